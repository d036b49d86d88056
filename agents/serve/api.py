"""The shapes of requests, answers and errors: those of vLLM's chat endpoint, and what this service adds to them.

Knows neither HTTP nor models.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rollouts.config import Sampling
from rollouts.errors import did_you_mean
from rollouts.text.prompts import Turns

if TYPE_CHECKING:
    from agents.serve.route import Route, Written

DONE = "data: [DONE]\n\n"
_GOES_ON = MappingProxyType({"finish_reason": None})  # a choice that has not come to its end
_SHOWN = 200  # characters of a wrong value that an error repeats
# What OpenAI's clients may send and what changes nothing that this service does.
_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "parallel_tool_calls",
    "include_reasoning",
)
# What is refused unless it says what happens anyway.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
}


class ApiError(Exception):
    """An answer other than the one that was asked for: HTTP status, and the fields of OpenAI's error body."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None, **more: Any) -> None:
        """Set the fields; `more` stands beside ``error`` in the body."""
        super().__init__(message)
        self.status, self.kind, self.param, self.more = status, kind, param, more

    def body(self) -> dict[str, Any]:
        """Return the body, as vLLM shapes it."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error, **self.more}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Return the error of a request that makes no sense here."""
    return ApiError(400, message, "BadRequestError", param)


def internal_error() -> ApiError:
    """Return the error of what should not happen."""
    return ApiError(500, "Internal error; the service's log has it.", "InternalServerError")


class _Part(BaseModel):
    type: Literal["text"]
    text: str


