"""Observations that tell the history (`seq`): what stands where, and all faces of the environment alike."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from handmade import ScriptedScorer
from made_stores import finished, rollout, same, writers
from test_env import episodes_of_singles
from test_live import close, empty, idle

from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.env import TrimEnv
from trim_env.features import SCHEMAS, Schema, schema_named, standard
from trim_env.live import LiveVectorEnv
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

STEPS = 30  # of the scripted stores


def pair(score, tokens):
    clipped = min(max(score, 1e-4), 1 - 1e-4)
    return math.log(clipped / (1 - clipped)) / 3, math.log(tokens / 20)


def test_observations_are_the_scores_and_tokens_of_the_path(tmp_path):
    """Whoever wrote a step, its own score counts, and its tokens as features count accepted steps."""
    plain, told = compile_store(finished(tmp_path / "s"), cache=False), 0
    trees = replace(plain, accepted_tokens=plain.tokens + np.array([0, 9], np.int32))
    tables = decision_tables(trees, None, schema="seq")
    env = TrimEnv(tables)
    draw = np.random.default_rng(0)
    for seed in range(60):
        seen, info = env.reset(seed=seed)
        path, ended = [], False
        while not ended:
            row = info["node"]
            wanted = [*path, pair(float(trees.score[row, 0]), int(trees.tokens[row, 0]))]
            flat = [value for both in wanted for value in both]
            assert seen[: len(flat)] == pytest.approx(flat, abs=1e-6)
            assert not seen[len(flat) : 2 * STEPS].any()
            own = (len(wanted) / STEPS, int(trees.child[row, 0] == -1), int(trees.has_answer[row, 0]))
            assert seen[2 * STEPS :] == pytest.approx(own, abs=1e-6)
            assert seen.shape == (2 * STEPS + 3,) and env.observation_space.contains(seen)
            last, action = seen, int(draw.integers(2))
            path.append(pair(float(trees.score[row, action]), int(trees.tokens[row, action]) + 9 * action))
            seen, _, ended, _, info = env.step(action)
            told += action and not ended
        np.testing.assert_array_equal(seen, last)  # an end repeats the last decision
    assert told > 20


@pytest.mark.parametrize("cap", [None, 9])
def test_all_faces_tell_the_same_history(tmp_path, cap):
    store, count, seed, lam = finished(tmp_path / "s"), 12, 7, 0.01
    tables = decision_tables(store.path, None, schema="seq", max_large_tokens=cap)
    actions = np.random.default_rng(1).integers(0, 2, (60, count))
    vector = TrimVectorEnv(tables, num_envs=count, lam=lam)
    stable = SB3VecEnv(TrimVectorEnv(tables, num_envs=count, lam=lam), seed=seed)
    live = idle(store.path, split=None, num_envs=count, lam=lam, schema="seq", max_large_tokens=cap)
    singles = episodes_of_singles(tables, actions, seed, lam)
    first = next(singles)[0]
    for observations in (vector.reset(seed=seed)[0], stable.reset(), live.reset(seed=seed)[0]):
        np.testing.assert_array_equal(observations, first)
    assert vector.observation_space.contains(first)
    for row, (observations, _, dones, last, _) in zip(actions, singles, strict=True):
        got = vector.step(row)
        np.testing.assert_array_equal(got[0], observations)
        assert same(live.step(row), got)
        stable_got = stable.step(row)
        np.testing.assert_array_equal(stable_got[0], observations)
        for index in np.flatnonzero(dones):
            np.testing.assert_array_equal(got[4]["final_obs"][index], last[index])
            np.testing.assert_array_equal(stable_got[3][index]["terminal_observation"], last[index])
    live.close()


def test_live_generation_tells_what_the_store_will(tmp_path):
    store = empty(tmp_path / "s", 1)
    options = {"split": None, "num_envs": 9, "replicas": 2, "schema": "seq", "max_escalations": 1}
    env = LiveVectorEnv(store.path, writers(), ScriptedScorer(), **options)
    first = rollout(env, 40, seed=0)
    env.close()
    assert env.generated > 20
    close(store, writers(), replicas=2, grader="exact")
    assert same(rollout(TrimVectorEnv(store.path, None, 9, schema="seq"), 40, seed=0), first)


def test_bounds_hold_padding_and_every_step():
    low, high = SCHEMAS["seq"].bounds(4)
    assert low.shape == high.shape == (11,) and (low <= 0).all() and (high >= 1).all()
    assert (low[:8:2] == low[0]).all() and (high[1:8:2] == 8).all()


def test_of_accepted_steps_only_what_is_kept_can_be_told():
    signal, fold = standard("small.min_logprob"), standard("min_score")
    for odd, name in (
        (signal, "small.min_logprob"),
        (fold, "min_score"),
        (SCHEMAS["seq"].features[2], "step, max_steps"),
    ):
        with pytest.raises(ConfigError, match=f"of which only score and tokens are kept; it reads {name}"):
            Schema("mine", 1, (odd, *SCHEMAS["seq"].features), history=1)
    assert schema_named("seq,small.min_logprob").history == 2  # what follows is of the proposal alone
