"""Bootstrap intervals, paired differences, their tests and Holm's correction: brute force and known answers."""

import time
from itertools import product

import numpy as np
import pytest
from made_outcomes import outcomes, simulated
from scipy import stats

from agents.evaluation.bootstrap import (
    curve_band,
    curve_estimates,
    estimate,
    holm,
    paired_curves,
    paired_means,
    paired_returns,
    resample_weights,
    sign_flips,
)
from agents.evaluation.curves import Curve, Method, References, curve_metrics
from rollouts.errors import DataError

SHARES = [0.05, 0.15, 0.3, 0.6]


def test_weights_are_resamples_and_depend_on_the_seed_alone():
    weights = resample_weights(7, 500, seed=3)
    counts = 7 * weights
    assert weights.shape == (500, 7)
    assert np.allclose(counts, np.rint(counts)) and np.allclose(counts.sum(axis=1), 7)
    # A problem is left out of a resample with probability (1 - 1/7)^7 = 0.34.
    assert (counts == 0).mean() == pytest.approx((6 / 7) ** 7, abs=0.03)
    assert np.array_equal(weights, resample_weights(7, 500, seed=3))
    assert not np.array_equal(weights, resample_weights(7, 500, seed=4))


def test_whole_curve_is_recomputed_in_each_resample():
    """Against a loop that resamples problems and builds every curve anew."""
    method, refs = simulated(40, SHARES, 3)
    weights = resample_weights(40, 60, seed=1)
    slow = []
    for row in weights:
        index = np.repeat(np.arange(40), np.rint(40 * row).astype(int))
        again = References(refs.small.take(index), refs.large.take(index))
        points = [(knob, each.take(index)) for knob, each in method.points]
        slow.append(curve_metrics(Curve.of(Method.whole(points), again)))
    for name, fast in curve_estimates(method, refs, weights).items():
        low, high = np.quantile([float(each[name]) for each in slow], [0.025, 0.975])
        assert (fast.low, fast.high) == pytest.approx((low, high)), name
        assert fast.value == pytest.approx(float(curve_metrics(Curve.of(method, refs))[name]))


def test_undefined_resamples_are_counted():
    # always-large solves one problem more of 3, the others alike: a resample has no gap iff it misses that problem.
    refs = References(outcomes([1, 0, 0], 0), outcomes([1, 0, 1], 10))
    weights = resample_weights(3, 400)
    found = curve_estimates(Method.whole([(0.0, outcomes([1, 0, 0.5], 2))]), refs, weights)
    assert found["cpt_80"].undefined == pytest.approx((weights[:, 2] == 0).mean())
    assert 0.2 < found["cpt_80"].undefined < 0.4
    assert np.isfinite(found["cpt_80"].low)
    assert found["accuracy_at_10"].undefined == 0


def test_interval_of_an_undefined_value_is_undefined():
    # No gap on the data, but in resamples that leave out the first problem there is one.
    refs = References(outcomes([1, 0, 0], 0), outcomes([0, 0, 1], 10))
    found = curve_estimates(Method.whole([(0.0, outcomes([0, 0, 1], 2))]), refs, resample_weights(3, 400))["delta_ibc"]
    assert np.isnan([found.value, found.low, found.high]).all()
    assert 0.3 < found.undefined < 0.9


def test_interval_covers_the_truth():
    """Accuracy of a coin that shows heads with probability 0.3, 60 problems: 95 % intervals cover in about 95 %."""
    generator = np.random.default_rng(0)
    weights = resample_weights(60, 400)
    covered = 0
    for _ in range(300):
        heads = (generator.random(60) < 0.3).astype(float)
        found = estimate(heads.mean(), weights @ heads)
        covered += found.low <= 0.3 <= found.high
    assert 0.89 <= covered / 300 <= 0.98


