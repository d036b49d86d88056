"""Backward induction over steps on a grid of g = P(all accepted steps are right); all λ at once.

Whatever was seen before a step matters through g and the level of the last score alone: one number and a small
integer are the whole state between steps. Values are
convex in g; linear interpolation between grid points therefore errs upwards, by less the finer the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.routers.pomdp.belief import after_large, after_small, corrected, predicted, scored
from agents.routers.pomdp.latent import RIGHT, WRONG, Floats
from agents.routers.pomdp.model import Model

POINTS = 65
_NEVER = 1e-12


@dataclass(frozen=True, eq=False)
class Solution:
    """Values of L values of λ; n grid points of g, equally spaced in [0, 1]; T steps; C contexts.

    Attributes:
        lams: (L,) values of λ.
        value: (L, T + 1, C, n) greatest expected return before the proposal of a step is seen; 0 after the last step
            and in contexts in which a step cannot be (`Model.contexts_at`).
        tokens: (L, T + 1, C, n) large tokens that are expected to get there; NaN if they were not asked for.
    """

    lams: Floats
    value: Floats
    tokens: Floats

    @property
    def at_start(self) -> tuple[Floats, Floats]:
        """(L,) expected returns and (L,) large tokens of whole episodes."""
        return self.value[:, 0, -1, -1], self.tokens[:, 0, -1, -1]


class _Places(NamedTuple):
    """Where some values of g lie in flattened tables of (C, n) values."""

    left: NDArray[np.int64]
    share: Floats  # of the right neighbour

    def of(self, values: Floats) -> Floats:
        """Interpolate (L, C * n) values: (L, *shape of the places)."""
        left: Floats = values.take(self.left, axis=1)
        result: Floats = left + self.share * (values.take(self.left + 1, axis=1) - left)
        return result


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


class Actions(NamedTuple):
    """Values of both actions, (L, ...); the tokens of escalating are not yet paid for."""

    small: Floats
    large: Floats


class Backup(NamedTuple):
    """What both actions lead to at some beliefs: computed once, worth different things for different λ.

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

    def worth(self, later: Floats, scored_later: Floats, end: float = 1.0) -> Actions:
        """Return what both actions are worth.

        Args:
            later: (L, C, n) values of the next step.
            scored_later: `after_score` of them.
            end: What a correct solution is worth: 1 for returns, 0 for tokens.
        """
        count = len(later)
        zeros = np.zeros((count, *self.small_end.shape))
        small, large = zeros + end * self.small_end, zeros + end * self.large_end
        if self.small_on > 0:
            small += self.small_on * self.small_place.of(later.reshape(count, -1))
        if self.large_on > 0:
            large += self.large_on * self.large_place.of(scored_later.reshape(count, -1))
        return Actions(small, large)


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
        small_place=places(after_small(classes), model.level[bins], points),
        large_end=large_ends * (wrong + mended * (right - wrong)),
        large_on=1 - large_ends,
        large_place=places(mended, context, points),
    )


def solve(model: Model, lams: Sequence[float] | Floats, points: int = POINTS, *, count_tokens: bool = True) -> Solution:
    """Solve for all values of λ in one pass.

    Args:
        model: The model.
        lams: λ, return lost per large token.
        points: Grid points n.
        count_tokens: Work out the expected large tokens as well, which routers do not need.
    """
    prices = np.asarray(lams, np.float64)
    value = np.zeros((len(prices), model.steps + 1, model.contexts, points))
    tokens = np.full_like(value, 0.0 if count_tokens else np.nan)
    g, bins = np.linspace(0, 1, points), np.arange(len(model.level))
    for step in reversed(range(model.steps)):
        contexts = model.contexts_at(step)
        later, later_tokens = value[:, step + 1], tokens[:, step + 1]
        scored_later = after_score(model, later, contexts)
        scored_tokens = after_score(model, later_tokens, contexts) if count_tokens else later_tokens
        for context, kind in product(contexts, np.flatnonzero(model.kind[step] > _NEVER)):
            ahead = predicted(g, model.p_small[step, kind])
            classes, chance = corrected(ahead[:, None], model.small[context, kind].T[None])  # (n, B, 3), (n, B)
            leads = backup(model, step, kind, context, bins, classes, points)
            own = model.tokens[step, kind]
            returns = leads.worth(later, scored_later)
            escalated = returns.large - (prices * own)[:, None, None]
            weight = model.kind[step, kind] * chance
            value[:, step, context] += np.einsum("lnb,nb->ln", np.maximum(escalated, returns.small), weight)
            if count_tokens:
                spent = leads.worth(later_tokens, scored_tokens, end=0.0)
                chosen = np.where(escalated > returns.small, own + spent.large, spent.small)
                tokens[:, step, context] += np.einsum("lnb,nb->ln", chosen, weight)
    return Solution(prices, value, tokens)
