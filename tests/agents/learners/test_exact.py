"""The exact tree gradient: against the exact walker, finite differences and a problem whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from made_trees import telling
from scripted_store import scripted_store

from agents.evaluation.oracle import tree_oracle
from agents.evaluation.walk import by_problem, run, run_trees
from agents.learners.exact import Forest, TreeAgg, TreeSettings
from agents.routers.mlp import MLP, ConditionedMLP
from agents.runs.run import Listener, TrainConfig, resume, train
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

LAM = 0.003
SMALL = TreeSettings(iterations=6, updates=20, batch=30, hidden=16)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("gradient") / "s", 120), cache=False)


@pytest.fixture(scope="module")
def tables(trees):
    return decision_tables(trees, "train")


@pytest.fixture(scope="module")
def drawn(tables):
    """Escalation probabilities at all nodes, drawn at random."""
    return np.random.default_rng(3).uniform(0.05, 0.95, tables.trees.nodes)


def test_the_value_is_what_the_walker_expects(tables, drawn):
    forest = Forest(tables, tables.indices)
    value, _ = forest.gradient(drawn[forest.rows], LAM)
    walked = by_problem(tables, run_trees(tables, lambda rows, _: drawn[rows]))
    assert value == pytest.approx(walked.returns(LAM).mean(), abs=1e-12)


def test_the_slope_is_that_of_finite_differences(tables, drawn):
    forest = Forest(tables, tables.indices[:7])
    z = np.log(drawn[forest.rows] / (1 - drawn[forest.rows]))
    _, slope = forest.gradient(1 / (1 + np.exp(-z)), LAM)
    assert len(slope) == len(forest.rows) > 20
    for node in range(len(z)):
        ends = []
        for change in (1e-4, -1e-4):
            moved = z.copy()
            moved[node] += change
            ends.append(forest.gradient(1 / (1 + np.exp(-moved)), LAM)[0])
        assert slope[node] == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=1e-8)
    assert np.abs(slope).max() > 1e-4


def test_a_tree_is_reached_once_and_ended_once(tables, drawn):
    forest = Forest(tables, tables.indices)
    reach = forest.reach(drawn[forest.rows])
    assert reach[forest.roots] == pytest.approx(1.0)
    assert reach[-1] == pytest.approx(forest.trees)  # every tree ends somewhere


def test_merged_nodes_add_up(tables):
    """Where both models write the same step, both branches lead to one node."""
    rows = tables.trees.child
    merged = np.flatnonzero((rows[:, 0] == rows[:, 1]) & (rows[:, 0] >= 0))
    assert len(merged)
    forest = Forest(tables, tables.indices)
    half = forest.reach(np.full(len(forest.rows), 0.5))[:-1]
    place = {int(row): i for i, row in enumerate(forest.rows)}
    inside = [row for row in merged.tolist() if row in place]
    assert inside
    for row in inside:
        assert half[place[int(rows[row, 0])]] == pytest.approx(half[place[row]])


def test_it_solves_a_problem_whose_answer_is_known(trees):
    tables = decision_tables(telling(trees), "train")
    learner = TreeAgg(tables, 0.001, replace(SMALL, iterations=20), seed=0)
    while not learner.done:
        learner.iterate()
    router = learner.router()
    assert isinstance(router, MLP)
    best = tree_oracle(tables, 0.001).returns(0.001).mean()
    assert run(router, tables).returns(0.001).mean() > best - 0.02


def test_a_range_of_lam_gives_a_policy_that_saves_more_where_tokens_are_dearer(trees):
    tables = decision_tables(telling(trees), "train")
    learner = TreeAgg(tables, (1e-4, 3e-2), replace(SMALL, iterations=20), seed=0)
    while not learner.done:
        learner.iterate()
    policy = learner.router()
    assert isinstance(policy, ConditionedMLP)
    spent = [run(policy.at(lam), tables).large_tokens.mean() for lam in (1e-4, 3e-2)]
    assert spent[1] < 0.8 * spent[0]


def test_the_same_seed_gives_the_same_router_and_a_restored_training_goes_on_as_it_would_have(tables):
    learner = TreeAgg(tables, LAM, SMALL, seed=4)
    for _ in range(3):
        learner.iterate()
    state = learner.state()
    other = TreeAgg(tables, LAM, SMALL, seed=4)
    other.restore(state)
    while not learner.done:
        assert learner.iterate() == other.iterate()
    again = TreeAgg(tables, LAM, SMALL, seed=4)
    while not again.done:
        again.iterate()
    for each in (other, again):
        for name, values in learner.router().weights.items():
            np.testing.assert_array_equal(values, each.router().weights[name])


def test_a_warm_start_decides_as_it_was_shown(tables):
    learner = TreeAgg(tables, LAM, SMALL, seed=0)
    rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
    wanted = (tables.trees.score[rows, 0] < 0.5).astype(np.int64)
    learner.imitate(wanted, rows)
    assert (learner.router().probability(tables.features[rows]) == wanted).mean() > 0.95


def test_bounded_trees_are_refused(tmp_path, trees):
    cut = compile_store(scripted_store(tmp_path / "s", 12, max_escalations=2), cache=False)
    with pytest.raises(ConfigError, match="needs complete trees; these are cut at 2 escalations"):
        TreeAgg(decision_tables(cut, "train"), LAM, SMALL, seed=0)
    with pytest.raises(ConfigError, match="knows no cap on large tokens"):
        TreeAgg(decision_tables(trees, "train", max_large_tokens=5), LAM, SMALL, seed=0)


def test_train_py_trains_it_and_resumes_it(tmp_path):
    store = scripted_store(tmp_path / "s", 60).path
    whole, parts = (
        TrainConfig(
            rollouts=str(store),
            agent="tree-agg",
            lam=(LAM,),
            tree=SMALL,
            tracking="none",
            attempts=1,
            out=tmp_path / name,
        )
        for name in ("whole", "parts")
    )
    trained = train(whole)
    assert trained.routers[LAM].name == "tree-agg"

    class Stop(Listener):
        def iteration(self, lam, training, record):
            if record["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, Stop())
    resumed = resume(tmp_path / "parts")
    for name, values in trained.routers[LAM].weights.items():
        np.testing.assert_array_equal(values, resumed.routers[LAM].weights[name])
    with pytest.raises(ConfigError, match="needs complete trees"):
        train(replace(whole, max_escalations=1, out=tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()
