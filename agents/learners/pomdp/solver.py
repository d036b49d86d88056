"""Backward induction over steps on a grid of g = P(all accepted steps are right); all λ at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from agents.routers.pomdp.backup import after_score, backup
from agents.routers.pomdp.belief import Floats, corrected, predicted
from agents.routers.pomdp.model import Model
from agents.routers.pomdp.router import PomdpRouter

POINTS = 65
_NEVER = 1e-12


def solve(model: Model, lams: Sequence[float] | Floats, points: int = POINTS) -> Floats:
    """Solve for all values of λ in one pass.

    Args:
        model: The model, of T steps and C contexts.
        lams: (L,) λ, return lost per large token.
        points: Grid points n of g, equally spaced in [0, 1].

    Returns:
        (L, T + 1, C, n) greatest expected return before the proposal of a step is seen; 0 after the last step and in
        contexts in which a step cannot be (`Model.contexts_at`). Of whole episodes it is ``[:, 0, -1, -1]``.
    """
    prices = np.asarray(lams, np.float64)
    value = np.zeros((len(prices), model.steps + 1, model.contexts, points))
    g, bins = np.linspace(0, 1, points), np.arange(len(model.level))
    for step in reversed(range(model.steps)):
        contexts, later = model.contexts_at(step), value[:, step + 1]
        scored_later = after_score(model, later, contexts)
        for context, kind in product(contexts, np.flatnonzero(model.kind[step] > _NEVER)):
            ahead = predicted(g, model.p_small[step, kind])
            classes, chance = corrected(ahead[:, None], model.small[context, kind].T[None])  # (n, B, 3), (n, B)
            small, large = backup(model, step, kind, context, bins, classes, points).worth(later, scored_later)
            best = np.maximum(large - (prices * model.tokens[step, kind])[:, None, None], small)
            value[:, step, context] += np.einsum("lnb,nb->ln", best, model.kind[step, kind] * chance)
    return value


def routers(
    model: Model, lams: Sequence[float] | Floats, *, price: float = 1.0, points: int = POINTS
) -> list[PomdpRouter]:
    """Return the router for each λ, return lost per unit of cost; `price` is that of a large token."""
    values = solve(model, price * np.asarray(lams, np.float64), points)
    return [PomdpRouter(model, float(lam), np.round(value, 9), price) for lam, value in zip(lams, values, strict=True)]
