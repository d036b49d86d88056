"""The route of one request over scripted models: what is asked of whom, what is counted, what happens without them."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from made_pomdps import made_model

from agents.deploy.policy import Policy
from agents.routers.base import Threshold
from agents.routers.pomdp.router import PomdpRouter
from agents.serve.models import Task
from agents.serve.route import Route, RouteFailed
from agents.serve.upstreams import Unavailable
from rollouts.config import Limits, Sampling
from rollouts.text.steps import Step, StopReason

TASK = Task("q", {}, {"small": Sampling(), "large": Sampling()}, Limits(max_steps=6))
ON, END = StopReason.DELIMITER, StopReason.BOXED


class Scripted:
    """Models that write step i with known tokens and scores; a role in `down` does not answer."""

    def __init__(self, scores: list[float], length: int = 4, down: tuple[str, ...] = (), slow: float = 0.0) -> None:
        self.script, self.length, self.down, self.slow = iter(scores), length, set(down), slow
        self.known: dict[tuple[str, ...], float] = {}
        self.asked: list[tuple[Any, ...]] = []

    async def step(self, role: str, task: Task, steps: Any, used: int, ledger: Any, most: int | None = None) -> Step:
        self.asked.append((role, steps, used))
        await asyncio.sleep(self.slow)
        if role in self.down:
            raise Unavailable(role, "down", "secret words of the server")
        number = len(steps) + 1
        tokens = (10 if role == "small" else 20) + number
        cut = most is not None and tokens > most
        tokens = most if cut and most is not None else tokens
        ledger.roles[role].requests += 1
        ledger.roles[role].completion_tokens += tokens
        reason = StopReason.LENGTH if cut else END if number == self.length else ON
        return Step(f"{role} {number}\n\n", tokens, reason)

    def prepare(self, task: Task, steps: Any) -> None:
        pass

    async def scores(self, task: Task, steps: Any, ledger: Any) -> list[float]:
        self.asked.append(("scorer", tuple(steps)))
        if "scorer" in self.down:
            raise Unavailable("scorer", "timeout", "secret words of the server")
        paths = [tuple(steps[: place + 1]) for place in range(len(steps))]
        for path in paths:
            if path not in self.known:
                self.known[path] = next(self.script)
        return [self.known[path] for path in paths]


def route(models: Scripted, fallback: Any = "small", timeout: float = 60, **about: Any) -> Route:
    policy = Policy(Threshold(0.5, schema="agg+prod/1"), {"max_steps": 6, **about})
    going = Route(TASK, policy.session(), fallback)

    async def run() -> None:
        async for _ in going.steps(models, asyncio.get_running_loop().time() + timeout):  # type: ignore[arg-type]
            pass

    asyncio.run(run())
    return going


def folds(going: Route) -> dict[str, float]:
    columns: dict[str, float] = {}
    going.session._folded.tell(columns)
    return columns


def told(going: Route) -> list[tuple[Any, ...]]:
    return [(step.author, step.action, step.score, step.large_score) for step in going.written]


def test_proposals_are_scored_and_bad_ones_written_anew() -> None:
    models = Scripted([0.9, 0.2, 0.8, 0.7, 0.1])
    done = route(models)
    small, large = "small", "large"
    assert told(done) == [(small, 0, 0.9, None), (large, 1, 0.2, 0.8), (small, 0, 0.7, None), (large, 1, 0.1, None)]
    assert done.text == "small 1\n\nlarge 2\n\nsmall 3\n\nlarge 4\n\n" and done.ended == END
    prefix = ("small 1\n\n",)
    assert models.asked[2:6] == [
        (small, prefix, 11),
        ("scorer", (*prefix, "small 2\n\n")),
        (large, prefix, 11),  # from the same prefix, without the proposal
        (small, (*prefix, "large 2\n\n"), 33),
    ]
    assert models.asked[6] == ("scorer", (*prefix, "large 2\n\n", "small 3\n\n"))  # scores both
    assert [step.late_scores for step in done.written] == [(), (), (0.8,), ()]
    assert models.asked[-1] == (large, tuple(step.text for step in done.written[:3]), 46)  # the end is not scored
    usage = done.usage()
    assert usage["completion_tokens"] == (11 + 12 + 13 + 14) + (22 + 24) == 96
    assert usage["completion_tokens_details"] == {
        "accepted_tokens": 70,
        "rejected_prediction_tokens": 26,
        "reasoning_tokens": 0,
    }
    assert usage["models"]["small"]["discarded_tokens"] == 26 and usage["models"]["large"]["discarded_tokens"] == 0
    assert done.large_token_share == 46 / 70
    assert (done.session.escalations, done.session.large_tokens, done.session.ended) == (2, 46, True)


def test_scores_of_large_steps_count_in_later_features(monkeypatch: pytest.MonkeyPatch) -> None:
    going = route(Scripted([0.9, 0.2, 0.05, 0.7, 0.6]))
    # the accepted ones', and not the proposal's 0.2
    assert folds(going) == pytest.approx({"min_score": 0.05, "product_score": 0.9 * 0.05 * 0.7 * 0.6})


def test_scores_that_come_late_count_all_the_same() -> None:
    models = Scripted([0.9, 0.3, 0.4, 0.6, 0.1], length=5)
    answers = models.scores

    async def seldom(task: Task, steps: Any, ledger: Any) -> list[float]:
        if len(steps) in (2, 3):  # the scorer is away for two steps
            raise Unavailable("scorer", "down", "gone")
        return await answers(task, steps, ledger)

    models.scores = seldom  # type: ignore[method-assign]
    done = route(models)
    assert told(done)[:4] == [("small", 0, 0.9, None), *[("small", None, score, None) for score in (0.3, 0.4)],
                              ("small", 0, 0.6, None)]  # fmt: skip
    assert [step.late_scores for step in done.written] == [(), (), (), (0.3, 0.4), ()]
    assert folds(done)["min_score"] == pytest.approx(0.3) and done.session.ended and done.session.step == 6


def test_caps_of_the_policy_bind() -> None:
    done = route(Scripted([0.1, 0.9, 0.1, 0.1, 0.1]), max_escalations=1)
    assert [step.author for step in done.written] == ["large", "small", "small", "small"]
    done = route(Scripted([0.1, 0.9, 0.1, 0.1, 0.1]), max_large_tokens=30)
    assert [(step.author, step.large_tokens) for step in done.written] == [
        ("large", 21),
        ("small", 9),  # cut off at what was left
        ("small", None),
        ("small", None),
    ]
    assert "cap" in str(done.written[1].fallback) and done.session.large_tokens == 30
    assert done.usage()["models"]["large"] == {
        "requests": 2,
        "prompt_tokens": 0,
        "completion_tokens": 30,
        "aborted_tokens": 0,
        "reasoning_tokens": 0,
        "discarded_tokens": 9,
    }


@pytest.mark.parametrize(
    ("down", "fallback", "authors", "words"),
    [
        (("scorer",), "small", {"small"}, "scorer (timeout): the proposal was kept"),
        (("scorer",), "large", {"large"}, "scorer (timeout): the large model wrote the step"),
        (("scorer", "large"), "large", {"small"}, "scorer (timeout): large (down): the proposal was kept"),
        (("small",), "small", {"large"}, "small (down): the large model wrote the step"),
        (("small", "scorer"), "error", {"large"}, "small (down): the large model wrote the step"),
        (("large",), "small", {"small"}, "large (down): the proposal was kept"),
    ],
)
def test_who_writes_when_somebody_does_not_answer(down: Any, fallback: Any, authors: Any, words: str) -> None:
    done = route(Scripted([0.1] * 9, down=down), fallback)
    assert {step.author for step in done.written} == authors and len(done.written) == 4 and done.ended == END
    assert all(str(step.fallback).startswith(words) for step in done.written)
    assert len(done.summary(trace=False)["fallbacks"]) == 4 and "secret" not in str(done.summary(trace=True))
    assert done.session.step == 5 and done.session.escalations == 4 * (authors == {"large"})
    small, large = (done.usage()["models"][role] for role in ("small", "large"))
    assert small["completion_tokens"] == (0 if "small" in down else 50)
    assert large["completion_tokens"] == (90 if authors == {"large"} else 0)
    assert small["discarded_tokens"] == (50 if authors == {"large"} and "small" not in down else 0)


def test_caps_of_the_policy_bind_without_the_small_model() -> None:
    done = route(Scripted([0.9] * 9, down=("small",)), max_escalations=1)
    assert [step.author for step in done.written] == ["large"]
    assert (done.ended, done.finish_reason) == ("cap", "length")
    assert done.summary(trace=False)["fallbacks"] == [
        "step 1: small (down): the large model wrote the step",
        "step 2: small (down): the policy's cap leaves the large model nothing",
    ]
    done = route(Scripted([0.9] * 9, down=("small",)), max_large_tokens=25)
    assert [(step.author, step.large_tokens) for step in done.written] == [("large", 21), ("large", 4)]
    assert "up to the policy's cap" in str(done.written[1].fallback) and done.finish_reason == "length"
    for away in ("large", "small"):
        with pytest.raises(RouteFailed, match="The first step cannot be written: small .down.: the policy's cap"):
            route(Scripted([0.9] * 9, down=("small", away)), max_large_tokens=0)


def test_caps_of_the_policy_bind_without_the_scorer() -> None:
    done = route(Scripted([0.9] * 9, down=("scorer",)), "large", max_large_tokens=30)
    assert [(step.author, step.large_tokens) for step in done.written] == [
        ("large", 21),
        ("small", 9),
        ("small", None),
        ("small", None),
    ]
    assert "cap" in str(done.written[1].fallback) and "cap" in str(done.written[3].fallback) and done.ended == END


def test_a_missing_proposal_can_be_an_error() -> None:
    policy = Policy(Threshold(0.5), {"max_steps": 6})
    going = Route(TASK, policy.session(), when_small_fails="error")

    async def run() -> None:
        models = Scripted([0.9] * 9, down=("small",))
        async for _ in going.steps(models, asyncio.get_running_loop().time() + 9):  # type: ignore[arg-type]
            pass

    with pytest.raises(RouteFailed, match=r"There is no proposal: small \(down\)"):
        asyncio.run(run())


class Flickering(Scripted):
    """Each request fails by chance; a large one that fails may have been decoded as far as it might."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        super().__init__([self.draw.random() for _ in range(99)], length=self.draw.randrange(3, 7))
        self.decoded = 0

    async def step(self, role: str, task: Task, steps: Any, used: int, ledger: Any, most: int | None = None) -> Step:
        self.down = {role} if self.draw.random() < 0.4 else set()
        if role == "large" and self.down:
            vain = 40 if most is None else most
            ledger.roles[role].aborted_tokens += vain
            self.decoded += vain
        before = ledger.roles[role].completion_tokens
        step = await super().step(role, task, steps, used, ledger, most)
        self.decoded += (ledger.roles[role].completion_tokens - before) * (role == "large")
        return step

    async def scores(self, task: Task, steps: Any, ledger: Any) -> list[float]:
        self.down = {"scorer"} if self.draw.random() < 0.4 else set()
        return await super().scores(task, steps, ledger)


