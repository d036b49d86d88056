"""Intervals of every metric by bootstrap over problems; tests of paired differences (docs/design.md, section 7).

Everything takes the weights that `resample_weights` draws: whoever passes the same weights for two methods compares
them on the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from agents.evaluation.curves import CPT_TARGETS, TOLERANCE, Curve, Method, References, curve_metrics
from agents.evaluation.outcomes import Floats, Outcomes
from rollouts.errors import DataError
from rollouts.trees.arrays import in_a_file

RESAMPLES = 2000
LEVELS = (0.025, 0.975)
_AT_ONCE = 1 << 22  # weights that are drawn at once
COUNTED = 12
"""Problems whose signs `sign_flips` counts out."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % percentile bootstrap interval over problems.

    Attributes:
        value: On the data as they are; NaN if undefined.
        low: Lower end, among the resamples in which the value is defined; NaN if the value is undefined.
        high: Upper end.
        undefined: Share of the resamples in which the value is undefined, in [0, 1].
    """

    value: float
    low: float
    high: float
    undefined: float

    @property
    def shown(self) -> bool:
        """Return whether the interval excludes 0 and no more resamples than it leaves out are undefined."""
        return (self.low > 0 or self.high < 0) and self.undefined <= LEVELS[0]


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference of means, first minus second.

    Attributes:
        p_value: `sign_flips` of the differences of the problems.
    """

    p_value: float


def resample_weights(problems: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Draw bootstrap resamples of the problems, with replacement.

    Args:
        problems: P, at least 1.
        resamples: R.
        seed: Same seed, same resamples.

    Returns:
        (R, P) share of each problem in each resample; rows sum to 1. Of many problems they lie in a file.
    """
    shape, generator = (resamples, problems), np.random.default_rng(seed)
    weights = np.empty(shape) if resamples * problems <= _AT_ONCE else in_a_file(shape, np.float64)
    for some in np.array_split(weights, -(-resamples * problems // _AT_ONCE)):
        draws = generator.integers(0, problems, some.shape)
        draws += problems * np.arange(len(some))[:, None]
        some[:] = np.bincount(draws.ravel(), minlength=some.size).reshape(some.shape) / problems
    return weights


def estimate(value: Floats | float, samples: Floats, levels: tuple[float, float] = LEVELS) -> Estimate:
    """Combine a value and its (R,) resampled values, NaN where undefined, into an estimate with such quantiles.

    Where the value itself is undefined so is its interval, whatever some resamples say.
    """
    defined = samples[np.isfinite(samples)]
    usable = len(defined) > 0 and bool(np.isfinite(value))
    low, high = np.quantile(defined, levels) if usable else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), 1 - len(defined) / len(samples))


def sign_flips(differences: Floats) -> float:
    """Return the two-sided p-value of no difference, by flipping signs (Fisher's randomisation test).

    Without a difference between two routers, a problem's difference is as likely with the other sign. The p-value is
    the share of all patterns of signs whose sum is at least as far from 0. The signs of the 12 greatest differences are
    counted out; the sum of the others is taken to be normal with the variance that flipping gives it, less the least of
    them as a correction for continuity. So the p-value is exact where at most 12 problems differ, and has no least
    value, as one of resamples has, where more do.

    Args:
        differences: (P,) one for each problem; with an undefined one the p-value is NaN.
    """
    from scipy.special import erfc

    if not np.isfinite(differences).all():
        return float("nan")
    sizes = np.sort(np.abs(differences[differences != 0]))[::-1]
    total = abs(differences.sum()) - TOLERANCE * sizes.sum()  # less rounding
    sums = np.zeros(1)
    for size in sizes[:COUNTED]:
        sums = np.concatenate([sums + size, sums - size])
    if len(sizes) <= COUNTED:
        return float((np.abs(sums) >= total).mean())
    spread = np.linalg.norm(sizes[COUNTED:]) * 2**0.5
    return min(1.0, float(erfc((total - sizes[-1] - sums) / spread).mean()))


def estimates(metrics: Callable[[Floats | None], Mapping[str, Floats]], weights: Floats) -> dict[str, Estimate]:
    """Return metrics with their intervals; `metrics`, a function of weights, is computed anew in each resample."""
    values, samples = metrics(None), metrics(weights)
    return {name: estimate(values[name], samples[name]) for name in values}


def curve_estimates(method: Method, references: References, weights: Floats) -> dict[str, Estimate]:
    """Return every metric of `curve_metrics` with its interval."""
    return estimates(lambda chosen: curve_metrics(Curve.of(method, references, chosen)), weights)


def curve_band(method: Method, references: References, weights: Floats, c: Floats) -> list[Estimate]:
    """Return the curve's accuracy at each of (L,) costs with its pointwise 95 % band."""
    value, samples = (Curve.of(method, references, chosen).accuracy_at(c) for chosen in (None, weights))
    return [estimate(value[i], samples[:, i]) for i in range(len(c))]


def paired_curves(method: Method, baseline: Method, references: References, weights: Floats) -> dict[str, Estimate]:
    """Compare the curves of two methods on the same resamples.

    Returns:
        For each metric of `curve_metrics` the difference `method` minus `baseline`, and for each CPT also
        ``cpt_80_percent``: that difference in percent of the baseline's CPT (negative: cheaper).
    """

    def differences(chosen: Floats | None) -> dict[str, Floats]:
        own = curve_metrics(Curve.of(method, references, chosen))
        other = curve_metrics(Curve.of(baseline, references, chosen))
        percent = {f"cpt_{x}_percent": 100 * (own[f"cpt_{x}"] / other[f"cpt_{x}"] - 1) for x in CPT_TARGETS}
        return {name: own[name] - other[name] for name in own} | percent

    return estimates(differences, weights)


def paired_means(first: Floats, second: Floats, weights: Floats) -> Difference:
    """Return the difference of the means of two (P,) arrays of per-problem values, paired on problems."""
    differences = first - second
    interval = estimate(differences.mean(), weights @ differences)
    return Difference(**asdict(interval), p_value=sign_flips(differences))


def paired_returns(first: Outcomes, second: Outcomes, lam: float, weights: Floats) -> Difference:
    """Return the difference of mean returns, ``correct - lam * cost``, of two routers.

    Raises:
        DataError: They are not on the same problems.
    """
    first.paired_with(second)
    return paired_means(first.returns(lam), second.returns(lam), weights)


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Adjust p-values of several comparisons by Holm's step-down method.

    Args:
        p_values: m p-values; NaN for a comparison that could not be made, which still counts.

    Returns:
        (m,) adjusted p-values in the same order: reject where they are at most the level. NaN stays NaN.

    Raises:
        DataError: A p-value is outside [0, 1].
    """
    p = np.asarray(p_values, float)
    if ((p < 0) | (p > 1)).any():
        raise DataError(f"Holm correction: p-values must lie in [0, 1], got {p[(p < 0) | (p > 1)].tolist()}.")
    order = np.argsort(p)  # NaN last
    steps = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
