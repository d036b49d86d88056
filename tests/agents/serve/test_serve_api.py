"""The interface as clients meet it: shapes, streams, errors, limits, keys; upstreams answer with recorded steps."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serve_harness import QUESTION, Router, Upstreams, policy, streamed

from agents.routers.base import Mixture, RandomRate, Threshold
from agents.routers.mlp import ConditionedMLP
from agents.serve import guard
from agents.serve.api import ApiError, parse_request

KEY = "sk-of-this-test"


@pytest.fixture(scope="module")
def guarded(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """With a key for clients, one for upstreams, a policy for a range of λ and small limits."""
    import numpy as np

    random = np.random.default_rng(0)
    shapes = {"0.weight": (8, 5), "0.bias": (8,), "1.weight": (2, 8), "1.bias": (2,)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    ranged = ConditionedMLP("ranged", "agg/1", 1e-4, 1e-2, weights)
    folder = policy(tmp_path_factory.mktemp("ranged"), ranged, default_lam=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIM_TEST_CLIENT_KEY", KEY)
        patch.setenv("TRIM_TEST_UPSTREAM_KEY", "sk-of-upstreams")
        running = Router(
            folder,
            upstreams.urls(),
            api_key_env="TRIM_TEST_CLIENT_KEY",
            upstream_key_env="TRIM_TEST_UPSTREAM_KEY",
            name="served",
            upstream_timeout=4.0,
            max_concurrent=2,
            max_body_bytes=4096,
            max_tokens=60,
        )
    running.client.headers["Authorization"] = f"Bearer {KEY}"
    yield running
    running.stop()


def fails(answer: httpx.Response, status: int, words: str, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert words in error["message"] and error["param"] == param and "Traceback" not in answer.text


# ---------------------------------------------------------------- shapes


def test_an_answer_has_openais_shape_and_tells_what_happened(router: Router) -> None:
    body = router.chat(model="trim-thr", trace=True).json()
    answer = ChatCompletion.model_validate(body)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "trim-thr"
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.role == "assistant"
    trace = body["trim"]["trace"]
    assert answer.choices[0].message.content == "".join(step["text"] for step in trace)
    for step in trace:
        assert step["action"] == (step["score"] < 0.5) and step["author"] == ("large" if step["action"] else "small")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    small = [step["tokens"] for step in trace]
    large = [step["large_tokens"] for step in trace if step["author"] == "large"]
    assert usage["models"]["small"]["completion_tokens"] == sum(small) and len(large) == body["trim"]["escalations"]
    assert usage["models"]["large"]["completion_tokens"] == sum(large)
    assert usage["completion_tokens"] == sum(small) + sum(large)
    assert "trace" not in router.chat().json()["trim"]


def test_a_stream_is_the_same_answer_step_by_step(router: Router) -> None:
    whole = router.chat(trace=True).json()
    chunks = list(streamed(router, trace=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *steps, end, last = chunks[1:]
    assert [step["choices"][0]["delta"]["content"] for step in steps] == [
        step["text"] for step in whole["trim"]["trace"]
    ]
    assert [step["trim"]["score"] for step in steps] == [step["score"] for step in whole["trim"]["trace"]]
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and end["choices"][0]["finish_reason"] == "stop"
    assert {**end["trim"]} == {name: value for name, value in whole["trim"].items() if name != "trace"}
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all("usage" not in chunk for chunk in streamed(router)) and "trim" not in list(streamed(router))[1]


def test_steps_are_sent_when_they_are_accepted(router: Router, upstreams: Upstreams) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
    with router.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
    assert len(times) > 4
    assert times[-1] - times[1] > (len(times) - 3) * 1.5 * upstreams.small.think  # a proposal and a score lie between


def test_the_official_client_understands_everything(router: Router) -> None:
    client = openai.OpenAI(base_url=router.url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["trim-thr"]
    assert client.models.retrieve("trim-thr").id == "trim-thr"
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model="trim-thr", messages=messages, extra_body={"trace": True})
    assert answer.usage is not None and answer.model_dump()["trim"]["trace"]
    plain = client.chat.completions.create(model="trim-thr", messages=messages[1:])
    assert plain.usage is not None and answer.usage.prompt_tokens > plain.usage.prompt_tokens
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model="trim-thr", messages=messages, stream=True, stream_options=options)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content and chunks[-1].usage == answer.usage
    for error, more in (
        (openai.NotFoundError, {"model": "gpt"}),
        (openai.BadRequestError, {"n": 2}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": "trim-thr", "messages": messages, **more})
        assert caught.value.body and str(caught.value.status_code) == caught.value.code  # type: ignore[attr-defined]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "words", "param"),
    [
        ({"n": 2}, "not supported", "n"),
        ({"logprobs": True}, "not supported", "logprobs"),
        ({"stop": ["\n"] * 17}, "at most 16", "stop"),
        ({"presence_penalty": 0.5}, "not supported", "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "not supported", "response_format"),
        ({"budgt": 0.2}, "Did you mean 'budget'?", "budgt"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens"),
        ({"seed": -1}, "seed", "seed"),
        ({"stream_options": {"include_usage": True}}, "stream=True", "stream_options"),
        ({"lam": 1e-3}, "fixed setting", "lam"),
        ({"budget": 0.3}, "fixed setting", "budget"),
        ({"lam": 1e-3, "budget": 0.3}, "not both", "budget"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "no room", "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(router: Router, more: Any, words: str, param: str) -> None:
    fails(router.chat(**more), 400, words, param)


def test_messages_without_a_problem_at_the_end_and_pictures_are_refused(router: Router) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for messages in ([user, assistant], [assistant], [user, {"role": "system", "content": "s"}, user]):
        fails(router.chat(messages=messages), 400, "must be a chat of user and assistant that ends", "messages")
    picture = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    words = "Parts of type `image_url` are not supported here"
    fails(router.chat(messages=[{"role": "user", "content": picture}]), 400, words, "messages.0.content")
    parts = [{"type": "text", "text": QUESTION}]
    text = router.chat().json()["choices"][0]["message"]["content"]
    assert router.chat(messages=[{"role": "user", "content": parts}]).json()["choices"][0]["message"]["content"] == text


def test_harmless_parameters_and_defaults_pass(router: Router) -> None:
    harmless = {
        "n": 1,
        "user": "me",
        "stop": None,
        "tools": None,
        "presence_penalty": 0.0,
        "logprobs": False,
        "seed": 4,
    }
    assert router.chat(**harmless, metadata={"a": "b"}, response_format={"type": "text"}).status_code == 200
    assert parse_request(b'{"messages": [{"role": "user", "content": "q"}], "top_k": -1}').top_k == -1
    with pytest.raises(ApiError, match="logprobs"):
        parse_request(b'{"messages": [{"role": "user", "content": "q"}], "logprobs": 1}')


def test_other_addresses_and_bodies_that_are_none(router: Router) -> None:
    fails(router.client.get("/v1/nothing"), 404, "Not Found")
    fails(router.client.get("/v1/chat/completions"), 405, "Method Not Allowed")
    fails(router.client.get("/v1/models/gpt"), 404, "does not exist", "model")
    url = "/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    fails(router.client.post(url, content=b'{"messages": ', headers=json_type), 400, "JSON")
    fails(router.client.post(url, content=b"{}", headers={"Content-Type": "text/plain"}), 400, "application/json")
    fails(router.chat(model="gpt"), 404, "trim-thr", "model")


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_limits_the_text(router: Router, name: str) -> None:
    whole = router.chat().json()
    accepted = whole["usage"]["completion_tokens_details"]["accepted_tokens"]
    cut = router.chat(**{name: accepted // 2}).json()
    assert cut["choices"][0]["finish_reason"] == "length" and cut["trim"]["ended"] == "length"
    assert cut["usage"]["completion_tokens_details"]["accepted_tokens"] == accepted // 2
    assert router.chat(**{name: 10**6}).json()["choices"] == whole["choices"]


def test_the_services_own_limits(guarded: Router) -> None:
    assert guarded.chat(max_tokens=500).json()["usage"]["completion_tokens_details"]["accepted_tokens"] <= 60
    fails(guarded.chat("a" * 5000), 413, "4096 bytes")

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    url = "/v1/chat/completions"
    fails(guarded.client.post(url, content=endless(), headers={"Content-Type": "application/json"}), 413, "4096 bytes")


def test_too_many_at_once_are_told_to_come_back(guarded: Router, upstreams: Upstreams) -> None:
    upstreams.prm.mode("stall")
    try:
        waiting = [threading.Thread(target=guarded.chat) for _ in range(2)]
        for thread in waiting:
            thread.start()
        end = time.monotonic() + 5
        while guarded.metric("trim_requests_in_flight") < 2 and time.monotonic() < end:
            time.sleep(0.02)
        refused = guarded.metric("trim_requests_total", status="429")
        answer = guarded.chat()
        fails(answer, 429, "Too many")
        assert guarded.metric("trim_requests_total", status="429") == refused + 1
        assert guarded.metric("trim_requests_in_flight") == 2
        assert answer.headers["Retry-After"] == "1"
    finally:
        upstreams.well()
    for thread in waiting:
        thread.join(60)
    guarded.wait_up()
    assert guarded.chat().status_code == 200


def test_a_body_that_does_not_come_is_given_up(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_S", 0.3)

    def slow() -> Iterator[bytes]:
        yield b'{"messages"'
        time.sleep(1.5)
        yield b": []}"

    headers = {"Content-Type": "application/json"}
    try:
        answer = router.client.post("/v1/chat/completions", content=slow(), headers=headers)
    except httpx.TransportError:  # the connection was closed while the body was being sent
        return
    fails(answer, 408, "did not come")


# ---------------------------------------------------------------- keys and settings


def test_the_key_is_asked_for_and_kept(guarded: Router, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    for value in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer \u00fc"):
        for path in ("/v1/models", "/v1/chat/completions"):
            answer = httpx.get(
                guarded.url.removesuffix("/v1") + path, headers={"Authorization": value.encode("latin-1")}
            )
            fails(answer, 401, "API key")
    assert httpx.get(guarded.url.removesuffix("/v1") + "/health").status_code == 200
    assert guarded.metric("trim_requests_total", status="401") == 6  # those for the model list are no requests
    answer = guarded.chat(trace=True)
    assert answer.status_code == 200
    everything = answer.text + caplog.text + guarded.client.get("/metrics").text + guarded.client.get("/v1/models").text
    assert KEY not in everything and "sk-of-upstreams" not in everything
    each = [server for upstream in guarded.server.models.upstreams.values() for server in upstream.each]
    assert {server._connection._headers["Authorization"] for server in each} == {"Bearer sk-of-upstreams"}


def test_lam_is_a_setting_of_each_request(guarded: Router) -> None:
    assert guarded.chat().json()["trim"]["knob"] == {"name": "lam", "value": 1e-3}
    assert guarded.chat(lam=5e-3).json()["trim"]["knob"]["value"] == 5e-3
    fails(guarded.chat(lam=1.0), 400, "0.0001 to 0.01", "lam")
    fails(guarded.chat(budget=0.2), 400, "name lam instead", "budget")
    card = guarded.client.get("/v1/models").json()["data"][0]
    assert card["id"] == "served" and card["trim"]["knob"]["high"] == 1e-2


def test_a_seed_fixes_the_routers_draws(upstreams: Upstreams, tmp_path: Path) -> None:
    mixed = Mixture(Threshold(0.3), RandomRate(0.5), 0.5, Threshold(0.3).knob)
    running = Router(policy(tmp_path, mixed), upstreams.urls())
    try:
        actions = [
            [step["action"] for step in running.chat(seed=seed, trace=True).json()["trim"]["trace"]]
            for seed in (1, 1, 1, *range(2, 12))
        ]
        assert actions[0] == actions[1] == actions[2]
        assert len({json.dumps(each) for each in actions}) > 1
    finally:
        running.stop()


def test_sampling_is_the_rollouts_unless_the_request_says_otherwise() -> None:
    from rollouts.config import Sampling

    usual = Sampling(0.7, 0.9, 20, 0.1)
    ask = parse_request(b'{"messages": [{"role": "user", "content": "q"}]}')
    assert ask.sampling(usual) == usual
    ask = parse_request(b'{"messages": [{"role": "user", "content": "q"}], "temperature": 0, "top_k": -1}')
    assert ask.sampling(usual) == Sampling(0.0, 0.9, 0, 0.1)


def test_metrics_count_what_answers_tell(router: Router) -> None:
    names = [("trim_tokens_total", {"model": model, "kind": kind}) for model in ("small", "large")
             for kind in ("prompt", "completion", "discarded")]  # fmt: skip
    names += [
        ("trim_escalations_total", {}),
        ("trim_requests_total", {"status": "200"}),
        ("trim_router_seconds_count", {}),
    ]
    before = [router.metric(name, **labels) for name, labels in names]
    answers = [answer.json() for answer in router.chats(6)]
    after = [router.metric(name, **labels) for name, labels in names]
    usage = [answer["usage"]["models"] for answer in answers]
    expected = [sum(each[labels["model"]][f"{labels['kind']}_tokens"] for each in usage) for _, labels in names[:6]]
    expected += [sum(a["trim"]["escalations"] for a in answers), 6, sum(a["trim"]["steps"] for a in answers)]
    assert [one - other for one, other in zip(after, before, strict=True)] == expected
