"""What the service answers to, as OpenAPI describes it (``/openapi.json``): every route, from the routes themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.routing import BaseRoute, Route

from agents.serve import api, responses
from agents.serve.guard import OPEN

_JSON, _EVENTS = "application/json", "text/event-stream"
_KINDS = {"/metrics": "text/plain", "/": "text/html"}
_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503, 504)
_ALSO = {
    "/v1/models": (401,),
    "/v1/models/{name}": (401, 404),
    "/openapi.json": (401,),
    "/health": (503,),
    "/ready": (503,),
}
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}


def described(routes: Sequence[BaseRoute], *, key: bool) -> dict[str, Any]:
    """Return the description of routes, whose endpoints' docstrings say what they do, with or without a key."""
    chat = api.ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = chat.pop("$defs")
    asked = {"/v1/chat/completions": chat, "/v1/responses": responses.schema(chat)}
    schemas["Error"] = _object(
        error=_object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code=_NUMBER)
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route):
            continue
        path = re.sub(r":\w+}", "}", route.path)
        told: dict[str, Any] = {"summary": (inspect.getdoc(route.endpoint) or "").partition("\n")[0]}
        if names := re.findall(r"{(\w+)}", path):
            told["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
        if path in asked:
            told["requestBody"] = {"required": True, "content": {_JSON: {"schema": asked[path]}}}
        told["responses"] = _answers(path, streams=path in asked)
        if key and path not in OPEN:
            told["security"] = [{"key": []}]
        paths[path] = {method.lower(): told for method in sorted((route.methods or set()) - {"HEAD"})}
    info = {"title": "trim-routing", "version": api.fingerprint().removeprefix("trim-routing-")}
    scheme = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if key else {}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas, **scheme}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _answers(path: str, *, streams: bool) -> dict[str, Any]:
    kind = _KINDS.get(path, _JSON)
    content: dict[str, Any] = {kind: {"schema": {"type": "object"} if kind == _JSON else _TEXT}}
    error = content if path in OPEN else {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    words = "The answer" + (", or with `stream` the events of its parts." if streams else ".")
    return {
        "200": {"description": words, "content": content | ({_EVENTS: {"schema": _TEXT}} if streams else {})},
        **{
            str(status): {"description": HTTPStatus(status).phrase, "content": error}
            for status in (_ERRORS if streams else _ALSO.get(path, ()))
        },
    }
