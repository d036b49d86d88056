"""Policies that buy what they read, in the service: decisions as in Gymnasium and sessions, faults, what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted_store import scripted_store
from serve_harness import Router, policy
from test_serve_route import END, ON, TASK, Scripted

from agents.deploy.policy import Policy
from agents.evaluation.walk import run_trees
from agents.routers.asking import HEADS, Asking
from agents.routers.base import Knob, Mixture, Threshold
from agents.serve.ledger import Ledger, Spent
from agents.serve.models import Models
from agents.serve.route import Route, RouteFailed
from agents.serve.sources import Sources, sources_of
from agents.serve.upstreams import Unavailable
from rollouts.errors import ConfigError
from rollouts.models.server.wire import Wire
from rollouts.text.likelihood import WORTHLESS
from rollouts.text.steps import Step, StopReason
from rollouts.trees.arrays import ASK, Trees
from rollouts.trees.compile import compile_store
from trim_env.env import TrimEnv
from trim_env.features import schema_named
from trim_env.tables import decision_tables

LAM, PRICE = 0.01, 3
CAPS: list[dict[str, int]] = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}]
LOOKS = "agg+/1,large.min_logprob/1,least(large.min_logprob)/1"
BOUGHT = {
    "scorer": ("agg+/1", ("score",)),
    "large": (LOOKS, ("large.min_logprob",)),
    "large, own score": ("score/1,min_score/1,tokens/1,step/1,terminal/1", ("score",)),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    made = compile_store(scripted_store(tmp_path_factory.mktemp("asking") / "s", 40).path, cache=False)
    look = -np.random.default_rng(0).exponential(size=made.score.shape).astype(np.float32)
    same = (made.child[:, 0] == made.child[:, 1]) & (made.child[:, 0] >= 0)
    look[same, 1] = look[same, 0]
    return replace(made, signals={**made.signals, "large.min_logprob": look})


def drawn(kind: str, seed: int, cap: int | None = None) -> Asking:
    schema, facts = BOUGHT[kind]
    draw, size = np.random.default_rng(seed), schema_named(schema).size + (cap is not None)
    shapes = {"0.weight": (4, size), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}
    weights = {f"{head}.{name}": draw.normal(size=each) for head in HEADS for name, each in shapes.items()}
    own = {name: values.astype(np.float32) for name, values in weights.items()}
    return Asking("drawn", schema, Knob("lam", LAM), kind.partition(",")[0], facts, own, cap)


def mixed(trees: Trees, kind: str, cap: int | None) -> Asking:
    """A router that asks at some nodes, and escalates at some with and without."""
    seen = decision_tables(trees, None, schema=BOUGHT[kind][0]).features
    seen = np.insert(seen, seen.shape[1], 0.9, axis=1)[:, : seen.shape[1] + (cap is not None)]
    for seed in range(3000):
        router = drawn(kind, seed, cap)
        asks, escalates = router.asks(seen), router.probability(seen) > 0
        if 0.2 < asks.mean() < 0.8 and all(0.1 < escalates[each].mean() < 0.9 for each in (asks, ~asks)):
            return router
    raise AssertionError


class Recorded(Scripted):
    """Models that write and tell what a tree holds."""

    def __init__(self, trees: Trees, root: int) -> None:
        super().__init__([])
        self.trees, self.places, self.look = trees, {(): root}, trees.signals["large.min_logprob"]

    async def step(self, role: str, task: Any, steps: Any, used: int, ledger: Any, most: int | None = None) -> Step:
        row, author = self.places[steps], int(role == "large")
        child, tokens = int(self.trees.child[row, author]), int(self.trees.tokens[row, author])
        tokens = tokens if most is None else min(tokens, most)
        ledger.roles[role].completion_tokens += tokens
        text = f"{row if child == self.trees.child[row, 0] and child >= 0 else (row, role)}"
        text += "\\boxed{1}" if self.trees.has_answer[row, author] else "\n\n"
        if tokens == self.trees.tokens[row, author]:
            self.places[(*steps, text)] = (row, author) if child < 0 else child
        stop = END if child < 0 else ON
        if tokens == most and tokens < self.trees.tokens[row, author]:
            stop = StopReason.LENGTH
        return Step(text, tokens, stop, statistics=(float(self.look[row, author]),))

    def _path(self, steps: Any) -> Iterator[tuple[int, int]]:
        """Rows and authors of the steps of a path, the last one proposed by the small model."""
        for place in range(len(steps)):
            row = self.places[tuple(steps[:place])]
            written = self.places.get(tuple(steps[: place + 1]))
            last = place == len(steps) - 1
            yield row, 0 if last or written == self.trees.child[row, 0] else 1

    async def scores(self, task: Any, steps: Any, ledger: Any) -> list[float]:
        self.asked.append(("scorer", tuple(steps)))
        ledger.roles["scorer"].add(100)
        return [float(self.trees.score[place]) for place in self._path(steps)]

    async def looked_at_each(self, task: Any, steps: Any, ledger: Any) -> Any:
        self.asked.append(("large", tuple(steps)))
        ledger.roles["large"].add(200)
        return [("large", (float(self.look[place]),)) for place in self._path(steps)]

    async def looked_at(self, task: Any, steps: Any, ledger: Any) -> Any:
        return (await self.looked_at_each(task, steps, ledger))[-1]


def going(models: Any, router: Any, fallback: Any = "small", **about: Any) -> Route:
    made = Policy(router, {"max_steps": 6, "scorer": "prm", **about})
    route = Route(TASK, made.session(), fallback, sources=sources_of(made))

    async def run() -> None:
        async for _ in route.steps(models, asyncio.get_running_loop().time() + 60):
            pass

    asyncio.run(run())
    return route


@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize("kind", BOUGHT)
def test_the_service_decides_as_gymnasium_and_pays_the_same(trees: Trees, kind: str, caps: dict[str, int]) -> None:
    if "own" in kind:
        scores = np.exp(trees.signals["large.min_logprob"].astype(np.float64)).astype(np.float32)
        trees = replace(trees, score=scores, meta={**trees.meta, "scorer": "large"})
    router = mixed(trees, kind, caps.get("max_large_tokens"))
    schema, ask = router.schema, router.source
    tables = decision_tables(trees, None, schema=schema, cost=f"calls:{PRICE}", **caps)
    env = TrimEnv(trees, None, lam=LAM, cost=f"calls:{PRICE}", schema=schema, ask=ask, **caps)
    totals, asked, size = run_trees(tables, router), 0, schema_named(schema).size
    about = {"max_steps": trees.meta["max_steps"], "scorer": trees.meta["scorer"], **caps}
    for place, tree in enumerate(tables.indices.tolist()):
        models = Recorded(trees, int(tables.roots[place]))
        done = going(models, router, **about)
        options = {"problem": trees.problem_ids[trees.problem[tree]], "replica": int(trees.replica[tree])}
        seen, info = env.reset(options=options)
        for written in done.written:
            told = np.delete(seen, size)[None]  # without whether it was asked
            assert written.asked == bool(router.asks(told)[0] and info["action_mask"][ASK])
            if written.asked:
                seen, *_, info = env.step(ASK)
                told = np.delete(seen, size)[None]
            action = bool(router.probability(told)[0]) if info["action_mask"][1] else 0
            assert written.action == action
            seen, _, _, _, info = env.step(action)
        spent = done.ledger.roles["large"].completion_tokens
        assert info["asked"] == totals["asked"][place] == done.questions.requests
        free = len(done.written) * (kind == "large")  # its schema has scores of the reward model, too
        assert info["cost"] == totals["cost"][place] == spent + PRICE * (info["asked"] + free)
        assert info["return"] == pytest.approx(totals["correct"][place] - LAM * totals["cost"][place])
        assert len(models.asked) == info["asked"] + free
        assert done.questions.prompt_tokens == info["asked"] * (100 if ask == "scorer" else 200)
        summary = done.summary(trace=True)
        assert summary["asked"] == info["asked"] == sum(step["asked"] for step in summary["trace"])
        asked += info["asked"]
    assert asked > 10


def always(ask: bool, kind: str = "scorer", escalate: bool = False) -> Asking:
    """A router that asks everywhere or nowhere, and escalates where it was told, or not."""
    router = drawn(kind, 0)
    said = {"ask": ask, "free": False, "told": escalate}
    weights = {name: 0 * values for name, values in router.weights.items()}
    for head, yes in said.items():
        weights[f"{head}.1.bias"] = np.array([not yes, yes], np.float32)
    return replace(router, weights=weights)


def test_scores_are_known_only_where_it_asked_and_then_of_the_whole_path() -> None:
    done = going(Scripted([0.9, 0.8, 0.7, 0.6]), always(True))
    assert [(step.asked, step.score, step.late_scores) for step in done.written] == [
        (True, score, ()) for score in (0.9, 0.8, 0.7, 0.6)
    ]
    models = Scripted([])
    done = going(models, always(False))
    assert not any(whom == "scorer" for whom, *_ in models.asked) and done.questions == Spent()
    assert [(step.asked, step.action, step.score) for step in done.written] == [(False, 0, None)] * 4
    assert (done.summary(trace=False)["asked"], done.ended) == (0, END)

    router = always(True)
    weight = np.zeros((4, 6), np.float32)
    weight[0, 3] = 40  # step / max_steps
    told = {"ask.0.weight": weight, "ask.0.bias": np.array([-18, 0, 0, 0], np.float32)}
    told["ask.1.weight"] = np.array([[0] * 4, [4, 0, 0, 0]], np.float32)
    done = going(Scripted([0.4, 0.3, 0.2, 0.1]), replace(router, weights={**router.weights, **told,
                 "ask.1.bias": np.zeros(2, np.float32)}))  # fmt: skip
    assert [step.asked for step in done.written] == [False, False, True, True]
    assert [step.score for step in done.written] == [0.4, 0.3, 0.2, 0.1]  # those of earlier steps came with its
    assert [step.late_scores for step in done.written] == [(), (), (0.4, 0.3), ()]


@pytest.mark.parametrize(
    ("fallback", "authors", "words"),
    [
        ("small", {"small"}, "scorer (timeout): the proposal was kept"),
        ("large", {"large"}, "scorer (timeout): the large model wrote the step"),
    ],
)
def test_who_writes_when_nobody_answers(fallback: Any, authors: Any, words: str) -> None:
    done = going(Scripted([], down=("scorer",)), always(True), fallback)
    assert {step.author for step in done.written} == authors and done.ended == END
    assert all(step.asked and step.action is None and step.fallback == words for step in done.written)
    assert done.session.ended and done.session.escalations == 4 * (authors == {"large"})
    assert done.questions == Spent() and "secret" not in str(done.summary(trace=True))
    done = going(Scripted([], down=("scorer",)), always(False), fallback)
    assert not any(step.fallback for step in done.written)  # nobody was asked, nobody is missed


def test_no_answer_can_be_an_error() -> None:
    with pytest.raises(RouteFailed, match=r"cannot be scored: scorer \(timeout\)"):
        going(Scripted([], down=("scorer",)), always(True), "error")


class Flickering(Scripted):
    """Each request fails by chance; the large model looks at proposals."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        super().__init__(self.draw.random(99).tolist(), length=int(self.draw.integers(3, 7)))

    def _fails(self, *roles: str) -> None:
        self.down = {role for role in roles if self.draw.random() < 0.4}

    async def step(self, role: str, *arguments: Any, **options: Any) -> Step:
        self._fails(role)
        return replace(await super().step(role, *arguments, **options), statistics=(-0.5,))

    async def scores(self, *arguments: Any) -> Any:
        self._fails("scorer")
        return await super().scores(*arguments)

    async def looked_at_each(self, task: Any, steps: Any, ledger: Any) -> Any:
        self._fails("large")
        if self.down:
            raise Unavailable("large", "timeout", "secret")
        return [("large", (-0.5,))] * len(steps)


