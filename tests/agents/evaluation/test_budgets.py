"""Budgets and targets: met in expectation, by one setting or a mixture of two, at the best accuracy there is."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from made_outcomes import outcomes
from scripted_store import scripted_store

from agents.evaluation.budgets import falling_costs, measure, operating_points, reached
from agents.evaluation.curves import BUDGETS, Curve, Method, References
from agents.evaluation.splits import OPERATING_POINTS, Candidates, thresholds
from agents.evaluation.walk import measured, references, run
from agents.routers.base import Constant, Knob, Mixture, Threshold
from agents.routers.budgets import LamCosts, calibrate
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("calibration") / "s", 90), cache=False)


@pytest.fixture(scope="module")
def tables(trees):
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


def test_accuracies_at_a_cost_are_those_of_budgets(trees, tables):
    """A curve says what a user gets: of the settings that a budget chooses among, mixed as a budget mixes them."""
    choosing, candidates = references(tables), Candidates(tables)
    choices = operating_points([(each, run(each, tables)) for each in (Constant(0), Constant(1))], choosing)
    choices += operating_points(candidates.thresholds, choosing)
    for split in ("validation", "train"):
        here = decision_tables(trees, split)
        both = references(here)
        curve = Curve.of(measured(candidates.spread_over(choosing.large), choosing, here), both)
        for budget in np.array(BUDGETS) / 100:
            router = calibrate(choices, budget=budget)
            ends = [run(each, here) for each in (router.first, router.second)]
            spent = [each.cost.sum() / both.large.cost.sum() for each in ends]
            share = (budget - spent[0]) / (spent[1] - spent[0])
            if 0 <= share <= 1:  # elsewhere the same settings cost something else: here it is spent exactly
                wanted = (1 - share) * ends[0].correct.mean() + share * ends[1].correct.mean()
                assert curve.accuracy_at(np.array([budget]))[0] == pytest.approx(wanted)


def test_mixing_beats_a_threshold_below_the_hull(tables):
    """Thresholds whose accuracy rises steeply late: at a small budget a mixture with always-small gets more."""
    both = references(tables)
    candidates = [(router.knob.value, outcomes) for router, outcomes in Candidates(tables).thresholds]
    method = Method.chosen(candidates, candidates, both)
    mixed, plain = Curve.of(method, both), Curve.of(Method.whole(candidates), both)
    c = np.linspace(0.02, 0.98, 25)
    assert (mixed.accuracy_at(c) >= plain.accuracy_at(c) - 1e-12).all()
    assert (mixed.accuracy_at(c) > plain.accuracy_at(c) + 1e-3).any()


def test_settings_to_choose_from_are_few_and_chosen_by_cost_alone(tables):
    """With every threshold to choose from the luckiest is chosen; solving more does not make one more likely."""
    both, candidates = references(tables), Candidates(tables).thresholds
    constants = [(each, run(each, tables)) for each in (Constant(0), Constant(1))]
    found = operating_points([*constants, *candidates], both)
    assert len(found) <= OPERATING_POINTS + 2 < len(candidates)
    draws = np.random.default_rng(0)
    lucky = [(each, replace(outcomes, correct=draws.random(len(outcomes)))) for each, outcomes in candidates]
    again = operating_points([*constants, *lucky], both)
    assert {round(each.share, 9) for each in again} == {round(each.share, 9) for each in found}


def test_costs_of_lams_fall_and_are_not_moved_up(tables):
    """Where measured costs go up and down they are averaged: the greatest of them would say that a λ costs too much."""
    both = references(tables)
    routers = [Threshold(level) for level in (0.9, 0.4, 0.6, 0.2)]
    found = [run(each, tables) for each in routers]
    shares = [measure(each, outcomes, both).share for each, outcomes in zip(routers, found, strict=True)]
    assert shares[1] < shares[2]
    rows = falling_costs(np.array([1e-3, 2e-3, 4e-3, 8e-3]), found, both)
    assert [row["share"] for row in rows] == pytest.approx([shares[0], *[(shares[1] + shares[2]) / 2] * 2, shares[3]])
    assert [row["accuracy"] for row in rows] == pytest.approx([each.correct.mean() for each in found])
    assert LamCosts(rows).lam(shares[3], "x") == pytest.approx(8e-3)


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


def drawn(problems, draws):
    """150 settings on some problems: what they gain is a concave function of what they spend, and luck."""
    shares = np.linspace(0.004, 0.6, 150)
    luck, tokens = draws.random(problems), draws.gamma(4, 25, problems)
    both = References(outcomes(luck < 0.5, np.zeros(problems)), outcomes(luck < 0.85, tokens))
    found = []
    for share in shares:
        right = (luck < 0.5 + 0.35 * share**0.5) ^ (draws.random(problems) < 0.05)
        found.append((Threshold(share), outcomes(right, share * tokens * draws.uniform(0.4, 1.6, problems))))
    return [(Constant(0), both.small), (Constant(1), both.large), *found], both


def test_targets_are_met_in_the_median_on_new_problems():
    draws = np.random.default_rng(0)
    new, truth = drawn(4000, draws)
    reached_by = {router.knob: each.correct.mean() for router, each in new}
    spent_by = {router.knob: each.cost.sum() / truth.large.cost.sum() for router, each in new}
    errors = {name: [] for name in ("budget", "accuracy", "accuracy, of all settings")}
    for _ in range(40):
        found, both = drawn(200, draws)
        few = operating_points(found, both)
        whole = [measure(router, each, both) for router, each in found]
        for name, target, choices in (
            ("budget", {"budget": 0.1}, few),
            ("accuracy", {"accuracy": 0.65}, few),
            ("accuracy, of all settings", {"accuracy": 0.65}, whole),
        ):
            mixed = calibrate(choices, **target)
            if not isinstance(mixed, Mixture):
                mixed = Mixture(mixed, mixed, 1.0, mixed.knob)
            at = spent_by if name == "budget" else reached_by
            got = (1 - mixed.share) * at[mixed.first.knob] + mixed.share * at[mixed.second.knob]
            errors[name].append(got / next(iter(target.values())) - 1)
    middle = {name: float(np.median(each)) for name, each in errors.items()}
    assert abs(middle["budget"]) < 0.02
    assert abs(middle["accuracy"]) < 0.03
    assert middle["accuracy, of all settings"] < -0.04  # why not all of them are choices: the luckiest is chosen
