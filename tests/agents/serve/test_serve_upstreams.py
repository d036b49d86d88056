"""Upstreams that answer in every way in which one can be wrong: a known reaction, no traceback, caps kept."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from fake_server import FakeServer, config
from serve_harness import ROLES, Router, policy

from agents.serve import upstreams as probing
from agents.serve.metrics import Metrics
from agents.serve.models import _checked
from agents.serve.upstreams import Probe, Unavailable, Upstream
from benchmarks.upstream import step_tag_id
from rollouts.models.server.chat import decoded
from rollouts.models.server.connection import Answer
from rollouts.text.likelihood import top_entropy

MOST = 9
TEXT = {"text": "a=1\n\n", "finish_reason": "stop", "stop_reason": "\n\n"}
DEEP = b"[" * 100_000


class Trio(FakeServer):
    """All three upstreams at one address; the scorer thinks little of everything."""

    wrong: dict[str, Any] = {}
    probes_too = False

    def answer(self, path: str, body: Any) -> Any:
        role = (body or {}).get("model", "").removeprefix("tinymath-")
        probe = body is not None and (body.get("prompt") or body.get("input") or [0])[0] == 1
        self.seen.append((role, body))
        if role in self.wrong and (self.probes_too or not probe):
            wrong = self.wrong[role]
            return wrong(path, body) if callable(wrong) else wrong
        return 200, {}, self.good(path, body)

    def good(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": f"tinymath-{role}", "max_model_len": 1024} for role in ROLES]}
        if path == "/pooling":
            return {"data": [{"data": [[0.75, 0.25]] * body["input"].count(step_tag_id())}]}
        if body["max_tokens"] < 2:
            return {"choices": [{"text": "a", "finish_reason": "length", "stop_reason": None, "token_ids": [5]}]}
        return {"choices": [{**TEXT, "token_ids": [5, 6]}]}


@pytest.fixture(scope="module")
def trio() -> Iterator[Trio]:
    server = Trio()
    yield server
    server.die()


@pytest.fixture(scope="module")
def routed(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    folder = policy(tmp_path_factory.mktemp("trio"), max_large_tokens=MOST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "_PAUSE_S", 0.05)
        running = Router(
            folder, dict.fromkeys(ROLES, trio.url), upstream_timeout=2.0, when_scorer_fails="large", request_timeout=5.0
        )
        yield running
        running.stop()


def whole(status: str, body: Any, **headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def choice(**changes: Any) -> Any:
    made = {**TEXT, "token_ids": [5, 6], **changes}
    return 200, {}, {"choices": [{name: value for name, value in made.items() if value is not KeyError}]}


def rows(*found: Any) -> Any:
    return 200, {}, {"data": [{"data": list(found)}]}


ANYBODY = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": whole("200 OK", b'{"choices": [', Content_Length="100"),
    "half a chunk": whole("200 OK", b'40\r\n{"choices"', Transfer_Encoding="chunked"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "a huge header": whole("200 OK", b"{}", Content_Length="2", X_Padding="x" * 1_000_000),
    "many headers": whole("200 OK", b"{}", Content_Length="2", **{f"X{i}": "x" * 100 for i in range(5000)}),
    "no gzip": whole("200 OK", b"no gzip", Content_Length="7", Content_Encoding="gzip"),
    "half an event": whole("200 OK", b'data: {"choices": [', Content_Type="text/event-stream"),
    "no JSON": (200, {}, b'{"choices": [\xff'),
    "no text": (200, {}, b""),
    "deep JSON": (200, {}, DEEP),
    "a long number": (200, {}, b'{"choices": ' + b"9" * 10_000 + b"}"),
    **{f"JSON {value!r}": (200, {}, value) for value in (None, [], {}, 1, "x", {"choices": None, "data": None})},
    "empty lists": (200, {}, {"choices": [], "data": []}),
    "numbers in lists": (200, {}, {"choices": [1], "data": [1]}),
    "nothing to say": whole("204 No Content", b""),
    "elsewhere": whole("302 Found", b"", Location="http://127.0.0.1:1/", Content_Length="0"),
    "an error": (500, {}, {"error": {"message": "\ud800 \x1b[31m"}}),
    "a deep error": (500, {}, DEEP),
    "an error in a list": (500, {}, [{"message": "x"}]),
    "an error with a huge number": (500, {}, b"9" * 10_000),
    "not found": (404, {}, {"error": None}),
    "not allowed": (401, {}, b""),
    "refused": (400, {}, {"detail": [{"loc": ["body"], "msg": "too long"}]}),
    "busy": (429, {"Retry-After": "0"}, {"error": "busy"}),
    "busy for long": (429, {"Retry-After": "60"}, {"error": "busy"}),
}
GENERATORS = {
    "no usage": choice(token_ids=KeyError),
    **{f"{value!r} tokens": (200, {}, {"choices": [TEXT], "usage": {"completion_tokens": value}})
       for value in (None, -5, 0, 2.5, "2", 10**20)},
    "usage of nothing": (200, {}, {"choices": [TEXT], "usage": None}),
    "no ids": choice(token_ids=[]),
    "no step, no ids": choice(text="---\n\n", token_ids=[]),
    "ids that are none": choice(token_ids=5),
    "more than was asked for": choice(token_ids=[5] * 600),
    "no text": choice(text=None),
    "a number for a text": choice(text=7),
    "no end": choice(finish_reason=KeyError),
    "no stop": choice(stop_reason=KeyError),
    "an end of its own": choice(finish_reason="abort\ud800"),
    "a thought": choice(text="<think> so"),
}  # fmt: skip
SCORERS = {
    **{f"{name} row": rows(row) for name, row in {
        "an empty": [], "a narrow": [0.5], "a wide": [0.1, 0.2, 0.7], "no": None, "a worded": ["a", "b"],
        "a nested": [[0.5], [0.5]], "a named": {"0": 0.5, "1": 0.5}}.items()},
    "too few": rows(),
    "too many": rows(*[[0.5, 0.5]] * 100),
    **{f"scores {low}, {high}": (200, {}, f'{{"data": [{{"data": [[{low}, {high}]]}}]}}'.encode())
       for low, high in [("NaN", "NaN"), ("0.5", "NaN"), ("-0.5", "1.5"), ("0.3", "0.3"), ("Infinity", "-Infinity")]},
}  # fmt: skip
KINDS = [
    (role, name, reply)
    for role in ROLES
    for name, reply in (ANYBODY | (SCORERS if role == "prm" else GENERATORS)).items()
]
CASES = [
    pytest.param(role, reply, place % 2 == 0, id=f"{role}: {name}") for place, (role, name, reply) in enumerate(KINDS)
]


@pytest.fixture(autouse=True)
def well_again(trio: Trio, routed: Router) -> Iterator[None]:
    yield
    trio.wrong, trio.probes_too = {}, False
    routed.wait_up()


def answers(routed: Router, stream: bool = False, **more: Any) -> tuple[list[str], dict[str, Any]]:
    """The fallbacks and the usage of an answer, which is one."""
    answer = routed.chat(stream=stream, stream_options={"include_usage": True} if stream else None, **more)
    if not stream:
        assert answer.status_code == 200, answer.text
        return answer.json()["trim"]["fallbacks"], answer.json()["usage"]["models"]
    *_, end, last, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]", answer.text
    return json.loads(end[6:])["trim"]["fallbacks"], json.loads(last[6:])["usage"]["models"]


@pytest.mark.parametrize(("role", "reply", "stream"), CASES)
def test_wrong_answers_of_every_kind(
    trio: Trio, routed: Router, role: str, reply: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = routed.metric("trim_requests_total", status="500")
    trio.wrong = {role: reply}
    fallbacks, models = answers(routed, stream, max_tokens=8)
    assert f"{'scorer' if role == 'prm' else role} (" in fallbacks[0]
    assert models["large"]["completion_tokens"] + models["large"]["aborted_tokens"] <= MOST
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert routed.metric("trim_requests_total", status="500") == broken


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("1.5", 1.5), ("-5", 0.0), ("nan", 0.0), ("inf", math.inf), ("1e999", math.inf), ("soon", 0.0), ("", 0.0)),
        *((f"Mon, 01 Jan {year} 00:00:00 {zone}", 0.0) for year in ("0001", "2015") for zone in ("-0000", "+2359")),
    ],
)
def test_pauses_that_servers_ask_for_are_numbers(value: str, seconds: float) -> None:
    assert Answer(429, {"Retry-After": value}, b"").retry_after == seconds


@pytest.mark.parametrize(
    "head", ["HTTP/1.0 200 OK\r\n", "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n", "HTTP/1.1 200 OK\r\n"]
)
def test_servers_may_be_old_fashioned(trio: Trio, routed: Router, head: str) -> None:
    """Without a length, an answer ends with its connection."""
    good = {
        role: (lambda path, body: head.encode() + b"\r\n" + json.dumps(trio.good(path, body)).encode())
        for role in ROLES
    }
    trio.wrong = good
    fallbacks, models = answers(routed, max_tokens=8)
    assert fallbacks == [] and models["large"]["completion_tokens"] == 8


def test_a_score_that_rounds_above_one_is_one(trio: Trio, routed: Router) -> None:
    trio.wrong = {"prm": rows([0.0, 1.0078125])}
    answer = routed.chat(max_tokens=2, trace=True).json()["trim"]
    assert answer["fallbacks"] == [] and [step["score"] for step in answer["trace"]] == [1.0]


def test_decoration_without_end_ends_at_the_limits(trio: Trio, routed: Router) -> None:
    trio.wrong = {role: choice(text="---\n\n") for role in ("small", "large")}
    fallbacks, models = answers(routed, max_tokens=20)
    assert models["small"]["completion_tokens"] == 20
    assert models["large"]["completion_tokens"] + models["large"]["aborted_tokens"] <= MOST


def test_probes_answered_wrongly_too_are_noticed_and_so_is_the_return(trio: Trio, routed: Router) -> None:
    for role, reply in (("small", (200, {}, [])), ("large", choice(stop_reason=KeyError)), ("prm", rows([-0.5, 1.5]))):
        trio.wrong, trio.probes_too = {role: reply}, True
        routed.chat(max_tokens=8)
        name = "scorer" if role == "prm" else role
        routed.wait_down(name)
        assert f"{name} (down)" in answers(routed, max_tokens=8)[0][0]
        trio.wrong = {}
        routed.wait_up((name,), within=5)


@pytest.mark.parametrize(
    "read",
    [
        lambda: Answer(200, {}, b'{"logprobs": [NaN, 0.1]}').json(),
        lambda: top_entropy([1000.0]),
        lambda: decoded({"completion_tokens": json.loads("1e999")}),
        lambda: decoded({"completion_tokens": None}),
    ],
)
def test_numbers_that_are_none_are_no_answer(trio: Trio, read: Any) -> None:
    """Before, NaN and what is too large for a number made the service fail."""

    async def asked() -> None:
        probe = Probe(lambda _: ("", {}), lambda *_: None)
        upstream = Upstream("small", config(trio), trio.url, probe, 9.0, Metrics(), [])
        upstream.model = "fake"
        try:
            answer = partial(_checked, lambda body: read(), 4)
            async with upstream.post("completions", {"prompt": [1], "max_tokens": 4}, answer, lambda: True, 0):
                pass
        finally:
            await upstream.close()

    with pytest.raises(Unavailable) as caught:
        asyncio.run(asked())
    assert caught.value.kind == "malformed"
