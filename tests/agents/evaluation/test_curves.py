"""Curves and metrics against hand-worked examples, brute force, and properties that must hold for any points.

Unless said otherwise the problems that choose the hull are those that it is measured on.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from made_outcomes import level, outcomes, references

from agents.evaluation.curves import (
    Curve,
    EscalationGain,
    Method,
    References,
    curve_metrics,
    gain_by_escalations,
    point_metrics,
)
from agents.evaluation.outcomes import Solutions, mix
from agents.evaluation.splits import spread
from rollouts.errors import DataError

GRID = np.linspace(0, 1, 201)
# Multiples of 1/64 and 1/16: exact in floating point, so that ties are ties.
accuracies = st.integers(0, 64).map(lambda i: i / 64)
costs = st.integers(0, 20).map(lambda i: i / 16)
point_lists = st.lists(st.tuples(accuracies, costs), max_size=8)


def points_of(pairs):
    return [(float(i), level(accuracy, cost)) for i, (accuracy, cost) in enumerate(pairs)]


def curve(points, refs, weights=None):
    return Curve.of(Method.chosen(points, points, refs), refs, weights)


def curve_of(pairs, small=0.25, large=0.75, scale=1.0):
    points = [(float(i), level(accuracy, scale * cost)) for i, (accuracy, cost) in enumerate(pairs)]
    return curve(points, references(small, large, scale))


def brute_force(pairs, small, large):
    """The hull by definition: a point is a knot if no other, and no mixture of two others, is as good for its cost."""
    candidates = {(0.0, small), (1.0, large)} | {(c, a) for a, c in pairs if 0 < c < 1}

    def beaten(c, a):
        others = candidates - {(c, a)}
        if any(c2 <= c and a2 >= a for c2, a2 in others):
            return True
        return any(
            c1 < c < c2 and a1 * (c2 - c) + a2 * (c - c1) >= a * (c2 - c1) - 1e-12
            for c1, a1 in others
            for c2, a2 in others
        )

    knots = sorted(each for each in candidates if not beaten(*each))
    return [c for c, _ in knots], [a for _, a in knots]


def test_hand_worked_curve():
    # always-small 0.4 at 0, always-large 0.8 at 100 tokens; two points: (0.1, 0.6) and (0.5, 0.76).
    # Segments: 0 -> 0.1 rises 0.2, 0.1 -> 0.5 rises 0.16, 0.5 -> 1 rises 0.04.
    points = [(2.0, level(0.76, 50)), (1.0, level(0.6, 10))]
    found = curve(points, references())
    assert np.allclose(
        found.accuracy_at(np.array([0, 0.05, 0.1, 0.3, 0.5, 0.75, 1])), [0.4, 0.5, 0.6, 0.68, 0.76, 0.78, 0.8]
    )
    # PGR 50 % is accuracy 0.6, exactly at the first point; 80 % is 0.72, 0.12/0.16 of the way from 0.1 to 0.5;
    # 95 % is 0.78, half of the way from 0.5 to 1, hence by mixing.
    assert found.cpt(50) == pytest.approx(0.1)
    assert found.cpt(80) == pytest.approx(0.4)
    assert found.cpt(95) == pytest.approx(0.75)
    assert [bool(found.by_mixing(x)) for x in (50, 80, 90, 95)] == [False, False, False, True]
    metrics = curve_metrics(found)
    assert metrics["cpt_80_cost"] == pytest.approx(40)
    # At 20 %: 0.6 + 0.16 / 4 = 0.64, PGR (0.64 - 0.4) / 0.4.
    assert metrics["accuracy_at_20"] == pytest.approx(0.64)
    assert metrics["pgr_at_20"] == pytest.approx(0.6)


def test_hand_worked_delta_ibc():
    # One point (c, PGR) = (0.25, 0.5). Levels up to 0.5 lie on the line from the origin: ratio 2 at each of 50 levels.
    # Above: c = 0.25 + (p - 0.5) / 0.5 * 0.75 = 1.5 p - 0.5.
    expected = np.mean([2.0] * 50 + [p / (1.5 * p - 0.5) for p in np.arange(51, 101) / 100]) - 1
    found = curve([(0.0, level(0.6, 25))], references())
    assert found.delta_ibc() == pytest.approx(expected)
    assert curve([], references()).delta_ibc() == pytest.approx(0)  # random mixing


def test_hand_worked_operating_point():
    # Gains 0.2 for 10 tokens: IBC 0.02; always-large gains 0.4 for 100: 0.004; so 5 times as much, a gain of 4.
    point = level(0.6, 10)
    metrics = point_metrics(point, references())
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 0.6, "c": 0.1, "pgr": 0.5, "ibc_gain": 4.0}
    )
    assert np.isnan(point_metrics(references().small, references())["ibc_gain"])


def test_normalised_cost_is_a_ratio_of_sums():
    # Tokens 30 of 200 and 30 of 100: 60 / 300 = 0.2, not the mean ratio 0.225.
    small, large = outcomes([0, 0], [0, 0]), outcomes([1, 1], [200, 100])
    assert point_metrics(outcomes([1, 0], [30, 30]), References(small, large))["c"] == pytest.approx(0.2)


def test_accuracy_above_always_large_is_kept():
    found = curve([(0.0, level(0.9, 40))], references())
    assert found.accuracy_at(np.array([0.4, 0.7, 1.0])).tolist() == pytest.approx([0.9, 0.9, 0.9])
    assert found.cpt(95) == pytest.approx(0.4 * 0.38 / 0.5)
    assert not found.by_mixing(95)
    assert found.cpt(125) == pytest.approx(0.4)
    assert np.isnan(found.cpt(126))


def test_points_beyond_always_large_and_free_points_are_not_on_the_curve():
    bare = curve([], references())
    found = curve([(0.0, level(0.95, 101)), (1.0, level(0.7, 0))], references())
    assert np.array_equal(found.accuracy_at(GRID), bare.accuracy_at(GRID))
    assert found.delta_ibc() == bare.delta_ibc()
    assert found.by_mixing(50)


def test_a_point_equal_to_always_large_does_not_count_as_reaching():
    """The threshold that always escalates is always-large: levels before it are still reached by mixing."""
    found = curve([(0.1, level(0.6, 10)), (1.0, level(0.8, 100))], references())
    assert found.by_mixing(95) and not found.by_mixing(50)


def test_dominated_last_point_does_not_hide_mixing():
    found = curve([(0.1, level(0.6, 10)), (0.2, level(0.59, 90))], references())
    assert found.mixing_from == pytest.approx(0.1)
    assert found.by_mixing(80)


def test_cost_of_always_small_starts_the_curve():
    # With small tokens priced, always-small has c 0.2: cheaper budgets buy nothing, random mixing starts there.
    found = curve([], references(small_cost=20))
    assert np.isnan(found.accuracy_at(np.array([0.1]))[0])
    assert found.accuracy_at(np.array([0.2, 0.6])).tolist() == pytest.approx([0.4, 0.6])
    assert found.cpt(50) == pytest.approx(0.6)
    assert np.isnan(curve_metrics(found)["accuracy_at_15"])


@pytest.mark.parametrize("large", [0.4, 0.3])
def test_no_gap_is_undefined_and_never_an_error(large):
    found = curve([(0.0, level(0.5, 10))], references(0.4, large))
    metrics = curve_metrics(found)
    needs_gap = {name for name in metrics if not name.startswith("accuracy")}
    assert {name for name, value in metrics.items() if np.isnan(value)} == needs_gap
    assert not found.by_mixing(50)
    assert np.isnan(point_metrics(level(0.5, 10), references(0.4, large))["pgr"])


def test_free_always_large_is_undefined():
    metrics = curve_metrics(curve([(0.0, level(0.5, 0))], references(cost=0)))
    assert all(np.isnan(value) for value in metrics.values())


def test_other_problems_are_refused():
    other = outcomes([0.5, 0.5], [1, 1])
    with pytest.raises(DataError, match="cannot be paired"):
        curve([(0.0, other)], references())
    with pytest.raises(DataError, match="no problems"):
        References(outcomes([], []), outcomes([], []))


@given(point_lists, accuracies, accuracies)
def test_curve_agrees_with_brute_force(pairs, small, large):
    assume(small < large)
    knots = brute_force(pairs, small, large)
    found = curve_of(pairs, small, large)
    assert np.allclose(found.accuracy_at(GRID), np.interp(GRID, *knots))
    shares = np.array([0.01, 0.5, 0.8, 0.95, 1.0])
    levels = small + shares * (large - small)
    expected = [np.interp(each, knots[1], knots[0]) for each in levels]  # accuracies of knots ascend strictly
    assert np.allclose(found.cost_at(shares), expected)
    steps = np.arange(1, 101) / 100
    inverse = np.interp(small + steps * (large - small), knots[1], knots[0])
    assert found.delta_ibc() == pytest.approx(np.mean(steps / inverse) - 1)


@given(point_lists, st.sampled_from([1e-6, 0.37, 3.0, 1e5]))
def test_scale_of_costs_does_not_matter(pairs, scale):
    plain, scaled = curve_metrics(curve_of(pairs)), curve_metrics(curve_of(pairs, scale=scale))
    for name in plain:
        factor = scale if name.endswith("_cost") else 1.0
        assert scaled[name] == pytest.approx(factor * plain[name]), name


@given(point_lists, st.tuples(accuracies, costs), accuracies, costs)
def test_a_dominated_point_changes_nothing(pairs, best, loss, extra):
    assume(0 < best[1] < 1)
    before = curve_of([*pairs, best])
    after = curve_of([*pairs, best, (max(0.0, best[0] - loss), best[1] + extra)])
    assert np.array_equal(before.accuracy_at(GRID), after.accuracy_at(GRID))
    assert before.mixing_from == after.mixing_from


@given(point_lists, costs, accuracies)
def test_a_point_on_or_above_the_curve_never_lowers_it(pairs, cost, rise):
    before = curve_of(pairs)
    height = before.accuracy_at(np.array([min(cost, 1.0)]))[0]
    after = curve_of([*pairs, (height + rise, cost)])
    assert (after.accuracy_at(GRID) >= before.accuracy_at(GRID) - 1e-12).all()


@given(point_lists)
def test_curve_and_cpt_ascend(pairs):
    found = curve_of(pairs)
    assert (np.diff(found.accuracy_at(GRID)) >= -1e-12).all()
    cpt = found.cost_at(np.linspace(0.01, 1, 60))
    assert (np.diff(cpt) >= -1e-12).all()
    assert (cpt > 0).all() and (cpt <= 1).all()


@given(point_lists, st.sampled_from([50, 80, 95]))
def test_by_mixing_means_that_no_point_of_the_hull_reaches_it(pairs, percent):
    reached = any(
        a >= 0.25 + percent / 100 * 0.5 for c, a in zip(*brute_force(pairs, 0.25, 0.75), strict=True) if c < 1
    )
    assert bool(curve_of(pairs).by_mixing(percent)) == (not reached)


@given(point_lists, st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_weights_equal_repeated_problems(pairs, counts):
    """A row of weights gives the curve of data in which each problem appears so many times."""
    generator = np.random.default_rng(0)

    def on_three(accuracy, cost):
        return outcomes(accuracy * generator.random(3), cost * (1 + generator.random(3)))

    points = [(0.0, on_three(*pair)) for pair in pairs]
    refs = References(on_three(0.3, 0.0), on_three(1.0, 1.0))
    index = np.repeat(np.arange(3), counts)
    again = References(refs.small.take(index), refs.large.take(index))
    repeated = Curve.of(Method.whole([(knob, each.take(index)) for knob, each in points]), again)
    weights = np.array([[1 / 3] * 3, np.array(counts) / sum(counts)])
    method = Method.whole(points)
    weighted = curve_metrics(Curve.of(method, refs, weights))
    for i, plain in enumerate((Curve.of(method, refs), repeated)):
        for name, value in curve_metrics(plain).items():
            assert weighted[name][i] == pytest.approx(float(value), nan_ok=True), name


def test_the_hull_is_chosen_elsewhere():
    """A point that was lucky there is paid for here, and one that was unlucky is not used."""
    there = [(1.0, level(0.7, 20)), (2.0, level(0.5, 40)), (3.0, level(0.72, 60))]
    here = [(1.0, level(0.5, 20)), (2.0, level(0.78, 40)), (3.0, level(0.7, 60))]
    method = Method.chosen(here, there, references())
    assert method.hull == (0,) and method.large  # always-small, 0.7 at 20 %, always-large: 0.72 at 60 % is below that
    found = Curve.of(method, references())
    assert found.accuracy_at(np.array([0.2, 0.4, 0.6, 1.0])).tolist() == pytest.approx([0.5, 0.575, 0.65, 0.8])
    assert found.cpt(50) == pytest.approx(0.2 + 0.8 / 3)
    assert found.mixing_from == pytest.approx(0.2)


def test_nothing_is_spent_on_a_large_model_that_was_no_better_there():
    there = [(1.0, level(0.85, 20))]
    method = Method.chosen([(1.0, level(0.7, 25))], there, references())
    assert not method.large
    found = Curve.of(method, references())
    assert found.accuracy_at(np.array([0.25, 0.5, 1.0])).tolist() == pytest.approx([0.7, 0.7, 0.7])
    # but what the hull does not reach can be reached by mixing: 0.78 is 0.08 of 0.1 of the way
    assert found.cpt(95) == pytest.approx(0.25 + 0.75 * 0.8) and found.by_mixing(95)
    assert np.isfinite(found.delta_ibc())


def test_a_curve_that_falls_is_read_where_it_first_reaches():
    method = Method((((1.0, level(0.7, 20))), (2.0, level(0.6, 40))), (0, 1))
    found = Curve.of(method, references())
    assert found.accuracy_at(np.array([0.2, 0.3, 0.4])).tolist() == pytest.approx([0.7, 0.65, 0.6])
    assert found.cpt(75) == pytest.approx(0.2) and found.cpt(90) == pytest.approx(0.4 + 0.6 * 0.8)


def with_solutions(problems, correct, counts):
    whole = outcomes(np.full(problems, 0.5), 1)
    return replace(whole, solutions=Solutions(np.array(correct, float), np.array(counts, float)))


def test_gain_by_number_of_escalations_counts_solutions():
    # Two problems with two solutions each: 0 and 2 escalations, 2 and 1.
    small = with_solutions(2, [1, 0, 0, 1], [0, 0, 0, 0])
    routed = with_solutions(2, [1, 1, 0, 0], [0, 2, 2, 1])
    wanted = EscalationGain(0, 1, 0.0), EscalationGain(1, 1, -1.0), EscalationGain(2, 2, 0.5)
    assert gain_by_escalations(routed, small) == wanted
    assert gain_by_escalations(with_solutions(2, [1, 1, 0, 0], [0, 0.4, 2, 1]), small) == ()  # it draws
    assert gain_by_escalations(mix(routed, small, 0.5), small) == ()


def test_spread_takes_nearest_candidates_to_equally_spaced_targets():
    # Targets 0.25, 0.5, 0.75; the cluster at 0.5 gives one point only.
    shares = [0.02, 0.27, 0.49, 0.5, 0.52, 0.71, 0.97, 1.0, 1.3]
    chosen = spread([(c, level(c / 2, 100 * c)) for c in reversed(shares)], level(0.8, 100), count=3)
    assert [knob for knob, _ in chosen] == [0.27, 0.5, 0.71]


def test_spread_merges_candidates_that_cost_the_same_and_keeps_the_better():
    candidates = [(1.0, level(0.5, 30)), (2.0, level(0.6, 30)), (3.0, level(0.6, 30)), (4.0, level(0.7, 60))]
    assert [knob for knob, _ in spread(candidates, level(0.8, 100))] == [2.0, 4.0]


@given(st.lists(st.integers(0, 130), max_size=60), st.integers(1, 16))
def test_spread_points_are_distinct_and_inside(percents, count):
    chosen = spread([(float(i), level(0.5, c)) for i, c in enumerate(percents)], level(0.8, 100), count)
    c = [each.cost[0] for _, each in chosen]
    assert len(c) == min(count, len({x for x in percents if 0 < x < 100}))
    assert (np.diff(c) > 0).all()
    assert all(0 < each < 100 for each in c)


@given(st.lists(st.integers(1, 99), min_size=4, max_size=7, unique=True))
def test_spread_is_the_nearest_assignment_there_is(percents):
    from itertools import permutations

    targets = np.array([25.0, 50.0, 75.0])
    chosen = [each.cost[0] for _, each in spread([(float(c), level(0.5, c)) for c in percents], level(0.8, 100), 3)]
    best = min(sum(abs(t - v) for t, v in zip(targets, each, strict=True)) for each in permutations(percents, 3))
    assert len(set(chosen)) == 3
    assert np.abs(targets - chosen).sum() == pytest.approx(best)
