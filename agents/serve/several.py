"""The upstream servers of one role, which share its requests, and who is asked instead when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from agents.serve.metrics import Metrics
from agents.serve.upstreams import Opened, Probe, Unavailable, Upstream
from rollouts.config import ModelConfig
from rollouts.models.server.pool import NobodyThere, Pool
from rollouts.models.server.wire import Wire

T = TypeVar("T")


class Upstreams:
    """The upstream servers of one role, which all have one model and share its requests (`Pool`).

    Attributes:
        role: ``small``, ``large`` or ``scorer``.
        each: The servers.
    """

    def __init__(self, role: str, model: ModelConfig, probe: Probe, timeout_s: float, metrics: Metrics) -> None:
        """Prepare the connections; nothing is sent before `start`. The arguments are those of `Upstream`.

        Raises:
            ConfigError: A URL is none, or the variable with the key is not set.
        """
        self.role, self.each = role, list[Upstream]()
        for url in model.url:
            Upstream(role, model, url, probe, timeout_s, metrics, self.each)
        self._pool = Pool(self.each, model.concurrency, patient=False)
        for upstream in self.each:
            upstream.changed = self._pool.changed

    @property
    def up(self) -> bool:
        """Whether requests are sent at all."""
        return any(each.trouble is None for each in self.each)

    @property
    def _speaker(self) -> Upstream:
        return next((each for each in self.each if each.well), self.each[0])

    @property
    def window(self) -> int | None:
        """The window in tokens, as far as it was told."""
        return self._speaker.window

    @property
    def wire(self) -> Wire:
        """How they are asked."""
        return self._speaker.wire

    def __str__(self) -> str:
        """Say who is up."""
        up, all_ = sum(each.trouble is None for each in self.each), len(self.each)
        return f"{'up' if up else 'DOWN'}{f' ({up} of {all_})' if up < all_ > 1 else ''}"

    def health(self) -> dict[str, Any]:
        """Return whether they are up, as far as is known, and in a word why not; of several each."""
        each = [{"up": one.trouble is None, **({"why": one.why} if one.why else {})} for one in self.each]
        if len(each) == 1:
            return each[0]
        return {"up": self.up, **({} if self.up else {"why": each[0]["why"]}), "servers": each}

    async def start(self) -> None:
        """Ask each once; go on asking in the background those that do not answer.

        Raises:
            ConfigError: Somebody answers, but it is not the server that is needed, or of another model than the others.
        """
        there = [True]
        if len(self.each) > 1:  # who is not there is met at once, the others one after the other
            there = await asyncio.gather(*(upstream.answers() for upstream in self.each))
        for upstream, answers in zip(self.each, there, strict=True):
            if answers:
                await upstream.start()

    async def close(self) -> None:
        """Disconnect."""
        for upstream in self.each:
            await upstream.close()

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any],
        parse: Callable[[Any], T],
        lost: Callable[[], bool] = lambda: True,
        tokens: int = 0,
        about: str = "",
    ) -> T:
        """Send a request and return what `parse` makes of the answer.

        Where no answer comes that is one, it is sent to another server, if that is safe and there is one; else once
        more to the same one if the connection broke or it was busy.

        Args:
            path: Below the base URL; below the root if it begins with a slash.
            payload: The body, but for the model's name.
            parse: May raise ValueError, LookupError, TypeError or BackendError for an answer that makes no sense.
            lost: Called when an upstream may have worked on a request in vain, one that is cancelled included; returns
                whether it may be sent once more.
            tokens: Most tokens that it decodes, hidden ones too; it has as much more time as they are more than 512.
            about: What it is about, as `Pool.one` has it.

        Raises:
            Unavailable: There was no usable answer, or all upstreams are down.
        """
        async with self._asked(about, lambda upstream: upstream.post(path, payload, parse, lost, tokens)) as answer:
            return answer

    def open(self, path: str, payload: Mapping[str, Any]) -> AbstractAsyncContextManager[Opened]:
        """Send a request as it is, but for the model's name, and give the answer if it is about the request.

        Where none comes, or a stream breaks before its first byte, it is sent once more as by `post`.

        Raises:
            Unavailable: There is no such answer, or all upstreams are down.
        """
        return self._asked("", lambda upstream: upstream.open(path, payload))

    @asynccontextmanager
    async def _asked(self, about: str, ask: Callable[[Upstream], AbstractAsyncContextManager[T]]) -> AsyncIterator[T]:
        tried: list[Upstream] = []
        fault = self._down
        while True:
            async with AsyncExitStack() as stack:
                try:
                    upstream = await stack.enter_async_context(self._pool.one(about, tried))
                    tried.append(upstream)
                    answer = await stack.enter_async_context(ask(upstream))
                except NobodyThere:
                    raise fault from None
                except Unavailable as found:
                    fault = found
                    upstream.failed(fault)
                else:
                    yield answer
                    return
            if not (fault.elsewhere and self._pool.others(tried)):
                if fault.pause is None or len(tried) > len(self.each):
                    raise fault
                await asyncio.sleep(fault.pause)

    @property
    def _down(self) -> Unavailable:
        return Unavailable(self.role, "down", self._speaker.trouble or "its model is not known")
