"""Cost models against sums worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from made_stores import finished

from agents.evaluation.walk import run_trees
from agents.routers.base import Constant, Threshold
from rollouts.errors import ConfigError
from rollouts.text.steps import LARGE, SMALL
from rollouts.trees.arrays import MISSING
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from trim_env.costs import cost_model, cost_of, edge_costs, sources_of
from trim_env.env import TrimEnv
from trim_env.features import schema_named
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

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


READS = [  # of the first decision the path has 110 tokens, of the second 307
    ("prices:scorer_in=1", {"scorer"}, [[110e-6, 110e-6], [307e-6, 307e-6]]),
    ("prices:scorer_in=1", {"large"}, [[0, 0], [0, 0]]),
    ("prices:large_in=3", {"large"}, [[330e-6, 690e-6], [921e-6, 1851e-6]]),  # prefix and proposal, prefix again
    ("prices:large_in=3,large_cached=0.5", set(), [[0, 360e-6], [0, 930e-6]]),
    ("prices:large_in=3,large_cached=0.5", {"large"}, [[80e-6, 140e-6], [171e-6, 326e-6]]),
    ("prices:large_in=3,large_cached=0,scorer_in=1", {"large", "scorer"}, [[140e-6, 140e-6], [328e-6, 328e-6]]),
    ("decode-only", {"large", "scorer"}, [[0, 40], [0, 0]]),
    ("calls:10", set(), [[0, 40], [0, 0]]),
    ("calls:10", {"scorer"}, [[10, 50], [10, 10]]),
    ("calls:10", {"scorer", "large"}, [[20, 60], [20, 20]]),
    ("prices:large_out=1,call=5", {"large"}, [[5e-6, 45e-6], [5e-6, 5e-6]]),
]


@pytest.mark.parametrize(("spec", "sources", "wanted"), READS)
def test_what_is_read_to_decide_has_its_price(spec, sources, wanted):
    found = cost_of(cost_model(spec), TOKENS, PROMPTS, frozenset(sources))
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("schema", "scorer", "sources"),
    [
        ("agg+", "prm", {"scorer"}),
        ("agg+", "prm.v2", {"scorer"}),
        ("agg+", "small", set()),
        ("agg+", "large.max_entropy", {"large"}),
        ("free", "prm", set()),
        ("prefill", "prm", {"large"}),
        ("all", "prm", {"scorer", "large"}),
        ("free,own.doubt", "prm", {"scorer"}),
        ("tokens,step", "prm", set()),
    ],
)
def test_who_reads_a_proposal_follows_from_the_features(schema, scorer, sources):
    assert sources_of(schema_named(schema), scorer) == sources


def test_every_router_pays_for_what_it_reads_alone(tmp_path):
    trees = compile_store(finished(tmp_path / "s"), cache=False)
    tables = decision_tables(trees, None, cost="prices:large_out=15,scorer_in=1")
    free = decision_tables(trees, None, cost="prices:large_out=15")
    count = len(tables.indices)
    for action in (0, 1):
        plain, read = Constant(action), Threshold(2.0 * action)
        paid, spared = (run_trees(tables, router)["cost"] for router in (read, plain))
        np.testing.assert_array_equal(spared, run_trees(free, plain)["cost"])
        row, wanted = tables.roots, np.zeros(count)
        while (going := row >= 0).any():
            at = row[going]
            wanted[going] += 1e-6 * (trees.tokens[at, 0] + trees.prompt_tokens[at, 0])
            row[going] = trees.child[at, action]
        np.testing.assert_allclose(paid - spared, wanted, rtol=1e-9)
    env = TrimVectorEnv(trees, None, 4, lam=1.0, cost="prices:large_out=15,scorer_in=1", schema="agg+")
    env.reset(seed=0)
    assert (-env.step(np.zeros(4, int))[1] > 0).any()


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