@pytest.mark.parametrize("fallback", ["small", "large"])
@pytest.mark.parametrize("kind", ["scorer", "large"])
def test_whatever_fails_caps_bind_and_solutions_end(fallback: str, kind: str) -> None:
    ends, asked = set(), set()
    for seed in range(60):
        models, router = Flickering(seed), drawn(kind, seed, 50)
        made = Policy(router, {"max_steps": 6, "max_large_tokens": 50, "max_escalations": 2, "scorer": "prm"})
        route = Route(TASK, made.session(), fallback, sources=sources_of(made))  # type: ignore[arg-type]

        async def run(route: Route, models: Any) -> None:
            async for _ in route.steps(models, asyncio.get_running_loop().time() + 60):
                pass

        try:
            asyncio.run(run(route, models))
        except RouteFailed as error:
            assert "Neither model" in str(error) or "cap" in str(error)
        ends.add(route.ended)
        asked |= {(step.asked, step.action) for step in route.written}
        assert route.ledger.roles["large"].completion_tokens <= 50 and route.session.large_tokens <= 50
        assert sum(step.author == "large" for step in route.written) <= 2 and route.session.escalations <= 2
    assert END in ends and {(True, None), (True, 1), (True, 0), (False, 0), (False, 1)} <= asked


def test_whom_it_asks_must_tell_what_it_asks_for() -> None:
    def of(router: Any, **about: Any) -> Sources:
        return sources_of(Policy(router, {"max_steps": 6, "scorer": "prm", **about}))

    assert of(drawn("scorer", 0)) == Sources("prm") and of(drawn("large", 0)) == Sources("prm", large=True)
    assert of(drawn("large, own score", 0), scorer="large.max_entropy").column == "large.max_entropy"
    assert of(Mixture(drawn("scorer", 0), Threshold(0.5, schema="free/1"), 0.5, Knob("budget", 0.1))).small
    for wrong in ({"source": "large"}, {"facts": ("tokens",)}, {"source": "scorer", "facts": ("score", "step")}):
        with pytest.raises(ConfigError, match=r"The policy asks the (large|scorer) for .* tells (score|nothing)\."):
            of(replace(drawn("scorer", 0), **wrong))
    with pytest.raises(ConfigError, match="reads own.doubt, which none of the servers tells"):
        own = replace(drawn("scorer", 0), schema="agg+/1,own.doubt/1", facts=("own.doubt", "score"),
                      weights={name: np.insert(values, 6, 0, axis=1) if name.endswith("0.weight") else values
                               for name, values in drawn("scorer", 0).weights.items()})  # fmt: skip
        of(own)


