"""Exact returns on trees and their gradient: against walker, enumeration, finite differences; forms of rules."""

from dataclasses import replace

import numpy as np
import pytest
from scripted_store import scripted_store

from agents.evaluation.forest import Forest, Polynomial, Scale, ascend, linear_rule
from agents.evaluation.walk import by_problem, run, run_trees
from agents.learners.exact import Perceptron
from agents.routers.base import Constant, Threshold
from agents.routers.mlp import ConditionedMLP
from rollouts.errors import StoreError
from rollouts.trees.arrays import MISSING
from rollouts.trees.compile import compile_store
from trim_env.features import Feature, Schema
from trim_env.tables import decision_tables

LAM = 0.003


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
    (value,), _, _ = forest.passes(drawn_in(some, forest)[:, None], np.array([LAM]))
    walked = by_problem(some, run_trees(some, lambda rows, spent: drawn(some, rows, spent.left)))
    assert value == pytest.approx(walked.returns(LAM).mean(), abs=1e-12)
    assert value == pytest.approx(np.mean([enumerated(some, LAM, int(root)) for root in some.roots]), abs=1e-12)


def test_the_slope_is_that_of_finite_differences(capped):
    forest = Forest(replace(capped, indices=capped.indices[:7]))
    start = drawn_in(capped, forest)
    z = np.log(start / (1 - start))
    lams = np.array([LAM, 10 * LAM])  # two policies at once
    p = 1 / (1 + np.exp(-np.stack([z, -z], axis=1)))
    _, visits, gain = forest.passes(p, lams)
    slope = visits * p * (1 - p) * gain
    assert slope.shape == (len(forest.graph.rows), 2) and len(slope) > 20
    for state in range(len(z)):
        ends = []
        for change in (1e-4, -1e-4):
            moved = np.stack([z, -z], axis=1)
            moved[state] += change
            ends.append(forest.passes(1 / (1 + np.exp(-moved)), lams)[0])
        assert slope[state] == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=1e-8)
    assert np.abs(slope).max() > 1e-4
    assert (slope[~forest.graph.open] == 0).all()


def test_every_tree_is_ended_once_and_visits_are_choices(capped):
    forest = Forest(capped)
    escalate = drawn_in(capped, forest)
    visits = forest.passes(escalate[:, None], np.array([LAM]))[1][:, 0]
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


def test_returns_of_policies_that_draw_nothing_are_those_of_the_walker(capped):
    forest = Forest(capped, "agg")
    rules = (Constant(0), Constant(1), Threshold(0.5))
    found = forest.returns(np.stack([rule.probability(forest.seen) > 0 for rule in rules], axis=1), LAM)
    assert found == pytest.approx([run(rule, capped).returns(LAM).mean() for rule in rules], abs=1e-5)


def test_features_that_are_seen_are_paid_for(trees):
    blind = Schema("steps", 1, (Feature("step", 0, np.inf, ("step",), lambda step: step),))
    tables = decision_tables(trees, "train", schema=blind, cost="prices:large_out=15,scorer_in=5")
    forest, rule = Forest(tables, "agg"), Threshold(0.5)
    found = forest.returns((rule.probability(forest.seen) > 0)[:, None], 1.0)
    paid = run(rule, tables)
    assert found[0] == pytest.approx(paid.returns(1.0).mean(), abs=1e-6)
    free = decision_tables(trees, "train", cost="prices:large_out=15")
    assert paid.cost.mean() > run(rule, free).cost.mean()


def test_what_was_not_generated_is_counted(tmp_path):
    cut = compile_store(scripted_store(tmp_path / "s", 60, max_escalations=2), cache=False)
    free = replace(decision_tables(cut, "train"), max_escalations=None)
    gone = np.isin(cut.tree, free.indices)[:, None] & (cut.child == MISSING)
    with pytest.raises(StoreError, match=f"{gone.sum()} large proposals.*were not generated"):
        Forest(free)


RULES = {
    "linear": lambda scale: Polynomial(scale, quadratic=False),
    "quadratic": lambda scale: Polynomial(scale, quadratic=True),
    "mlp": lambda scale: Perceptron(scale, 5, seed=0),
}


@pytest.fixture(params=RULES)
def rule(request, capped):
    return RULES[request.param](Scale([Forest(capped)], (1e-3, 1e-2, 3e-2)))


def test_derivatives_of_a_rule_are_those_of_finite_differences(rule):
    draw = np.random.default_rng(0)
    at = draw.normal(size=len(rule.start))
    logits, back = rule.logits(at)
    slope = draw.normal(size=logits.shape)
    assert len(rule.penalty) == len(at)
    for place, found in enumerate(back(slope)):
        ends = [(rule.logits(at + change * np.eye(len(at))[place])[0] * slope).sum() for change in (1e-5, -1e-5)]
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-5)


def test_the_stored_form_of_a_rule_decides_as_the_rule(rule, capped):
    lams = (1e-3, 1e-2, 3e-2)
    at = np.random.default_rng(1).normal(size=len(rule.start))
    weights = rule.weights(at)
    activation = "square" if len(weights) == 4 and isinstance(rule, Polynomial) else "tanh"
    stored = ConditionedMLP("exact", "agg+/1", 1e-3, 3e-2, weights, activation=activation)
    seen = Forest(capped).seen
    for place, lam in enumerate(lams):
        both = stored.at(lam).logits(seen)
        wanted = rule.logits(at)[0][:, place]
        assert both[:, 1] - both[:, 0] == pytest.approx(wanted, abs=1e-4 * np.abs(wanted).max())


def test_what_ascends_returns_more_and_entropy_keeps_it_soft(tables):
    forest = Forest(tables)
    rule = Polynomial(Scale([forest], [LAM]), quadratic=True)
    found = {}
    for entropy in (1.0, 0.1, 0.001):
        z, _ = rule.logits(ascend([forest], rule, [LAM], rule.start, entropy))
        found[entropy] = forest.passes(1 / (1 + np.exp(-z)), np.array([LAM]))[0][0], np.abs(z).mean()
    returns, steepness = zip(*found.values(), strict=True)
    assert list(returns) == sorted(returns) and list(steepness) == sorted(steepness)
    rule = linear_rule(forest, "agg+/1", LAM, None)
    assert run(rule, tables).returns(LAM).mean() > returns[0]