@pytest.mark.parametrize("fallback", ["small", "large"])
def test_caps_of_the_policy_bind_whatever_fails(fallback: str) -> None:
    most, ends = 50, set()
    for seed in range(300):
        models = Flickering(seed)
        policy = Policy(Threshold(0.5, schema="agg+prod/1"), {"max_steps": 6, "max_large_tokens": most,
                                                              "max_escalations": 2})  # fmt: skip
        going = Route(TASK, policy.session(), fallback)  # type: ignore[arg-type]

        async def run(going: Route, models: Any) -> None:
            async for _ in going.steps(models, asyncio.get_running_loop().time() + 60):
                pass

        try:
            asyncio.run(run(going, models))
        except RouteFailed as error:
            assert "Neither model" in str(error) or "cap" in str(error)
        ends.add(going.ended)
        assert models.decoded <= most and sum(step.author == "large" for step in going.written) <= 2
        assert going.session.large_tokens <= most and going.session.escalations <= 2
    assert {END, "cap", None} <= ends


@pytest.mark.parametrize(
    ("down", "fallback", "words"),
    [
        (("small", "large"), "small", r"Neither model answers: small \(down\); large \(down\)"),
        (("scorer",), "error", r"cannot be scored: scorer \(timeout\)"),
    ],
)
def test_what_cannot_go_on_is_an_error(down: Any, fallback: Any, words: str) -> None:
    with pytest.raises(RouteFailed, match=words) as caught:
        route(Scripted([0.1] * 9, down=down), fallback)
    assert caught.value.status == 503 and "secret" not in str(caught.value)


