"""A server like vLLM's over an engine of this process: real weights behind HTTP where vLLM is not the point."""

from __future__ import annotations

import itertools
from typing import Any

from fake_server import FakeServer

from rollouts.config import Sampling
from rollouts.models.base import Backend, CompletionRequest, LogprobRequest, PoolingRequest


class EngineServer(FakeServer):
    """Serves one backend under a name, a reward model's scores at its step tag; `seen` has what it was asked."""

    def __init__(self, backend: Backend, name: str, tag: int | None = None) -> None:
        super().__init__()
        self.tag = tag
        self.backend = backend
        self.model = name
        self.card = {"id": name, "max_model_len": backend.window}
        self._seeds = itertools.count(1)

    def good(self, path: str, body: Any) -> Any:
        if path == "/pooling":
            tags = tuple(place for place, token in enumerate(body["input"]) if token == self.tag)
            scores = self.backend.submit(PoolingRequest(tuple(body["input"]), tags)).result(120)
            return {"data": [{"data": [[1 - score, score] for score in scores]}]}
        if path != "/v1/completions":
            return super().good(path, body)
        ids = tuple(body["prompt"])
        sampling = Sampling(**{name: body[name] for name in ("temperature", "top_p", "top_k", "min_p")})
        request = CompletionRequest(ids, body["max_tokens"], sampling, tuple(body["stop"]), next(self._seeds))
        done = self.backend.submit(request).result(120)
        ended = next((stop for stop in body["stop"] if done.finish == "stop" and done.text.endswith(stop)), None)
        choice: dict[str, Any] = {"text": done.text, "token_ids": list(done.token_ids or ()), "stop_reason": ended}
        choice["finish_reason"] = "length" if done.finish == "length" else "stop"
        if body.get("prompt_logprobs") is not None:
            told = self.backend.submit(LogprobRequest(ids, 1)).result(120).logprobs
            rows = ({str(token): {"logprob": each}} for token, each in zip(ids[1:], told, strict=True))
            choice["prompt_logprobs"] = [None, *rows]
        return {"choices": [choice], "usage": {"completion_tokens": done.tokens}}
