"""One model answers, the policy only watches: what is told of it is what evaluation says, and disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_harness import Router, Upstreams, streamed
from test_serve_asking import Recorded
from test_serve_route import TASK, Scripted

from agents.deploy.policy import Policy
from agents.evaluation.walk import run_trees
from agents.routers.base import Threshold
from agents.serve.route import Route
from agents.serve.shadow import Shadow
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

TREES = 200


class Replayed(Recorded):
    """Models that write what a bundled tree holds."""

    def __init__(self, tables: DecisionTables, place: int) -> None:
        Scripted.__init__(self, [])
        self.trees, self.places = tables.trees, {(): int(tables.roots[place])}
        self.look = np.zeros((self.trees.nodes, 2))
        self.large = 0

    async def step(self, role: str, *arguments: Any, **options: Any) -> Any:
        self.large += role == "large"
        return await super().step(role, *arguments, **options)


def shadowed(models: Any, policy: Policy, only: Any, **more: Any) -> Shadow:
    served = Route(TASK, policy.session(), only=only)
    shadow = Shadow(TASK, policy.session(), served=served, **more)

    async def run() -> None:
        beside = asyncio.create_task(shadow.run(models, asyncio.get_running_loop().time() + 60))
        async for _ in served.steps(models, asyncio.get_running_loop().time() + 60):
            await asyncio.sleep(0)
            shadow.news.set()
        shadow.news.set()
        await beside

    asyncio.run(run())
    return shadow


@pytest.fixture(scope="module")
def tables() -> DecisionTables:
    trees = compile_store("quickstart", split="test")
    return decision_tables(trees, "test", indices=trees.select("test")[:TREES])


@pytest.mark.parametrize("level", [0.3, 0.8])
def test_the_would_be_share_is_that_of_evaluation(tables: DecisionTables, level: float) -> None:
    router = Threshold(level)
    totals = run_trees(tables, router)
    policy = Policy(router, {"max_steps": tables.trees.meta["max_steps"], "max_escalations": tables.max_escalations})
    estimated, firsts = 0, 0
    for place in range(len(tables.indices)):
        full = shadowed(Replayed(tables, place), policy, "large")
        decided = full.decided()
        assert {each[2:] for each in decided} == {("exact", "exact")} and full.complete
        large = [tokens for author, tokens, *_ in decided if author == "large"]
        assert (len(large), sum(large), len(decided)) == tuple(
            int(totals[name][place]) for name in ("escalations", "large_tokens", "steps")
        )
        models = Replayed(tables, place)
        free = shadowed(models, policy, "small")
        assert models.large == 0 and free.complete
        assert free.served.written[-1].author == "small" and len(free.written) == len(free.served.written)
        assert (not free.refused) == (totals["escalations"][place] == 0)  # known exactly: whether it would escalate
        first = next((at for at, each in enumerate(decided) if each[0] == "large"), None)
        assert (free.refused or [None])[0] == first  # and where first
        assert free.report()["exact_steps"] == (len(free.written) if first is None else first + 1)
        assert free.same_answer is (True if first is None else None)
        estimated, firsts = estimated + len(free.refused), firsts + bool(free.refused)
    assert firsts > 10 and estimated == pytest.approx(totals["escalations"].sum(), rel=0.1)  # on these trees


def test_a_step_at_a_shared_prefix_is_not_written_twice() -> None:
    models = Scripted([0.1, 0.9, 0.9, 0.9] + [0.9] * 9)
    shadow = shadowed(models, Policy(Threshold(0.5), {"max_steps": 6}), "large")
    assert [step.author for step in shadow.written] == ["large", "small", "small", "small"]
    assert sum(asked[0] == "large" for asked in models.asked) == 4 == len(shadow.served.written)
    assert shadow.ledger.roles["large"].completion_tokens == 0
    report = shadow.report()
    assert report["large_steps"] == 1 and report["exact"] and report["large_token_share"] == 21 / (21 + 12 + 13 + 14)


def test_after_the_first_would_be_escalation_figures_are_estimates() -> None:
    shadow = shadowed(Scripted([0.9, 0.1, 0.9, 0.2]), Policy(Threshold(0.5), {"max_steps": 6}), "small")
    assert [each[0] for each in shadow.decided()] == ["small", "large", "small", "large"]
    assert [each[2:] for each in shadow.decided()] == [
        ("exact", "exact"),
        ("exact", "estimate"),
        ("estimate", "estimate"),
        ("estimate", "estimate"),
    ]
    report = shadow.report()
    assert report | {"exact": False, "exact_steps": 2, "answer": None, "same_answer": None, "large_steps": 2} == report


@pytest.mark.parametrize("fallback", ["small", "large", "error"])
def test_what_fails_beside_is_no_fault_of_the_answer(fallback: Any) -> None:
    policy = Policy(Threshold(0.5), {"max_steps": 6})
    shadow = shadowed(Scripted([0.9] * 9, down=("scorer",)), policy, "small", when_scorer_fails=fallback)
    assert shadow.served.ended and all(step.author == "small" for step in shadow.served.written)
    assert shadow.complete is (fallback != "error") and bool(shadow.refused) is (fallback == "large")


@pytest.fixture(scope="module", params=["small", "large"])
def watched(request: Any, upstreams: Upstreams, folder: Path) -> Iterator[Router]:
    running = Router(folder, upstreams.urls(), upstream_timeout=3.0, shadow=request.param)
    yield running
    running.stop()


def test_the_service_answers_with_one_model_and_tells_the_rest(watched: Router) -> None:
    served = watched.server.service.config.shadow
    answer = watched.chat(trace=True)
    assert answer.status_code == 200 and answer.headers["X-Trim-Shadow"] == served
    trim = answer.json()["trim"]
    assert trim["large_token_share"] == float(served == "large") and {step["author"] for step in trim["trace"]} == {
        served
    }
    shadow = trim["shadow"]
    assert (
        shadow["complete"]
        and shadow["served"] == served
        and shadow["exact"] == (served == "large" or shadow["large_steps"] == 0)
    )
    assert len(shadow["trace"]) == shadow["steps"] > 0 and 0 <= shadow["large_token_share"] <= 1
    *_, last = streamed(watched, trace=True)
    assert last["trim"]["shadow"]["complete"]
    before = sum(watched.metric("trim_shadows_total", answer=word) for word in ("same", "other", "unknown"))
    assert (
        before == 2
        and sum(watched.metric("trim_steps_total", author=each) for each in {"small", "large"} - {served}) == 0
    )
    counted = sum(
        watched.metric("trim_shadow_steps_total", author=author, known=known)
        for author in ("small", "large") for known in ("exact", "estimate")
    )  # fmt: skip
    assert counted == shadow["steps"] + last["trim"]["shadow"]["steps"]


def test_a_client_that_leaves_ends_the_shadow_too(watched: Router, upstreams: Upstreams) -> None:
    upstreams.prm.mode("stall")
    try:
        with pytest.raises(Exception, match="timed out"):
            watched.client.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "Let a=4. Find a."}], "trace": True},
                timeout=0.5,
            )
        watched.idle()
        assert not watched.server.service._shadows
        untraced = watched.chat("Let a=5. Find a.")  # nobody waits for what is decided
        assert untraced.status_code == 200 and not untraced.json()["trim"]["shadow"]["complete"]
    finally:
        upstreams.prm.mode("ok")


def test_shadows_beyond_what_is_allowed_at_once_are_dropped_and_counted(upstreams: Upstreams, folder: Path) -> None:
    running = Router(folder, upstreams.urls(), shadow="small", shadow_share=1.0, max_concurrent=2)
    try:
        upstreams.prm.mode("stall")
        for number in range(4):  # served one after the other, while their shadows wait for scores
            assert running.chat(f"Let a={number}. Find a.").status_code == 200
        assert running.metric("trim_shadows_total", answer="dropped") == 2
    finally:
        upstreams.prm.mode("ok")
        running.stop()
