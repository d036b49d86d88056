"""The exact tree gradient: against walker, enumeration, finite differences and a problem whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from made_trees import telling
from scripted_store import scripted_store

from agents.evaluation.oracle import tree_oracle
from agents.evaluation.walk import by_problem, run, run_trees
from agents.learners.exact import Forest, TreeAgg
from agents.learners.settings import TreeSettings
from agents.routers.base import told_cap
from agents.routers.mlp import MLP, ConditionedMLP
from agents.runs.config import TrainConfig
from agents.runs.listener import Listener
from agents.runs.run import resume, train
from rollouts.errors import StoreError
from rollouts.trees.arrays import MISSING
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


CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}, {"max_escalations": 2, "max_large_tokens": 11}]


@pytest.fixture(scope="module", params=CAPS, ids=str)
def capped(request, trees):
    return decision_tables(trees, "train", **request.param)


def drawn(tables, rows, left):
    """Return escalation probabilities that depend on the node and on what is left, drawn at random."""
    share = np.random.default_rng(3).uniform(0.05, 0.95, tables.trees.nodes)[rows]
    return (share + 0.37 * left) % 0.9 + 0.05


def drawn_in(tables, forest):
    return drawn(tables, forest.graph.rows, forest.graph.spent.left)


def enumerated(tables, lam, row, used=0, left=None):
    """Return the expected return of `drawn` from a node on, path by path, straight from the rules."""
    trees, cap = tables.trees, tables.max_large_tokens
    left = (cap or 0) if left is None else left
    closed = used == tables.max_escalations or (cap is not None and left == 0)
    chance = 0.0 if closed else float(drawn(tables, np.array([row]), np.array([left]))[0])
    total = 0.0
    for action, share in ((0, 1 - chance), (1, chance)):
        if not share:
            continue
        needed = int(trees.tokens[row, 1]) * action
        paid = needed if cap is None else min(needed, left)
        accepted = action if paid == needed else 0
        child = int(trees.child[row, accepted])
        own = float(trees.correct[row, accepted] == 1) if child < 0 else 0.0
        if child >= 0:
            own = enumerated(tables, lam, child, used + accepted, left - paid if cap is not None else 0)
        total += share * (own - lam * paid)
    return total


def test_the_value_is_what_the_walker_and_enumeration_expect(capped):
    some = replace(capped, indices=capped.indices[:40])
    forest = Forest(some)
    value, _, _ = forest.gradient(drawn_in(some, forest), LAM)
    walked = by_problem(some, run_trees(some, lambda rows, spent: drawn(some, rows, spent.left)))
    assert value == pytest.approx(walked.returns(LAM).mean(), abs=1e-12)
    assert value == pytest.approx(np.mean([enumerated(some, LAM, int(root)) for root in some.roots]), abs=1e-12)


def test_the_slope_is_that_of_finite_differences(capped):
    forest = Forest(replace(capped, indices=capped.indices[:7]))
    start = drawn_in(capped, forest)
    z = np.log(start / (1 - start))
    _, slope, _ = forest.gradient(1 / (1 + np.exp(-z)), LAM)
    assert len(slope) == len(forest.graph.rows) > 20
    for state in range(len(z)):
        ends = []
        for change in (1e-4, -1e-4):
            moved = z.copy()
            moved[state] += change
            ends.append(forest.gradient(1 / (1 + np.exp(-moved)), LAM)[0])
        assert slope[state] == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=1e-8)
    assert np.abs(slope).max() > 1e-4
    assert (slope[~forest.graph.open] == 0).all()


def test_every_tree_is_ended_once_and_visits_are_choices(capped):
    forest = Forest(capped)
    escalate = drawn_in(capped, forest)
    _, _, visits = forest.gradient(escalate, LAM)
    reach = forest.graph.reach(np.stack([1 - escalate, escalate], axis=1))
    assert reach[forest.graph.roots] == pytest.approx(1.0)
    assert reach[-1] == pytest.approx(forest.trees)  # every tree ends somewhere
    open_ = forest.graph.open
    assert visits[open_] == pytest.approx(reach[:-1][open_] / forest.trees) and (visits[~open_] == 0).all()
    bound = capped.max_escalations is not None or capped.max_large_tokens is not None
    assert (~open_).any() == bound


def test_merged_nodes_add_up(tables):
    """Where both models write the same step, both branches lead to one node."""
    rows = tables.trees.child
    merged = np.flatnonzero((rows[:, 0] == rows[:, 1]) & (rows[:, 0] >= 0))
    assert len(merged)
    graph = tables.graph
    half = graph.reach(np.full((len(graph.rows), 2), 0.5))[:-1]
    place = {int(row): i for i, row in enumerate(graph.rows)}
    inside = [row for row in merged.tolist() if row in place]
    assert inside
    for row in inside:
        assert half[place[int(rows[row, 0])]] == pytest.approx(half[place[row]])


def test_it_solves_a_problem_whose_answer_is_known(trees):
    tables = decision_tables(telling(trees), "train")
    learner = TreeAgg(tables, 0.001, replace(SMALL, iterations=20), seed=0)
    best = tree_oracle(tables, 0.001).returns(0.001).mean()
    assert run(learner.router(), tables).returns(0.001).mean() < best - 0.05
    while not learner.done:
        learner.iterate()
    router = learner.router()
    assert isinstance(router, MLP)
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


def test_the_same_seed_gives_the_same_router(tables):
    first, again = (TreeAgg(tables, LAM, SMALL, seed=4) for _ in range(2))
    while not first.done:
        assert first.iterate() == again.iterate()
    for name, values in first.router().weights.items():
        np.testing.assert_array_equal(values, again.router().weights[name])


def test_a_warm_start_decides_as_it_was_shown(tables):
    learner = TreeAgg(tables, LAM, SMALL, seed=0)
    rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
    wanted = (tables.trees.score[rows, 0] < 0.5).astype(np.int64)
    learner.imitate(wanted, rows)
    assert (learner.router().probability(tables.features[rows]) == wanted).mean() > 0.95


def test_it_learns_under_caps(trees):
    """What one escalation, or so many tokens, are best spent on; the policy is told what is left of the tokens."""
    for caps in CAPS[1:]:
        tables = decision_tables(telling(trees), "train", **caps)
        learner = TreeAgg(tables, 0.001, replace(SMALL, iterations=20), seed=0)
        before = run(learner.router(), tables).returns(0.001).mean()
        while not learner.done:
            learner.iterate()
        router = learner.router()
        assert told_cap(router) == tables.max_large_tokens
        assert router.size == tables.features.shape[1] + (tables.max_large_tokens is not None)
        best = tree_oracle(tables, 0.001).returns(0.001).mean()
        found = run(router, tables)
        assert found.returns(0.001).mean() > max(before + 0.1, best - 0.05), caps
        assert found.large_tokens.max() <= (tables.max_large_tokens or np.inf)


def test_a_range_of_lam_under_a_cap_keeps_both_columns_apart(trees):
    tables = decision_tables(trees, "train", max_large_tokens=9)
    learner = TreeAgg(tables, (0.001, 0.1), SMALL, seed=0)
    learner.iterate()
    learner.imitate(np.zeros(50, np.int64), np.arange(50), updates=3)
    router = learner.router()
    own = router.at(0.01)
    assert own.max_large_tokens == 9 and own.size == 7 and router.weights["0.weight"].shape[1] == 8
    assert run(own, tables).large_tokens.max() <= 9


def test_bounded_trees_serve_up_to_their_cap_and_what_is_missing_is_counted(tmp_path):
    cut = compile_store(scripted_store(tmp_path / "s", 60, max_escalations=2), cache=False)
    tables = decision_tables(cut, "train")
    learner = TreeAgg(tables, LAM, SMALL, seed=0)
    learner.iterate()
    assert run(learner.router(), tables).escalations.max() <= 2
    free = replace(tables, max_escalations=None)
    gone = np.isin(cut.tree, free.indices)[:, None] & (cut.child == MISSING)
    with pytest.raises(StoreError, match=f"{gone.sum()} large proposals.*were not generated"):
        TreeAgg(free, LAM, SMALL, seed=0)


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
    under = train(replace(whole, max_escalations=1, max_large_tokens=9, out=tmp_path / "cut"))
    assert under.routers[LAM].max_large_tokens == 9
