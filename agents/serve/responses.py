"""OpenAI's responses, as far as they are chats by another name: read as chats, and answered in their own shape.

Nothing is kept between them: what a response follows stands in the request's input.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from agents.serve.api import ApiError, ChatRequest, Message, bad_request, event, parse_request

if TYPE_CHECKING:
    from agents.serve.route import Route, Written

# Names of the chat endpoint for what the request calls otherwise.
_NAMES = {
    "input": "messages",
    "max_output_tokens": "max_completion_tokens",
    "text.format": "response_format",
    "reasoning.effort": "reasoning_effort",
}
# What chats do not have, by what is so here anyway; None: there is nothing like it.
_ONLY = {
    "background": False,
    "include": [],
    "truncation": "disabled",
    "reasoning.summary": "auto",
    "text.verbosity": "medium",
    "previous_response_id": None,
    "conversation": None,
    "prompt": None,
    "max_tool_calls": None,
}
_KEPT = ("previous_response_id", "conversation")
_KINDS = {"message": "output_text", "reasoning": "reasoning_text"}


def parse(body: bytes) -> ChatRequest:
    """Read the body of a request as the chat that it asks for.

    Raises:
        ApiError: It is no JSON, no request, or of more than a chat.
    """
    try:
        asked = from_json(body)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        return parse_request(body)  # says what it is
    for name, chat in _NAMES.items():
        if chat in asked:
            raise bad_request(f'"{chat}" is of chat completions; here it is `{name}`.', name)
    for name in ("text", "reasoning"):
        if not isinstance(parts := asked.pop(name, None), dict | None):
            raise bad_request(f"`{name}` must be an object.", name)
        asked |= {f"{name}.{key}": value for key, value in (parts or {}).items()}
    instructions = asked.pop("instructions", None)
    if not isinstance(instructions, str | None):
        raise bad_request("`instructions` must be a text.", "instructions")
    for name, usual in _ONLY.items():
        if asked.pop(name, None) not in (None, usual):
            hint = " Nothing is kept: send what came before in `input`." if name in _KEPT else ""
            raise bad_request(f"`{name}` is not supported here.{hint}", name)
    metadata = asked.get("metadata") or {}
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise bad_request("`metadata` must be an object of texts.", "metadata")
    asked["input"] = _messages(asked.get("input"))
    ask = parse_request(json.dumps({_NAMES.get(name, name): value for name, value in asked.items()}).encode())
    if instructions is not None:
        ask.messages.insert(0, Message(role="system", content=instructions))
    return ask


def schema(chat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of what `parse` reads, from that of chats."""
    known = {name: each for name, each in chat["properties"].items() if name not in _NAMES.values()}
    text, messages = {"type": "string"}, chat["properties"]["messages"]
    known |= {
        "input": {"anyOf": [text, messages]},
        "instructions": {"anyOf": [text, {"type": "null"}]},
        "max_output_tokens": chat["properties"]["max_completion_tokens"],
    }
    return {
        **chat,
        "title": "ResponseRequest",
        "description": parse.__doc__,
        "properties": known,
        "required": ["input"],
    }


def renamed(error: ApiError) -> ApiError:
    """Return an error about a chat in the words of the request for a response."""
    words, param = str(error), error.param or ""
    for name, other in _NAMES.items():
        pattern = rf"(?:^|(?<=[`'])|(?<=, )){other}\b(\.\d+)?"  # places are not those of the input
        words, param = re.sub(pattern, name, words), re.sub(pattern, name, param)
    return ApiError(error.status, words, error.kind, param or None, **error.more)


def _messages(given: Any) -> list[Any]:
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(isinstance(each, dict) for each in items):
        raise bad_request("`input` must be a text or a list of messages.", "input")
    items = [each for each in items if each.get("type") != "reasoning"]  # templates have no place for earlier thoughts
    if strange := [each["type"] for each in items if each.get("type", "message") != "message"]:
        raise bad_request(f"`input` may hold messages of texts; found {str(strange[0])[:200]!r}.", "input")
    for item in items:
        for part in item["content"] if isinstance(item.get("content"), list) else []:
            if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
                part["type"] = "text"
    return [{name: item.get(name) for name in ("role", "content")} for item in items]


