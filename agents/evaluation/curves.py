"""Cost-accuracy curves and the numbers read off them (docs/design.md, section 7): PGR, CPT, IBC, budgeted accuracy.

From arrays of outcomes only: nothing here knows routers, trees or files. Every function takes optional weights of
problems with a leading axis of resamples, so that one implementation gives the estimate and its bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.outcomes import Floats, Outcomes, mix
from agents.routers.budgets import upper_hull
from rollouts.errors import DataError

CPT_TARGETS = (50, 80, 95)
"""Shares of the performance gap, in %, for which the cost is reported."""
BUDGETS = (10, 15, 20, 25, 30)
"""Costs, in % of always escalating, at which the accuracy is reported: what such a budget comes to."""
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

    def share(self, outcomes: Outcomes) -> float:
        """Return a cost as a share of always-large's, on whatever problems."""
        return float(per_cost(outcomes.cost.sum(), self.large.cost.sum()))

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
    return stacked.mean(axis=0) if weights is None else weights @ stacked


def per_cost(values: Floats, cost: Floats) -> Floats:
    """Divide by costs; NaN at no cost."""
    quotient: Floats = values / np.where(cost > 0, cost, np.nan)
    return quotient


def performance_gap(small_accuracy: Floats, large_accuracy: Floats) -> Floats:
    """Return r_s - r_w, or NaN where it is not positive."""
    gap = large_accuracy - small_accuracy
    return np.where(gap > TOLERANCE, gap, np.nan)


@dataclass(frozen=True, eq=False)
class Method:
    """A method's operating points on some problems, and those of them that other problems have put on its hull.

    On the hull are the points that no mixture of two others beats, always-small and always-large among them. Between
    two neighbours on it each problem goes to one of both at random: that is what a budget comes to
    (`agents.routers.budgets.calibrate`). Which points are on it is chosen on validation; what they reach there is not
    used, so that measuring them on other problems is free of the luck of the choice.

    Attributes:
        points: All operating points, on the problems that they are measured on.
        hull: Positions of those on the hull.
        large: Whether always-large is on it.
    """

    points: Points
    hull: tuple[int, ...]
    large: bool = True

    @classmethod
    def chosen(cls, points: Points, validation: Points, references: References) -> Method:
        """Put points on the hull by what they come to elsewhere.

        Args:
            points: On the problems that they are measured on.
            validation: The same, in the same order, on the problems that choose.
            references: Always-small and always-large on the latter.

        Raises:
            DataError: `validation` and `references` are on different problems.
        """
        references.check(validation)
        everything = [references.small, references.large, *(outcomes for _, outcomes in validation)]
        cost = average([each.cost for each in everything])
        c, accuracy = per_cost(cost, cost[1:2]), average([each.correct for each in everything])
        usable = np.flatnonzero((cost > 0) & (c < 1 - TOLERANCE) | (np.arange(len(c)) < 2))
        found = usable[upper_hull(c[usable], accuracy[usable])]
        return cls(points, tuple(int(i) - 2 for i in found if i > 1), 1 in found)

    @classmethod
    def whole(cls, points: Points) -> Method:
        """Take points all of which are on the hull, and always-large is not, as an oracle's are."""
        return cls(points, tuple(range(len(points))), large=False)


