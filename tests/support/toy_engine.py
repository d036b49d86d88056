"""An engine without a model, for tests of the process that engines run in; imports nothing heavy."""

from __future__ import annotations

import time
from typing import Any

from rollouts.errors import BackendError
from rollouts.models.base import Capabilities, CompletionRequest


class Echo:
    """Answers with the request, one a step; `pause` is the time of a step in seconds."""

    capabilities = Capabilities()
    window = 7

    def __init__(self, pause: float) -> None:
        self.description = {"engine": "echo"}
        self.pause = pause
        self.waiting: list[tuple[int, Any]] = []

    def add(self, key: int, request: Any) -> None:
        if request == "refused":
            raise BackendError(request)
        if isinstance(request, CompletionRequest) and not request.prompt_ids:
            raise BackendError("nothing to say")
        self.waiting.append((key, request))

    def step(self) -> list[tuple[int, Any]]:
        time.sleep(self.pause)
        key, request = self.waiting.pop(0)
        if isinstance(request, Exception):
            raise request
        return [(key, request)]


def echo(*, pause: float) -> Echo:
    if pause < 0:
        raise ValueError(f"pause is {pause}")
    return Echo(pause)
