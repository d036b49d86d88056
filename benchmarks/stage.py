"""The service in a process of its own before stand-ins for vLLM servers (`benchmarks.upstream`), and its clients."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp

from agents.routers import artefact
from agents.routers.base import Threshold
from benchmarks.upstream import StandIn, record

ABOUT = {"small": "tinymath-small", "large": "tinymath-large", "scorer": "tinymath-prm", "max_steps": 16}
"""What an artefact for the embedded family says."""
DEMO = Path(str(files("agents.demo") / "router"))
"""The router of the demo: of a range of λ, by the exact learner."""


@contextmanager
def process(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a module of this project, and end it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def url_of(process: subprocess.Popen[str]) -> str:
    """Return where the service is, once its upstreams are up."""
    assert process.stdout is not None
    found = re.search(r"at (http://\S+)/v1 \(small up, large up, scorer up\)", process.stdout.readline())
    if found is None:
        raise SystemExit("The service did not start as it should.")
    return found[1]


@dataclass
class Running:
    """A service: its address, its process, and the file of what it logs."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        rows = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(row.split()[1] for row in rows if row.startswith("VmRSS"))) / 1024

    @property
    def core_seconds(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def tracebacks(self) -> int:
        """How many its log has."""
        return self.log.read_text().count("Traceback")


@dataclass
class Stage:
    """Where services run.

    Attributes:
        urls: Of the upstreams, by role.
        folder: For files.
        standins: The upstreams, where they are stand-ins, by role.
    """

    urls: Mapping[str, str]
    folder: Path
    standins: Mapping[str, StandIn]

    def policy(self, router: artefact.Storable | None = None, **about: Any) -> Path:
        """Write an artefact for the embedded family; a threshold if nothing else is said."""
        return artefact.save(router or Threshold(0.3), self._new("policy"), ABOUT | about)

    @contextmanager
    def service(self, *flags: object, policy: Path | None = None, **options: Any) -> Iterator[Running]:
        """Run a service; without a policy: of a threshold."""
        urls = [part for role, url in self.urls.items() for part in (f"--{role}", url)]
        log = self._new("service.log")
        command = ["agents", "serve", "--policy", policy or self.policy(), "--port", 0, *urls, *flags]
        with log.open("wb") as errors, process(*command, stderr=errors, **options) as running:
            yield Running(url_of(running), running, log)

    def _new(self, name: str) -> Path:
        return self.folder / f"{sum(1 for _ in self.folder.iterdir())}-{name}"


@contextmanager
def stage(spread: float = 0.5, **think: float) -> Iterator[Stage]:
    """Start stand-ins that think so many seconds, more or less by a share of `spread`, for each role."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replies = record(folder / "replies.json")
        standins = {role: StandIn(role, seconds, replies, spread) for role, seconds in think.items()}
        for each in standins.values():
            each.start()
            stack.callback(each.kill)
        for each in standins.values():
            each.wait()
        yield Stage({role: each.url for role, each in standins.items()}, folder, standins)


@asynccontextmanager
async def connected() -> AsyncIterator[aiohttp.ClientSession]:
    """A client of any number of connections that waits for ever."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


def body(index: int, **more: Any) -> dict[str, Any]:
    """Return a request with a question that its number tells from others."""
    return {"messages": [{"role": "user", "content": f"Let a={index}+33, b=a+49, c=b*12. Find c."}], **more}


async def chunks(session: aiohttp.ClientSession, url: str, asked: Mapping[str, Any]) -> AsyncIterator[Any]:
    """Yield when each event of a stream came, and what it says."""
    async with session.post(f"{url}/v1/chat/completions", json={**asked, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                yield time.monotonic(), json.loads(line[6:])


async def counters(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Return what the service counts."""
    async with session.get(f"{url}/metrics") as answer:
        rows = [line.rpartition(" ") for line in (await answer.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}
