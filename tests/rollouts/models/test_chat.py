"""Single steps by chat, against a server that misbehaves on command and a real one."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import Any

import pytest
from fake_server import (
    FakeServer,
    Reply,
    chat_config,
    chat_reply,
    error_reply,
    fake,
    gone,
)

from rollouts.config import Limits
from rollouts.errors import BackendError, ConfigError
from rollouts.models.server.chat import ChatWriter, first_step
from rollouts.models.stepwise import Generation
from rollouts.text.steps import Prefix, Step, StopReason

__all__ = ["fake"]


DONE = Step("c=7\n\n", 5, StopReason.DELIMITER)


def writer(server: FakeServer, **settings: Any) -> closing[ChatWriter]:
    return closing(ChatWriter("large", chat_config(server, **settings), Limits(step_tokens=64), lambda *_: True))


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        ("Step 4: b=3", "b=3"),
        ("**Step 4:** b=3\n\nStep 5: c=4", "b=3"),
        ("**Step 4: Compute b**\n\nb=3\n\nc=4", "b=3"),
        ("### Step 4\nSo b=3", "So b=3"),
        ("4. So b=3", "So b=3"),
        ("4.5+1=5.5", "4.5+1=5.5"),
        ("12. So", "12. So"),
        ("Step 4 (add) - b=3", "b=3"),
        ("**Step 4: first,** then b=3", "**first,** then b=3"),
        ("The next step is to add 3.", "The next step is to add 3."),
        ("Step functions jump.", "Step functions jump."),
        ("---\n\nb=3\n\nc=4", "b=3"),
        ("<think>hm\n\nwell</think>\n\nb=3", "b=3"),
        ("<think>hm", ""),
        ("Step 4:", ""),
        ("\n\n---", ""),
    ],
)
def test_first_step_of_an_answer(answer: str, step: str) -> None:
    assert first_step(answer, 4)[0] == step


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([chat_reply("Step 3: c=7")], Step("c=7\n\n", 5, StopReason.DELIMITER)),
        ([chat_reply("c=7\n\nd=8", "length")], Step("c=7\n\n", 5, StopReason.DELIMITER)),
        ([chat_reply("c=7 and", "length")], Step("c=7 and", 5, StopReason.LENGTH)),
        ([chat_reply("", "length")], Step("", 5, StopReason.FAILED)),  # all of it went into thinking that it hides
        ([chat_reply(None, "length")], Step("", 5, StopReason.FAILED)),
        ([chat_reply("<think>Let me see", "length")], Step("", 5, StopReason.FAILED)),
        ([chat_reply([], "length")], Step("", 5, StopReason.FAILED)),
        ([chat_reply([{"type": "text", "text": "Step 3: "}, {"type": "text", "text": "c=7"}])], DONE),
        ([chat_reply(["c=", "7"])], DONE),
        ([chat_reply([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "c=7"}])], DONE),
        ([chat_reply([{"type": "reasoning", "text": "hm\n\nwell"}, {"type": "output_text", "text": "c=7"}])], DONE),
        ([chat_reply("c=7\n \nd=8")], DONE),
        ([chat_reply("c=7\r\n\r\nd=8", "length")], DONE),
        ([chat_reply("So \\boxed{7}.\n\nDone")], Step("So \\boxed{7}.", 5, StopReason.BOXED)),
        (
            [chat_reply("## Step 3"), chat_reply("## Step 3\n\nc=7\n\nd", "stop", 9)],
            Step("c=7\n\n", 14, StopReason.DELIMITER),
        ),
        ([chat_reply("## Step 3"), chat_reply("## Step 3", "stop", 9)], Step("", 14, StopReason.FAILED)),
        ([chat_reply(None, "content_filter")], Step("", 5, StopReason.FAILED)),
        ([error_reply(400, "no")], Step("", 0, StopReason.FAILED)),
    ],
)
def test_chat_answers(fake: FakeServer, replies: list[Reply], expected: Step) -> None:
    with writer(fake, sampling={"temperature": 0.5}) as large:
        first = len(fake.seen)
        fake.fault = lambda *_: replies[len(fake.seen) - first - 1]
        steps = ("a=1\n\n", "b=2\n\n")
        done = large.submit(Prefix("p", "Find c.", 0, steps, 8), whole=False).result(10)
    assert done == Generation((expected,), expected.tokens, reason=done.reason)
    assert bool(done.reason) is (expected.stop_reason is StopReason.FAILED)
    asked = [body for _, body in fake.seen[first:]]
    assert len(asked) == len(replies)
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
    text = asked[0]["messages"][1]["content"]
    assert "Find c." in text and "Step 1: a=1\nStep 2: b=2\n" in text and "next step" in text and "\\boxed{}" in text
    assert (asked[0]["max_tokens"], asked[0]["temperature"], asked[0]["stop"]) == (64, 0.5, ["\n\n"])
    assert all("stop" not in body for body in asked[1:])


@pytest.mark.parametrize("content", ["", None, " \n"])
def test_a_vendor_that_answers_without_a_text_is_refused_at_the_start(fake: FakeServer, content: Any) -> None:
    fake.fault = lambda path, *_: chat_reply(content) if "chat" in path else None
    with pytest.raises(ConfigError, match=r"large: http.*/v1 answered a chat with fake without text .ended by 'stop'"):
        writer(fake)
    fake.fault = lambda path, *_: chat_reply(content, "length") if "chat" in path else None
    writer(fake).thing.close()  # it may have thought


@pytest.mark.parametrize("usage", [{"completion_tokens": -1}, {"completion_tokens": float("inf")}])
def test_an_answer_whose_tokens_cannot_be_counted_is_a_failed_step(fake: FakeServer, usage: dict[str, Any]) -> None:
    with writer(fake, retries=0) as large:
        choice = {"message": {"content": "Step 1: c=3"}, "finish_reason": "stop"}
        fake.fault = lambda *_: (200, {}, {"choices": [choice], "usage": usage})
        done = large.submit(Prefix("p", "Find c.", 0, (), 0), whole=False).result(10)
    assert done.steps[0].stop_reason is StopReason.FAILED and "cannot be read" in done.reason


@pytest.mark.parametrize("content", [None, "", []])
def test_a_budget_spent_on_hidden_thinking_is_a_failed_step_with_its_reason(fake: FakeServer, content: Any) -> None:
    message = {"content": content, "reasoning_content": "Let me see.\n\nFirst"}
    usage = {"completion_tokens": 64, "completion_tokens_details": {"reasoning_tokens": 64}}
    with writer(fake) as large:
        choice = {"message": message, "finish_reason": "length"}
        fake.fault = lambda *_: (200, {}, {"choices": [choice], "usage": usage})
        done = large.submit(Prefix("p", "Find c.", 0, (), 0), whole=False).result(10)
    assert done.steps == (Step("", 64, StopReason.FAILED),) and done.decoded == 64
    assert "64 tokens" in done.reason and "limits.step_tokens" in done.reason


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"completion_tokens": 9}, 9),
        ({"completion_tokens": 9, "prompt_tokens": 20, "total_tokens": 29}, 9),
        ({"completion_tokens": 39, "completion_tokens_details": {"reasoning_tokens": 30}}, 39),
        ({"completion_tokens": 39, "completion_tokens_details": None, "total_tokens": None}, 39),
        ({"completion_tokens": 9, "prompt_tokens": 20, "total_tokens": 59}, 39),  # hidden ones are in the sum only
        ({"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 30}}, 39),
    ],
)
def test_hidden_tokens_are_decoded_tokens(fake: FakeServer, usage: Any, tokens: int) -> None:
    with writer(fake) as large:
        choice = {"message": {"content": "c=7", "reasoning": "hm"}, "finish_reason": "stop"}
        fake.fault = lambda *_: (200, {}, {"choices": [choice], "usage": usage})
        done = large.submit(Prefix("p", "Find c.", 0, (), 0), whole=False).result(10)
    assert done.steps == (Step("c=7\n\n", tokens, StopReason.DELIMITER),) and done.decoded == tokens


def test_a_server_whose_messages_cannot_be_read_is_refused_at_once(fake: FakeServer) -> None:
    fake.fault = lambda path, *_: chat_reply({"text": "OK"}) if "chat" in path else None
    with pytest.raises(ConfigError, match="neither text nor a list of parts"):
        writer(fake, retries=0)


def test_chat_leaves_out_what_a_vendor_refuses(fake: FakeServer) -> None:
    def vendor(path: str, body: Any, count: int) -> Any:
        if path != "/v1/chat/completions":
            return error_reply(404, "nothing here")
        if "max_tokens" in body:
            return error_reply(
                400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            )
        refused = next((name for name in ("stop", "top_p", "min_p") if name in body), None)
        if refused:
            return error_reply(400, f"Unsupported parameter: '{refused}'")
        return error_reply(422, "Extra inputs are not permitted") if "top_k" in body else None

    fake.fault = vendor
    with writer(fake, system_prompt=None) as large:
        submit = partial(large.submit, Prefix("p", "Find a.", 0, (), 0), whole=False)
        assert submit().result(10).steps == (Step("a=1\n\n", 2, StopReason.DELIMITER),)
        assert large.describe()["unsent"] == ["min_p", "repetition_penalty", "stop", "top_k", "top_p"]
        fake.fault = lambda *_: error_reply(500, "boom")
        gone(submit, [submit()], "HTTP 500: boom")
    fake.fault = vendor
    for wanted, value in (("min_p", 0.1), ("top_k", 5)):
        with pytest.raises(ConfigError, match=f"refuses {wanted} = {value}"):
            writer(fake, sampling={wanted: value})
    fake.fault = lambda path, *_: error_reply(404, "no such model") if "chat" in path else None
    with pytest.raises(BackendError, match="no such model.*Did you mean 'fake'"):
        writer(fake, model="fak")


QUOTA = {"error": {"message": "You exceeded your current quota.", "type": "insufficient_quota", "param": None}}


def test_an_empty_account_ends_the_run_at_once_with_the_reason(fake: FakeServer) -> None:
    with writer(fake, retries=4) as large:
        submit = partial(large.submit, Prefix("p", "Find a.", 0, (), 0), whole=False)
        assert submit().result(10).steps[0].stop_reason is StopReason.DELIMITER
        fake.fault = lambda *_: (429, {}, QUOTA)  # not the 429 of somebody who is only too fast
        began = time.monotonic()
        gone(submit, [submit()], "You exceeded your current quota", "wants to be paid first")
        assert time.monotonic() - began < 5
