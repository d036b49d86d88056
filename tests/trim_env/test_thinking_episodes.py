"""Episodes that think: what one alone writes costs the same whatever is decided, live as in compiled trees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from handmade import ScriptedScorer, process
from made_stores import PROBLEMS, finished, rollout, same, writers
from scripted_thinking import ThinkingWriter, splitting

from rollouts.errors import ConfigError
from rollouts.store.store import Store
from rollouts.text.steps import LARGE, SMALL, StopReason
from rollouts.trees.arrays import STOP_REASONS
from rollouts.trees.compile import compile_store
from trim_env.graph import alone
from trim_env.live import LiveVectorEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

AUTHORS = ["router", SMALL, LARGE]


@pytest.mark.parametrize("by", AUTHORS)
@pytest.mark.parametrize("cost", ["decode-only", "prices:large_in=1,large_out=9,small_in=1,small_out=2"])
def test_live_episodes_are_those_of_compiled_trees(tmp_path, by, cost):
    """Also where everything is generated while they run."""
    options = {"split": None, "num_envs": 5, "cost": cost}
    store = finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting(answer_by=by))
    compiled = rollout(TrimVectorEnv(store.path, **options), 60, seed=3)
    fresh = Store.create(tmp_path / "live", process(splitting=splitting(answer_by=by)))
    fresh.add_problems(PROBLEMS)
    env = LiveVectorEnv(fresh.path, writers(ThinkingWriter), ScriptedScorer(), replicas=2, **options)
    assert same(rollout(env, 60, seed=3), compiled) and env.generated
    env.close()


@pytest.mark.parametrize("by", [SMALL, LARGE])
def test_in_an_answer_that_one_alone_writes_both_actions_are_one(tmp_path, by):
    store = finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting(answer_by=by))
    tables = decision_tables(store.path, None, cost="prices:large_in=3,large_out=9,small_in=1,small_out=2")
    trees = tables.trees
    tokens = np.asarray(trees.tokens)
    answers = np.flatnonzero((tokens == 0).any(axis=1))
    assert len(answers)
    for values in (tables.child, tables.cost, tables.solved, tables.large_tokens):
        pairs = values.reshape(-1, 2)[answers]
        assert (pairs[:, 0] == pairs[:, 1]).all()
    assert (tables.large_tokens.reshape(-1, 2)[answers, 0] == tokens[answers, 1]).all()
    price = (9, 3) if by == LARGE else (2, 1)  # of tokens and prompts of the one that is asked
    prompts = np.asarray(trees.prompt_tokens)[answers].max(axis=1)
    expected = price[0] * tokens[answers].max(axis=1) + price[1] * prompts
    assert tables.cost.reshape(-1, 2)[answers, 0] * 1e6 == pytest.approx(expected)
    assert (tables.cost > 0).all() and (trees.accepted_tokens[answers] == tokens[answers].max(axis=1)[:, None]).all()


def test_a_small_step_that_failed_is_not_the_large_models(tmp_path):
    trees = compile_store(finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting(answer_by=LARGE)).path)
    row = int(np.flatnonzero(~trees.large_alone)[0])
    tokens, reasons = trees.tokens.copy(), trees.stop_reason.copy()
    tokens[row, 0], reasons[row, 0] = 0, STOP_REASONS.index(StopReason.FAILED)
    assert not replace(trees, tokens=tokens, stop_reason=reasons).large_alone[row]


def test_a_cap_on_tokens_of_a_large_model_that_always_answers_is_refused(tmp_path):
    store = finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting(answer_by=LARGE))
    with pytest.raises(ConfigError, match="write every answer"):
        decision_tables(store.path, None, max_large_tokens=50)
    with pytest.raises(ConfigError, match="write every answer"):
        LiveVectorEnv(store.path, {}, ScriptedScorer(), max_large_tokens=50)
    decision_tables(store.path, None, max_escalations=1)


@pytest.mark.parametrize("by", AUTHORS)
def test_no_solution_is_one_models_alone_where_another_answers(tmp_path, by):
    store = finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting(answer_by=by))
    tables = decision_tables(store.path, None)
    if by == "router":
        assert alone(tables).tokens.shape == (12, 2)
        return
    with pytest.raises(ConfigError, match=f"answer_by = '{by}'"):
        alone(tables)