def test_time_is_limited_and_what_there_is_counts() -> None:
    done = route(Scripted([0.9] * 9, length=99, slow=0.1), timeout=0.25)
    assert done.ended == "time" and len(done.written) == 2 and done.finish_reason == "length"
    with pytest.raises(RouteFailed, match="Time was up") as caught:
        route(Scripted([0.9] * 9, slow=0.5), timeout=0.1)
    assert caught.value.status == 504


def test_the_horizon_ends_a_session_with_the_solution() -> None:
    models = Scripted([0.9] * 9, length=99)

    async def limited(*arguments: Any, **named: Any) -> Step:
        step = await Scripted.step(models, *arguments, **named)
        return Step(step.text, step.tokens, StopReason.MAX_STEPS) if len(arguments[2]) == 5 else step

    models.step = limited  # type: ignore[method-assign]
    done = route(models)
    assert len(done.written) == 6 and done.session.ended and done.finish_reason == "length"


def test_routers_with_a_memory_live_through_every_fault() -> None:
    for down in ((), ("scorer",), ("small",), ("large",), ("small", "scorer")):
        for fallback in ("small", "large"):
            going = Route(TASK, Policy(_pomdp(), {"max_steps": 6}).session(), fallback)  # type: ignore[arg-type]

            async def run(going: Route, models: Any) -> None:
                async for _ in going.steps(models, asyncio.get_running_loop().time() + 60):
                    pass

            asyncio.run(run(going, Scripted([0.1, 0.9] * 9, down=down)))
            assert len(going.written) == 4


def _pomdp() -> PomdpRouter:
    from agents.learners.pomdp.solver import routers

    return routers(made_model(steps=6), [1e-3])[0]
