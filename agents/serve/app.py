"""The service over HTTP: OpenAI's chat completions with server-sent events, model list, health, metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from agents.serve import api
from agents.serve.api import ApiError, ChatRequest, Chunks
from agents.serve.guard import Guard, refusal
from agents.serve.route import Written
from agents.serve.service import Run, Service

T = TypeVar("T")
_log = logging.getLogger("trim.serve")
_CHAT = "/v1/chat/completions"
_GONE = "499"  # nginx' word for a client that left
_RETRY = {"Retry-After": "1"}


class _ClientGone(Exception):
    pass


def build(service: Service, api_key: str | None = None, max_body_bytes: int = 1 << 18) -> FastAPI:
    """Return the application.

    Args:
        service: What does the work.
        api_key: Key that clients must send; None: none.
        max_body_bytes: Largest request body.
    """

    def count(path: str, status: int) -> None:
        if path == _CHAT:
            service.metrics.requests.labels(str(status)).inc()

    app = FastAPI(title="trim-routing", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes, count=count)  # type: ignore[arg-type]

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return refusal(error, _RETRY if error.status in (429, 503) else None)

    async def no_such_page(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(ApiError(error.status_code, str(error.detail), HTTPStatus(error.status_code).phrase))

    async def our_fault(_: Request, error: Exception) -> Response:
        return refusal(ApiError(500, "Internal error; the service's log has it.", "InternalServerError"))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, no_such_page)
    app.add_exception_handler(Exception, our_fault)

    body = {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}

    @app.post(_CHAT, openapi_extra={"requestBody": body})
    async def chat(raw: Request) -> Response:
        """Solve a problem step by step, each step by the model that the policy chooses."""
        try:
            ask = _read(raw, await raw.body())
            run = service.begin(ask)
        except ApiError as error:
            count(_CHAT, error.status)
            raise
        return await (_stream(service, raw, run) if ask.stream else _whole(service, raw, run))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.settings.name:
            raise ApiError(404, f"The model `{name[:200]}` does not exist.", "NotFoundError", "model")
        return service.card()

    @app.get("/health")
    async def health() -> Response:
        found = await service.health()
        return JSONResponse(found, status_code=503 if found["status"] == "unavailable" else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _read(raw: Request, body: bytes) -> ChatRequest:
    if raw.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed.", "Bad Request")
    return api.parse_request(body)


async def _whole(service: Service, raw: Request, run: Run) -> Response:
    async def finish() -> None:
        async with aclosing(run.steps()) as steps:
            async for _ in steps:
                pass

    status = "500"
    try:
        await _unless_gone(raw, finish())
        status = "200"
    except ApiError as error:
        status = str(error.status)
        raise
    except _ClientGone:
        status = _GONE
        return Response(status_code=int(_GONE))
    finally:
        run.close(status)
    route = run.route
    trim = route.summary(trace=run.ask.trace)
    answer = api.completion(api.new_id(), service.settings.name, route.text, route.finish_reason, route.usage(), trim)
    return JSONResponse(answer)


async def _stream(service: Service, raw: Request, run: Run) -> Response:
    """Answer once the first step is there: until then an error can still have a status of its own."""
    steps = run.steps()
    try:
        first = await _unless_gone(raw, _next(steps))
    except _ClientGone:
        run.close(_GONE)
        return Response(status_code=int(_GONE))
    except ApiError as error:
        run.close(str(error.status))
        raise
    except BaseException:
        run.close("500")
        raise
    return StreamingResponse(
        _events(service, run, first, steps),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        background=BackgroundTask(run.close, _GONE),  # if the client left before the first event
    )


async def _next(steps: AsyncGenerator[Written, None]) -> Written:
    return await anext(steps)


async def _events(
    service: Service, run: Run, first: Written, steps: AsyncGenerator[Written, None]
) -> AsyncIterator[str]:
    ask, route = run.ask, run.route
    include_usage = bool(ask.stream_options and ask.stream_options.include_usage)
    chunks = Chunks(api.new_id(), service.settings.name, include_usage)

    def chunk(written: Written) -> str:
        return chunks.step(written.text, None, **({"trim": written.plain(text=False)} if ask.trace else {}))

    status = _GONE
    try:
        yield chunks.first()
        yield chunk(first)
        async for written in steps:
            yield chunk(written)
        yield chunks.step("", route.finish_reason, trim=route.summary(trace=False))
        if include_usage:
            yield chunks.usage(route.usage())
        status = "200"
    except ApiError as error:
        status = str(error.status)
        yield api.event(error.body())
    except Exception:
        _log.exception("a stream failed")
        status = "500"
        yield api.event(ApiError(500, "Internal error; the service's log has it.", "InternalServerError").body())
    finally:
        await steps.aclose()
        run.close(status)
    yield api.DONE


async def _unless_gone(raw: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for some work, and cancel it if the client leaves."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_left(raw))
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
