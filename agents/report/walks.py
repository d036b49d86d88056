"""The path that a router takes through every tree, decision by decision: what traces and positions are read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.walk import answered, walked
from agents.routers.base import AnyRouter
from rollouts.errors import ConfigError
from trim_env.tables import DecisionTables

Ints = NDArray[np.int64]
CUT_OFF, ANSWERED = 2, 3
"""Actions that `Paths` knows besides the two: the large model was called, and a cap on its tokens cut it off; nothing
was decided, as one model alone writes the answer (``answer_by``)."""


@dataclass(frozen=True, eq=False)
class Paths:
    """One path through each of R trees, of at most T decisions.

    Attributes:
        rows: (R, T) node at which each decision was taken; -1 after the end.
        actions: (R, T) whose step was accepted, 0 or 1, or `CUT_OFF` or `ANSWERED`; -1 after the end.
        correct: (R,) whether the solution is right.
        large_tokens: (R,) tokens that the large model decoded.
    """

    rows: Ints
    actions: NDArray[np.int8]
    correct: NDArray[np.bool_]
    large_tokens: Ints

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
    large, correct = np.zeros(count, np.int64), np.zeros(count, bool)
    visited, taken = [], []
    for done, _ in walked(tables, router):
        if len(done.tree) > len(np.unique(done.tree)):
            raise ConfigError(f"{router.name} draws its actions: it has no one path through a tree to show.")
        found = done.moved.taken
        visited.append(_column(count, done.tree, done.rows))
        actions = np.where(found.cut_off, CUT_OFF, done.moved.accepted)
        taken.append(_column(count, done.tree, np.where(answered(tables.trees, done.rows), ANSWERED, actions)))
        large[done.tree] += found.large_tokens
        correct[done.tree] = tables.solved[found.place] == 1
    return Paths(np.stack(visited, axis=1), np.stack(taken, axis=1).astype(np.int8), correct, large)


def _column(count: int, tree: Ints, values: Ints) -> Ints:
    column = np.full(count, -1, np.int64)
    column[tree] = values
    return column
