"""Clairvoyant reference points: what a router could reach that knows how every solution ends.

They also exploit the sampling noise of the frozen draws, so they bound what can be reached from above, loosely.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.outcomes import Outcomes
from agents.evaluation.walk import Spent, always_trees, by_problem, outcomes_of
from rollouts.errors import StoreError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING
from trim_env.tables import DecisionTables

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_CORRECT, _COST = (Outcomes.columns().index(name) for name in ("correct", "cost"))


class _Level(NamedTuple):
    """What can happen after some number of decisions: n nodes, each with what may have been spent on the way there.

    Attributes:
        child: (2, n) position in the next level by action, -1 at an end, -2 where the action is impossible.
        own: (2, n, 7) what the action adds to the fields of `Outcomes`.
    """

    child: Ints
    own: Floats


def tree_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the best path through every tree within the caps, by backward induction with hindsight.

    Raises:
        StoreError: A tree holds no whole path within the caps.
    """
    best: Floats = np.zeros((0, len(Outcomes.columns())))
    value: Floats = np.zeros(0)
    for level in reversed(_levels(tables)):
        totals, values = [], []
        for action in (CONTINUE_SMALL, ESCALATE_LARGE):
            child, own = level.child[action], level.own[action]
            on = child >= 0
            later, ahead = np.zeros_like(own), np.zeros(len(own))
            later[on], ahead[on] = best[child[on]], value[child[on]]
            here = own[:, _CORRECT] - lam * own[:, _COST] + ahead
            totals.append(own + later)
            values.append(np.where(child == MISSING, -np.inf, here))
        escalate = values[1] > values[0]
        best, value = np.where(escalate[:, None], totals[1], totals[0]), np.maximum(*values)
    if not np.isfinite(value).all():
        raise StoreError(f"{int((~np.isfinite(value)).sum())} trees hold no whole path within the caps.")
    return by_problem(tables, dict(zip(Outcomes.columns(), best.T, strict=True)))


def _levels(tables: DecisionTables) -> list[_Level]:
    """Return all (node, what was spent) that the caps let a path reach, by depth; the first are the roots."""
    most, cap = tables.max_escalations, tables.max_large_tokens
    rows = tables.roots
    spent = Spent(np.zeros(len(rows), np.int64), np.full(len(rows), cap or 0, np.int64))
    levels = []
    while len(rows):
        children, owns, keys = [], [], []
        open_ = spent.open(tables)
        for action in (CONTINUE_SMALL, ESCALATE_LARGE):
            found = tables.take(rows, np.full(len(rows), action), spent.left)
            accepted = found.place - 2 * rows
            child = tables.child[found.place]
            if action == ESCALATE_LARGE:
                child = np.where(open_, child, MISSING)
            children.append(child)
            owns.append(np.stack(list(outcomes_of(tables, found, accepted).values()), axis=1))
            used = spent.escalations + accepted if most is not None else spent.escalations
            left = spent.left - found.large_tokens if cap is not None else spent.left
            keys.append((child * ((most or 0) + 1) + used) * ((cap or 0) + 1) + left)
        child, key = np.stack(children), np.stack(keys)
        on = child >= 0
        reached, place = np.unique(key[on], return_inverse=True)
        child[on] = place
        levels.append(_Level(child, np.stack(owns)))
        rest, left = np.divmod(reached, (cap or 0) + 1)
        rows, used = np.divmod(rest, (most or 0) + 1)
        spent = Spent(used, left)
    return levels


def query_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the better of always-small and always-large for every tree, known beforehand; no caps."""
    small, large = always_trees(tables)
    better = (large["correct"] - lam * large["cost"]) > (small["correct"] - lam * small["cost"])
    return by_problem(tables, {name: np.where(better, large[name], small[name]) for name in small})
