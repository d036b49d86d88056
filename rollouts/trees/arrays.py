"""Compiled trees: a rollout store as flat NumPy arrays, one row per decision node; see `rollouts.trees.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import StoreError
from rollouts.text.steps import StopReason

CONTINUE_SMALL, ESCALATE_LARGE = 0, 1
TERMINAL, MISSING = -1, -2
STOP_REASONS = tuple(StopReason)


@dataclass(frozen=True, eq=False)
class Trees:
    """All trees of a store. N decision nodes, R trees (problem x replica), P problems.

    Rows of one tree are contiguous, its root first, every child after its parent. Columns of arrays with shape
    (N, 2) are actions: 0 accepts the small model's proposal, 1 the large model's.

    Attributes:
        child: (N, 2) int32: row of the next node, -1 if the proposal is terminal, -2 if it was not generated.
        tokens: (N, 2) int32: tokens decoded for the proposal.
        accepted_tokens: (N, 2) int32: its tokens as features count an accepted step (the small model's count
            wherever that model wrote the same text).
        prompt_tokens: (N, 2) int32: tokens of the prompt that it was decoded from.
        score: (N, 2) float32 in [0, 1]; NaN if not generated.
        correct: (N, 2) int8: grade of the solution that it ends; -1 if it ends none.
        stop_reason: (N, 2) int8: position in `STOP_REASONS`; -1 if not generated.
        has_answer: (N, 2) bool: whether it states a final answer.
        label: (N, 2) int8: whether the step itself is right, where problems come with exact labels; else -1.
        tree: (N,) int32: tree of the node.
        depth: (N,) int16: accepted steps.
        prefix_tokens: (N,) int32: tokens of the accepted steps.
        min_score: (N,) float32: least score of the accepted steps (1 at a root).
        product_score: (N,) float32: product of the scores of the accepted steps (1 at a root).
        root: (R,) int32: row of the root.
        problem: (R,) int32: position in `problem_ids`.
        replica: (R,) int16.
        text: (B,) uint8: UTF-8 of all proposals, row after row.
        text_end: (N, 2) int64: where the text of a proposal ends; it begins where the one before it ends.
        problem_ids: Ids of the P problems.
        questions: Their P texts.
        splits: (P,) array of split names.
        meta: Store, scorer, grader, K, limits, counts of what was left out, and ``hash``, the content hash.
    """

    child: NDArray[np.int32]
    tokens: NDArray[np.int32]
    accepted_tokens: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    score: NDArray[np.float32]
    correct: NDArray[np.int8]
    stop_reason: NDArray[np.int8]
    has_answer: NDArray[np.bool_]
    label: NDArray[np.int8]
    tree: NDArray[np.int32]
    depth: NDArray[np.int16]
    prefix_tokens: NDArray[np.int32]
    min_score: NDArray[np.float32]
    product_score: NDArray[np.float32]
    root: NDArray[np.int32]
    problem: NDArray[np.int32]
    replica: NDArray[np.int16]
    text: NDArray[np.uint8]
    text_end: NDArray[np.int64]
    problem_ids: tuple[str, ...]
    questions: tuple[str, ...]
    splits: NDArray[np.str_]
    meta: dict[str, Any]

    @property
    def nodes(self) -> int:
        """Number of decision nodes, N."""
        return len(self.tree)

    def proposal(self, row: int, action: int) -> str:
        """Return the text of a proposal; empty if it was not generated."""
        place = 2 * int(row) + int(action)
        ends = self.text_end.reshape(-1)
        start = int(ends[place - 1]) if place else 0
        return bytes(self.text[start : ends[place]]).decode("utf-8")

    def select(self, split: str | None = None) -> NDArray[np.int64]:
        """Return the tree indices of a split, or of all.

        Raises:
            StoreError: There are none.
        """
        mask = np.ones(len(self.root), bool) if split is None else self.splits[self.problem] == split
        chosen = np.flatnonzero(mask)
        if not len(chosen):
            raise StoreError(f"No trees in split {split!r}; the store has {sorted(set(self.splits.tolist()))}.")
        return chosen


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

    Raises:
        StoreError: A proposal that the policy needs was not generated.
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
        if (child == MISSING).any():
            raise StoreError(
                f"{int((child == MISSING).sum())} proposals that this policy needs were not generated "
                f"(K = {trees.meta['max_escalations']}). Expand the store with the policy, or cap its escalations."
            )
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


def iterate_by_depth(trees: Trees) -> Iterator[NDArray[np.int64]]:
    """Yield node rows grouped by depth, deepest first: the order of backward induction."""
    order = np.argsort(trees.depth, kind="stable")
    bounds = np.flatnonzero(np.diff(trees.depth[order])) + 1
    yield from reversed(np.split(order, bounds))