def test_a_scorer_may_be_named_with_its_column() -> None:
    for schema in ("agg+/1", "prm.score/1", "agg+/1,least(prm.score)/1"):
        found = sources_of(Policy(Threshold(0.5, schema=schema), {"max_steps": 6, "scorer": "prm.score"}))
        assert found.scorer and not found.large
        assert "prm.score" in found.signals(0.5) or "prm.score" not in schema
    assert sources_of(Policy(Threshold(0.5, schema="a.score.score/1"), {"max_steps": 6, "scorer": "a.score"})).scorer


# ---------------------------------------------------------------- over HTTP


def from_the_second_step(kind: str) -> Asking:
    """A router that asks at all steps but the first, and escalates where what it was told is low."""
    router, last = always(True, kind), np.array([[0] * 4, [4, 0, 0, 0]], np.float32)
    weights = {name: 0 * values for name, values in router.weights.items()}
    weights |= {"ask.1.weight": last, "told.1.weight": last}
    weights["ask.0.weight"][0, 3], weights["ask.0.bias"][0] = 40, -3.75  # step / max_steps
    weights["told.0.weight"][0, 0] = -9  # logit of the score
    return replace(router, weights=weights)


@pytest.mark.parametrize("kind", ["scorer", "large"])
def test_it_serves_and_counts_what_it_asked(upstreams: Any, tmp_path: Any, kind: str) -> None:
    router = from_the_second_step(kind)
    running = Router(policy(tmp_path, router), upstreams.urls())
    try:
        assert running.client.get("/v1/models").json()["data"][0]["trim"]["asks"] == [*router.facts]
        answers = [running.chat(f"Let a={number}+33, b=a+49. Find b.", trace=True).json() for number in range(4)]
        for answer in answers:
            trace = answer["trim"]["trace"]
            assert [step["asked"] for step in trace] == [False, *[True] * (len(trace) - 1)]
            assert not answer["trim"]["fallbacks"] and answer["trim"]["asked"] == len(trace) - 1
            assert trace[0]["asked_tokens"] is None and all(step["asked_tokens"] > 10 for step in trace[1:])
            assert sum(step["asked_tokens"] for step in trace[1:]) == answer["trim"]["asked_tokens"]
            scorer = answer["usage"]["models"]["scorer"]
            if kind == "scorer":
                assert scorer == {"requests": len(trace) - 1, "prompt_tokens": answer["trim"]["asked_tokens"]}
        running.idle()
        asked = sum(answer["trim"]["asked"] for answer in answers)
        tokens = sum(answer["trim"]["asked_tokens"] for answer in answers)
        assert asked and running.metric("trim_questions_total", model=kind) == asked
        assert running.metric("trim_question_tokens_total", model=kind) == tokens > 10 * asked
    finally:
        running.stop()


