"""The embedded models behind the interface of vLLM's servers: all three in one process, and no vLLM."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from rollouts.config import Sampling, load_family
from rollouts.errors import BackendError, require
from rollouts.models.base import Backend, Capabilities, Completion, CompletionRequest, PoolingRequest
from rollouts.models.process import Engine, EngineProcess

_DRAWING = ("temperature", "top_p", "top_k", "min_p")


class _Trio:
    """Three engines that take turns; a request comes with the name of its model."""

    def __init__(self, engines: Mapping[str, Engine], tag: int | None) -> None:
        self._engines = engines
        self.window = min(engine.window for engine in engines.values())
        self.capabilities = Capabilities()
        self.description: Mapping[str, Any] = {**next(iter(engines.values())).description, "tag": tag}

    def add(self, key: int, request: Any) -> None:
        role, asked = request
        self._engines[role].add(key, asked)

    def step(self) -> list[tuple[int, Any]]:
        return [done for engine in self._engines.values() for done in engine.step()]


def _trio() -> _Trio:
    """Load the models; runs in their process."""
    from rollouts.family import Family
    from rollouts.models.hf.generator import generator
    from rollouts.models.hf.pooling import pooling

    family = Family(load_family("tinymath:transformers"))
    scorer, prompts = family.config.scorer, family.reward_prompts
    assert scorer is not None and scorer.model is not None and prompts is not None
    return _Trio(
        {
            "small": generator(family.config.small, seed=0),
            "large": generator(family.config.large, seed=0),
            "prm": pooling(scorer.model, seed=0, reading=prompts.reading),
        },
        prompts.reading.tag,
    )


def load() -> Backend:
    """Load the models, which takes some seconds.

    Raises:
        ConfigError: What runs them is not installed.
        BackendError: They cannot be loaded.
    """
    require("rollouts", "torch", "transformers", "pyarrow")
    return EngineProcess("demo", _trio, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def application(backend: Backend) -> web.Application:
    """Return what vLLM's servers would be asked for, below ``/small``, ``/large`` and ``/prm``."""

    async def submit(role: str, asked: CompletionRequest | PoolingRequest) -> Any:
        try:
            return await asyncio.wrap_future(backend.submit((role, asked)))  # type: ignore[arg-type]
        except BackendError as error:
            raise web.HTTPBadRequest(text=str(error)) from error

    async def models(request: web.Request) -> web.Response:
        name = f"tinymath-{request.match_info['role']}"
        return web.json_response({"data": [{"id": name, "object": "model", "max_model_len": backend.window}]})

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        sampling = Sampling(**{name: body[name] for name in _DRAWING})
        stop, seed = tuple(body["stop"]), secrets.randbits(63)
        asked = CompletionRequest(tuple(body["prompt"]), body["max_tokens"], sampling, stop, seed)
        done: Completion = await submit(request.match_info["role"], asked)
        choice = {
            "index": 0,
            "text": done.text,
            "finish_reason": "length" if done.finish == "length" else "stop",
            "stop_reason": next(each for each in stop if done.text.endswith(each)) if done.finish == "stop" else None,
            "token_ids": done.token_ids,
        }
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": done.tokens}})

    async def pool(request: web.Request) -> web.Response:
        ids, tag = tuple((await request.json())["input"]), backend.describe()["tag"]
        tags = tuple(place for place, token in enumerate(ids) if token == tag)
        scores = await submit("prm", PoolingRequest(ids, tags))
        return web.json_response({"data": [{"data": [[1 - score, score] for score in scores]}]})

    app = web.Application(client_max_size=1 << 24)
    app.add_routes(
        [
            web.get("/{role}/v1/models", models),
            web.post("/{role:small|large}/v1/completions", complete),
            web.post("/prm/pooling", pool),
        ]
    )
    return app


@contextmanager
def served(backend: Backend, listening: socket.socket) -> Iterator[None]:
    """Answer on a socket from a thread of this process."""
    loop = asyncio.new_event_loop()

    async def begin() -> web.AppRunner:
        runner = web.AppRunner(application(backend), access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
