"""What the router itself adds to every step, on loopback.

    python -m benchmarks.serve                     # a minute on two cores

Three upstreams in processes of their own answer with recorded steps after a stated time, the router runs in another
process, and clients here read streams. The overhead of a step is the time between two chunks less the stated times of
the upstream requests that the step took: an upper bound, as it holds what the upstreams' own HTTP takes, too. The
service's histogram of time not spent waiting for upstreams is the lower bound.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from agents import artefact
from agents.base import Threshold
from benchmarks.upstream import record
from rollouts.prompts import RewardFormat, load_tokenizer
from rollouts.tinymath import STEP_TAG, model_dir

_MODEL = "trim-thr"
_ABOUT = {"small": "tinymath-small", "large": "tinymath-large", "scorer": "tinymath-prm", "max_steps": 16}


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        clients: Requests under way at once.
        requests: Requests in all.
        small: Time of a small step, seconds.
        large: Time of a large step, seconds.
        prm: Time of a score, seconds.
        limit_ms: What 95 % of the steps must stay within.
    """

    clients: int = 16
    requests: int = 160
    small: float = 0.15
    large: float = 0.4
    prm: float = 0.05
    limit_ms: float = 5.0


@contextmanager
def _process(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def _url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    found = re.search(r"at (http://\S+)/v1 \(small up, large up, scorer up\)", process.stdout.readline())
    if found is None:
        raise SystemExit("The service did not start.")
    return found[1]


def _wait(port: int) -> None:
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"No upstream on port {port}.")


async def _steps(client: httpx.AsyncClient, question: str, config: Config) -> list[float]:
    """Return the overhead of each step of one request, seconds."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "trace": True}
    overheads, last = [], time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            now = time.perf_counter()
            if not line.startswith("data: {"):
                continue
            step = json.loads(line[6:]).get("trim", {})
            if "author" not in step:
                continue
            stated = config.small + config.prm
            if step["author"] == "large":
                stated += config.large + (config.prm if step["large_score"] is not None else 0.0)
            overheads.append(now - last - stated)
            last = now
    return overheads


async def _load(url: str, config: Config) -> list[float]:
    limits = httpx.Limits(max_connections=config.clients)
    slots = asyncio.Semaphore(config.clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def one(index: int) -> list[float]:
            async with slots:
                return await _steps(client, f"Let a={index}+33, b=a+49, c=b*12. Find c.", config)

        await asyncio.gather(*(one(-index) for index in range(config.clients)))  # connections and caches
        found = await asyncio.gather(*(one(index) for index in range(config.requests)))
    return [overhead for each in found for overhead in each]


def _inside(metrics: str) -> list[tuple[float, float]]:
    """Return the cumulative histogram of the time not spent waiting: (upper bound in seconds, share)."""
    rows = re.findall(r'trim_router_seconds_bucket\{le="([^"]+)"\} (\S+)', metrics)
    total = float(rows[-1][1])
    return [(float(bound), float(count) / total) for bound, count in rows]


def measure(config: Config) -> dict[str, Any]:
    """Return the figures."""
    reward = RewardFormat(load_tokenizer(str(model_dir("prm"))), None, STEP_TAG)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replies = record(folder / "replies.json")
        policy = artefact.save(Threshold(0.3), folder / "policy", _ABOUT)
        flags: list[object] = ["--policy", policy, "--port", 0]
        for offset, (role, think) in enumerate((("small", config.small), ("large", config.large), ("prm", config.prm))):
            port = 18_400 + offset
            more = ("--tag", reward.step_tag_id, "--replies", replies)
            stack.enter_context(_process("benchmarks.upstream", role, "--port", port, "--think", think, *more))
            _wait(port)
            flags += [f"--{role}", f"http://127.0.0.1:{port}/v1"]
        url = _url_of(stack.enter_context(_process("agents", "serve", *flags)))
        began = time.perf_counter()
        overheads = np.array(asyncio.run(_load(url, config))) * 1000
        seconds = time.perf_counter() - began
        inside = _inside(httpx.get(f"{url}/metrics").text)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {platform.python_version()}",
        "clients": config.clients,
        "think_s": {"small": config.small, "large": config.large, "prm": config.prm},
        "steps": len(overheads),
        "steps_per_second": round(len(overheads) / seconds, 1),
        "overhead_ms": {f"p{p}": round(float(np.percentile(overheads, p)), 2) for p in (50, 90, 95, 99)},
        "not_waiting_ms_p95_at_most": next(bound for bound, share in inside if share >= 0.95) * 1000,
    }


def main() -> int:
    """Print the figures; exit code 1 if the limit is exceeded."""
    import tyro

    config = tyro.cli(Config, description=__doc__)
    found = measure(config)
    print(json.dumps(found, indent=1))
    return int(found["overhead_ms"]["p95"] > config.limit_ms)


if __name__ == "__main__":
    sys.exit(main())