def test_the_large_model_tells_of_each_step_in_one_request() -> None:
    class Format:
        def step_spans(self, question: str, steps: Any) -> Any:
            return tuple(range(10, 20)), [4, 6, 6, 9, 10]

    class Upstream:
        wire, window = Wire(), 100

        async def post(self, path: str, body: Any, read: Any, lost: Any, about: str) -> Any:
            assert about == TASK.question
            rows = [None, *({str(token): {"logprob": -token / 10}} for token in body["prompt"][1:])]
            return read({"choices": [{"prompt_logprobs": rows}]})

    models: Any = object.__new__(Models)
    models.upstreams, models.family = {"large": Upstream()}, type("F", (), {"windows": {"large": 100}})
    task: Any = replace(TASK, formats={"large": Format()})
    ledger = Ledger()
    found = asyncio.run(models.looked_at_each(task, ["a", "", "b", "c"], ledger))
    least = [told[0] for _, told in found]
    assert least == [-1.5, WORTHLESS[0], -1.8, -1.9] and ledger.roles["large"].prompt_tokens == 10
    assert asyncio.run(models.looked_at(task, ["a", "", "b", "c"], ledger)) == found[-1]
    models.family.windows["large"] = 10
    models.upstreams["large"].window = 10
    assert [told[0] for _, told in asyncio.run(models.looked_at_each(task, ["a", "", "b", "c"], ledger))] == [
        *least[:3],
        WORTHLESS[0],
    ]
