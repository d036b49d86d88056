"""A generating model that is no model: a vLLM-like server in a process, whose step is a function of the prompt.

    python tests/support/step_server.py NAME DIE_AFTER

It prints its URL. With another DIE_AFTER than 0 it kills itself by SIGKILL when it has so many requests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import urlopen

from fake_server import FakeServer, real

WINDOW = 1024


class StepServer(FakeServer):
    """Answers without token ids, so that every step is a request."""

    def __init__(self, name: str, die_after: int = 0) -> None:
        self.name, self.die_after, self.asked = name, die_after, 0
        super().__init__()
        self.card = {"id": name, "max_model_len": WINDOW, "root": f"/models/{name}"}

    def good(self, path: str, body: Any) -> Any:
        if path != "/v1/completions":
            return super().good(path, body)
        if real(body):
            with self.lock:
                self.asked += 1
            if self.asked == self.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
        draw = zlib.crc32(f"{self.name} {body['prompt']}".encode())
        last = draw % 3 == 0
        text = f"\\boxed{{{draw % 5}}}" if last else f"a={draw % 100}+1\n\n"
        choice = {"text": text, "finish_reason": "stop", "stop_reason": None if last else "\n\n"}
        return {"choices": [choice], "usage": {"completion_tokens": 4}}


@contextmanager
def running(*asked: tuple[str, int]) -> Iterator[list[str]]:
    """Servers of these names in processes of their own, each with its DIE_AFTER; gives their URLs."""
    started = []
    try:
        for name, die_after in asked:
            command = [sys.executable, __file__, name, str(die_after)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        urls = [each.stdout.readline().strip() for each in started if each.stdout is not None]
        for url in urls:
            urlopen(f"{url}/models", timeout=30).close()
        yield urls
    finally:
        for each in started:
            each.kill()
            each.wait()


def main() -> None:
    server = StepServer(sys.argv[1], int(sys.argv[2]))
    print(server.url, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
