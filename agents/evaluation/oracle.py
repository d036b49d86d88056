"""Clairvoyant reference points: what a router could reach that knows how every solution ends.

They also exploit the sampling noise of the frozen draws, so they bound what can be reached from above, loosely.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.curves import Points, References
from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.walk import always_trees, by_problem, joined, outcomes_of, run_trees
from rollouts.errors import StoreError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING
from trim_env.tables import DecisionTables

SPREAD = 24
LOWEST, HIGHEST = 1e-4, 1e4
"""λ between which an oracle's are looked for, in units of one over what always-large costs more for a problem."""


def tree_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the best path through every tree within the caps, by backward induction with hindsight.

    Raises:
        StoreError: A tree holds no whole path within the caps.
    """
    tables = tables.charged(None)
    return by_problem(tables, joined([_best(part, lam) for part in tables.parts()]))


def _best(tables: DecisionTables, lam: float) -> dict[str, Floats]:
    graph, own = tables.graph, outcomes_of(tables, tables.graph.moved)
    now = np.where(graph.missing, -np.inf, own["correct"] - lam * own["cost"])
    value = graph.backward(lambda level, later: (now[level] + later).max(axis=1))
    hopeless = int((~np.isfinite(value[graph.roots])).sum())
    if hopeless:
        raise StoreError(f"{hopeless} trees hold no whole path within the caps.")
    best = (now + value[graph.child]).argmax(axis=1)
    visited = np.flatnonzero(graph.reach(np.eye(2)[best])[:-1])
    tree, place = tables.trees.tree[graph.rows[visited]], (visited, best[visited])
    totals = {name: np.bincount(tree, each[place], len(tables.trees.root)).astype(float) for name, each in own.items()}
    return {name: total[tables.indices] for name, total in totals.items()}


def query_oracle(tables: DecisionTables, lam: float, *, per_draw: bool = False) -> Outcomes:
    """Return the outcomes of the better of always-small and always-large, known beforehand; no caps.

    Args:
        tables: The tables.
        lam: λ.
        per_draw: Choose for each tree, knowing its draws. Otherwise the choice is one for all replicas of a problem, by
            their mean: no router that sees the question alone does better on these trees.
    """
    small, large = always_trees(tables)
    better = (large["correct"] - lam * large["cost"]) - (small["correct"] - lam * small["cost"])
    if not per_draw:
        _, position = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
        better = np.bincount(position, better).astype(float)[position]
    return by_problem(tables, {name: np.where(better > 0, large[name], small[name]) for name in small})


def score_oracle(tables: DecisionTables, tau: float = 0.0) -> Outcomes:
    """Return the outcomes of escalating where the large model's step scores more than τ above the small one's.

    What Arbitrage calls its oracle (`agents.learners.arbitrage`). It sees one step ahead and trusts the scorer, so that
    it bounds nothing.
    """
    score = scores_of_both(tables)
    return _knowing(tables, score[:, ESCALATE_LARGE] - score[:, CONTINUE_SMALL] > tau)


def scores_of_both(tables: DecisionTables) -> NDArray[np.float64]:
    """Return the (N, 2) scores of both models' proposals; NaN where one was not generated.

    Raises:
        StoreError: The scorer does not tell those of both: a stand-in score (`UNSCORED`) is no score to compare with.
    """
    trees, scorer = tables.trees, tables.trees.meta["scorer"]
    score = np.where(trees.child == MISSING, np.nan, trees.score.astype(np.float64))
    told = [each for name, each in trees.signals.items() if scorer in (name, name.rpartition(".")[0])]
    unknown = np.isnan([trees.score, *told[:1]]).any(axis=(0, 2)) & (trees.child != MISSING).all(axis=1)
    if lacking := int(unknown[trees.rows_of(tables.indices)].sum()):
        raise StoreError(
            f"{trees.meta['store']}: {lacking} decisions lack the score of a proposal by {scorer}, where those of both "
            "models are to be compared. Use a scorer that tells both."
        )
    return score


def step_oracle(tables: DecisionTables) -> Outcomes:
    """Return the outcomes of escalating where the small model's step is wrong and the large one's right, by labels.

    Raises:
        StoreError: The problems have no exact labels of steps.
    """
    label = np.asarray(tables.trees.label)
    if (label[tables.roots] < 0).any():
        raise StoreError(
            f"{tables.trees.meta['store']} has no exact labels of steps, which this reference point needs."
        )
    return _knowing(tables, (label[:, CONTINUE_SMALL] == 0) & (label[:, ESCALATE_LARGE] == 1))


def _knowing(tables: DecisionTables, escalates: NDArray[np.bool_]) -> Outcomes:
    totals = run_trees(tables.charged(None), lambda rows, _: escalates[rows].astype(np.float64))
    return by_problem(tables, totals)


def spread_oracle(oracle: Callable[[float], Outcomes], references: References) -> Points:
    """Return an oracle's points for values of λ that spread over its cost, found by bisection.

    λ is halved, on a logarithmic scale, where neighbouring points are farthest apart in cost, until they are no
    farther than the range of its costs over `SPREAD`, or cannot be told apart.

    Args:
        oracle: From λ to outcomes.
        references: Always-small and always-large, which say what a gain may cost.
    """
    price = max(float(references.large.cost.mean() - references.small.cost.mean()), 1e-9)
    first, last = LOWEST / price, HIGHEST / price
    found = {lam: oracle(lam) for lam in (first, last)}
    cost = {lam: float(outcomes.cost.sum()) for lam, outcomes in found.items()}
    step = (cost[first] - cost[last]) / SPREAD
    while True:
        gaps = [(cost[low] - cost[high], low, high) for low, high in pairwise(sorted(found)) if high > low * 1.001]
        widest, low, high = max(gaps, default=(0.0, 0.0, 0.0))
        if widest <= step:
            distinct = {cost[lam]: lam for lam in found}
            return [(lam, found[lam]) for _, lam in sorted(distinct.items())]
        lam = (low * high) ** 0.5
        found[lam] = oracle(lam)
        cost[lam] = float(found[lam].cost.sum())