def test_interval_of_cpt_covers_the_truth():
    """Known curve: always-small solves nothing, always-large all, a router half of them at a tenth of the cost.

    CPT(80 %) is then 0.1 + 0.9 * 0.3 / 0.5 = 0.64.
    """
    generator = np.random.default_rng(1)
    weights = resample_weights(150, 300)
    refs = References(outcomes(np.zeros(150), 0), outcomes(np.ones(150), 100))
    covered = 0
    for _ in range(100):
        router = outcomes(generator.random(150) < 0.5, generator.exponential(10, 150))
        found = curve_estimates(Method.whole([(0.0, router)]), refs, weights)["cpt_80"]
        covered += found.low <= 0.64 <= found.high
    assert 0.87 <= covered / 100 <= 1.0


def test_paired_differences_of_curves():
    """Of a method and itself nothing; of two methods, resample by resample."""
    points, refs = simulated(120, SHARES, 4)
    others, _ = simulated(120, SHARES, 1.2)
    weights = resample_weights(120, 300)
    same = paired_curves(points, points, refs, weights)["cpt_80"]
    assert (same.value, same.low, same.high) == (0, 0, 0) and not same.shown
    found = paired_curves(points, others, refs, weights)
    own = curve_metrics(Curve.of(points, refs, weights))["cpt_80"]
    base = curve_metrics(Curve.of(others, refs, weights))["cpt_80"]
    assert (found["cpt_80"].low, found["cpt_80"].high) == pytest.approx(tuple(np.quantile(own - base, [0.025, 0.975])))
    percent = found["cpt_80_percent"]
    assert (percent.low, percent.high) == pytest.approx(tuple(np.quantile(100 * (own - base) / base, [0.025, 0.975])))
    assert percent.value < 0 and percent.shown
    back = paired_curves(others, points, refs, weights)["cpt_80"]
    assert back.value == pytest.approx(-found["cpt_80"].value)


def test_paired_returns():
    # Returns at lam 0.01: first 1 - 0.1 and 0 - 0.2, second 0 and 1 - 0.3: differences 0.9 and -0.9.
    first, second = outcomes([1, 0], [10, 20]), outcomes([0, 1], [0, 30])
    found = paired_returns(first, second, 0.01, resample_weights(2, 100))
    assert found.value == pytest.approx(0)
    assert (found.low, found.high) == pytest.approx((-0.9, 0.9))
    with pytest.raises(DataError, match="cannot be paired"):
        paired_returns(first, outcomes([1], [1]), 0.01, resample_weights(2, 100))


def test_pairing_removes_what_problems_share():
    """A router that is a little better on every problem is shown to be, however much problems differ."""
    generator = np.random.default_rng(0)
    base = generator.random(100)
    assert paired_means(base + 0.01, base, resample_weights(100, 200)).shown


def test_flipped_signs_are_counted():
    for differences in ([0.5, -0.25, 1.0, 0.75], [1.0, 1.0, -1.0, 1.0, 0.0], [0.1, 0.2, -0.3]):
        flips = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
        wanted = np.mean([each >= abs(sum(differences)) - 1e-12 for each in flips])
        assert sign_flips(np.array(differences)) == pytest.approx(wanted)
    assert sign_flips(np.ones(3)) == pytest.approx(
        0.25
    )  # three problems can show no more, however large the difference
    assert sign_flips(np.array([])) == sign_flips(np.zeros(50)) == 1.0
    assert np.isnan(sign_flips(np.array([0.5, np.nan, 0.25])))
    assert sign_flips(1e-300 * np.ones(3)) == sign_flips(1e9 * np.ones(3))  # of any scale


@pytest.mark.parametrize("make", [np.abs, np.exp, np.sign, lambda x: np.abs(x) ** 4])
def test_what_is_not_counted_is_normal(make):
    draws = np.random.default_rng(0)
    signs = np.array(list(product((-1, 1), repeat=17)))
    for size in (0.0, 0.3, 0.7):
        differences = make(draws.normal(size=17)) * draws.choice([-1, 1], 17, p=[0.5 - size / 2, 0.5 + size / 2])
        wanted = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
        assert sign_flips(differences) == pytest.approx(wanted, rel=0.25, abs=0.01)


