"""What the service asks of whom for policies that read log-probabilities, and what sessions are told of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_harness import Router, Upstreams, policy
from test_serve_route import END, TASK, Scripted

from agents.deploy.policy import Policy
from agents.routers.base import Constant, Knob, Mixture, Threshold
from agents.serve.command import Server, family_of
from agents.serve.config import ServeConfig
from agents.serve.route import Route
from agents.serve.sources import Sources, sources_of
from agents.serve.upstreams import Unavailable
from rollouts.errors import BackendError, ConfigError
from rollouts.models.server.wire import Wire
from rollouts.text.likelihood import STATISTICS
from rollouts.text.steps import Step
from trim_env.features import schema_named

ABOUT = {"max_steps": 6, "scorer": "prm"}


def told_of(role: str, number: int) -> tuple[float, ...]:
    size = number / 10 + (role == "large")
    return (-size, -size / 2, -3 * size, 2 * size, size / 4)


class Telling(Scripted):
    """Models that tell the log-probabilities of their steps; the large one looks at proposals."""

    async def step(self, role: str, *arguments: Any, **options: Any) -> Step:
        made = await super().step(role, *arguments, **options)
        return replace(made, statistics=told_of(role, int(made.text.split()[1])))

    async def looked_at(self, task: Any, steps: Any, ledger: Any) -> Any:
        self.asked.append(("look", tuple(steps)))
        if "look" in self.down:
            raise Unavailable("large", "timeout", "secret")
        return "large", told_of("large", 40 + len(steps))

    async def scores(self, task: Any, steps: Any, ledger: Any) -> Any:
        return await super().scores(task, steps, ledger) if self.prm else [None] * len(steps)


class Seen:
    """A router that escalates every other step and keeps what it sees."""

    name, knob = "seen", Knob("rate", 0.5)

    def __init__(self, schema: str) -> None:
        self.schema, self.rows = schema_named(schema).id, []

    def probability(self, features: Any) -> Any:
        self.rows.append(features[0])
        return np.array([len(self.rows) % 2], float)


def going(schema: str, scores: Any = (), down: Any = (), **about: Any) -> tuple[Telling, Seen, Route]:
    router, models = Seen(schema), Telling(list(scores), down=down)
    made_policy = Policy(router, {**ABOUT, **about})
    sources = sources_of(made_policy)
    models.prm = sources.scorer
    made = Route(TASK, made_policy.session(), sources=sources)

    async def run() -> None:
        async for _ in made.steps(models, asyncio.get_running_loop().time() + 60):
            pass

    asyncio.run(run())
    return models, router, made


def facts(number: int, least: float, **more: float) -> dict[str, float]:
    known = {f"small.{name}": value for name, value in zip(STATISTICS, told_of("small", number), strict=True)}
    known |= {f"large.{name}": value for name, value in zip(STATISTICS, told_of("large", 40 + number), strict=True)}
    shape = {"tokens": 10 + number, "step": number, "terminal": number == 4, "has_answer": number == 4, "max_steps": 6}
    known = {name: float(np.float32(value)) for name, value in known.items()}
    return {**known, **shape, "least(small.min_logprob)": least, **more}


def test_a_free_policy_asks_no_scorer_and_skips_the_large_models_steps() -> None:
    models, router, done = going("free")
    assert done.ended == END and [step.author for step in done.written] == ["large", "small", "large", "small"]
    assert {asked[0] for asked in models.asked} == {"small", "large"}
    least = [0.0, 0.0, -0.2, -0.2]  # the second step is the only one before that the small model wrote
    schema = schema_named("free")
    for number, row in enumerate(router.rows, 1):
        np.testing.assert_array_equal(row, schema.single(facts(number, float(np.float32(least[number - 1]))))[0])
    assert done.usage()["models"]["scorer"] == {"requests": 0, "prompt_tokens": 0}


def test_what_the_large_model_makes_of_proposals_is_asked_where_it_is_read() -> None:
    models, router, done = going("all,least(large.min_logprob)", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert sum(asked[0] == "look" for asked in models.asked) == sum(asked[0] == "scorer" for asked in models.asked) == 4
    schema, first = router.schema, router.rows[2]  # after its own first step, and the small model's second one
    columns = facts(3, float(np.float32(-0.2)), score=0.6, min_score=float(np.float32(0.7)))
    columns |= {"least(large.min_logprob)": float(np.float32(told_of("large", 42)[0]))}
    rounded = {name: float(np.float32(value)) for name, value in columns.items()}
    np.testing.assert_allclose(first, schema_named(schema).single(rounded)[0], rtol=1e-5)
    assert done.ended == END


@pytest.mark.parametrize("scorer", ["small", "small.max_entropy", "large"])
def test_a_column_can_be_the_score(scorer: str) -> None:
    models, router, done = going("agg", scorer=scorer)
    assert not any(asked[0] == "scorer" for asked in models.asked)
    own = {"small": -0.1, "small.max_entropy": -0.2, "large": -5.1}[scorer]
    assert router.rows[0][0] == np.float32(np.exp(np.float64(np.float32(own))))
    assert done.ended == END


@pytest.mark.parametrize("down", [("look",), ("scorer",), ("small",)])
def test_faults_are_lived_through(down: Any) -> None:
    _, router, done = going("all,least(large.min_logprob)", [0.5] * 20, down=down)
    assert done.ended == END and any(step.fallback for step in done.written)
    assert all(np.isfinite(row).all() for row in router.rows)


def test_sources_follow_from_what_is_read() -> None:
    def of(router: Any, **about: Any) -> Sources:
        return sources_of(Policy(router, {**ABOUT, **about}))

    assert of(Threshold(0.5)) == Sources("prm")
    assert of(Threshold(0.5, schema="free/1")) == Sources("prm", scorer=False, small=True)
    assert of(Threshold(0.5), scorer="large.max_entropy") == Sources(
        "large.max_entropy", scorer=False, large=True, column="large.max_entropy"
    )
    assert of(Threshold(0.5, schema="prm.score/1")).scorer and not of(Threshold(0.5, schema="tokens/1")).scorer
    both = Mixture(Constant(0), Threshold(0.5, schema="prefill/1"), 0.5, Knob("budget", 0.1))
    assert of(both) == Sources("prm", scorer=False, small=True, large=True)
    for schema in ("own.doubt/1", "agg+/1,prm.doubt/1", "small.score/1"):
        with pytest.raises(
            ConfigError, match=rf"reads {schema.split(',')[-1].removesuffix('/1')}, which none of the serv"
        ):
            of(Threshold(0.5, schema=schema))


def test_without_scores_no_reward_model_is_configured() -> None:
    settings = ServeConfig(policy="p", small="http://s:1/v1", large="http://l:2/v1")
    about = {"small": "tinymath-small", "large": "tinymath-large"}
    assert family_of(settings, about, scorer=False).scorer is None
    with pytest.raises(ConfigError, match="--prm"):
        family_of(settings, about)


def test_servers_that_tell_no_log_probabilities_are_refused_by_the_probe() -> None:
    from agents.serve.models import _generates

    silent = {"choices": [{"text": "x", "finish_reason": "length", "stop_reason": None, "token_ids": [5]}]}
    _generates(False).check(Wire(), silent)
    with pytest.raises(BackendError, match="tells no log-probabilities, which the policy reads"):
        _generates(True).check(Wire(), silent)
    told, untold = (_generates(likelihood).request(Wire())[1] for likelihood in (True, False))
    assert told["logprobs"] == 20 and "logprobs" not in untold
    _generates(False, True).check(Wire(), {"choices": [{**silent["choices"][0], "prompt_logprobs": [None]}]})
    with pytest.raises(BackendError, match="tells no log-probabilities of prompts, which the policy reads"):
        _generates(False, True).check(Wire(), silent)
    assert _generates(False, True).request(Wire())[1]["prompt_logprobs"] == 20


def test_answers_of_servers_are_read() -> None:
    logprobs = {"token_logprobs": [-0.5, -0.1], "top_logprobs": [{"token_id:5": -0.5}, {"token_id:6": -0.1}]}
    choice = {"text": "x", "finish_reason": "stop", "stop_reason": None, "token_ids": [5, 6], "logprobs": logprobs}
    found = Wire().read({"choices": [choice]}).likelihood
    assert found is not None and found.logprobs == (-0.5, -0.1) and len(found.entropies) == 2
    assert Wire().read({"choices": [{**choice, "logprobs": None}]}).likelihood is None


# ---------------------------------------------------------------- over HTTP


@pytest.mark.parametrize("schema", ["small.min_logprob", "large.min_logprob"])
def test_without_scores_two_servers_do(upstreams: Any, tmp_path: Any, schema: str) -> None:
    router = Threshold(0.0, schema=schema_named(schema).id)  # of a log-probability of -1
    folder = policy(tmp_path, router)
    urls = {role: url for role, url in upstreams.urls().items() if role != "prm"}
    running = Router(folder, urls)
    try:
        for number in range(6):
            answer = running.chat(f"Let a={number}+33, b=a+49. Find b.", trace=True).json()
            trace = answer["trim"]["trace"]
            assert trace and {step["action"] for step in trace} <= {0, 1} and not answer["trim"]["fallbacks"]
            assert answer["usage"]["models"]["scorer"]["requests"] == 0
            looked = len(trace) if schema.startswith("large") else 0
            asked = sum(step["author"] == "large" for step in trace)
            assert answer["usage"]["models"]["large"]["requests"] == asked + looked
        assert set(running.client.get("/health").json()["upstreams"]) == {"small", "large"}
    finally:
        running.stop()


def test_a_server_that_tells_no_log_probabilities_is_refused_at_the_start(upstreams: Any, tmp_path: Any) -> None:
    folder = policy(tmp_path, Threshold(0.0, schema="small.min_logprob/1"))
    upstreams.small.mode("quiet")
    try:
        with pytest.raises(ConfigError, match="small: .* tells no log-probabilities, which the policy reads"):
            Server(ServeConfig(policy=str(folder), **upstreams.urls(), port=0)).run()
        Router(policy(tmp_path), upstreams.urls()).stop()  # one that reads none is served
    finally:
        upstreams.well()


def test_a_mixture_that_draws_a_part_which_reads_nothing_asks_no_scorer(upstreams: Upstreams, tmp_path: Path) -> None:
    mixture = Mixture(Constant(0), Threshold(0.5), 0.5, Knob("budget", 0.3))
    router = Router(policy(tmp_path, mixture), upstreams.urls())
    try:
        told = [router.chat(seed=seed).json() for seed in range(6)]
    finally:
        router.stop()
    drawn = [np.random.default_rng(seed).random() < 0.5 for seed in range(6)]
    assert {*drawn} == {True, False}
    assert [each["usage"]["models"]["scorer"]["requests"] > 0 for each in told] == drawn
