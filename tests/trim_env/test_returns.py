"""Every episode of small trees gives what a recursive enumeration over their nodes says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_stores import HorizonWriter, finished, outcomes

from rollouts.errors import StoreError
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from trim_env.env import TrimEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

LAM = 0.013


def trees_with_tables(store, cap=None):
    compiled = compile_store(store, cache=False)
    for index, tree in enumerate(load_trees(store, store.problems(), None, None)):
        tables = decision_tables(compiled, None, indices=np.array([index]), max_escalations=cap)
        assert compiled.problem_ids[compiled.problem[index]] == tree.problem.id
        yield tree, tables


def expected(outcome):
    tokens = {name: getattr(outcome, name) for name in ("large_tokens", "small_tokens", "escalations", "masked")}
    return {
        "correct": outcome.correct,
        "return": pytest.approx(outcome.correct - LAM * outcome.large_tokens),
        "cost": outcome.large_tokens,
        "steps": len(outcome.actions),
        **tokens,
    }


def check_single(tables, outcome):
    env = TrimEnv(tables, lam=LAM)
    env.reset(seed=0)
    rewards, ended, info = [], False, {}
    for action in outcome.actions:
        assert not ended
        _, reward, ended, truncated, info = env.step(action)
        rewards.append(reward)
        assert not truncated
    assert ended
    wanted = expected(outcome)
    assert {name: info[name] for name in wanted} == wanted
    assert sum(rewards) == wanted["return"]
    assert all(reward == 0 for reward, action in zip(rewards[:-1], outcome.actions[:-1], strict=True) if action == 0)


def check_vector(tables, found):
    env = TrimVectorEnv(tables, num_envs=len(found), lam=LAM)
    env.reset(seed=0)
    total = np.zeros(len(found))
    for step in range(max(len(outcome.actions) for outcome in found)):
        running = np.array([step < len(outcome.actions) for outcome in found])
        actions = [outcome.actions[step] if step < len(outcome.actions) else 0 for outcome in found]
        _, reward, done, _, infos = env.step(np.array(actions))
        total += reward * running
        for index, outcome in enumerate(found):
            if running[index]:
                assert done[index] == (step == len(outcome.actions) - 1)
                if done[index]:
                    wanted = expected(outcome)
                    assert {name: infos["final_info"][name][index] for name in wanted} == wanted
                    assert total[index] == wanted["return"]


@pytest.mark.parametrize(("closed", "cap"), [(None, None), (None, 1), (None, 0), (0, None), (1, None), (2, 1)])
def test_all_episodes_of_all_trees(tmp_path, closed, cap):
    store = finished(tmp_path / "s", closed)
    limit = cap if cap is not None else closed
    seen = []
    for tree, tables in trees_with_tables(store, cap):
        found = list(outcomes(tree, limit))
        seen += found
        for outcome in found:
            check_single(tables, outcome)
        check_vector(tables, found)
    assert any(outcome.actions[-1] == 1 and outcome.large_tokens for outcome in seen) == (limit != 0)
    assert any(outcome.masked for outcome in seen) == (limit is not None)
    assert {outcome.correct for outcome in seen} == {True, False}


def test_masked_escalations_cost_nothing_and_are_counted(tmp_path):
    tree, tables = next(trees_with_tables(finished(tmp_path / "s", 0)))
    always, never = (next(o for o in outcomes(tree, 0) if set(o.actions) == {action}) for action in (1, 0))
    assert always.masked == len(always.actions) > 0 and always.large_tokens == 0
    env = TrimEnv(tables, lam=LAM)
    _, info = env.reset()
    assert info["action_mask"].tolist() == [True, False]
    for _ in always.actions:
        _, reward, _, _, info = env.step(1)
    assert info["masked"] == len(always.actions) and info["escalations"] == 0
    assert info["return"] == reward == never.correct


def test_the_last_step_that_is_allowed_ends_an_episode_and_is_graded(tmp_path):
    limits = {"step_tokens": 512, "solution_tokens": 2048, "max_steps": 3}
    store = finished(tmp_path / "s", grader="numeric", kind=HorizonWriter, limits=limits)
    seen = []
    for tree, tables in trees_with_tables(store):
        found = list(outcomes(tree, None))
        assert {len(outcome.actions) for outcome in found} == {3}
        check_vector(tables, found)
        for outcome in found:
            check_single(tables, outcome)
        assert tables.features[:, 3].max() == 1  # step / max_steps
        seen += found
    assert {outcome.correct for outcome in seen} == {True, False}


def test_where_both_models_write_the_same_step_only_the_cost_differs(tmp_path):
    merged = 0
    for tree, tables in trees_with_tables(finished(tmp_path / "s")):
        child = tables.child.reshape(-1, 2)
        root = int(tables.trees.root[tables.indices[0]])
        if child[root, 0] != child[root, 1] or child[root, 0] < 0:
            continue
        merged += 1
        found = {outcome.actions: outcome for outcome in outcomes(tree, None)}
        for actions, cheap in found.items():
            if actions[0] == 0:
                dear = found[1, *actions[1:]]
                assert dear.correct == cheap.correct
                assert dear.large_tokens - cheap.large_tokens == tree.root.proposals["large"].tokens
    assert merged


@pytest.mark.parametrize(("plan", "role"), [((0, 1), "large"), ((1, 0), "small")])
def test_a_proposal_that_was_not_generated_is_an_error_with_a_count(tmp_path, plan, role):
    store = finished(tmp_path / "s", 0, grader="numeric", kind=HorizonWriter)
    tables = replace(decision_tables(store.path), max_escalations=None)  # as nobody should: without the cap
    env, vector = TrimEnv(tables), TrimVectorEnv(tables, num_envs=3)
    env.reset(seed=0)
    vector.reset(seed=0)
    env.step(plan[0])
    vector.step(np.full(3, plan[0]))
    with pytest.raises(StoreError, match=f"^1 {role} proposals .* not generated .K = 0"):
        env.step(plan[1])
    with pytest.raises(StoreError, match=f"^3 {role} proposals .* not generated .K = 0"):
        vector.step(np.full(3, plan[1]))
