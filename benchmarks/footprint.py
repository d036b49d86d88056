"""What a serving process takes: memory, and time until it serves.

    python -m benchmarks.footprint                 # half a minute

The router of the demo serves in a process of its own before three stand-ins for vLLM servers.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.stage import DEMO, body, connected, stage


async def _ask(url: str, requests: int) -> None:
    async with connected() as session:
        for number in range(requests):
            async with session.post(f"{url}/v1/chat/completions", json=body(number)) as answer:
                answer.raise_for_status()
                await answer.read()


def main(requests: int = 200) -> None:
    """Measure and print."""
    with stage(small=0.002, large=0.002, prm=0.002) as on:
        began = time.monotonic()
        with on.service("--budget", 0.3, policy=DEMO) as service:
            wall = time.monotonic() - began
            told = f"{service.core_seconds:.1f} s of one processor: {service.megabytes:.0f} MB"
            print(f"serving after {wall:.1f} s, {told}")
            asyncio.run(_ask(service.url, requests))
            print(f"after {requests} requests: {service.megabytes:.0f} MB")


if __name__ == "__main__":
    main()
