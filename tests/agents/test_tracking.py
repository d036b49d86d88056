"""Weights & Biases never keeps a training from starting. The only network here is this machine's own."""

import configparser
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import train as train_command
from agents import __main__ as command
from agents import tracking
from agents.routers import artefact
from agents.routers.base import Threshold
from rollouts.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty home and working folder, nobody logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def closed():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def answering(status):
    @contextmanager
    def server():
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
            threading.Thread(target=found.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{found.server_port}"
            found.shutdown()

    return server


CODE = """
import sys, time
from pathlib import Path
from agents import tracking
artefacts = Path(sys.argv[1])
tracking._library()  # importing it takes as long as the machine is busy
for name in ("a", "b"):
    folder = Path(name)
    folder.mkdir()
    begun = time.monotonic()
    tracker = tracking.WandbTracker(folder, name, "group", {})
    print("begun", time.monotonic() - begun)
    tracker.log({"step": 1, "x": 1.0})
    tracker.finish({"x": 1.0}, None, artefacts)
    print("kept", len(list(folder.glob("wandb/offline-run-*/*.wandb"))))
"""


@pytest.mark.parametrize("server", [closed, silent, answering(500), answering(401)], ids=["closed", "silent", 500, 401])
def test_without_its_server_tracking_is_offline_at_once_and_says_so(place, server):
    artefact.save(Threshold(0.3), place / "policy", {"max_steps": 16})
    with server() as url:
        environment = {**os.environ, "WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": url, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(place / "policy")],
            env=environment, cwd=place, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    assert [line for line in words if line[0] == "kept"] == [["kept", "1"]] * 2
    assert max(float(line[1]) for line in words if line[0] == "begun") < 10
    said = [line for line in done.stderr.splitlines() if "cannot be used" in line]
    assert len(said) == 1 and url in said[0] and "offline" in said[0]


def settings(file, **values):
    written = configparser.ConfigParser()
    written["default"] = values
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        written.write(opened)


def test_what_wandb_offline_has_set_is_obeyed(place, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert tracking.wandb_mode() == "online"
    settings(place / "home" / ".config" / "wandb" / "settings", mode="offline")
    assert tracking.wandb_mode() == "offline"
    settings(place / "wandb" / "settings", mode="disabled")  # of the working folder
    assert tracking.wandb_mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.wandb_mode() == "offline"


def test_the_library_itself_says_where_wandb_offline_writes(place, monkeypatch):
    environment = {**os.environ, "WANDB_API_KEY": "x" * 40}
    subprocess.run([sys.executable, "-m", "wandb", "offline"], env=environment, cwd=place, check=True, timeout=100)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert tracking.wandb_mode() == "offline"


def test_a_settings_file_that_cannot_be_read_is_left_aside(place, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    (place / "wandb").mkdir()
    (place / "wandb" / "settings").write_bytes(b"\xff no section")
    assert tracking.wandb_mode() == "online"


def test_nobody_is_asked_for_a_login(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracking.wandb_mode() == "offline"


@pytest.mark.parametrize("bad", ["on-line", "\x1b[31m"])
def test_a_bad_mode_is_one_line(place, monkeypatch, capsys, bad):
    monkeypatch.setenv("WANDB_MODE", bad)
    with pytest.raises(ConfigError, match="WANDB_MODE is .* Known: disabled, dryrun, offline, online"):
        tracking.wandb_mode()
    begun = time.monotonic()
    artefact.save(Threshold(0.3), place / "policy", {"max_steps": 16})
    exporting = ["export", str(place / "policy"), "--out", str(place / "out"), "--to-wandb"]
    for main, arguments in ((train_command.main, ["--out", str(place / "run")]), (command.main, exporting)):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: WANDB_MODE is ") and len(printed.strip().splitlines()) == 1
        assert "\x1b" not in printed
    assert not (place / "run").exists() and not (place / "out").exists()
    assert time.monotonic() - begun < 60
