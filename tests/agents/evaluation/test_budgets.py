"""Budgets and targets: met in expectation, by one setting or a mixture of two, at the best accuracy there is."""

from itertools import combinations

import numpy as np
import pytest
from scripted_store import scripted_store

from agents.evaluation.budgets import measure, reached
from agents.evaluation.splits import thresholds
from agents.evaluation.walk import references, run
from agents.routers.base import Constant, Knob, Mixture, Threshold
from agents.routers.budgets import calibrate
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    trees = compile_store(scripted_store(tmp_path_factory.mktemp("calibration") / "s", 90), cache=False)
    return decision_tables(trees, "validation")


@pytest.fixture(scope="module")
def candidates(tables):
    routers = [Constant(0), *(Threshold(level) for level in thresholds(tables, 30)), Constant(1)]
    return [measure(router, run(router, tables), references(tables)) for router in routers]


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.37, 0.8])
def test_a_budget_is_met_and_no_other_mixture_of_two_solves_more(tables, candidates, budget):
    both = references(tables)
    found = run(calibrate(candidates, budget=budget), tables)
    total = both.large.cost.sum()
    points = [(each.share, each.accuracy) for each in candidates]
    best = max(accuracy for cost, accuracy in points if cost <= budget)
    for (c1, a1), (c2, a2) in combinations(points, 2):
        if min(c1, c2) <= budget <= max(c1, c2) and c1 != c2:
            best = max(best, a1 + (a2 - a1) * (budget - c1) / (c2 - c1))
    assert found.correct.mean() == pytest.approx(best)
    spent = found.cost.sum() / total
    assert spent == pytest.approx(budget) or (spent < budget and best == max(a for _, a in points))


def test_an_accuracy_is_met_at_the_least_cost(tables, candidates):
    both = references(tables)
    accuracies = [each.accuracy for each in candidates]
    for target in np.linspace(min(accuracies) + 0.01, max(accuracies), 5):
        found = run(calibrate(candidates, accuracy=float(target)), tables)
        assert found.correct.mean() == pytest.approx(target)
        cheaper = calibrate(candidates, budget=0.98 * float(found.cost.sum() / both.large.cost.sum()))
        assert run(cheaper, tables).correct.mean() < target


def test_an_accuracy_below_all_costs_nothing_more(tables, candidates):
    found = calibrate(candidates, accuracy=0.01)
    assert run(found, tables).cost.sum() == 0


def test_targets_out_of_reach_are_refused(tables, candidates):
    both = references(tables)
    with pytest.raises(ConfigError, match="No setting reaches an accuracy of 99.9 %"):
        calibrate(candidates, accuracy=0.999)
    with pytest.raises(ConfigError, match="the cheapest costs"):
        calibrate([measure(Constant(1), both.large, both)], budget=0.3)
    for wrong in ({}, {"budget": 0.2, "accuracy": 0.9}):
        with pytest.raises(ConfigError, match="either a budget or an accuracy"):
            calibrate(candidates, **wrong)
    with pytest.raises(ConfigError, match="expected a share"):
        calibrate(candidates, budget=0.0)


def test_a_mixture_is_its_expectation(tables):
    mixture = Mixture(Constant(0), Threshold(0.6), 0.3, Knob("budget", 0.2))
    first, second, found = (run(each, tables) for each in (mixture.first, mixture.second, mixture))
    assert found.correct == pytest.approx(0.7 * first.correct + 0.3 * second.correct)
    draws = np.random.default_rng(0).random(4000)
    assert np.mean([mixture.pick(u) is mixture.second for u in draws]) == pytest.approx(0.3, abs=0.03)
    with pytest.raises(ConfigError, match="expected a probability"):
        Mixture(Constant(0), Constant(1), 1.2, Knob("budget", 0.2))


def test_the_interval_holds_for_new_problems(tables):
    """Split the problems in two at random, many times: one half's interval holds the other half's share."""
    router, both = Threshold(0.5), references(tables)
    outcomes, draw = run(router, tables), np.random.default_rng(1)
    hits = []
    for seed in range(100):
        order = draw.permutation(len(outcomes))
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        part = type(both)(both.small.take(one), both.large.take(one))
        share, accuracy = reached(outcomes.take(one), part, seed)
        new = outcomes.take(other)
        hits.append(share.low <= new.cost.sum() / both.large.take(other).cost.sum() <= share.high)
        hits.append(accuracy.low <= new.correct.mean() <= accuracy.high)
    assert 0.84 <= np.mean(hits) <= 0.96