class Response:
    """The answer to one request: whole, or as lines of server-sent events.

    Attributes:
        last: What its stream ends with, however it went.
    """

    last = ""

    def __init__(self, model: str, ask: ChatRequest) -> None:
        """Fix what all parts of the answer to a request have in common."""
        self._trace, self._count, self._items = bool(ask.trace), count(), list[dict[str, Any]]()
        self._common = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "instructions": ask.problem()[1],
            "metadata": (ask.model_extra or {}).get("metadata") or {},
            "max_output_tokens": ask.limit(),
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "store": False,
            "error": None,
            "incomplete_details": None,
            "output": self._items,
        }

    def whole(self, route: Route) -> dict[str, Any]:
        """Return the answer that a route has come to."""
        if route.reasoning:
            self._given("reasoning", route.reasoning)
        self._given("message", route.text)
        self._done()
        return self._ended(route, trace=self._trace)

    def first(self) -> str:
        """Return the events of an answer that has begun."""
        return "".join(self._event(f"response.{word}", response=self._common) for word in ("created", "in_progress"))

    def step(self, written: Written, said: str) -> str:
        """Return the events of one step, of which `said` can be given."""
        more = {"trim": written.plain(text=False)} if self._trace else {}
        return self._given("reasoning" if written.thinking else "message", said, **more)

    def end(self, route: Route) -> str:
        """Return what comes after the last step: the rest of the text, if some was held back, and what happened."""
        response = self._ended(route, trace=False)  # which reads that rest, too
        rest = self._given("message", route.stops.rest()) + self._done()
        return rest + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> str:
        """Return the event of an error."""
        told = {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        more = {"usage": _usage(error.more["usage"]), "trim": error.more["trim"]} if error.more else {}
        return self._event("response.failed", response={**self._common, **told, **more})

    def _ended(self, route: Route, *, trace: bool) -> dict[str, Any]:
        stopped = route.finish_reason == "stop"
        return {
            **self._common,
            "status": "completed" if stopped else "incomplete",
            "incomplete_details": None if stopped else {"reason": "max_output_tokens"},
            "usage": _usage(route.usage()),
            "trim": route.summary(trace=trace),
        }

    def _given(self, kind: str, text: str, **more: Any) -> str:
        """Return the events of a piece of the text of an item."""
        begun = ""
        if not self._items or self._items[-1]["type"] != kind:
            begun = self._done()
            part: dict[str, Any] = {"type": _KINDS[kind], "text": "", "annotations": []}
            item: dict[str, Any] = {"id": f"{kind[:3]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
            item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
            self._items.append(item)
            begun += self._event("response.output_item.added", item=item)
            item["content"] = [part]
            begun += self._event("response.content_part.added", **self._place(), part=part)
        self._items[-1]["content"][0]["text"] += text
        return begun + self._event(f"response.{_KINDS[kind]}.delta", **self._place(), delta=text, logprobs=[], **more)

    def _done(self) -> str:
        """Return the events of the end of an item, if there is one."""
        if not self._items:
            return ""
        item = self._items[-1]
        item["status"], (part,) = "completed", item["content"]
        return (
            self._event(f"response.{part['type']}.done", **self._place(), text=part["text"], logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=part)
            + self._event("response.output_item.done", item=item)
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "content_index": 0}

    def _event(self, kind: str, **more: Any) -> str:
        place = {} if "response" in more else {"output_index": len(self._items) - 1}
        return f"event: {kind}\n" + event({"type": kind, "sequence_number": next(self._count), **place, **more})


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was spent by the names that responses have for it."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
        "models": usage["models"],
    }
