"""Scorers of a service that take a request for each step: judges, and reward models that are language models."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, chat_reply, error_reply, fake
from tiny_rewards import QUESTION, STEPS, make_reward_folder

from agents.deploy.policy import Policy
from agents.routers.base import Threshold
from agents.serve.ledger import Ledger
from agents.serve.metrics import Metrics
from agents.serve.models import Models, Task
from agents.serve.route import Route
from agents.serve.upstreams import Unavailable
from rollouts.config import Limits, parse_family
from rollouts.models.base import PoolingRequest
from rollouts.models.server.completions import ServerBackend
from rollouts.tinymath import model_dir

__all__ = ["fake"]


def service(server: FakeServer, **scorer: Any) -> Models:
    model = {"backend": "server", "url": server.url, "model": "fake", "max_length": 1024, **scorer.pop("model", {})}
    role = {**model, "tokenizer": str(model_dir("small")), "system_prompt": ""}
    return Models(parse_family({"small": role, "large": role, "scorer": {"model": model, **scorer}}), 5.0, Metrics())


def scores(models: Models, *paths: list[str], **task: Any) -> tuple[list[Any], Ledger]:
    """What some paths get, one after the other, and what that took."""
    ledger = Ledger()

    async def run() -> list[Any]:
        await models.upstreams["scorer"].start()
        try:
            asked = Task(QUESTION, models.formats(None), {}, models.limits, reward=models.reward(), **task)
            return [await models.scores(asked, path, ledger) for path in paths]
        finally:
            await models.close()

    return asyncio.run(run()), ledger


def chats(server: FakeServer) -> list[str]:
    said = [body["messages"][-1]["content"] for path, body in server.seen if path.endswith("chat/completions")]
    return [text for text in said if "What is 1 + 1?" not in text]


def test_a_judge_is_asked_once_about_each_step_in_terms_that_it_takes(fake: FakeServer) -> None:
    def answer(path: str, body: Any, count: int) -> Any:
        if not path.endswith("chat/completions"):
            return None
        if "logprobs" in body:
            return error_reply(400, "logprobs are not for you")
        status, headers, reply = chat_reply(
            "No" if "Last step:\nStep 2" in str(body["messages"][-1]["content"]) else "Yes"
        )
        return status, headers, {**reply, "usage": {"prompt_tokens": 40, "completion_tokens": 3}}

    fake.fault = answer
    found, ledger = scores(service(fake, kind="judge", max_tokens=99), STEPS[:1], STEPS[:2], STEPS, STEPS)
    assert found == [[1.0], [1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    assert len(chats(fake)) == 3 and all(QUESTION in text for text in chats(fake))
    spent = ledger.roles["scorer"]
    assert (spent.requests, spent.prompt_tokens, spent.completion_tokens) == (3, 120, 9)
    route = Route(Task(QUESTION, {}, {}, Limits()), Policy(Threshold(0.5), {"max_steps": 6}).session(), ledger=ledger)
    usage = route.usage()  # tells what the judge decoded, which is no part of the answer
    assert usage["models"]["scorer"] == {"requests": 3, "prompt_tokens": 120, "completion_tokens": 9}
    assert usage["completion_tokens"] == 0
    assert fake.seen[-1][1]["max_tokens"] == 99 and fake.seen[-1][1]["model"] == "fake"
    scores(service(fake, kind="judge"), STEPS[:1], turns=(("user", "Earlier."),))
    assert "user: Earlier.\n\n" + QUESTION in chats(fake)[-1]


def test_a_judge_that_says_nothing_gave_no_usable_answer(fake: FakeServer) -> None:
    fake.fault = lambda path, body, count: chat_reply("Hm.") if path.endswith("chat/completions") else None
    with pytest.raises(Unavailable, match="no verdict in 'Hm.'"):
        scores(service(fake, kind="judge"), STEPS)


def test_what_a_judge_told_is_kept_where_another_of_its_answers_is_lost(fake: FakeServer) -> None:
    lost: list[str] = []

    def answer(path: str, body: Any, count: int) -> Any:
        if not path.endswith("chat/completions"):
            return None
        if "Last step:\nStep 2" in str(body["messages"][-1]["content"]) and len(lost) < 2:  # it is asked once more
            lost.append("Step 2")
            return chat_reply("Hm.")
        return chat_reply("Yes")

    fake.fault = answer
    judge, ledger = service(fake, kind="judge"), Ledger()

    async def run() -> list[Any]:
        await judge.upstreams["scorer"].start()
        asked = Task(QUESTION, judge.formats(None), {}, judge.limits, reward=judge.reward())
        try:
            with pytest.raises(Unavailable):
                await judge.scores(asked, STEPS, ledger)
            before = len(chats(fake))
            assert await judge.scores(asked, STEPS, ledger) == [1.0] * len(STEPS)
            return chats(fake)[before:]
        finally:
            await judge.close()

    (again,) = asyncio.run(run())
    assert "Last step:\nStep 2" in again


@pytest.mark.parametrize("layout", ["math-shepherd", "rlhflow"])
def test_verdicts_of_a_language_model_are_asked_for_one_by_one(fake: FakeServer, tmp_path: Path, layout: str) -> None:
    fake.card["max_model_len"] = 4096
    folder = make_reward_folder(layout, tmp_path / "tiny")
    models = service(fake, layout=layout, model={"tokenizer": str(folder)})
    style = models.reward()
    assert style is not None and style.reading.verdicts is not None
    ids, places = style.marked(QUESTION, STEPS)
    share = {place: 0.2 + 0.3 * number for number, place in enumerate(places)}

    def answer(path: str, body: Any, count: int) -> Any:
        if path != "/v1/completions":
            return None
        assert style.reading.verdicts is not None and body["logprob_token_ids"] == [*style.reading.verdicts]
        assert body["max_tokens"] == 1 and body["logprobs"] == 2
        right = share.get(len(body["prompt"]) - 1, 0.5) / 4  # other tokens are likelier
        wrong = 0.25 - right
        told = {
            f"token_id:{token}": math.log(p) for token, p in zip(style.reading.verdicts, (wrong, right), strict=True)
        }
        choice = {"text": "x", "finish_reason": "length", "stop_reason": None, "token_ids": [5]}
        return 200, {}, {"choices": [{**choice, "logprobs": {"top_logprobs": [{**told, "token_id:5": -0.1}]}}]}

    fake.fault = answer
    found, ledger = scores(models, STEPS[:2], STEPS)
    assert found[0] == pytest.approx([0.2, 0.5]) and found[1] == pytest.approx([0.2, 0.5, 0.8])
    assert ledger.roles["scorer"].requests == 3
    assert ledger.roles["scorer"].prompt_tokens == sum(place + 1 for place in places)
    config = models.family.config.scorer
    assert config is not None and config.model is not None
    with ServerBackend("scorer", config.model, style.reading) as backend:  # as `rollouts score` asks it
        assert backend.submit(PoolingRequest(ids, places[1:])).result(10) == pytest.approx([0.5, 0.8])
