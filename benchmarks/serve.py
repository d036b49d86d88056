"""What the router itself adds to every step, on loopback.

    python -m benchmarks.serve                     # a minute on two cores

Three stand-ins for vLLM servers, in processes of their own, answer with recorded steps after a stated time and note
when each request arrived and when its answer was handed over. The router runs in another process, and clients here read
streams. The overhead of a step is the time from each answer to the next request, the client's chunk going out on the
way; of the last step, to its chunk. It includes what the connections take. The service's own histogram of time not
spent waiting for upstreams leaves out its HTTP client and is a lower bound. A bare exchange is what the same client and
the connection take of one request with no router around them; a step has two or three, and without them it is what the
router itself spends.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import numpy as np

from benchmarks.stage import body, chunks, connected, stage
from benchmarks.upstream import read_log
from rollouts.config import Sampling
from rollouts.models.base import CompletionRequest
from rollouts.models.server.wire import Wire
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import model_dir


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        clients: Requests under way at once.
        requests: Requests in all.
        small: Time of a small step, seconds.
        large: Time of a large step, seconds.
        prm: Time of a score, seconds.
        spread: Share of these times by which they vary either way, uniformly; 0: all requests go in lockstep, and
            whoever is last waits for all others.
        pin: Whether the router has a core for itself and everything else another one.
        limit_ms: What the router itself may spend on 95 % of the steps.
    """

    clients: int = 16
    requests: int = 160
    small: float = 0.15
    large: float = 0.4
    prm: float = 0.05
    spread: float = 0.5
    pin: bool = True
    limit_ms: float = 5.0


@dataclass(frozen=True)
class Request:
    """What a client saw: the times at which it sent the request and at which each step came."""

    index: int
    times: list[float]


async def _ask(session: aiohttp.ClientSession, url: str, index: int) -> Request:
    begun = time.monotonic()
    came = [
        now async for now, chunk in chunks(session, url, body(index, trace=True)) if "author" in chunk.get("trim", {})
    ]
    return Request(index, [begun, *came])


async def _load(url: str, config: Config) -> list[Request]:
    slots = asyncio.Semaphore(config.clients)
    async with connected() as session:

        async def one(index: int) -> Request:
            async with slots:
                if 0 < index <= config.clients:
                    await asyncio.sleep(config.small * index / config.clients)  # else all begin at the same instant
                return await _ask(session, url, index)

        await asyncio.gather(*(one(-index) for index in range(config.clients)))  # connections and caches
        return await asyncio.gather(*(one(index) for index in range(1, config.requests + 1)))


def _overheads(requests: list[Request], logs: dict[str, Path]) -> list[tuple[float, int]]:
    """Return the seconds of each step in which none of its requests was in a stand-in, and how many it had."""
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for role, log in logs.items():
        tokenizer = load_tokenizer(str(model_dir(role)))
        for note in read_log(log, "delivered"):
            found = re.search(r"a\s*=\s*(-?\d+)\s*\+\s*33", tokenizer.decode(note.prompt)) if note.prompt else None
            if found:
                spans[int(found[1])].append((note.arrived, note.sent))
    overheads = []
    for request in requests:
        begun, *chunks = request.times
        own = iter(sorted(spans[request.index]))
        arrived, sent = next(own)
        for chunk in chunks:
            overhead, count = 0.0, 0
            while sent < chunk:
                overhead += arrived - begun
                begun = sent
                count += 1
                arrived, sent = next(own, (math.inf, math.inf))
            overheads.append((overhead + (chunk - begun) * (chunk == chunks[-1]), count))
        if arrived < math.inf:
            raise SystemExit(f"Request {request.index}: upstream requests after its last step.")
    return overheads


async def _bare(url: str, log: Path, count: int) -> list[float]:
    """Return the seconds that the HTTP client and the connection alone take of an exchange, one after the other."""
    times, before = [], len(read_log(log, "delivered"))
    async with aiohttp.ClientSession() as client:
        for number in range(count):
            begun = time.monotonic()
            request = CompletionRequest((number,) * 64, 64, Sampling())
            payload = {"model": "tinymath-small", **Wire().completion(1024, request)}
            async with client.post(f"{url}/completions", json=payload) as answer:
                Wire().read(json.loads(await answer.read()))
            times.append(time.monotonic() - begun)
    return [
        each - (note.sent - note.arrived) for each, note in zip(times, read_log(log, "delivered")[before:], strict=True)
    ]


def _inside(metrics: str) -> list[tuple[float, float]]:
    """Return the cumulative histogram of the time not spent waiting: (upper bound in seconds, share)."""
    rows = re.findall(r'trim_router_seconds_bucket\{le="([^"]+)"\} (\S+)', metrics)
    total = float(rows[-1][1])
    return [(float(bound), float(count) / total) for bound, count in rows]


def measure(config: Config) -> dict[str, Any]:
    """Return the figures."""
    own, *others = sorted(os.sched_getaffinity(0))
    if config.pin and others:
        os.sched_setaffinity(0, others)
    think = {role: getattr(config, role) for role in ("small", "large", "prm")}
    with stage(config.spread, **think) as on, on.service() as running:
        logs = {role: each.log for role, each in on.standins.items()}
        if config.pin and others:
            for thread in Path(f"/proc/{running.process.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {own})
        began, used = time.perf_counter(), running.core_seconds
        requests = asyncio.run(_load(running.url, config))
        seconds, used = time.perf_counter() - began, running.core_seconds - used
        inside = _inside(urlopen(f"{running.url}/metrics").read().decode())
        counted = _overheads(requests, logs)
        if config.pin:
            os.sched_setaffinity(0, {own})
        bare = asyncio.run(_bare(on.urls["small"], logs["small"], 64))
    overheads = [overhead for overhead, _ in counted]
    itself = [overhead - count * float(np.median(bare)) for overhead, count in counted]
    steps = len(overheads) * (1 + config.clients / config.requests)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {platform.python_version()}",
        "clients": config.clients,
        "think_s": think | {"spread": config.spread},
        "steps": len(overheads),
        "steps_per_second": round(steps / seconds, 1),
        "router_core_ms_per_step": round(1000 * used / steps, 2),
        "overhead_ms": _percentiles(overheads),
        "bare_exchange_ms": _percentiles(bare),
        "router_itself_ms": _percentiles(itself),
        "not_waiting_ms_p95_at_most": next(bound for bound, share in inside if share >= 0.95) * 1000,
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}": round(1000 * float(np.percentile(seconds, p)), 2) for p in (50, 90, 95, 99)}


def main() -> int:
    """Print the figures; exit code 1 if the limit is exceeded."""
    import tyro

    config = tyro.cli(Config, description=__doc__)
    found = measure(config)
    print(json.dumps(found, indent=1))
    return int(found["router_itself_ms"]["p95"] > config.limit_ms)


if __name__ == "__main__":
    sys.exit(main())
