"""The service over HTTP: OpenAI's chat completions with server-sent events, model list, health, metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from agents.serve import api
from agents.serve.api import ApiError, ChatRequest, Chunks
from agents.serve.guard import Guard, refusal
from agents.serve.passing import Passed
from agents.serve.route import Route, Written
from agents.serve.service import CLIENT_GONE, Service
from agents.serve.shadow import MARK as SHADOW
from agents.serve.tracing import Trace

T = TypeVar("T")
_log = logging.getLogger("trim.serve")
_CHAT = "/v1/chat/completions"


class _ClientGone(Exception):
    pass


def build(
    service: Service,
    api_key: str | None = None,
    max_body_bytes: int = 1 << 18,
    cors_origins: Sequence[str] = (),
    trace: Callable[[Headers], Trace] = Trace,
) -> FastAPI:
    """Return the application.

    Args:
        service: What does the work.
        api_key: Key that clients must send; None: none.
        max_body_bytes: Largest request body.
        cors_origins: Where pages may come from that call it in a browser.
        trace: Returns what is known of a request's trace.
    """

    def count(path: str, status: int) -> None:
        if path == _CHAT:
            service.metrics.requests.labels(str(status)).inc()

    app = FastAPI(title="trim-routing", docs_url=None, redoc_url=None, redirect_slashes=False)
    guarding: Any = {"api_key": api_key, "max_body_bytes": max_body_bytes, "count": count, "trace": trace}
    app.add_middleware(Guard, **guarding)
    if cors_origins:  # outermost: browsers ask without the key first
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, _ClientGone):
            return Response(status_code=CLIENT_GONE)
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail), HTTPStatus(error.status_code).phrase)
        return refusal(error if isinstance(error, ApiError) else _internal())

    for kind in (_ClientGone, ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)

    body = {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}

    @app.post(_CHAT, openapi_extra={"requestBody": body})
    async def chat(raw: Request) -> Response:
        """Solve a problem step by step, each step by the model that the policy chooses."""
        content = await raw.body()
        try:
            otherwise = service.config.otherwise
            beyond = api.beyond_routing(content) if _is_json(raw) and otherwise != "error" else None
            if beyond is None:
                ask = _read(raw, content)
                route = await service.begin(ask)
            else:
                service.policies.named(beyond[0].get("model"))
        except ApiError as error:
            count(_CHAT, error.status)
            raise
        if beyond is not None:
            return await _unless_gone(raw, Passed(service, otherwise, *beyond).answer())
        steps = service.steps(route, ask)
        headers = {SHADOW: service.config.shadow} if service.config.shadow and not ask.only else {}
        if ask.stream:  # answered once the first step is there: until then an error can still have a status of its own
            first = await _unless_gone(raw, anext(steps))
            return StreamingResponse(
                _events(Chunks(ask.model or service.name, ask), route, first, steps),
                media_type="text/event-stream",
                headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(steps.aclose),  # if the client left between two of them
            )
        await _unless_gone(raw, _exhaust(steps))
        trim = route.summary(trace=bool(ask.trace))
        told = route.finish_reason, route.usage(), trim, route.stops.matched, route.reasoning
        return JSONResponse(api.completion(ask.model or service.name, route.text, *told), headers=headers)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card(name) for name in service.policies.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return service.card(name)

    @app.get("/health")
    async def health() -> Response:
        found = service.health()
        return JSONResponse(found, status_code=503 if found["status"] == "unavailable" else 200)

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        status = "draining" if service.draining else service.health()["status"]
        return JSONResponse({"status": status}, status_code=503 if status in ("draining", "unavailable") else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _is_json(raw: Request) -> bool:
    return raw.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "application/json"


def _read(raw: Request, body: bytes) -> ChatRequest:
    if not _is_json(raw):
        raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed.", "Bad Request")
    return api.parse_request(body)


async def _exhaust(steps: AsyncIterator[Written]) -> None:
    async for _ in steps:
        pass


async def _events(chunks: Chunks, route: Route, first: Written, steps: AsyncIterator[Written]) -> AsyncIterator[str]:
    try:
        yield chunks.first()
        yield chunks.step(first, route.said[0])
        async for written in steps:
            yield chunks.step(written, route.said[-1])
        yield chunks.end(route.finish_reason, route.summary(trace=False), route.stops.rest(), route.stops.matched)
        if chunks.include_usage:
            yield chunks.usage(route.usage())
    except ApiError as error:
        yield api.event(error.body())
    except Exception:
        _log.exception("a stream failed")
        yield api.event(_internal().body())
    yield api.DONE


def _internal() -> ApiError:
    return ApiError(500, "Internal error; the service's log has it.", "InternalServerError")


async def _unless_gone(raw: Request, work: Awaitable[T]) -> T:
    """Wait for some work, and cancel it if the client leaves."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(raw))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(raw: Request) -> None:
    while (await raw.receive())["type"] != "http.disconnect":
        pass
