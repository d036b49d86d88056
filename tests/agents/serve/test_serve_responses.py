"""OpenAI's responses by OpenAI's client: the chat path under other names, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from serve_harness import QUESTION, Router, Upstreams

from agents.serve.api import ApiError
from agents.serve.responses import parse

KEPT = ("previous_response_id", "conversation")
TURN = [{"role": "user", "content": "Let a=1+2. Find a."}]


@pytest.fixture(scope="module")
def client(router: Router) -> openai.OpenAI:
    return openai.OpenAI(base_url=router.url, api_key="none", max_retries=0)


def shaped(response: Response) -> dict[str, Any]:
    """It as JSON, checked against the client's own types."""
    told = response.model_dump()
    Response.model_validate({name: value for name, value in told.items() if value is not None or name == "error"})
    return told


def test_a_response_is_the_chat_s_answer(client: openai.OpenAI, router: Router) -> None:
    chat = router.chat(trace=True).json()
    text = chat["choices"][0]["message"]["content"]
    response = client.responses.create(model="trim-thr", input=QUESTION, extra_body={"trace": True})
    told = shaped(response)
    assert response.output_text == text and (response.status, response.error) == ("completed", None)
    usage = told["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == tuple(
        chat["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")
    )
    assert usage["models"] == chat["usage"]["models"] and told["trim"] == chat["trim"]
    long = client.responses.create(model="trim-thr", input=QUESTION, max_output_tokens=20)
    assert long.status == "incomplete" and long.incomplete_details is not None
    assert long.incomplete_details.reason == "max_output_tokens" and long.max_output_tokens == 20
    assert long.output_text == router.chat(max_tokens=20).json()["choices"][0]["message"]["content"] != text


def test_the_second_turn_takes_what_the_first_gave(client: openai.OpenAI, router: Router) -> None:
    first = client.responses.create(model="trim-thr", input=TURN, instructions="Be brief.")  # type: ignore[arg-type]
    assert first.instructions == "Be brief."
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    parts = [{"type": "input_text", "text": QUESTION}]
    turns: Any = [*TURN, thought, *first.output, {"type": "message", "role": "user", "content": parts}]
    second = client.responses.create(model="trim-thr", input=turns, instructions="Be brief.")
    chat = [
        {"role": "system", "content": "Be brief."},
        *TURN,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": QUESTION},
    ]
    same = router.chat(messages=chat).json()
    assert second.output_text == same["choices"][0]["message"]["content"]
    assert second.usage is not None and second.usage.input_tokens == same["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stop", [None, "\n"])
def test_events_tell_steps_as_they_come(client: openai.OpenAI, router: Router, stop: str | None) -> None:
    whole = router.chat(stop=stop, trace=True).json()
    text, steps = whole["choices"][0]["message"]["content"], whole["trim"]["trace"]
    extra = {"stop": stop, "trace": True}
    with client.responses.stream(model="trim-thr", input=QUESTION, extra_body=extra) as stream:
        events = list(stream)
        final = stream.get_final_response()  # put together by the client
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == text == final.output_text == events[-4].text
    assert len(deltas) == len(steps) + 1 and all(event.delta for event in deltas[:-1])
    last = shaped(events[-1].response)
    assert last["usage"]["output_tokens"] == whole["usage"]["completion_tokens"]
    assert last["trim"]["answer"] == whole["trim"]["answer"]
    assert last["output"][0]["content"][0]["text"] == text and last["output"][0]["status"] == "completed"


def test_a_stream_that_fails_says_so_in_an_event(client: openai.OpenAI, router: Router, upstreams: Upstreams) -> None:
    try:
        stream = client.responses.create(model="trim-thr", input=QUESTION, stream=True, extra_body={"trace": True})
        events: list[Any] = []
        for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                for each in (upstreams.small, upstreams.large):
                    each.mode("error")
        assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
        assert [event.trim["step"] for event in events[4:-1]] == list(range(1, len(events) - 4))
        error, told = events[-1].response.error, shaped(events[-1].response)
        assert error is not None and error.code == "server_error" and "answer" in error.message
        assert told["usage"]["output_tokens"] > 0 and told["trim"]["steps"] >= 1
        router.wait_down("small")
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model="trim-thr", input=QUESTION, stream=True)
    finally:
        upstreams.well()
        router.wait_up()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [1]}, "input"),
        ({"input": " "}, "input"),
        ({"input": "x " * 9000}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input.content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.content"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": 5}, "text"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"colour": 1}, "colour"),
        ({"messages": [{"role": "user", "content": "x"}]}, "input"),
        ({"max_completion_tokens": 5}, "max_output_tokens"),
        ({"metadata": {"a": [1]}}, "metadata"),
        ({"metadata": "x"}, "metadata"),
        ({"conversation": "conv_1"}, "conversation"),
    ],
)
def test_what_is_more_than_a_chat_is_refused_by_its_own_name(router: Router, more: Any, param: str) -> None:
    before = router.metric("trim_requests_total", status="400")
    answer = router.client.post("/v1/responses", json={"input": QUESTION, **more})
    error = answer.json()["error"]
    assert answer.status_code == 400 and param in error["param"] and "messages.0" not in error["message"]
    assert param == "colour" or "Unknown" not in error["message"]
    assert ", messages" not in error["message"] and ("in `input`" in error["message"]) == (param in KEPT)
    assert router.metric("trim_requests_total", status="400") == before + 1


def test_what_clients_send_without_being_asked_is_no_matter() -> None:
    usual = {"background": False, "include": [], "store": True, "truncation": "disabled", "tools": [], "user": None}
    usual |= {"text": {"format": {"type": "text"}}, "reasoning": {"effort": "none", "summary": "auto"}, "metadata": {}}
    usual |= dict.fromkeys((*KEPT, "prompt", "max_tool_calls"))
    assert parse(json.dumps({"input": QUESTION, **usual}).encode()).problem() == (QUESTION, None, ())
    for body in (
        b'{"input": "x", "metadata": {"a": NaN}}',
        b"",
        b"[]",
        b"{}",
        b'{"input": "\\ud800"}',
        b"[" * 100_000,
        b'{"input":' * 150 + b"1" + b"}" * 150,
    ):
        with pytest.raises(ApiError):
            parse(body)
