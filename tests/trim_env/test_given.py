"""What callers give that is not what is asked for is refused, and never read as something else."""

from __future__ import annotations

import numpy as np
import pytest
from made_stores import finished

from agents.deploy.session import Session, decide_together
from agents.evaluation.walk import run
from agents.routers.base import Knob
from rollouts.errors import ConfigError
from rollouts.trees import on_policy
from rollouts.trees.arrays import actions_of
from rollouts.trees.columns import fold_named
from trim_env.costs import TokenPrices, cost_model, cost_of
from trim_env.env import TrimEnv
from trim_env.features import Feature, Schema
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

SHARE = Feature("share", 0, 1, ("step", "max_steps"), lambda step, most: step / max(most, 1))
BELOW = Feature("below", -5, -1, ("score",), lambda score: score - 3)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return decision_tables(finished(tmp_path_factory.mktemp("given") / "s").path, None, cost="calls:5")


def test_actions_are_whole_numbers(tables):
    assert actions_of([1, 0.0, True, 0.7, np.nan, -1]).tolist() == [1, 0, 1, -1, -1, -1]
    assert actions_of(np.array(2, np.uint8)) == 2 and actions_of("1") == actions_of("one") == actions_of(None) == -1
    single, vector = TrimEnv(tables), TrimVectorEnv(tables, num_envs=2)
    single.reset(seed=0), vector.reset(seed=0)
    for odd in (0.7, np.nan, "continue", None, [0, 1], 1 << 70):
        with pytest.raises(ConfigError, match="The action is .*, expected 0"):
            single.step(odd)
        with pytest.raises(ConfigError, match="step got actions .* of shape"):
            vector.step([odd, 0])
    assert single.step(np.float32(1))[4]["escalations"] == 1
    given = np.array([1.0, 1.0])
    vector.step(given)
    assert vector.taken.tolist() == given.tolist() == [1, 1]


@pytest.mark.parametrize("answer", [0.7, -1, 2, np.nan])
def test_routers_that_expand_a_store_give_actions(answer):
    with pytest.raises(ConfigError, match="expected 0 or 1 for each"):
        on_policy._asked(np.full(3, answer), 3)
    with pytest.raises(ConfigError, match="for 2 decisions"):
        on_policy._asked(np.zeros(3), 2)
    assert on_policy._asked(np.array([True, False]), 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    "spec", ["threshold:nan", "threshold:inf", "random:1.5", "random:-0.1", "random:nan", "random:"]
)
def test_numbers_of_named_routers(spec):
    with pytest.raises(ConfigError, match="expected a number after the colon"):
        on_policy.load_router(spec)


@pytest.mark.parametrize(
    "answer",
    [lambda n: np.full(n, np.nan), lambda n: np.full(n, 1.7), lambda n: np.full(n, -0.1), lambda n: np.zeros(1)],
)
def test_probabilities_of_routers(tables, answer):
    class Odd:
        name, schema, knob = "odd", "agg/1", Knob("x", 1.0)

        def probability(self, features):
            return answer(len(features))

    with pytest.raises(ConfigError, match="expected the probability of escalating for each"):
        run(odd := Odd(), tables)
    sessions = [Session(odd, odd.knob, 16, (None, None), None) for _ in range(2)]
    proposals = [{"score": 0.5, "tokens": 3, "terminal": False, "has_answer": False}] * 2
    with pytest.raises(ConfigError, match="for 2 decisions, with values from .*expected the probability"):
        decide_together(sessions, proposals)


def test_settings_of_environments(tables):
    for given, message in (
        ({"num_envs": -1}, "num_envs is -1"),
        ({"num_envs": 2.5}, "num_envs is 2.5"),
        ({"lam": (1e-4, 1e-3, 1e-2)}, "The range of lam is 0.0001 to 0.001 to 0.01"),
        ({"lam": "much"}, "lam is much, expected"),
        ({"lam": (1e-4, None)}, "lam is None, expected"),
        ({"schema": "agg"}, "Tables that were built before"),
        ({"max_escalations": 1}, "Tables that were built before"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrimVectorEnv(tables, **{"num_envs": 2, **given})
    for name in ("max_escalations", "max_large_tokens"):
        for odd in (1.5, np.inf, np.nan, -1):
            with pytest.raises(ConfigError, match=f"{name} is {odd}, expected at least [01], a whole"):
                decision_tables(tables.trees, None, **{name: odd})
    assert TrimVectorEnv(tables, num_envs=1, lam=np.array([1e-4, 1e-3])).lam_range == (1e-4, 1e-3)


def test_seeds_and_replicas(tables):
    single, vector = TrimEnv(tables), TrimVectorEnv(tables, num_envs=2)
    for seed in ([2**64, 0], [0.5, 1], [None, 1], [-1, 0]):
        with pytest.raises(ConfigError, match="reset got seeds"):
            vector.reset(seed=seed)
    vector.reset(seed=2**70)
    for replica in (0.5, "x", None):
        with pytest.raises(ConfigError, match="has no replica"):
            single.reset(options={"problem": tables.trees.problem_ids[0], "replica": replica})


def test_prices_are_named_once():
    with pytest.raises(ConfigError, match="the price 'large_out' is there twice"):
        cost_model("prices:large_out=3,large_out=5")


def test_costs_are_checked_wherever_they_are_asked_for():
    for odd in (-1.0, np.nan):
        with pytest.raises(ConfigError, match="expected finite numbers of at least 0"):
            cost_of(TokenPrices("odd", large_decode=odd), np.ones((3, 2)), np.ones((3, 2)), frozenset())


def test_tables_know_what_they_charge_for(tables):
    free = tables.charged(None)
    assert free.cost.sum() < tables.cost.sum() and free.charged(None) is free
    np.testing.assert_array_equal(free.charged(tables.schema).cost, tables.cost)


def test_own_features_are_given_one_max_steps_and_are_numbers():
    schema = Schema("own", 1, (SHARE, Feature("log", 0, 9, ("score",), lambda score: np.log(score - 0.5))))
    seen = [{"step": step, "max_steps": 30, "score": 1.0} for step in (1, 2)]
    np.testing.assert_array_equal(schema.together(seen), np.concatenate([schema.single(each) for each in seen]))
    for undefined in ([{**seen[0], "score": 0.1}], [seen[0], {**seen[1], "score": 0.1}]):
        with np.errstate(invalid="ignore"), pytest.raises(ConfigError, match="Feature 'log' is not a number"):
            schema.single(undefined[0]) if len(undefined) == 1 else schema.together(undefined)


def test_what_is_not_shown_lies_in_the_space(tables):
    for schema, given in ((Schema("own", 1, (BELOW,)), {"ask": "scorer"}), (Schema("own", 1, (BELOW,), 1), {})):
        env = TrimVectorEnv(decision_tables(tables.trees, None, schema=schema), num_envs=8, **given)
        observations, _ = env.reset(seed=0)
        assert (observations == 0).any() and env.observation_space.contains(observations)


def test_folds_begin_where_facts_of_that_name_end():
    assert [fold_named(f"least({name})").initial for name in ("prm.score", "mine.raw_score", "small.min_logprob")] == [
        1, np.inf, 0,
    ]  # fmt: skip
    assert fold_named("greatest(mine.zscore)").initial == -np.inf
    assert fold_named("greatest(mine.spent_tokens)").initial == 0


def test_masks_are_what_spaces_sample_with(tables):
    env = TrimEnv(decision_tables(tables.trees, None, max_escalations=0))
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [1, 0] and env.action_masks().dtype == bool
    assert {int(env.action_space.sample(info["action_mask"])) for _ in range(20)} == {0}