def test_wins_and_losses_are_counted_as_by_the_sign_test():
    """Where all differences are alike the test is the sign test: never a smaller p-value, and hardly a larger one."""
    for count in (5, 12, 13, 14, 17, 25, 40, 60, 200):
        for wins in range(count // 2 + 1):
            exact = stats.binomtest(wins, count).pvalue
            found = sign_flips(np.repeat([1.0, -1.0], [wins, count - wins]))
            assert exact * (1 - 1e-3) <= found <= 1.3 * exact + 1e-3


@pytest.mark.parametrize("problems", [6, 12, 17, 40, 400])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "few differ"])
def test_p_values_are_uniform_without_a_difference(problems, kind):
    draws = np.random.default_rng(problems)
    count = 1000
    differences = draws.normal(size=(count, problems))
    if kind == "heavy tails":  # most of them small
        differences = draws.exponential(size=differences.shape) ** 2 * draws.choice([-1, 1], differences.shape)
    if kind == "few differ":  # replicas: shares of 1/4, 0 for most problems
        differences = draws.integers(-2, 3, differences.shape) / 4 * (draws.random(differences.shape) < 0.3)
    p = np.array([sign_flips(row) for row in differences])
    for level in (0.05, 0.2, 0.5):  # of discrete differences they may be larger than uniform ones
        low = 0 if kind == "few differ" or problems < 12 else 0.7 * level
        assert low <= (p <= level).mean() <= level + 3.3 * (level * (1 - level) / count) ** 0.5
    assert (p > 0).all() and (p <= 1).all()


def test_lopsided_differences_of_mean_zero_are_not_taken_for_one():
    """A problem in ten loses much, the others gain a little: in the mean nothing, though signs are not exchangeable."""
    draws = np.random.default_rng(3)
    p = np.array([sign_flips(np.where(draws.random(400) < 0.1, -0.9, 0.1)) for _ in range(2000)])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


def test_a_difference_is_found_and_p_values_go_below_those_of_resamples():
    draws = np.random.default_rng(4)
    found = [sign_flips(draws.normal(0.3, 1, 100)) < 0.05 for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.85, abs=0.06)  # of the t-test: 0.844
    strong = paired_means(draws.normal(0.5, 1, 1000), np.zeros(1000), resample_weights(1000, 200))
    assert strong.p_value < 1e-20 and strong.shown
    assert max(holm([strong.p_value] * 40)) < 1e-15
    same = paired_means(np.ones(9), np.ones(9), resample_weights(9, 50))
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_a_difference_with_many_undefined_resamples_is_not_shown():
    samples = np.ones(1000)
    assert estimate(1.0, samples).shown
    samples[:26] = np.nan
    assert not estimate(1.0, samples).shown


def test_band_contains_the_curve():
    points, refs = simulated(200, SHARES, 3)
    c = np.linspace(0, 1, 11)
    band = curve_band(points, refs, resample_weights(200, 200), c)
    assert len(band) == 11 and all(each.low < each.value < each.high for each in band)
    assert band[0].value == pytest.approx(refs.small.correct.mean())


def test_holm():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; never falling: 0.04, 0.06, 0.06, 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    # A comparison without p-value still counts among the three.
    assert holm([0.01, np.nan, 0.02]) == pytest.approx([0.03, np.nan, 0.04], nan_ok=True)
    assert len(holm([])) == 0
    with pytest.raises(DataError, match="1.2"):
        holm([0.1, 1.2])


def test_all_resamples_together_are_quicker_than_one_by_one():
    points, refs = simulated(1000, np.linspace(0.03, 0.95, 16), 3)
    weights = resample_weights(1000)
    start = time.process_time()
    curve_estimates(points, refs, weights)
    together = time.process_time() - start
    start = time.process_time()
    for row in weights[:40]:
        curve_metrics(Curve.of(points, refs, row[None]))
    assert together < (time.process_time() - start) / 40 * len(weights) / 2
