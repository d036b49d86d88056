"""Single steps by chat, against a server that misbehaves on command and a real one."""

from __future__ import annotations

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

from rollouts.config import Sampling
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Completion
from rollouts.models.server.chat import ChatBackend, first_step

__all__ = ["fake"]


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
        ([chat_reply("Step 3: c=7")], Completion("c=7\n\n", 5, None, "stop")),
        ([chat_reply("c=7\n\nd=8", "length")], Completion("c=7\n\n", 5, None, "stop")),
        ([chat_reply("c=7 and", "length")], Completion("c=7 and", 5, None, "length")),
        ([chat_reply("So \\boxed{7}.\n\nDone")], Completion("So \\boxed{7}.", 5, None, "eos")),
        (
            [chat_reply("## Step 3"), chat_reply("## Step 3\n\nc=7\n\nd", "stop", 9)],
            Completion("c=7\n\n", 14, None, "stop"),
        ),
        (
            [chat_reply(None, "content_filter")],
            Completion("", 5, None, "failed", "the server ended the answer with 'content_filter'"),
        ),
        ([error_reply(400, "no")], Completion("", 0, None, "failed", "HTTP 400: no")),
    ],
)
def test_chat_answers(fake: FakeServer, replies: list[Reply], expected: Completion) -> None:
    with ChatBackend("large", chat_config(fake)) as backend:
        first = len(fake.seen)
        fake.fault = lambda *_: replies[len(fake.seen) - first - 1]
        assert backend.submit("Find c.", ["a=1\n\n", "b=2\n\n"], 64, Sampling(0.5)).result(10) == expected
    asked = [body for _, body in fake.seen[first:]]
    assert len(asked) == len(replies)
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
    text = asked[0]["messages"][1]["content"]
    assert "Find c." in text and "Step 1: a=1\nStep 2: b=2\n" in text and "next step" in text and "\\boxed{}" in text
    assert (asked[0]["max_tokens"], asked[0]["temperature"], asked[0]["stop"]) == (64, 0.5, ["\n\n"])
    assert all("stop" not in body for body in asked[1:])


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
    with ChatBackend("large", chat_config(fake, system_prompt=None)) as backend:
        done = backend.submit("Find a.", [], 64, Sampling(0.5)).result(10)
        assert done == Completion("a=1\n\n", 2, None, "stop")
        assert backend.describe()["unsent"] == ["min_p", "repetition_penalty", "stop", "top_k", "top_p"]
        with pytest.raises(ConfigError, match="takes no top_k"):
            backend.submit("Find a.", [], 64, Sampling(0.5, top_k=5))
        fake.fault = lambda *_: error_reply(500, "boom")
        submit = partial(backend.submit, "Find a.", [], 64, Sampling(0.5))
        gone(submit, [submit()], "HTTP 500: boom")
    fake.fault = vendor
    with pytest.raises(ConfigError, match="refuses min_p = 0.1"):
        ChatBackend("large", chat_config(fake, sampling={"min_p": 0.1}))
    fake.fault = lambda path, *_: error_reply(404, "no such model") if "chat" in path else None
    with pytest.raises(BackendError, match="no such model.*Did you mean 'fake'"):
        ChatBackend("large", chat_config(fake, model="fak"))