def _only_texts(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
            raise ValueError(f"Parts of type `{kind[:_SHOWN]}` are not supported here")
    return content


class Message(BaseModel):
    """One message of a chat; text only."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | Annotated[list[_Part], Field(max_length=1024, fail_fast=True)], BeforeValidator(_only_texts)
    ]

    def text(self) -> str:
        """Return its text; parts are joined as vLLM joins them."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What streams carry beside text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: Literal[False] | None = False


_Seed = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
_Count = Annotated[int, Field(ge=1, le=1 << 31, strict=True)]
_Stops = Annotated[
    list[Annotated[str, Field(max_length=256)]],
    Field(max_length=16, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
_Option = str | bool | int | float | None
_Number = Annotated[float, Field(allow_inf_nan=False)]


class ChatRequest(BaseModel):
    """A chat completion that is asked for.

    Attributes:
        messages: A chat that ends with a user message, the problem; earlier turns stand before it in the prompts as
            the models' templates have them. A system message at the beginning is instead of the configured one.
        model: Name of the policy, perhaps with a setting (``NAME@budget=0.2``); None is fine.
        max_tokens: Most tokens of the answer's text; at most the service's own limit.
        max_completion_tokens: The same, by its newer name.
        stream: Whether steps are sent as they are accepted.
        stream_options: `StreamOptions`.
        stop: Texts that end the answer, which does not contain them, wherever one begins and whoever wrote it.
        chat_template_kwargs: What is told to the models' chat templates, as far as they take it.
        temperature: Instead of the temperature that both models had in the rollouts.
        top_p: Likewise.
        top_k: Likewise.
        min_p: Likewise.
        seed: Of the router's own draws; what models draw cannot be repeated.
        lam: λ for this request, for policies that take one.
        budget: Share of always-large's cost for this request, for policies that take one.
        trace: Whether the answer tells every step's author, action, scores and tokens, and proposals thrown away.
        only: One model that writes all steps, to compare with; for services with a playground.
    """

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(min_length=1, max_length=64, fail_fast=True)]
    model: str | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: _Stops | None = None
    chat_template_kwargs: Annotated[dict[str, _Option], Field(max_length=16)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31, strict=True)] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    seed: _Seed | None = None
    lam: Annotated[_Number, Field(ge=0)] | None = None
    budget: Annotated[_Number, Field(gt=0, le=1)] | None = None
    trace: bool | None = False
    only: Literal["small", "large"] | None = None

    @model_validator(mode="after")
    def _only_what_is_done(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if value is None:  # as good as absent
                continue
            if name in _ONLY:
                if not any(_same(value, only) for only in _ONLY[name]):
                    raise ValueError(f"`{name}` is not supported here.\x00{name}")
            elif name not in _IGNORED:
                known = [*type(self).model_fields, *_ONLY]
                raise ValueError(
                    f"Unknown parameter `{name[:_SHOWN]}`.{did_you_mean(name[:_SHOWN], known)}\x00{name[:_SHOWN]}"
                )
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.\x00stream_options")
        if self.lam is not None and self.budget is not None:
            raise ValueError("Give either `lam` or `budget`, not both.\x00budget")
        return self

    def problem(self) -> tuple[str, str | None, Turns]:
        """Return the problem, the system message, None if there is none, and earlier turns.

        Raises:
            ApiError: The messages are no chat in which a problem comes last.
        """
        messages = self.messages
        system = messages[0].text() if messages[0].role in ("system", "developer") else None
        *earlier, last = messages if system is None else messages[1:] or messages
        if last.role != "user" or any(each.role not in ("user", "assistant") for each in earlier):
            raise bad_request(
                "`messages` must be a chat of user and assistant that ends with a user message, perhaps with a system "
                f"message before it; found {', '.join(message.role for message in messages)[:_SHOWN]}.",
                "messages",
            )
        if not last.text().strip():
            raise bad_request("The user message is empty.", "messages")
        return last.text(), system, tuple((each.role, each.text()) for each in earlier)

    @property
    def thinks(self) -> bool | None:
        """Whether it asks for thinking; None if it does not say."""
        asked = (self.chat_template_kwargs or {}).get("enable_thinking")
        effort = (self.model_extra or {}).get("reasoning_effort")
        return False if asked is None and effort == "none" else None if asked is None else bool(asked)

    def limit(self) -> int | None:
        """Return the most tokens of the answer that the request allows."""
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, usual: Sampling) -> Sampling:
        """Return a role's sampling parameters with what the request says instead."""
        top_k = usual.top_k if self.top_k is None else max(self.top_k, 0)  # -1 is vLLM's other word for "all"
        return Sampling(
            usual.temperature if self.temperature is None else self.temperature,
            usual.top_p if self.top_p is None else self.top_p,
            top_k,
            usual.min_p if self.min_p is None else self.min_p,
        )


OURS = ("lam", "budget", "trace", "only")
"""What a request says to this service and to nobody else."""


def _same(value: Any, only: Any) -> bool:
    return bool(value == only) and isinstance(value, bool) == isinstance(only, bool)


def beyond_routing(body: bytes) -> tuple[dict[str, Any], str] | None:
    """Return a request that cannot be routed, but that one model might answer, and the field that says so; else None.

    These are tools, JSON modes, several answers, log-probabilities, penalties and the like; images and other parts that
    are no text; messages of tools, or one of the assistant that is to be continued.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    messages = asked.get("messages") if isinstance(asked, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        return None
    if not isinstance(asked.get("model"), str | None):
        return None
    for name, only in _ONLY.items():
        if asked.get(name) is not None and not any(_same(asked[name], each) for each in only):
            return asked, name
    for place, message in enumerate(messages):
        parts = message["content"] if isinstance(message.get("content"), list) else []
        strange = any(isinstance(part, dict) and part.get("type") != "text" for part in parts)
        system = message.get("role") in ("system", "developer")
        if strange or message.get("role") in ("tool", "function") or message.get("tool_calls") or (system and place):
            return asked, "messages"
    return (asked, "messages") if messages[-1].get("role") == "assistant" else None


def parse_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        ApiError: It is no JSON, or not a request of this service.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message, _, param = str(first["msg"]).removeprefix("Value error, ").partition("\x00")
        place = ".".join(str(part) for part in first["loc"])
        if not param and place:
            shown = repr(first["input"])[:_SHOWN] if first["type"] != "missing" else None
            message = f"{place}: {message}" + (f" (found {shown})" if shown else "")
        raise ApiError(400, message, "Bad Request", param or place or None) from None


@cache
def fingerprint() -> str:
    """Return what answers say of the software behind them."""
    try:
        return f"trim-routing-{version('trim-routing')}"
    except PackageNotFoundError:
        return "trim-routing"


class Chat:
    """The answer to one chat: whole, or as lines of server-sent events.

    Attributes:
        last: What its stream ends with, however it went.
    """

    last = DONE

    def __init__(self, model: str, ask: ChatRequest) -> None:
        """Fix what all parts of the answer to a request have in common."""
        self._usage = bool(ask.stream_options and ask.stream_options.include_usage)
        self._trace = bool(ask.trace)
        kind = "chat.completion.chunk" if ask.stream else "chat.completion"
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, route: Route) -> dict[str, Any]:
        """Return the answer that a route has come to."""
        unused = ("refusal", "annotations", "audio", "function_call", "reasoning")
        thought = _reasoning(route.reasoning) if route.reasoning else {}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": route.text, **dict.fromkeys(unused), **thought},
            "logprobs": None,
            "finish_reason": route.finish_reason,
            "stop_reason": route.stops.matched,
            "token_ids": None,
        }
        return {
            **self._common,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": fingerprint(),
            "usage": route.usage(),
            "trim": route.summary(trace=self._trace),
        }

    def first(self) -> str:
        """Return the event that names the role."""
        return self._event({"role": "assistant", "content": ""})

    def step(self, written: Written, said: str) -> str:
        """Return the event of one step, of which `said` can be given."""
        more = {"trim": written.plain(text=False)} if self._trace else {}
        return self._event(_reasoning(said) if written.thinking else {"content": said}, **more)

    def end(self, route: Route) -> str:
        """Return what comes after the last step: the rest of the text, if some was held back, and what happened."""
        trim, software = route.summary(trace=False), {"system_fingerprint": fingerprint()}
        ended = {"finish_reason": route.finish_reason, "stop_reason": route.stops.matched}
        last = {"trim": trim} if self._usage else {"trim": trim, **software}
        end = self._event({"content": route.stops.rest()}, ended, **last)
        if not self._usage:
            return end
        return end + event({**self._common, "choices": [], "usage": route.usage(), **software})

    def failed(self, error: ApiError) -> str:
        """Return the event of an error."""
        return event(error.body())

    def _event(self, delta: Mapping[str, Any], ended: Mapping[str, Any] = _GOES_ON, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, **ended}
        usage = {"usage": None} if self._usage else {}
        return event({**self._common, "choices": [choice], **usage, **more})


def _reasoning(text: str) -> dict[str, str]:
    """Return what was thought, by the name that vLLM's servers had for it and the one that they have."""
    return {"reasoning_content": text, "reasoning": text}


def event(value: Mapping[str, Any]) -> str:
    """Return a server-sent event with a JSON value, in ASCII: some readers end lines at U+2028 or U+0085, too."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
