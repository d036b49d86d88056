"""A query-level router behind the service: one decision from the question, then one model writes everything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serve_harness import ABOUT, QUESTION, Router, Upstreams, policy, streamed

import agents
from agents.baselines.examples import Examples
from agents.baselines.routellm import classifier, neighbours
from agents.deploy.policy import Policy
from agents.routers.base import Knob, Mixture
from agents.routers.text import CharTfidf, TextRouter
from agents.routers.whole import OneModel
from agents.serve.api import ChatRequest
from agents.serve.sources import sources_of
from rollouts.errors import ArtefactError, ConfigError
from trim_env.tables import decision_tables

URLS = ("small", "large")  # there is nothing to score


def questions(split: str) -> list[str]:
    tables = decision_tables("quickstart", split)
    return [tables.trees.questions[each] for each in np.unique(tables.trees.problem[tables.indices])]


@pytest.fixture(scope="module")
def fitted() -> TextRouter:
    examples = Examples.of(decision_tables("quickstart", "validation"))
    found = classifier(examples, CharTfidf.fit(examples.questions, most=256))
    worth = np.sort(found.preference(examples.questions))
    return TextRouter("classifier", Knob("threshold", float(worth[199:201].mean())), found.preference)


def at(router: TextRouter, threshold: float) -> TextRouter:
    return TextRouter(router.name, Knob("threshold", threshold), router.preference)


@pytest.fixture(scope="module")
def served(upstreams: Upstreams, fitted: TextRouter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """The fitted router, and beside it its two ends and a mixture of one of them with a model alone."""
    place = tmp_path_factory.mktemp("query-level")
    ends = {"never": at(fitted, 2.0), "always": at(fitted, -1.0)}
    ends |= {"mixed": Mixture(OneModel(0), at(fitted, -1.0), 0.5, Knob("budget", 0.5))}
    also = tuple(f"{name}={policy(place, router)}" for name, router in ends.items())
    urls = {role: upstreams.urls()[role] for role in URLS}
    running = Router(policy(place, fitted, max_escalations=1), urls, also=also, upstream_timeout=3.0)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def well(upstreams: Upstreams) -> None:
    upstreams.well()


def test_decisions_are_those_of_the_router_on_all_test_problems(served: Router, fitted: TextRouter) -> None:
    asked = questions("test")
    wanted = fitted.sends(asked)
    assert len(asked) == 1000 and 0.2 < wanted.mean() < 0.8

    async def decided() -> list[str | None]:
        service = served.server.service
        bodies = ([{"role": "user", "content": question}] for question in asked)
        return [(await service.begin(ChatRequest(messages=body))).author for body in bodies]

    assert asyncio.run(decided()) == [("small", "large")[int(each)] for each in wanted]


@pytest.mark.parametrize(("model", "author"), [("never", "small"), ("always", "large")])
def test_one_model_writes_everything_and_nothing_is_discarded(served: Router, model: str, author: str) -> None:
    before = served.metric("trim_problems_total", author=author)
    answer = served.chat(model=model, trace=True).json()
    trim, usage = answer["trim"], answer["usage"]
    assert trim["decided"] == {"for": "problem", "model": author, "chance": float(author == "large")}
    assert {step["author"] for step in trim["trace"]} == {author} and trim["ended"] == "boxed"
    assert all(step["action"] is step["score"] is step["rejected"] is None for step in trim["trace"])
    other = "small" if author == "large" else "large"
    assert usage["models"][other]["requests"] == usage["models"]["scorer"]["requests"] == 0
    assert usage["models"][author]["discarded_tokens"] == 0
    assert usage["completion_tokens"] == usage["models"][author]["completion_tokens"] > 0
    assert trim["large_token_share"] == float(author == "large") and trim["escalations"] == 0
    assert served.metric("trim_problems_total", author=author) == before + 1
    assert not served.metric("trim_tokens_total", model=other, kind="discarded")


def test_answers_stream(served: Router) -> None:
    whole = served.chat(model="always", seed=1).json()["choices"][0]["message"]["content"]
    chunks = list(streamed(served, model="always", trace=True))
    text = "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks if each["choices"])
    assert text == whole and sum(bool(each["choices"]) for each in chunks) > 2
    assert chunks[-1]["trim"]["decided"]["model"] == "large"


def test_mixtures_draw_one_decision_for_a_problem(served: Router) -> None:
    drawn = [served.chat(model="mixed", seed=seed).json()["trim"] for seed in range(12)]
    assert {each["decided"]["model"] for each in drawn} == {"small", "large"}
    assert {each["large_token_share"] for each in drawn} == {0.0, 1.0}


def test_who_does_not_answer_is_stood_in_for(served: Router, upstreams: Upstreams) -> None:
    upstreams.large.mode("error")
    trim = served.chat(model="always").json()["trim"]
    assert trim["fallbacks"][0].startswith("step 1: large (") and trim["ended"] == "boxed"
    assert trim["large_token_share"] == 0 and trim["decided"]["model"] == "large"
    upstreams.well()
    served.wait_up()
    upstreams.small.mode("error")
    trim = served.chat(model="never").json()["trim"]
    assert len(trim["fallbacks"]) == trim["steps"] and trim["large_token_share"] == 1 and trim["ended"] == "boxed"
    upstreams.well()
    served.wait_up()


def test_the_model_list_says_what_is_decided(served: Router) -> None:
    card = served.client.get("/v1/models/classifier").json()["trim"]
    assert card["kind"] == "query" and card["features"] == [] and card["decides"] == "once for a problem, from its text"
    assert card["max_escalations"] == 1  # of its rollouts; it binds no query-level router


def test_a_shadow_decides_once(upstreams: Upstreams, fitted: TextRouter, tmp_path: Path) -> None:
    urls = {role: upstreams.urls()[role] for role in URLS}
    running = Router(policy(tmp_path, at(fitted, 2.0)), urls, shadow="large", upstream_timeout=3.0)
    try:
        shadow = running.chat(trace=True).json()["trim"]["shadow"]
        assert shadow["complete"] and shadow["large_steps"] == 0 and shadow["served"] == "large"
        assert {step["author"] for step in shadow["trace"]} == {"small"}
    finally:
        running.stop()


def test_a_policy_has_sessions_of_one_decision(fitted: TextRouter, tmp_path: Path) -> None:
    found = agents.load(policy(tmp_path, fitted, max_escalations=0))
    assert found.decides_once and not sources_of(found).scorer
    asked = questions("validation")[:50]
    assert [found.session().decide(question=each) for each in asked] == fitted.sends(asked).tolist()
    with pytest.raises(ConfigError, match="decides once.*question=..."):
        found.session().decide(score=0.5, tokens=3, text="x")
    json.dumps(found.describe())


def test_what_cannot_be_served_is_refused_by_name(fitted: TextRouter, tmp_path: Path) -> None:
    hidden = neighbours(Examples(("a", "b"), np.eye(2)), lambda texts: np.ones((len(texts), 3)))
    with pytest.raises(
        ArtefactError, match="50 neighbours reads questions with a model of its own.*not there in serving"
    ):
        policy(tmp_path, hidden)
    with pytest.raises(ArtefactError, match="classifier.*cannot keep a cap of large tokens"):
        Policy(fitted, {**ABOUT, "max_large_tokens": 40})


def test_long_questions_are_decided_beside_the_others(served: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.serve.service._SHORT", len(QUESTION) - 1)
    assert served.chat(model="always").json()["trim"]["decided"]["model"] == "large"
