"""What stands before the service: the API key, and limits on the size and the patience of request bodies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agents.serve import tracing
from agents.serve.api import ApiError, internal_error

OPEN = ("/health", "/live", "/ready", "/metrics", "/")
"""Paths that need no key: for machines that watch the service, and the playground's page, which asks for it."""
_log = logging.getLogger("trim.serve")
_BODY_S = 10.0  # a body that takes longer is not coming
_DRAINED_S, _DRAINED_BYTES = 2.0, 1 << 24  # of a body that is too big, before it is refused
LARGE, _LARGE_AT_ONCE = 1 << 14, 16  # bytes; larger bodies are read a few at a time, so that many take no more memory
_RETRY, _CLOSE = {"Retry-After": "1"}, {"Connection": "close"}  # the rest of the body is not worth reading
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: _CLOSE, 413: _CLOSE, 429: _RETRY, 503: _RETRY}


class Guard:
    """ASGI middleware that lets nothing through that lacks the key or is too big."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body_bytes: int,
        count: Callable[[str, int], None],
        trace: Callable[[Headers], tracing.Trace],
    ) -> None:
        """Keep only a hash of the key, so that comparing takes the same time whatever is offered.

        `count` is told path and status of what was refused, `trace` returns what is known of a request's trace.
        """
        self.app, self._count, self._trace = app, count, trace
        self._key = None if api_key is None else _hash(api_key)
        self._most = max_body_bytes
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the whole body in hand."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["path"] = scope["path"].rstrip("/") or "/"
        headers = Headers(scope=scope)
        trace = self._trace(headers)
        tracing.CURRENT.set(trace)
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[tracing.HEADER] = trace.id
                trace.told |= {"request_id": trace.id, "http.response.status_code": message["status"]}
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            async with self._turn(headers):
                body = await self._body(headers, Request(scope, receive).stream())
        except ClientDisconnect:
            return
        except ApiError as error:
            self._count(scope["path"], error.status)
            await refusal(error)(scope, receive, answer)
            return
        with trace.request() if scope["method"] == "POST" else nullcontext():
            try:
                await self.app(scope, _replay(body, receive), answer)
            except Exception:
                _log.exception("a request failed")
                if begun:
                    raise
                trace.told["status"] = 500
                await refusal(internal_error())(scope, receive, answer)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in OPEN:
            return
        scheme, _, offered = headers.get("Authorization", "").partition(" ")
        if not secrets.compare_digest(_hash(offered), self._key) or scheme.lower() != "bearer":
            raise ApiError(401, "Unauthorized: the API key is missing or wrong.", "Unauthorized")

    def _turn(self, headers: Headers) -> AbstractAsyncContextManager[None]:
        told = headers.get("Content-Length", "" if "Transfer-Encoding" in headers else "0")
        return nullcontext() if told.isdecimal() and int(told[:20]) <= LARGE else self._large

    async def _body(self, headers: Headers, chunks: AsyncIterator[bytes]) -> bytes:
        told, parts = headers.get("Content-Length", ""), list[bytes]()
        size = int(told[:20]) if told.isdecimal() else 0
        if size <= self._most:
            size = 0
            try:
                async with asyncio.timeout(_BODY_S):
                    async for chunk in chunks:
                        parts.append(chunk)
                        size += len(chunk)
                        if size > self._most:
                            break
            except TimeoutError:
                words = f"The request's body did not come within {_BODY_S:g} s."
                raise ApiError(408, words, "Request Timeout") from None
        if size > self._most:
            await _drain(chunks)
            raise ApiError(413, f"The request is larger than {self._most} bytes.", "Request Entity Too Large")
        return b"".join(parts)


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read on for a while without keeping anything: who is still sending would not see the answer."""
    left = _DRAINED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAINED_S):
            async for chunk in chunks:
                left -= len(chunk)
                if left <= 0:
                    return


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first gives the body and then what really comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def refusal(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response that an error becomes, in ASCII: it may repeat half a surrogate pair of the request."""
    content, headers = json.dumps(error.body()), headers or _HEADERS.get(error.status)
    return Response(content, error.status, headers, media_type="application/json")
