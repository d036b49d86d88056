"""What the demo is made of, and what decides its port and its browser."""

import json
import socket
import webbrowser
from importlib.resources import files
from pathlib import Path

import pytest

import agents
from agents.demo import command
from rollouts.trees.compile import compile_store
from trim_env.tables import rollouts_hash


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
