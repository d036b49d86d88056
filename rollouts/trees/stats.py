"""What a store holds, in numbers: sizes, stop reasons, tokens, accuracies with intervals, and the oracle's headroom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import StoreError
from rollouts.store.store import Store
from rollouts.text.steps import StopReason
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees, graph_of


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
        trees: Trees (problems x replicas).
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


def always(trees: Trees, indices: NDArray[Any], action: int) -> NDArray[np.float64]:
    """Return, (4, E), whether always taking one action solves some trees, its large tokens, small tokens and steps.

    Raises:
        StoreError: A proposal that it needs was not generated.
    """
    there = trees.child != MISSING
    small = trees.tokens[:, CONTINUE_SMALL] * there[:, CONTINUE_SMALL]
    large = trees.tokens[:, ESCALATE_LARGE] * (trees.large_alone | bool(action))
    own = [trees.correct[:, action] == 1, large, small, np.ones(trees.nodes)]
    now = np.where(there[:, [action]], np.stack(own, axis=1), np.nan)
    found = graph_of(trees).backward(lambda rows, later: now[rows] + later[:, action], np.zeros(4))
    ends: NDArray[np.float64] = found[trees.root[indices]].T
    if np.isnan(ends).any():
        raise StoreError(f"{int(np.isnan(ends[0]).sum())} trees lack the path of one model. Run `generate` again.")
    return ends


def oracle(trees: Trees) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Solve every tree with hindsight by backward induction.

    Returns:
        (N,) whether some path from the node ends correctly, and (N,) the least large tokens that it takes (of
        any path, where none is correct).
    """
    prize = 2.0**40  # of a correct end: more than all tokens, and sums stay exact
    now = np.where(trees.child == MISSING, -np.inf, prize * (trees.correct == 1))
    now[:, ESCALATE_LARGE] -= trees.tokens[:, ESCALATE_LARGE]
    now[:, CONTINUE_SMALL] -= trees.tokens[:, ESCALATE_LARGE] * trees.large_alone
    value = graph_of(trees).backward(lambda rows, later: (now[rows] + later).max(axis=1))[:-1]
    reachable = value > 0
    return reachable, (prize * reachable - value).astype(np.int64)


def split_statistics(trees: Trees, split: str | None = None) -> SplitStatistics:
    """Compute the statistics of one split, or of all trees."""
    indices = trees.select(split)
    member = np.isin(trees.tree, indices)
    small, _, small_tokens, small_steps = always(trees, indices, CONTINUE_SMALL)
    large, large_tokens, _, large_steps = always(trees, indices, ESCALATE_LARGE)
    reachable, cost = oracle(trees)
    roots = trees.root[indices]
    merged = (trees.child[:, 0] == trees.child[:, 1]) & (trees.child[:, 0] >= 0)
    labelled = member[:, None] & (trees.label >= 0)
    return SplitStatistics(
        problems=len(np.unique(trees.problem[indices])),
        trees=len(indices),
        nodes=int(member.sum()),
        merged=int((merged & member).sum()),
        small_accuracy=bootstrap(by_problem(trees, indices, small)),
        large_accuracy=bootstrap(by_problem(trees, indices, large)),
        large_tokens=float(large_tokens.mean()),
        small_tokens=float(small_tokens.mean()),
        small_steps=float(small_steps.mean()),
        large_steps=float(large_steps.mean()),
        oracle_accuracy=bootstrap(by_problem(trees, indices, reachable[roots])),
        oracle_share=float(cost[roots].sum() / max(1, large_tokens.sum())),
        min_score_auc=auc(small_path_min_scores(trees, indices), small == 1),
        step_auc=auc(trees.score[labelled], right_so_far(trees)[labelled]) if labelled.any() else None,
    )


def right_so_far(trees: Trees) -> NDArray[np.bool_]:
    """Return, (N, 2), whether a proposal and all accepted steps before it are right, by exact labels."""
    right: NDArray[np.bool_] = trees.label == 1
    return np.logical_and(right, graph_of(trees).reach(right)[:-1, None] > 0)


def small_path_min_scores(trees: Trees, indices: NDArray[Any]) -> NDArray[np.float64]:
    """Return, for each tree, the least score along its always-small path."""
    score = trees.score[:, CONTINUE_SMALL]
    least = graph_of(trees).backward(lambda rows, later: np.minimum(score[rows], later[:, CONTINUE_SMALL]), 1.0)
    found: NDArray[np.float64] = least[trees.root[indices]]
    return found


def failed_steps(store: Store) -> Counter[tuple[str, str]]:
    """Count failed steps by role and reason; stores of earlier versions do not tell the reason."""
    counts: Counter[tuple[str, str]] = Counter()
    for (role, stop, reason), count in store.steps.counts("role", "stop_reason", "reason").items():
        if stop == StopReason.FAILED:
            counts[role, reason or "no reason stored"] += count
    return counts


def small_outcomes(trees: Trees) -> NDArray[np.float64]:
    """Return, (N, 2), whether the small model alone goes on from a proposal to a right solution; NaN if unknown."""
    graph = graph_of(trees)

    def ended(own: NDArray[Any], later: NDArray[Any]) -> NDArray[Any]:
        return np.where(own >= 0, own, later)

    small = trees.correct[:, CONTINUE_SMALL]
    alone = graph.backward(lambda rows, later: ended(small[rows], later[:, CONTINUE_SMALL]), np.nan)
    return ended(trees.correct, alone[graph.child])


def store_statistics(store: Store) -> dict[str, Any]:
    """Return counts that need no compiling: rows, stop reasons, tokens and requests by role, dropped segments.

    ``neutralised`` has, by role, the special tokens of questions that are read as text.
    """
    reasons = Counter(
        {f"{role} {reason}": count for (role, reason), count in store.steps.counts("role", "stop_reason").items()}
    )
    failures = [
        {"role": role, "reason": why, "steps": count} for (role, why), count in failed_steps(store).most_common()
    ]
    return {
        "steps": reasons.total(),
        "stop_reasons": dict(sorted(reasons.items())),
        "requests": store.steps.counters(),
        "failures": failures,
        "neutralised": store.manifest.get("neutralised", {}),
    }
