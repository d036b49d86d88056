"""Backward induction over steps on a grid of g = P(all accepted steps are right); all λ at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from agents.routers.pomdp.backup import after_score, backup
from agents.routers.pomdp.belief import Floats, corrected, predicted
from agents.routers.pomdp.model import Model
from agents.routers.pomdp.router import PomdpRouter

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


def routers(model: Model, solution: Solution) -> list[PomdpRouter]:
    """Return a router for each λ of a solution."""
    pairs = zip(solution.lams, solution.value, strict=True)
    return [PomdpRouter(model, float(lam), np.round(value, 9)) for lam, value in pairs]
