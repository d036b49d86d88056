"""Cost-accuracy curves and the numbers read off them (docs/design.md, section 7): PGR, CPT, IBC, budgeted accuracy.

From arrays of outcomes only: nothing here knows routers, trees or files. Every function takes optional weights of
problems with a leading axis of resamples, so that one implementation gives the estimate and its bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.outcomes import Floats, Outcomes
from rollouts.errors import DataError

CPT_TARGETS = (50, 80, 95)
"""Shares of the performance gap, in %, for which the cost is reported."""
BUDGETS = (10, 15, 20, 25, 30)
"""Costs, in % of always escalating, at which the accuracy is reported."""
IBC_LEVELS = 100
TOLERANCE = 1e-9
"""Differences of accuracies and of normalised costs up to this are rounding."""

Points = Sequence[tuple[float, Outcomes]]
"""Operating points of one method: (knob, outcomes)."""


@dataclass(frozen=True, eq=False)
class References:
    """The two constants that every metric is relative to, walked through the same trees as the routers.

    Attributes:
        small: Outcomes of always continuing with the small model (r_w in docs/design.md).
        large: Outcomes of always escalating (r_s, C_s).
    """

    small: Outcomes
    large: Outcomes

    def __post_init__(self) -> None:
        """Check that both are on the same problems.

        Raises:
            DataError: They are not, or there are no problems.
        """
        self.small.paired_with(self.large)
        if not len(self.small):
            raise DataError("References: there are no problems to evaluate on. Choose a split that has some.")

    def check(self, points: Points) -> None:
        """Check that operating points are on the problems of the references; raises DataError if not."""
        for _, outcomes in points:
            outcomes.paired_with(self.small)


def average(columns: Sequence[Floats], weights: Floats | None = None) -> Floats:
    """Average per-problem values.

    Args:
        columns: n arrays of shape (P,).
        weights: (R, P) weights whose rows sum to 1, or None for the plain mean.

    Returns:
        (n,) means, or (R, n) with weights.
    """
    stacked = np.stack(columns, axis=-1)
    means: Floats = stacked.mean(axis=0) if weights is None else weights @ stacked
    return means


def per_cost(values: Floats, cost: Floats) -> Floats:
    """Divide by costs; NaN at no cost."""
    quotient: Floats = values / np.where(cost > 0, cost, np.nan)
    return quotient


def performance_gap(small_accuracy: Floats, large_accuracy: Floats) -> Floats:
    """Return r_s - r_w, or NaN where it is not positive."""
    gap = large_accuracy - small_accuracy
    return np.where(gap > TOLERANCE, gap, np.nan)


@dataclass(frozen=True, eq=False)
class Curve:
    """A method's cost-accuracy curve, or one curve for each resample (docs/design.md, section 7).

    Costs are c = sum C(q) / sum C_s(q). The knots are always-small at (its c, r_w), always-large at (1, r_s) and the
    operating points, sorted by c; the running maximum of accuracy keeps those that rise above all cheaper ones,
    so that a dominated point changes nothing; the curve is linear between them, and flat after the last. It is no
    concave hull: a point that rises above all cheaper ones and yet lies below the line between its neighbours lowers
    it. Like any maximum of noisy means it is a little too high, the more so the more points there are.
    Two kinds of operating points are reported but are not on the curve: those with c > 1, and those that cost
    nothing. The latter never escalated: where their accuracy differs from r_w that is noise of sampling, and a gain
    at no cost would make the benefit per cost infinite.

    Attributes:
        cost: (..., K) c of the knots, ascending; a dropped point repeats the knot before it.
        accuracy: (..., K) accuracy at the knots, ascending.
        small_accuracy: (...) r_w.
        large_accuracy: (...) r_s.
        large_cost: (...) mean cost per problem of always escalating, in the unit of the cost model.
        mixing_from: (...) c of the last operating point on the curve with c < 1. Beyond it, the curve rises only by
            mixing with always-large.
    """

    cost: Floats
    accuracy: Floats
    small_accuracy: Floats
    large_accuracy: Floats
    large_cost: Floats
    mixing_from: Floats

    @classmethod
    def of(cls, points: Points, references: References, weights: Floats | None = None) -> Curve:
        """Build the curve of some operating points.

        Args:
            points: (knob, outcomes), in any order, on the problems of `references`.
            references: Always-small and always-large.
            weights: (R, P) weights of the problems, one row for each resample; None for the data as they are.

        Raises:
            DataError: The points are on other problems than the references.
        """
        references.check(points)
        everything = [references.small, *(outcomes for _, outcomes in points), references.large]
        accuracy = average([each.correct for each in everything], weights)
        cost = average([each.cost for each in everything], weights)
        c = per_cost(cost, cost[..., -1:])
        operating = np.zeros(c.shape, bool)
        operating[..., 1:-1] = True
        eligible = (c <= 1) & ((c > 0) | ~operating)
        sort_by, height = np.where(eligible, c, np.inf), np.where(eligible, accuracy, -np.inf)
        order = np.lexsort((-height, sort_by), axis=-1)
        c, height, operating = (np.take_along_axis(each, order, axis=-1) for each in (c, height, operating))
        best = np.maximum.accumulate(height, axis=-1)
        before = np.concatenate([np.full_like(best[..., :1], -np.inf), best[..., :-1]], axis=-1)
        rises = height > before + TOLERANCE
        kept = np.maximum.accumulate(np.where(rises, np.arange(c.shape[-1]), 0), axis=-1)
        knots = np.take_along_axis(c, kept, axis=-1)
        inside = rises & operating & (c < 1 - TOLERANCE)
        return cls(
            cost=knots,
            accuracy=np.where(np.isnan(knots), np.nan, np.take_along_axis(height, kept, axis=-1)),
            small_accuracy=accuracy[..., 0],
            large_accuracy=accuracy[..., -1],
            large_cost=cost[..., -1],
            mixing_from=np.maximum(knots[..., 0], np.where(inside, c, -np.inf).max(axis=-1)),
        )

    @property
    def gap(self) -> Floats:
        """Return (...) r_s - r_w, or NaN where it is not positive."""
        return performance_gap(self.small_accuracy, self.large_accuracy)

    def pgr(self, accuracy: Floats) -> Floats:
        """Return the performance gap recovered, (r - r_w) / (r_s - r_w), by (..., L) accuracies."""
        recovered: Floats = (accuracy - self.small_accuracy[..., None]) / self.gap[..., None]
        return recovered

    def accuracy_at(self, c: Floats) -> Floats:
        """Return (..., L) accuracies at (L,) costs; NaN at costs below the cheapest knot."""
        place = (self.cost[..., None, :] <= c[:, None]).sum(axis=-1) - 1
        (c0, c1), (a0, a1) = self._segments(place)
        width = np.where(c1 > c0, c1 - c0, 1.0)
        value = a0 + (a1 - a0) * np.clip((c - c0) / width, 0.0, 1.0)
        return np.where(place >= 0, value, np.nan)

    def cost_at(self, pgr: Floats) -> Floats:
        """Return the least c, (..., L), at which the curve recovers (L,) shares of the gap; NaN if it never does."""
        level = self.small_accuracy[..., None] + pgr * self.gap[..., None]
        place = (self.accuracy[..., None, :] < level[..., :, None]).sum(axis=-1)
        (c0, c1), (a0, a1) = self._segments(np.minimum(place, self.cost.shape[-1] - 1) - 1)
        height = np.where(a1 > a0, a1 - a0, 1.0)
        value = np.where(place == 0, self.cost[..., :1], c0 + (c1 - c0) * (level - a0) / height)
        return np.where(level <= self.accuracy[..., -1:] + TOLERANCE, value, np.nan)

    def _segments(self, left: NDArray[np.intp]) -> list[tuple[Floats, Floats]]:
        """Return costs and accuracies, each at both ends of the segments that begin at some knots."""
        left = np.maximum(left, 0)
        right = np.minimum(left + 1, self.cost.shape[-1] - 1)
        along = np.take_along_axis
        return [(along(each, left, axis=-1), along(each, right, axis=-1)) for each in (self.cost, self.accuracy)]

    def cpt(self, percent: float) -> Floats:
        """Return CPT(x %), (...): the least c at which the curve reaches a PGR of x %."""
        return self.cost_at(np.array([percent / 100]))[..., 0]

    def by_mixing(self, percent: float) -> NDArray[np.bool_]:
        """Return (...) whether CPT(x %) lies beyond the last operating point, on the segment to always-large."""
        return np.asarray(self.cpt(percent) > self.mixing_from + TOLERANCE)

    def delta_ibc(self) -> Floats:
        """Return ΔIBC, (...): the mean relative gain in benefit per cost over always escalating.

        At each of 100 levels r_w + p (r_s - r_w), p = 0.01..1, the benefit per cost at the least cost c that reaches
        it, relative to that of always escalating, is p / c; ΔIBC is the mean of p / c - 1. Random mixing has 0.
        Every level costs something: points that cost nothing are not on the curve. Where always-small itself
        has a cost, the lowest levels are dear for every method, random mixing included.
        """
        p = np.arange(1, IBC_LEVELS + 1) / IBC_LEVELS
        value: Floats = (p / self.cost_at(p)).mean(axis=-1) - 1
        return value


def point_metrics(outcomes: Outcomes, references: References, weights: Floats | None = None) -> dict[str, Floats]:
    """Return accuracy, c, PGR and relative gain in IBC, (IBC - IBC_base) / IBC_base, of one operating point.

    Args:
        outcomes: The operating point, on the problems of `references`.
        references: Always-small and always-large.
        weights: (R, P) weights of the problems, or None.

    Returns:
        For each of ``accuracy``, ``c``, ``pgr``, ``ibc_gain`` a value, or (R,) values with weights; NaN where
        undefined.
    """
    references.check([(0.0, outcomes)])
    small, large = references.small, references.large
    accuracy, r_w, r_s = np.moveaxis(average([outcomes.correct, small.correct, large.correct], weights), -1, 0)
    own_cost, large_cost = np.moveaxis(average([outcomes.cost, large.cost], weights), -1, 0)
    c, pgr = per_cost(own_cost, large_cost), (accuracy - r_w) / performance_gap(r_w, r_s)
    return {"accuracy": accuracy, "c": c, "pgr": pgr, "ibc_gain": per_cost(pgr, c) - 1}


def curve_metrics(curve: Curve) -> dict[str, Floats]:
    """Return every metric of a curve, by name, each of shape (...); NaN where undefined.

    Names: ``cpt_50`` (as c) and ``cpt_50_cost`` (mean cost per problem) for each target, ``delta_ibc``,
    ``accuracy_at_10`` and ``pgr_at_10`` for each budget.
    """
    metrics: dict[str, Floats] = {}
    for percent in CPT_TARGETS:
        metrics[f"cpt_{percent}"] = curve.cpt(percent)
        metrics[f"cpt_{percent}_cost"] = metrics[f"cpt_{percent}"] * curve.large_cost
    metrics["delta_ibc"] = curve.delta_ibc()
    accuracy = curve.accuracy_at(np.array(BUDGETS) / 100)
    pgr = curve.pgr(accuracy)
    metrics |= {f"accuracy_at_{budget}": accuracy[..., i] for i, budget in enumerate(BUDGETS)}
    metrics |= {f"pgr_at_{budget}": pgr[..., i] for i, budget in enumerate(BUDGETS)}
    return metrics


@dataclass(frozen=True)
class EscalationGain:
    """Accuracy gained over always-small on the problems with one number of escalations."""

    escalations: int
    problems: int
    gain: float


def gain_by_escalations(outcomes: Outcomes, small: Outcomes) -> tuple[EscalationGain, ...]:
    """Group problems by escalations (mean over replicas, rounded) and return each group's gain over always-small."""
    outcomes.paired_with(small)
    groups, member = np.unique(np.rint(outcomes.escalations).astype(int), return_inverse=True)
    gain = outcomes.correct - small.correct
    return tuple(
        EscalationGain(int(number), int((member == i).sum()), float(gain[member == i].mean()))
        for i, number in enumerate(groups)
    )