@dataclass(frozen=True, eq=False)
class Curve:
    """A method's cost-accuracy curve, or one curve for each resample (docs/design.md, section 7).

    Costs are c = sum C(q) / sum C_s(q). The knots are always-small at (its c, r_w), always-large at (1, r_s) and the
    points of the method's hull, sorted by c; the curve is linear between them. If always-large is not on the hull,
    because a cheaper point was as good on the problems that chose, a budget is not spent on it: accuracy is flat
    after the last point, and only what the hull does not reach is reached by mixing with always-large.
    Two kinds of points are reported but are not on the curve: those as dear as always-large, and those that cost
    nothing. The latter never escalated: where their accuracy differs from r_w that is noise of sampling, and a gain at
    no cost would make the benefit per cost infinite.

    Attributes:
        cost: (..., K) c of the knots, ascending; a dropped point repeats the knot before it.
        accuracy: (..., K) accuracy at the knots.
        small_accuracy: (...) r_w.
        large_accuracy: (...) r_s.
        large_cost: (...) mean cost per problem of always escalating, in the unit of the cost model.
        mixing_from: (...) c of the last point of the hull with c < 1. Beyond it there is only mixing with always-large.
        end: (...) c beyond which no budget is spent: 1 with always-large on the hull, else `mixing_from`.
    """

    cost: Floats
    accuracy: Floats
    small_accuracy: Floats
    large_accuracy: Floats
    large_cost: Floats
    mixing_from: Floats
    end: Floats

    @classmethod
    def of(cls, method: Method, references: References, weights: Floats | None = None) -> Curve:
        """Build the curve of a method.

        Args:
            method: Its points, on the problems of `references`.
            references: Always-small and always-large.
            weights: (R, P) weights of the problems, one row for each resample; None for the data as they are.

        Raises:
            DataError: The points are on other problems than the references.
        """
        references.check(method.points)
        on_hull = [method.points[i][1] for i in method.hull]
        everything = [references.small, *on_hull, references.large]
        accuracy = average([each.correct for each in everything], weights)
        cost = average([each.cost for each in everything], weights)
        c = per_cost(cost, cost[..., -1:])
        operating = np.zeros(c.shape, bool)
        operating[..., 1:-1] = True
        kept = (c <= 1) & ((c > 0) | ~operating)
        order = np.lexsort((operating, np.where(kept, c, np.inf)), axis=-1)  # always-small first, dropped points last
        columns = (c, accuracy, operating, kept)
        c, height, operating, kept = (np.take_along_axis(each, order, axis=-1) for each in columns)
        last = np.maximum.accumulate(np.where(kept, np.arange(c.shape[-1]), 0), axis=-1)
        knots = np.take_along_axis(c, last, axis=-1)
        inside = kept & operating & (c < 1 - TOLERANCE)
        mixing_from = np.maximum(knots[..., 0], np.where(inside, c, -np.inf).max(axis=-1))
        return cls(
            cost=knots,
            accuracy=np.where(np.isnan(knots), np.nan, np.take_along_axis(height, last, axis=-1)),
            small_accuracy=accuracy[..., 0],
            large_accuracy=accuracy[..., -1],
            large_cost=cost[..., -1],
            mixing_from=mixing_from,
            end=np.ones_like(mixing_from) if method.large else mixing_from,
        )

    @property
    def gap(self) -> Floats:
        """Return (...) r_s - r_w, or NaN where it is not positive."""
        return performance_gap(self.small_accuracy, self.large_accuracy)

    def pgr(self, accuracy: Floats) -> Floats:
        """Return the performance gap recovered, (r - r_w) / (r_s - r_w), by (..., L) accuracies."""
        return (accuracy - self.small_accuracy[..., None]) / self.gap[..., None]

    def accuracy_at(self, c: Floats) -> Floats:
        """Return (..., L) accuracies at (L,) costs; NaN at costs below the cheapest knot."""
        spent = np.minimum(c, self.end[..., None])
        place = (self.cost[..., None, :] <= spent[..., :, None]).sum(axis=-1) - 1
        (c0, c1), (a0, a1) = self._segments(place)
        width = np.where(c1 > c0, c1 - c0, 1.0)
        value = a0 + (a1 - a0) * np.clip((spent - c0) / width, 0.0, 1.0)
        return np.where(place >= 0, value, np.nan)

    def cost_at(self, pgr: Floats) -> Floats:
        """Return the least c, (..., L), at which the curve recovers (L,) shares of the gap; NaN if it never does."""
        level = self.small_accuracy[..., None] + pgr * self.gap[..., None]
        best = np.maximum.accumulate(self.accuracy, axis=-1)
        place = (best[..., None, :] < level[..., :, None] - TOLERANCE).sum(axis=-1)
        (c0, c1), (a0, a1) = self._segments(np.minimum(place, self.cost.shape[-1] - 1) - 1)
        height = np.where(a1 > a0, a1 - a0, 1.0)
        value = np.where(place == 0, self.cost[..., :1], c0 + (c1 - c0) * np.minimum((level - a0) / height, 1.0))
        return np.where(level <= best[..., -1:] + TOLERANCE, value, np.nan)

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
    """Accuracy gained over always-small in the solutions with one number of escalations."""

    escalations: int
    solutions: int
    gain: float


def gain_by_escalations(outcomes: Outcomes, small: Outcomes) -> tuple[EscalationGain, ...]:
    """Group solutions by escalations and return each group's gain over always-small in the same trees.

    Empty where there are no single solutions to count: of a router that draws, and of a mixture.
    """
    outcomes.paired_with(small)
    own, other = outcomes.solutions, small.solutions
    if own is None or other is None or (np.abs(own.escalations - np.rint(own.escalations)) > TOLERANCE).any():
        return ()
    groups, member = np.unique(np.rint(own.escalations).astype(int), return_inverse=True)
    gain = own.correct - other.correct
    return tuple(
        EscalationGain(int(number), int((member == i).sum()), float(gain[member == i].mean()))
        for i, number in enumerate(groups)
    )


def _settings(method: Method, references: References) -> list[Outcomes]:
    return [references.small, *(outcomes for _, outcomes in method.points), references.large]


def knots(method: Method, references: References) -> list[int]:
    """Return the knots of a method's curve by cost: positions in always-small, the points, always-large."""
    c = [references.share(each) for each in _settings(method, references)]
    on_curve = [0, *(i + 1 for i in method.hull if 0 < c[i + 1] < 1 + TOLERANCE), len(c) - 1]
    return sorted(on_curve, key=lambda i: c[i])


def mixture_at(
    method: Method, references: References, percent: float, told: Sequence[Outcomes] = ()
) -> Outcomes | None:
    """Return what a method comes to where its curve reaches a PGR of x %, if it does: a mixture of two knots.

    Args:
        method: The method.
        references: Always-small and always-large.
        percent: x.
        told: The same settings under other prices, always-small before and always-large after them: what is mixed in
            their place.
    """
    own, at = _settings(method, references), float(Curve.of(method, references).cpt(percent))
    if not np.isfinite(at):
        return None
    c = [references.share(each) for each in own]
    on_curve = knots(method, references)
    after = next(place for place, i in enumerate(on_curve) if c[i] >= at - TOLERANCE)
    last, first = on_curve[after], on_curve[max(after - 1, 0)]
    width = c[last] - c[first]
    told = told or own
    return mix(told[first], told[last], min(max((at - c[first]) / width, 0.0), 1.0) if width > 0 else 1.0)
