"""The demo as a user starts it, and what decides its port and its browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from importlib.resources import files
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

import agents
from agents.demo import command
from rollouts.tinymath import generate_problems
from rollouts.trees.compile import compile_store
from trim_env.tables import rollouts_hash

ROOT = Path(__file__).parents[3]


def ask(url, question, **more):
    body = {"messages": [{"role": "user", "content": question}], "trace": True, **more}
    asked = Request(f"{url}v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


def test_the_demo_solves_problems_and_ends_without_a_trace(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DISPLAY": ""}
    line = [sys.executable, "-m", "agents", "demo", "--port", "0"]
    running = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        said = []
        while not said or not said[-1].startswith("Playground: "):
            said.append(running.stdout.readline())
            assert said[-1], said
        assert any(each.startswith("Ready after ") for each in said)
        url = said[-1].removeprefix("Playground: ").strip()
        assert url.startswith("http://127.0.0.1:")
        with urlopen(url, timeout=10) as page:
            assert "Router playground" in page.read().decode()
        right = {"router": 0, "large": 0, "small": 0}
        tokens = dict.fromkeys(right, 0)
        for problem in generate_problems("validation", 8):
            for way, more in (("router", {"budget": 0.4}), ("large", {"only": "large"}), ("small", {"only": "small"})):
                answer = ask(url, problem.question, **more)
                right[way] += answer["trim"]["answer"] == problem.answer
                tokens[way] += answer["usage"]["models"]["large"]["completion_tokens"]
        assert (
            right["router"] >= 4 and right["large"] >= 4 and tokens["small"] == 0 < tokens["router"] < tokens["large"]
        )
        models = children(running.pid)
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in models):
            assert time.monotonic() < end, "a process is left"
            time.sleep(0.1)
    finally:
        running.kill()
        running.wait()
    assert not list(tmp_path.iterdir())


def test_the_router_is_small_and_was_trained_on_the_bundled_rollouts():
    folder = Path(str(files("agents.demo") / "router"))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 100_000
    about = json.loads((folder / "policy.json").read_text(encoding="utf-8"))["about"]
    found = rollouts_hash(compile_store("quickstart"), agents.load(folder).schema)
    assert about["rollouts"] == {"store": "quickstart", "hash": found} and about["budgets"]


def test_another_port_is_taken_where_the_usual_one_is_not_free(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(command, "_USUAL", port)
        assert command._port(None) == 0 and command._port(port) == port
    assert command._port(None) == port


@pytest.mark.parametrize(
    ("environment", "found", "opens"),
    [
        ({"DISPLAY": ":0"}, webbrowser.BackgroundBrowser("firefox"), True),
        ({"WAYLAND_DISPLAY": "w"}, webbrowser.BackgroundBrowser("firefox"), True),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "1"}, webbrowser.BackgroundBrowser("firefox"), False),
        ({}, webbrowser.BackgroundBrowser("firefox"), False),
        ({"DISPLAY": ":0"}, webbrowser.GenericBrowser("w3m"), False),
        ({"DISPLAY": ":0", "BROWSER": "mine"}, webbrowser.GenericBrowser("mine"), True),
        ({"DISPLAY": ":0"}, None, False),
    ],
)
def test_a_browser_is_opened_where_there_is_one_with_a_window(monkeypatch, environment, found, opens):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def get():
        if found is None:
            raise webbrowser.Error("none")
        return found

    monkeypatch.setattr(command.sys, "platform", "linux")
    monkeypatch.setattr(webbrowser, "get", get)
    assert (command._browser() is not None) is opens
