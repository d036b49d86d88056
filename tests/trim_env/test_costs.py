"""Cost models against sums worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from made_stores import finished

from rollouts.errors import ConfigError
from rollouts.text.steps import LARGE, SMALL
from rollouts.trees.arrays import MISSING
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from trim_env.costs import cost_model, edge_costs
from trim_env.env import TrimEnv
from trim_env.tables import decision_tables

TOKENS = np.array([[10, 40], [7, 0]])  # decoded: small, large
PROMPTS = np.array([[100, 120], [300, 310]])


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("decode-only", [[0, 40], [0, 0]]),
        ("prefill-20", [[0, 48], [0, 0]]),
        ("prefill-full:0.5", [[0, 40 + 60], [0, 155]]),
        ("prefill-full:0", [[0, 40], [0, 0]]),
        ("prices:large_out=15", [[0, 600e-6], [0, 0]]),
        ("prices:large_in=3,large_out=15", [[0, (360 + 600) * 1e-6], [0, 930e-6]]),
        ("prices:small_in=0.1,small_out=2", [[30e-6, 30e-6], [44e-6, 44e-6]]),
        (
            "prices:large_in=3,large_out=15,small_in=0.1,small_out=2",
            [[30e-6, 990e-6], [44e-6, 974e-6]],
        ),
    ],
)
def test_cost_of_both_actions(spec, wanted):
    np.testing.assert_allclose(cost_model(spec).of(TOKENS, PROMPTS), wanted, rtol=1e-12)


def test_units():
    assert cost_model("prefill-20").unit == "large-model tokens"
    assert cost_model("prices:large_out=1").unit == "US dollars"


@pytest.mark.parametrize("spec", ["decode-only", "prefill-20", "prefill-full:0.25", "prices:large_in=3,small_out=0.5"])
def test_an_episode_costs_the_sum_over_its_edges(tmp_path, spec):
    store = finished(tmp_path / "s")
    model = cost_model(spec)
    env = TrimEnv(decision_tables(compile_store(store), None, cost=spec), lam=0.5)
    trees = {(tree.problem.id, tree.replica): tree for tree in load_trees(store, store.problems(), None, None)}
    actions = np.random.default_rng(0)
    for seed in range(30):
        _, info = env.reset(seed=seed)
        tree = trees[info["problem"], info["replica"]]
        node, cost, total, ended = tree.root, 0.0, 0.0, False
        while not ended:
            action = int(actions.integers(2))
            small = node.proposals[SMALL]
            cost += model.small_decode * small.tokens + model.small_prefill * small.prompt_tokens
            if action:
                large = node.proposals[LARGE]
                cost += model.large_decode * large.tokens + model.large_prefill * large.prompt_tokens
            node = tree.child(node, (SMALL, LARGE)[action])
            _, reward, ended, _, info = env.step(action)
            total += reward
        assert info["cost"] == pytest.approx(cost)
        assert total == pytest.approx(info["correct"] - 0.5 * cost) and info["return"] == pytest.approx(total)


def test_what_was_not_generated_has_no_cost(tmp_path):
    trees = compile_store(finished(tmp_path / "s", 0), cache=False)
    edges = edge_costs(cost_model("decode-only"), trees)
    assert (trees.child == MISSING).any()
    np.testing.assert_array_equal(np.isnan(edges), trees.child == MISSING)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("decode_only", "Did you mean 'decode-only'"),
        ("prefill-full", "expected a number of at least 0, found ''"),
        ("prefill-full:-1", "found '-1'"),
        ("prefill-full:nan", "found 'nan'"),
        ("prices:large_outt=3", "unknown price 'large_outt'. Did you mean 'large_out'"),
        ("prices:large_out=cheap", "found 'cheap'"),
        ("prices", "unknown price ''"),
        ("", "Unknown cost model ''"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ConfigError, match=message):
        cost_model(spec)
