"""The path that a router takes through every tree, decision by decision: what traces and positions are read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.walk import seen_by
from agents.routers.base import AnyRouter, StatefulRouter
from rollouts.errors import ConfigError, StoreError
from rollouts.trees.arrays import ESCALATE_LARGE, MISSING
from trim_env.graph import Spent
from trim_env.tables import DecisionTables, missing

Ints = NDArray[np.int64]
CUT_OFF = 2
"""An action that `Paths` knows besides the two: the large model was called, and a cap on its tokens cut it off."""


@dataclass(frozen=True, eq=False)
class Paths:
    """One path through each of R trees, of at most T decisions.

    Attributes:
        rows: (R, T) node at which each decision was taken; -1 after the end.
        actions: (R, T) whose step was accepted, 0 or 1, or `CUT_OFF`; -1 after the end.
        correct: (R,) whether the solution is right.
        large_tokens: (R,) tokens that the large model decoded.
    """

    rows: Ints
    actions: NDArray[np.int8]
    correct: NDArray[np.bool_]
    large_tokens: Ints

    @property
    def escalations(self) -> Ints:
        """(R,) steps that the large model wrote."""
        return np.asarray((self.actions == ESCALATE_LARGE).sum(axis=1), np.int64)

    @property
    def steps(self) -> Ints:
        """(R,) accepted steps."""
        return np.asarray((self.rows >= 0).sum(axis=1), np.int64)


def follow(router: AnyRouter, tables: DecisionTables) -> Paths:
    """Follow a router that leaves nothing to chance through the trees of a split, under the caps of the tables.

    Raises:
        ConfigError: The router draws, so that there is no one path; or it needs a cap on large tokens that is not set.
        StoreError: A proposal that the router needs was not generated.
    """
    count = len(tables.indices)
    seen = seen_by(router, tables)
    state = router.start(count) if isinstance(router, StatefulRouter) else np.zeros((count, 0))
    rows, tree = tables.roots, np.arange(count)
    spent = Spent(np.zeros(count, np.int64), np.full(count, tables.max_large_tokens or 0, np.int64))
    large, correct = np.zeros(count, np.int64), np.zeros(count, bool)
    visited, taken = [], []
    while len(rows):
        if isinstance(router, StatefulRouter):
            escalate, state = router.decide(seen(rows, spent.left), state)
        else:
            escalate = router.probability(seen(rows, spent.left))
        if ((escalate > 0) & (escalate < 1)).any():
            raise ConfigError(f"{router.name} draws its actions: it has no one path through a tree to show.")
        wanted = ((escalate > 0) & spent.open(tables)).astype(np.int64)
        found = tables.take(rows, wanted, spent.left)
        child, accepted = tables.child[found.place], found.place - 2 * rows
        if (child == MISSING).any():
            raise StoreError(missing(tables, found.place))
        visited.append(_column(count, tree, rows))
        taken.append(_column(count, tree, np.where(found.cut_off, CUT_OFF, accepted)))
        large[tree] += found.large_tokens
        correct[tree] = tables.solved[found.place] == 1
        if isinstance(router, StatefulRouter):
            at = rows, accepted
            state = router.accept(state, accepted, tables.trees.score[at], tables.trees.accepted_tokens[at])
        left = spent.left if tables.max_large_tokens is None else spent.left - found.large_tokens
        on = child >= 0
        spent = Spent((spent.escalations + accepted)[on], left[on])
        rows, tree, state = child[on], tree[on], state[on]
    return Paths(np.stack(visited, axis=1), np.stack(taken, axis=1).astype(np.int8), correct, large)


def _column(count: int, tree: Ints, values: Ints) -> Ints:
    column = np.full(count, -1, np.int64)
    column[tree] = values
    return column
