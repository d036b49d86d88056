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

from agents.serve import api, responses
from agents.serve.api import ApiError, Chat, ChatRequest
from agents.serve.guard import Guard, refusal
from agents.serve.passing import Passed
from agents.serve.responses import Response as Answered
from agents.serve.route import Route, Written
from agents.serve.service import CLIENT_GONE, Service
from agents.serve.shadow import MARK as SHADOW
from agents.serve.tracing import Trace

T = TypeVar("T")
_log = logging.getLogger("trim.serve")
_CHAT, _RESPONSES = "/v1/chat/completions", "/v1/responses"


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
        if path in (_CHAT, _RESPONSES):
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

    async def answered(
        raw: Request, parse: Callable[[bytes], ChatRequest], shape: type[Chat] | type[Answered]
    ) -> Response:
        try:
            if not _is_json(raw):
                raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed.", "Bad Request")
            ask = parse(await raw.body())
            route = await service.begin(ask)
        except ApiError as error:
            count(raw.url.path, error.status)
            raise
        steps, answer = service.steps(route, ask), shape(ask.model or service.name, ask)
        headers = {SHADOW: service.config.shadow} if service.config.shadow and not ask.only else {}
        if ask.stream:  # answered once the first step is there: until then an error can still have a status of its own
            first = await _unless_gone(raw, anext(steps))
            return StreamingResponse(
                _events(answer, route, first, steps),
                media_type="text/event-stream",
                headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(steps.aclose),  # if the client left between two of them
            )
        await _unless_gone(raw, _exhaust(steps))
        return JSONResponse(answer.whole(route), headers=headers)

    @app.post(_CHAT, openapi_extra={"requestBody": body})
    async def chat(raw: Request) -> Response:
        """Solve a problem step by step, each step by the model that the policy chooses."""
        otherwise = service.config.otherwise
        beyond = api.beyond_routing(await raw.body()) if _is_json(raw) and otherwise != "error" else None
        if beyond is None:
            return await answered(raw, api.parse_request, Chat)
        try:
            service.policies.named(beyond[0].get("model"))
        except ApiError as error:
            count(_CHAT, error.status)
            raise
        return await _unless_gone(raw, Passed(service, otherwise, *beyond).answer())

    @app.post(_RESPONSES)
    async def response(raw: Request) -> Response:
        """Do the same, asked and answered as OpenAI's responses are."""
        try:
            return await answered(raw, responses.parse, Answered)
        except ApiError as error:
            raise responses.renamed(error) from None

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


async def _exhaust(steps: AsyncIterator[Written]) -> None:
    async for _ in steps:
        pass


async def _events(
    answer: Chat | Answered, route: Route, first: Written, steps: AsyncIterator[Written]
) -> AsyncIterator[str]:
    try:
        yield answer.first()
        yield answer.step(first, route.said[0])
        async for written in steps:
            yield answer.step(written, route.said[-1])
        yield answer.end(route)
    except ApiError as error:
        yield answer.failed(error)
    except Exception:
        _log.exception("a stream failed")
        yield answer.failed(_internal())
    yield answer.last


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
