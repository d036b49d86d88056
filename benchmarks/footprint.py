"""What a serving process takes: memory, and time until it serves.

    python -m benchmarks.footprint                 # half a minute

The router of the demo serves in a process of its own before three stand-ins for vLLM servers (`benchmarks.upstream`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from urllib.request import Request, urlopen

from benchmarks.upstream import StandIn, record

_ROLES = ("small", "large", "prm")


def _megabytes(pid: int) -> float:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(row.split()[1] for row in rows if row.startswith("VmRSS"))) / 1024


def _processor(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def main(requests: int = 200) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        replies = record(Path(folder) / "replies.json")
        upstreams = [StandIn(role, 0.002, replies) for role in _ROLES]
        try:
            for each in upstreams:
                each.start()
            for each in upstreams:
                each.wait()
            urls = [part for each in upstreams for part in (f"--{each.role}", each.url)]
            router = str(files("agents.demo") / "router")
            command = [sys.executable, "-m", "agents", "serve", "--policy", router, "--budget", "0.3", "--port", "0"]
            began = time.monotonic()
            served = subprocess.Popen([*command, *urls], stdout=subprocess.PIPE, text=True)
            assert served.stdout is not None
            url = served.stdout.readline().split(" at ")[1].split(" ")[0]
            wall, pid = time.monotonic() - began, served.pid
            print(f"serving after {wall:.1f} s, {_processor(pid):.1f} s of one processor: {_megabytes(pid):.0f} MB")
            for number in range(requests):
                question = f"Let a={number}+33, b=a+49, c=b*12. Find c."
                body = json.dumps({"messages": [{"role": "user", "content": question}]}).encode()
                asked = Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
                urlopen(asked, timeout=60).read()
            print(f"after {requests} requests: {_megabytes(pid):.0f} MB")
            served.terminate()
            served.wait()
        finally:
            for each in upstreams:
                each.kill()


if __name__ == "__main__":
    main()
