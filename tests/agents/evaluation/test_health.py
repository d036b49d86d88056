"""The health report says what the paired intervals say."""

import numpy as np
import pytest

from agents.evaluation.bootstrap import resample_weights
from agents.evaluation.health import BEATEN, BETTER, COLLAPSED, LEVEL, assess
from agents.evaluation.outcomes import Outcomes

LAM = 0.01
COUNT = 400
WEIGHTS = resample_weights(COUNT, 500)


def outcomes(correct, cost, rate):
    steps = np.full(COUNT, 5.0)
    ids = tuple(f"p{i}" for i in range(COUNT))
    cost = np.full(COUNT, float(cost))
    return Outcomes(ids, correct.astype(float), cost, cost, steps * 9, steps * 3, steps * rate, steps)


def solved(share, seed):
    return np.random.default_rng(seed).random(COUNT) < share


SMALL = outcomes(solved(0.4, 0), 0, 0)
LARGE = outcomes(solved(0.9, 1), 100, 1)
GOOD_THRESHOLD = outcomes(solved(0.75, 2), 20, 0.2)
POOR_THRESHOLD = outcomes(solved(0.3, 3), 0, 0)


def verdict(router, threshold=GOOD_THRESHOLD):
    health = assess(router, {"thr": threshold, "always-small": SMALL}, LARGE, LAM, WEIGHTS)
    assert f"{router.returns(LAM).mean():.4f}" in health.sentence
    return health


def test_never_escalating_is_collapsed_where_a_threshold_is_better():
    health = verdict(SMALL)
    assert health.verdict == COLLAPSED and not health.fine
    assert "continues whatever it sees" in health.sentence
    health = verdict(LARGE)
    assert health.verdict == COLLAPSED and "escalates whatever it sees" in health.sentence


def test_never_escalating_is_optimal_where_nothing_is_better():
    health = verdict(SMALL, POOR_THRESHOLD)
    assert health.verdict == LEVEL and health.fine


def test_beaten_by_either_rule():
    mixed = outcomes(solved(0.5, 4), 20, 0.3)
    assert verdict(mixed).verdict == BEATEN
    worse_than_constant = outcomes(solved(0.3, 5), 10, 0.3)
    assert verdict(worse_than_constant, POOR_THRESHOLD).verdict == BEATEN


def test_better_needs_both():
    good = outcomes(solved(0.88, 6), 15, 0.2)
    health = verdict(good)
    assert health.verdict == BETTER and all(difference.low > 0 for difference in health.over.values())
    assert verdict(GOOD_THRESHOLD).verdict == LEVEL


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (0.0099, True), (0.02, False), (0.985, False), (0.995, True)])
def test_one_action_means_99_percent(rate, same):
    weak = outcomes(solved(0.4, 7), 0, rate)
    assert (verdict(weak).verdict == COLLAPSED) == same


def test_a_handful_of_problems_gets_no_verdict():
    few = np.arange(7)
    small, large = SMALL.take(few), LARGE.take(few)
    rules = {"thr": outcomes(np.ones(COUNT, bool), 0, 0).take(few), "always-small": small}
    health = assess(large, rules, large, LAM, resample_weights(7, 500))
    assert health.over["thr"].high < 0  # beaten, if one believed seven problems
    assert health.verdict == LEVEL and health.fine
    assert health.sentence.startswith("No verdict: 7 problems are too few, expected at least 8.")
