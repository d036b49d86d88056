"""The id of a request and the trace that it is part of (W3C Trace Context): both are handed on to upstreams."""

from __future__ import annotations

import re
import uuid
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers

HEADER = "X-Request-ID"
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")
_PARENT = re.compile(
    r"(?!ff|00.{53}-)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,200})?"
)
_STATE = re.compile(r"[\x20-\x7e]{1,512}")


class Trace:
    """The trace of one request, of which nothing is noted (`agents.serve.spans` does).

    Attributes:
        id: The request's own id if that is one, else a new one.
        told: What there is to say of the request, by the names of attributes; those without a dot get ``trim.``.
    """

    def __init__(self, headers: Headers) -> None:
        """Take what the request brings; what makes no sense is as good as absent."""
        offered = headers.get(HEADER, "")
        self.id = offered if _USABLE.fullmatch(offered) else uuid.uuid4().hex
        self.told: dict[str, Any] = {}
        self._brought: dict[str, str] = {}
        parents, state = headers.getlist("traceparent"), ",".join(headers.getlist("tracestate"))
        if len(parents) == 1 and _PARENT.fullmatch(parents[0]):
            self._brought = {"traceparent": parents[0], **({"tracestate": state} if _STATE.fullmatch(state) else {})}

    def headers(self) -> dict[str, str]:
        """Return what upstreams are told now."""
        return self._brought

    def request(self) -> AbstractContextManager[None]:
        """Note what happens inside as the request, and in the end what was told of it."""
        return nullcontext()

    def step(self, name: str, told: dict[str, Any]) -> AbstractContextManager[None]:
        """Note what happens inside as a step of it, and in the end what was told of that."""
        return nullcontext()


CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""That of the request that is under way; None if none is."""


def current() -> Trace:
    """Return the trace of the request that is under way; an empty one if none is."""
    return CURRENT.get() or Trace(Headers({}))


def forwarded() -> dict[str, str]:
    """Return the headers by which upstreams know the request that they are asked for."""
    trace = CURRENT.get()
    return {} if trace is None else {HEADER: trace.id, **trace.headers()}
