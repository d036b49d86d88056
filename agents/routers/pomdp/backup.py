"""What both actions lead to and are worth, from values on a grid of g = P(all accepted steps are right).

Whatever was seen before a step matters through g and the level of the last score alone: one number and a small
integer are the whole state between steps. Values are convex in g; linear interpolation between grid points therefore
errs upwards, by less the finer the grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.routers.pomdp.belief import RIGHT, S0, WRONG, Floats, after_large, scored
from agents.routers.pomdp.model import Model


class _Places(NamedTuple):
    """Where some values of g lie in flattened tables of (C, n) values."""

    left: NDArray[np.int64]
    share: Floats  # of the right neighbour

    def of(self, values: Floats) -> Floats:
        """Interpolate (L, C * n) values: (L, *shape of the places)."""
        left: Floats = values.take(self.left, axis=1)
        return left + self.share * (values.take(self.left + 1, axis=1) - left)


def places(g: Floats, context: NDArray[np.int64] | int, points: int) -> _Places:
    """Return the places of values of g in contexts; both broadcast."""
    scaled = g * (points - 1)
    left = np.minimum(scaled.astype(np.int64), points - 2)
    return _Places(left + points * np.asarray(context), scaled - left)


def after_score(model: Model, values: Floats, contexts: Iterable[int]) -> Floats:
    """Return the expectation over the score of a large step of the values that follow it.

    Args:
        model: The model.
        values: (L, C, n) values of the next step.
        contexts: Contexts of the present step.

    Returns:
        (L, C, n) by context of the present step and by g once the large model has written, before the score is seen.
    """
    count, _, points = values.shape
    g = np.linspace(0, 1, points)
    expected = np.zeros_like(values)
    for context in contexts:
        likelihood = model.large[context].T  # (B, 2)
        chance = g[:, None] * likelihood[:, RIGHT] + (1 - g)[:, None] * likelihood[:, WRONG]  # (n, B)
        place = places(scored(g[:, None], likelihood[None]), model.level, points)
        expected[:, context] = np.einsum("lnb,nb->ln", place.of(values.reshape(count, -1)), chance)
    return expected


class Backup(NamedTuple):
    """What both actions lead to at some beliefs, for any λ.

    Attributes:
        small_end: (...) P(correct end now) of accepting the proposal.
        small_on: Share of going on.
        small_place: Where that leads.
        large_end: (...) P(correct end now) of escalating.
        large_on: Share of going on.
        large_place: Where that leads.
    """

    small_end: Floats
    small_on: float
    small_place: _Places
    large_end: Floats
    large_on: float
    large_place: _Places

    def worth(self, later: Floats, scored_later: Floats) -> tuple[Floats, Floats]:
        """Return the (L, ...) values of accepting and of escalating, whose tokens are not yet paid for.

        Args:
            later: (L, C, n) values of the next step.
            scored_later: `after_score` of them.
        """
        count = len(later)
        zeros = np.zeros((count, *self.small_end.shape))
        small, large = zeros + self.small_end, zeros + self.large_end
        if self.small_on > 0:
            small += self.small_on * self.small_place.of(later.reshape(count, -1))
        if self.large_on > 0:
            large += self.large_on * self.large_place.of(scored_later.reshape(count, -1))
        return small, large


def backup(
    model: Model,
    step: int,
    kind: int,
    context: NDArray[np.int64] | int,
    bins: NDArray[np.int64],
    classes: Floats,
    points: int,
) -> Backup:
    """Return what both actions lead to.

    Args:
        model: The model.
        step: Step number minus 1.
        kind: Kind of the proposal.
        context: Context of the step; like `bins`, it broadcasts against beliefs.
        bins: Bin of the proposal's score.
        classes: (..., 3) probabilities of S0, S1, S2 given that score.
        points: n.
    """
    mended = after_large(classes, model.p_large[:, kind], model.repair)
    right, wrong = model.large_end_value
    ends, large_ends = float(model.ends[step, kind]), float(model.large_ends[step, kind])
    return Backup(
        small_end=ends * (classes @ model.end_value[kind]),
        small_on=1 - ends,
        small_place=places(classes[..., S0], model.level[bins], points),
        large_end=large_ends * (wrong + mended * (right - wrong)),
        large_on=1 - large_ends,
        large_place=places(mended, context, points),
    )
