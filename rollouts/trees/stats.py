"""What a store holds, in numbers: sizes, stop reasons, tokens, accuracies with intervals, and the oracle's headroom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.store.store import Store
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees, iterate_by_depth, walk


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over problems."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as a percentage."""
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of the trees of one split.

    Attributes:
        problems: Problems.
        trees: Trees (problems x replicas).
        nodes: Decision nodes.
        merged: Nodes at which both models wrote the same step.
        small_accuracy: Of always continuing.
        large_accuracy: Of always escalating.
        large_tokens: Mean large tokens of always escalating.
        small_tokens: Mean small tokens of always continuing.
        small_steps: Mean steps of always continuing.
        large_steps: Mean steps of always escalating.
        oracle_accuracy: Of the best path of every tree: a clairvoyant bound.
        oracle_share: Least large tokens on such paths, as a share of always escalating.
        min_score_auc: How well the least score of an always-small solution tells right from wrong ones; NaN if
            all are alike.
        step_auc: How well the score of a proposal tells whether all steps up to it are right, by exact labels;
            None without labels.
    """

    problems: int
    trees: int
    nodes: int
    merged: int
    small_accuracy: Interval
    large_accuracy: Interval
    large_tokens: float
    small_tokens: float
    small_steps: float
    large_steps: float
    oracle_accuracy: Interval
    oracle_share: float
    min_score_auc: float
    step_auc: float | None


def by_problem(trees: Trees, indices: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
    """Average values of trees over the replicas of each problem."""
    _, position = np.unique(trees.problem[indices], return_inverse=True)
    return np.bincount(position, values) / np.bincount(position)


def bootstrap(values: NDArray[Any], resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of per-problem values with its percentile bootstrap interval."""
    values = np.asarray(values, float)
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def auc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve: P(score of a positive > that of a negative), ties half."""
    from scipy.stats import rankdata

    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def always(action: int) -> Callable[[NDArray[Any]], NDArray[np.int64]]:
    """Return the policy that always takes one action."""
    return lambda rows: np.full(len(rows), action)


def oracle(trees: Trees) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Solve every tree with hindsight by backward induction.

    Returns:
        (N,) whether some path from the node ends correctly, and (N,) the least large tokens that it takes (of
        any path, where none is correct).
    """
    reachable = np.zeros(trees.nodes, bool)
    cost = np.zeros(trees.nodes, np.int64)
    for rows in iterate_by_depth(trees):
        good = np.zeros((len(rows), 2), bool)
        price = np.full((len(rows), 2), np.iinfo(np.int64).max // 4)
        for action in (CONTINUE_SMALL, ESCALATE_LARGE):
            child = trees.child[rows, action]
            own = trees.tokens[rows, action] if action == ESCALATE_LARGE else np.zeros(len(rows), np.int64)
            inner = child >= 0
            good[:, action] = np.where(inner, reachable[child], trees.correct[rows, action] == 1)
            price[:, action] = np.where(inner, cost[child], 0) + own
            good[child == MISSING, action] = False
            price[child == MISSING, action] = np.iinfo(np.int64).max // 4
        reachable[rows] = good.any(axis=1)
        usable = np.where(good == good.any(axis=1, keepdims=True), price, np.iinfo(np.int64).max // 2)
        cost[rows] = usable.min(axis=1)
    return reachable, cost


def split_statistics(trees: Trees, split: str | None = None) -> SplitStatistics:
    """Compute the statistics of one split, or of all trees."""
    indices = trees.select(split)
    member = np.isin(trees.tree, indices)
    small, large = walk(trees, indices, always(CONTINUE_SMALL)), walk(trees, indices, always(ESCALATE_LARGE))
    reachable, cost = oracle(trees)
    roots = trees.root[indices]
    merged = (trees.child[:, 0] == trees.child[:, 1]) & (trees.child[:, 0] >= 0)
    labelled = member[:, None] & (trees.label >= 0)
    return SplitStatistics(
        problems=len(np.unique(trees.problem[indices])),
        trees=len(indices),
        nodes=int(member.sum()),
        merged=int((merged & member).sum()),
        small_accuracy=bootstrap(by_problem(trees, indices, small.correct)),
        large_accuracy=bootstrap(by_problem(trees, indices, large.correct)),
        large_tokens=float(large.large_tokens.mean()),
        small_tokens=float(small.small_tokens.mean()),
        small_steps=float(small.steps.mean()),
        large_steps=float(large.steps.mean()),
        oracle_accuracy=bootstrap(by_problem(trees, indices, reachable[roots])),
        oracle_share=float(cost[roots].sum() / max(1, large.large_tokens.sum())),
        min_score_auc=auc(small_path_min_scores(trees, indices), small.correct),
        step_auc=auc(trees.score[labelled], right_so_far(trees)[labelled]) if labelled.any() else None,
    )


def right_so_far(trees: Trees) -> NDArray[np.bool_]:
    """Return, (N, 2), whether a proposal and all accepted steps before it are right, by exact labels."""
    right = np.zeros((trees.nodes, 2), bool)
    before = np.ones(trees.nodes, bool)
    for rows in reversed(list(iterate_by_depth(trees))):
        for action in (CONTINUE_SMALL, ESCALATE_LARGE):
            right[rows, action] = before[rows] & (trees.label[rows, action] == 1)
            child = trees.child[rows, action]
            before[child[child >= 0]] = right[rows[child >= 0], action]
    return right


def small_path_min_scores(trees: Trees, indices: NDArray[Any]) -> NDArray[np.float64]:
    """Return, for each tree, the least score along its always-small path."""
    least = np.ones(len(trees.root))

    def follow(rows: NDArray[Any]) -> NDArray[np.int64]:
        least[trees.tree[rows]] = np.minimum(trees.min_score[rows], trees.score[rows, CONTINUE_SMALL])
        return np.full(len(rows), CONTINUE_SMALL)

    walk(trees, indices, follow)
    return np.asarray(least[indices])


def store_statistics(store: Store) -> dict[str, Any]:
    """Return counts that need no compiling: rows, stop reasons, tokens and requests by role, dropped segments."""
    reasons: Counter[str] = Counter()
    for table in store.steps.read(columns=["role", "stop_reason"]):
        pairs = zip(table["role"].to_pylist(), table["stop_reason"].to_pylist(), strict=True)
        reasons.update(f"{role} {reason}" for role, reason in pairs)
    return {"steps": reasons.total(), "stop_reasons": dict(sorted(reasons.items())), "requests": store.steps.counters()}
