"""Real upstream processes that misbehave on command, a router in front of them, and clients."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from agents.routers import artefact
from agents.routers.base import Threshold
from agents.serve.command import ServeConfig, Server
from benchmarks.upstream import StandIn, record

ROOT = Path(__file__).parents[2]
QUESTION = "Let a=70+33, b=a+49, c=b*12. Find c."
ABOUT = {
    "small": "tinymath-small",
    "large": "tinymath-large",
    "scorer": "tinymath-prm",
    "max_steps": 16,
    "max_escalations": None,
}
ROLES = ("small", "large", "prm")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def replies() -> Path:
    """Recorded steps, in a file."""
    return record(Path(tempfile.mkdtemp(prefix="upstreams-")) / "replies.json")


class UpstreamProcess(StandIn):
    """With shorter words for tests."""

    def __init__(self, role: str, think: float = 0.03) -> None:
        super().__init__(role, think, replies())

    def mode(self, mode: str) -> None:
        self.control(mode=mode)

    def lines(self, word: str, path: str = "") -> list[list[str]]:
        """What was noted: [delivered or left, path, tokens]."""
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return [row for row in rows if row[0] == word and path in row[1]]

    def probes(self) -> int:
        return sum(row[2] == "0" and "completions" in row[1] for row in self.lines("delivered"))

    def decoded(self) -> int:
        """Tokens of delivered completions, probes left out."""
        return sum(int(row[2]) for row in self.lines("delivered", "completions"))


class Upstreams:
    """One of each role."""

    def __init__(self, think: float = 0.03) -> None:
        self.small, self.large, self.prm = (UpstreamProcess(role, think) for role in ROLES)
        self.every = (self.small, self.large, self.prm)

    def start(self) -> Upstreams:
        for each in self.every:
            each.start()
        for each in self.every:
            each.wait()
        return self

    def well(self) -> None:
        for each in self.every:
            each.mode("ok")

    def stop(self) -> None:
        for each in self.every:
            each.kill()

    def urls(self) -> dict[str, str]:
        return {role: each.url for role, each in zip(ROLES, self.every, strict=True)}


def policy(folder: Path, router: Any = None, **about: Any) -> Path:
    return artefact.save(router or Threshold(0.5), folder / f"policy-{time.monotonic_ns()}", {**ABOUT, **about})


class Router:
    """The service in a thread of this process, and a client of it."""

    def __init__(self, folder: Path, urls: dict[str, str], **settings: Any) -> None:
        self.server = Server(ServeConfig(policy=str(folder), **urls, port=0, **settings))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.url = self.server.url
        limits = httpx.Limits(max_connections=200)
        self.client = httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=60, limits=limits)
        self.wait_up()

    def wait_up(self, roles: tuple[str, ...] | None = None, within: float = 30) -> float:
        """Wait until these upstreams are up; return how long it took."""
        began = time.monotonic()
        while time.monotonic() - began < within:
            with contextlib.suppress(httpx.HTTPError):
                found = self.client.get("/health").json()["upstreams"]
                if all(found[role]["up"] for role in (found if roles is None else roles)):
                    return time.monotonic() - began
            time.sleep(0.05)
        raise RuntimeError("upstreams did not come up")

    def wait_down(self, role: str, within: float = 30) -> None:
        end = time.monotonic() + within
        while time.monotonic() < end:
            if not self.client.get("/health").json()["upstreams"][role]["up"]:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{role} did not go down")

    def chat(self, question: str = QUESTION, **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": question}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    def chats(self, count: int, clients: int = 8, first: int = 0, **more: Any) -> list[httpx.Response]:
        """Many problems at once, those with the numbers from `first` on."""
        with ThreadPoolExecutor(clients) as pool:
            questions = [f"Let a={number}+33, b=a+49. Find b." for number in range(first, first + count)]
            return list(pool.map(lambda question: self.chat(question, **more), questions))

    def metric(self, name: str, **labels: str) -> float:
        for line in self.client.get("/metrics").text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == name and all(f'{label}="{word}"' in key for label, word in labels.items()):
                return float(value)
        return 0.0

    def idle(self, within: float = 10) -> None:
        """Wait until no request is under way."""
        end = time.monotonic() + within
        while self.metric("trim_requests_in_flight"):
            assert time.monotonic() < end, "requests hang"
            time.sleep(0.05)

    def stop(self) -> None:
        self.client.close()
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


class Process:
    """``python -m agents serve`` with what it printed."""

    def __init__(self, *arguments: Any, first: str = "pass") -> None:
        program = f"import sys; {first}; from agents.__main__ import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "serve", *map(str, arguments)]
        self.log = Path(tempfile.mkstemp(prefix="serve-", suffix=".log")[1])
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=output, text=True)

    def wait(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Serving 'trim-thr' at http://127.0.0.1:"), line + self.log.read_text()
        assert "small up, large up, scorer up" in line
        return line.split(" at ")[1].split("/v1")[0]

    def megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def streamed(router: Router, question: str = QUESTION, **more: Any) -> Iterator[dict[str, Any]]:
    """The chunks of a stream; the last line must be [DONE]."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, **more}
    with router.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    yield from (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
