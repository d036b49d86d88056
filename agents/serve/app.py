"""The service over HTTP: OpenAI's chat completions with server-sent events, model list, health, metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agents.serve import api, openapi, responses
from agents.serve.api import ApiError, Chat, ChatRequest
from agents.serve.guard import Guard, refusal
from agents.serve.passing import Passed, streaming
from agents.serve.responses import Response as Answered
from agents.serve.route import Route as Routed
from agents.serve.route import Written
from agents.serve.service import CLIENT_GONE, Service
from agents.serve.shadow import MARK as SHADOW
from agents.serve.tracing import Trace

T = TypeVar("T")
_log = logging.getLogger("trim.serve")
_CHAT, _RESPONSES = "/v1/chat/completions", "/v1/responses"


class _ClientGone(Exception):
    pass


def build(service: Service, api_key: str | None, trace: Callable[[Headers], Trace]) -> Starlette:
    """Return the application; `trace` returns what is known of a request's trace."""
    config = service.config

    def count(path: str, status: int) -> None:
        if path in (_CHAT, _RESPONSES):
            service.metrics.requests.labels(str(status)).inc()

    async def answered(
        raw: Request, parse: Callable[[bytes], ChatRequest], shape: type[Chat] | type[Answered]
    ) -> Response:
        try:
            if not _is_json(raw):
                raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed.", "Bad Request")
            ask = parse(await raw.body())
            route = await service.begin(ask)
        except Exception as error:
            count(raw.url.path, error.status if isinstance(error, ApiError) else 500)
            raise
        steps, answer = service.steps(route, ask), shape(ask.model or service.name, ask)
        headers = {SHADOW: config.shadow} if config.shadow and not ask.only else {}
        if ask.stream:  # answered once the first step is there: until then an error can still have a status of its own
            first = await _unless_gone(raw, anext(steps))
            return streaming(_events(answer, route, first, steps), headers, steps.aclose)
        await _unless_gone(raw, _exhaust(steps))
        return JSONResponse(answer.whole(route), headers=headers)

    async def chat(raw: Request) -> Response:
        """Solve a problem step by step, each step by the model that the policy chooses."""
        otherwise = config.otherwise
        beyond = api.beyond_routing(await raw.body()) if _is_json(raw) and otherwise != "error" else None
        if beyond is None:
            return await answered(raw, api.parse_request, Chat)
        try:
            service.policies.named(beyond[0].get("model"))
        except ApiError as error:
            count(_CHAT, error.status)
            raise
        return await _unless_gone(raw, Passed(service, otherwise, *beyond).answer())

    async def response(raw: Request) -> Response:
        """Solve a problem as chats do, asked and answered as OpenAI's responses are."""
        try:
            return await answered(raw, responses.parse, Answered)
        except ApiError as error:
            raise responses.renamed(error) from None

    async def models(_: Request) -> Response:
        """Return the names that requests may ask for, each with what its policy is."""
        return JSONResponse({"object": "list", "data": [service.card(name) for name in service.policies.names()]})

    async def model(raw: Request) -> Response:
        """Return the entry of one name."""
        return JSONResponse(service.card(raw.path_params["name"]))

    async def health(_: Request) -> Response:
        """Return which upstreams answer, as far as is known; nobody is asked."""
        found = service.health()
        return JSONResponse(found, status_code=503 if found["status"] == "unavailable" else 200)

    async def live(_: Request) -> Response:
        """Return at once, as long as the process runs."""
        return JSONResponse({"status": "alive"})

    async def ready(_: Request) -> Response:
        """Return whether requests should be sent here."""
        status = "draining" if service.draining else service.health()["status"]
        return JSONResponse({"status": status}, status_code=503 if status in ("draining", "unavailable") else 200)

    async def metrics(_: Request) -> Response:
        """Return counters for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def description(_: Request) -> Response:
        """Return this description."""
        return JSONResponse(openapi.described(app.routes, key=api_key is not None))

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, _ClientGone):
            return Response(status_code=CLIENT_GONE)
        if isinstance(error, HTTPException):
            told = ApiError(error.status_code, str(error.detail), HTTPStatus(error.status_code).phrase)
            return refusal(told, error.headers)
        assert isinstance(error, ApiError)
        return refusal(error)

    app = Starlette(
        routes=[
            Route(_CHAT, chat, methods=["POST"]),
            Route(_RESPONSES, response, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/live", live),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", description),
        ],
        exception_handlers=dict.fromkeys((_ClientGone, ApiError, HTTPException), failed),
    )
    app.router.redirect_slashes = False
    app.add_middleware(Guard, api_key, config.max_body_bytes, count, trace)
    if config.cors_origins:  # outermost: browsers ask without the key first
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _is_json(raw: Request) -> bool:
    return raw.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "application/json"


async def _exhaust(steps: AsyncIterator[Written]) -> None:
    async for _ in steps:
        pass


async def _events(
    answer: Chat | Answered, route: Routed, first: Written, steps: AsyncIterator[Written]
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
        yield answer.failed(api.internal_error())
    yield answer.last


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
