"""Compiled trees: a rollout store as flat NumPy arrays, one row per decision node; see `rollouts.trees.compile`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import StoreError
from rollouts.text.steps import LARGE, StopReason

CONTINUE_SMALL, ESCALATE_LARGE = 0, 1
ASK = 2  # what it takes to choose between them; trees know it not
TERMINAL, MISSING = -1, -2
STOP_REASONS = tuple(StopReason)
PART = 1 << 18  # most nodes that are worked on at once
_PER_NODE = (
    *("child", "tokens", "accepted_tokens", "prompt_tokens", "score", "correct", "stop_reason", "has_answer", "label"),
    *("tree", "depth", "text_end"),
)


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
        root: (R,) int32: row of the root.
        problem: (R,) int32: position in `problem_ids`.
        replica: (R,) int16.
        text: (B,) uint8: UTF-8 of all proposals, row after row.
        text_end: (N, 2) int64: where the text of a proposal ends; it begins where the one before it ends.
        problem_ids: Ids of the P problems.
        questions: Their P texts.
        splits: (P,) array of split names.
        signals: (N, 2) float32 for each column of the store's score tables, by ``TABLE.COLUMN``; NaN if not known.
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
    root: NDArray[np.int32]
    problem: NDArray[np.int32]
    replica: NDArray[np.int16]
    text: NDArray[np.uint8]
    text_end: NDArray[np.int64]
    problem_ids: tuple[str, ...]
    questions: tuple[str, ...]
    splits: NDArray[np.str_]
    meta: dict[str, Any]
    signals: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Number of decision nodes, N."""
        return len(self.tree)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(R,) nodes of each tree."""
        return np.diff(np.asarray(self.root, np.int64), append=self.nodes)

    def rows_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the nodes of some trees, ascending."""
        indices = np.sort(indices)
        sizes = self.sizes[indices]
        rows: NDArray[np.int64] = np.repeat(self.root[indices] - (np.cumsum(sizes) - sizes), sizes)
        return rows + np.arange(len(rows))

    def parted(self, indices: NDArray[np.int64], nodes: int | None = None) -> list[NDArray[np.int64]]:
        """Return some trees in parts, in their order, of `nodes` (or `PART`) at most unless a single one has more."""
        ends, cuts, most = np.cumsum(self.sizes[indices]), [0], min(nodes or PART, PART)
        while cuts[-1] < len(indices):
            before = ends[cuts[-1] - 1] if cuts[-1] else 0
            cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + most, side="right"))))
        return np.split(indices, cuts[1:-1])

    def between(self, first: int, last: int) -> Trees:
        """Return the trees from one to before another as trees of their own; few of their arrays are copied."""
        begin, end = (int(self.sizes[:place].sum()) for place in (first, last))
        text = int(self.text_end[begin - 1, 1]) if begin else 0
        own = {name: getattr(self, name)[begin:end] for name in _PER_NODE}
        own |= {name: getattr(self, name)[first:last] for name in ("root", "problem", "replica")}
        own["child"] = np.where(own["child"] >= 0, own["child"] - begin, own["child"])
        own |= {"tree": own["tree"] - first, "root": own["root"] - begin, "text_end": own["text_end"] - text}
        signals = {name: values[begin:end] for name, values in self.signals.items()}
        return replace(self, **own, text=self.text[text:], signals=signals)

    def by_parts(self, compute: Callable[[Trees], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """Return arrays of a row, or two, for each node.

        Args:
            compute: From trees to their arrays. Of many nodes it is given one part after the other, and what it returns
                is put into files without a name beside the trees, so that memory holds what is in use.
        """
        parts = self.parted(np.arange(len(self.root)))
        if len(parts) == 1:
            return dict(compute(self))
        found, done = dict[str, NDArray[Any]](), 0
        for part in parts:
            own = self.between(int(part[0]), int(part[-1]) + 1)
            for name, values in compute(own).items():
                each = len(values) // own.nodes
                if name not in found:
                    found[name] = in_a_file((each * self.nodes, *values.shape[1:]), values.dtype, self.child)
                found[name][each * done : each * (done + own.nodes)] = values
            done += own.nodes
        return found

    @property
    def large_alone(self) -> NDArray[np.bool_]:
        """(N,) where the large model alone writes: its step is the proposal of both, at no tokens of the small one."""
        alone = self.meta.get("splitting", {}).get("answer_by") == LARGE
        same = (
            self.stop_reason[:, CONTINUE_SMALL] == self.stop_reason[:, ESCALATE_LARGE]
        )  # unlike a small one that failed
        found: NDArray[np.bool_] = (
            alone & same & (self.tokens[:, CONTINUE_SMALL] == 0) & (self.tokens[:, ESCALATE_LARGE] > 0)
        )
        return found

    def proposal(self, row: int, action: int) -> str:
        """Return the text of a proposal; empty if it was not generated."""
        place = 2 * int(row) + int(action)
        ends, text = np.asarray(self.text_end).reshape(-1), np.asarray(self.text)  # a memmap is slow to index
        start = int(ends[place - 1]) if place else 0
        return bytes(text[start : ends[place]]).decode("utf-8")

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


def actions_of(given: Any) -> NDArray[np.int64]:
    """Return actions as whole numbers; -1, which is none, for what is not one, such as a probability."""
    try:
        values = np.asarray(given)
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.array(-1)
    return np.where(whole == values, whole, -1)


def in_a_file(shape: tuple[int, ...], dtype: Any, beside: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return zeros in a file that goes with them, beside a memory-mapped array or among temporary files."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    name = getattr(beside, "filename", None)
    folder = Path(name).parent if name and os.access(Path(name).parent, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, and would be a crash later
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


@dataclass(frozen=True, eq=False)
class Graph:
    """States in which one of two actions is taken, each leading to a later state or to none: n states, by depth.

    Attributes:
        child: (n, 2) position of the state that an action leads to; n, where it leads to none.
        levels: Positions of the states of each depth, from the first on.
        roots: Positions of the states where it begins.
    """

    child: NDArray[np.int64]
    levels: list[Any]
    roots: NDArray[np.int64]

    def backward(self, step: Callable[[Any, NDArray[Any]], NDArray[Any]], end: Any = 0.0) -> NDArray[np.float64]:
        """Return the (n + 1, ...) values of all states, those of later ones first; the last is that of an end.

        Args:
            step: From the (m,) states of a level and the (m, 2, ...) values of what they lead to, to their own.
            end: Value of an end, of shape (...).
        """
        value = np.empty((len(self.child) + 1, *np.shape(end)))
        value[-1] = end
        for level in reversed(self.levels):
            value[level] = step(level, value[self.child[level]])
        return value

    def forward(self, step: Callable[[Any, NDArray[Any]], NDArray[Any]], start: NDArray[Any]) -> NDArray[np.float64]:
        """Return the (n + 1, ...) masses that arrive at all states; the last is what arrives at ends.

        Args:
            step: From the (m,) states of a level and their (m, ...) masses, to the (m, 2, ...) that actions pass on.
            start: (n, ...) masses to begin with.
        """
        mass = np.zeros((len(start) + 1, *start.shape[1:]))
        mass[:-1] = start
        for level in self.levels:
            passed = step(level, mass[level])
            np.add.at(mass, self.child[level].reshape(-1), passed.reshape(-1, *start.shape[1:]))
        return mass

    def reach(self, share: NDArray[Any], start: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """Return the (n + 1,) masses that arrive, of which the (n, 2) shares are passed on; one starts at each root."""
        if start is None:
            start = np.bincount(self.roots, minlength=len(self.child)).astype(np.float64)
        return self.forward(lambda level, mass: mass[:, None] * share[level], start)


def graph_of(trees: Trees, rows: NDArray[np.int64] | None = None) -> Graph:
    """Return the graph of all nodes, or of the (n,) nodes of some trees; what was not generated leads nowhere."""
    rows = np.arange(trees.nodes) if rows is None else rows
    position = np.full(trees.nodes + 2, len(rows))  # the last two are those of -1 and -2
    position[rows] = np.arange(len(rows))
    depth = trees.depth[rows]
    order = np.argsort(depth, kind="stable")
    levels = np.split(order, np.flatnonzero(np.diff(depth[order])) + 1)
    return Graph(position[trees.child[rows]], levels, levels[0])
