"""One episode in each of some trees, decision by decision: what faster walkers are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, TERMINAL, Trees


class Walk(NamedTuple):
    """Outcome of one episode per tree; arrays of equal length."""

    correct: NDArray[np.bool_]
    large_tokens: NDArray[np.int64]
    small_tokens: NDArray[np.int64]
    steps: NDArray[np.int64]
    escalations: NDArray[np.int64]


def walk(trees: Trees, indices: NDArray[Any], policy: Callable[[NDArray[Any]], NDArray[Any]]) -> Walk:
    """Run one episode in each of some trees.

    Args:
        trees: Compiled trees.
        indices: (E,) tree indices, repeats allowed.
        policy: From the rows of the nodes where episodes stand, (n,) ints, to actions, (n,) of 0 and 1.
    """
    count = len(indices)
    node = trees.root[indices].astype(np.int64)
    correct = np.zeros(count, bool)
    totals = np.zeros((4, count), np.int64)
    alive = np.arange(count)
    while len(alive):
        rows = node[alive]
        action = np.asarray(policy(rows)).astype(np.int64)
        child = trees.child[rows, action]
        assert (child != MISSING).all()
        totals[0, alive] += np.where(action == ESCALATE_LARGE, trees.tokens[rows, ESCALATE_LARGE], 0)
        totals[1, alive] += np.where(
            trees.child[rows, CONTINUE_SMALL] == MISSING, 0, trees.tokens[rows, CONTINUE_SMALL]
        )
        totals[2, alive] += 1
        totals[3, alive] += action
        ended = child == TERMINAL
        correct[alive[ended]] = trees.correct[rows[ended], action[ended]] == 1
        node[alive] = child
        alive = alive[~ended]
    return Walk(correct, *totals)
