"""Requests that cannot be routed: they go to one upstream as they are, and its answer comes back, marked."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from agents.serve import api
from agents.serve.api import OURS, ApiError
from agents.serve.route import ENDING, UnderWay
from agents.serve.service import CLIENT_GONE, Service
from agents.serve.upstreams import Unavailable, Upstream

MARK = "X-Trim-Passed-To"
"""Header of answers that one model gave alone."""
_log = logging.getLogger("trim.serve")
_DATA = re.compile(rb"^data:(.*?)(?:\r?\n){2}", re.MULTILINE)


class Passed(UnderWay):
    """One request on its way through.

    Attributes:
        mark: What its answer tells beside that of the model, as ``trim``.
    """

    def __init__(self, service: Service, role: str, asked: Mapping[str, Any], because: str) -> None:
        """Prepare; nothing is sent. It cannot be routed `because` of a field."""
        self.service, self.role = service, role
        self.mark = {"routed": False, "passed_to": role, "because": because}
        self._body = {name: value for name, value in asked.items() if name not in OURS}
        self._stack = AsyncExitStack()
        self._status = CLIENT_GONE

    async def answer(self) -> Response:
        """Send it, and return the model's answer.

        Raises:
            ApiError: There is none, or it is an error that is not about the request.
        """
        self.service.enter(self)
        self._stack.callback(lambda: self.service.passed(self, self.role, self._status))
        self._deadline = asyncio.get_running_loop().time() + self.service.config.request_timeout
        try:
            return await self._answered()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _answered(self) -> Response:
        upstreams, headers = self.service.models.upstreams[self.role], {MARK: self.role}
        try:
            async with self._in_time(self._deadline):
                opened = await self._stack.enter_async_context(upstreams.open("chat/completions", self._body))
        except Unavailable as error:
            raise self._failed(str(error)) from None
        except TimeoutError:
            raise self._late() from None
        if opened.chunks is not None:
            return streaming(self._events(opened.upstream, opened.chunks), headers, self._stack.aclose)
        try:
            content = json.dumps({**json.loads(opened.content), "trim": self.mark}, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            fault = Unavailable(self.role, "malformed", f"an answer that cannot be read: {opened.content[:80]!r}")
            opened.upstream.failed(fault)
            raise self._failed(str(fault)) from None
        self._status = opened.status
        await self._stack.aclose()
        return Response(content, opened.status, headers, media_type="application/json")

    async def _events(self, upstream: Upstream, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Give the events as they come, with the mark in the first that has data."""
        begun, marked = b"", False
        try:
            while True:
                async with self._in_time(self._deadline):  # not the client's
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                given, begun, marked = (chunk, b"", True) if marked else self._marked(begun + chunk)
                if given:
                    yield given
            yield begun
            self._status = 200
        except TimeoutError:
            yield _error(self._late())
        except Exception as error:  # the connection broke
            fault = Unavailable(self.role, "connection", f"{type(error).__name__}: {error}")
            upstream.failed(fault)
            yield _error(self._failed(str(fault)))
        finally:
            await self._stack.aclose()

    def _marked(self, begun: bytes) -> tuple[bytes, bytes, bool]:
        """Return what of a stream's beginning can be given, what cannot yet, and whether the first data were in it."""
        if (found := _DATA.search(begun)) is None:
            whole = re.match(rb"(?:(?!data:).*\n)*", begun)  # comments, by which connections are kept alive
            assert whole is not None
            return whole[0], begun[whole.end() :], False
        try:
            first = api.event({**json.loads(found[1]), "trim": self.mark}).encode()
        except (ValueError, TypeError, RecursionError):
            first = found[0]  # none of OpenAI's
        return begun[: found.start()] + first + begun[found.end() :], b"", True

    def _late(self) -> ApiError:
        if self._cut:
            return self._error(503, ENDING, "ServiceUnavailableError")
        return self._error(504, "Time was up before the answer was complete.", "GatewayTimeoutError")

    def _failed(self, words: str) -> ApiError:
        _log.warning("passed on: %s", words)
        return self._error(503, f"The {self.role} model does not answer.", "ServiceUnavailableError")

    def _error(self, status: int, words: str, kind: str) -> ApiError:
        self._status = status
        return ApiError(status, words, kind, trim=self.mark)


def streaming(events: AsyncIterator[Any], headers: Mapping[str, str], close: Callable[[], Awaitable[None]]) -> Response:
    """Return the response that is a stream of events; `close` is called in the end, also if the client leaves."""
    headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, 200, headers, "text/event-stream", BackgroundTask(close))


def _error(error: ApiError) -> bytes:
    return (api.event(error.body()) + api.DONE).encode()
