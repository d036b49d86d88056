"""Clairvoyant reference points: what a router could reach that knows how every solution ends.

They also exploit the sampling noise of the frozen draws, so they bound what can be reached from above, loosely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.outcomes import Outcomes
from agents.evaluation.run import always_trees, by_problem, run_trees
from rollouts.tree import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, iterate_by_depth
from trim_env.tables import DecisionTables

Floats = NDArray[np.float64]


def tree_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the best path through every tree, by backward induction with hindsight."""
    escalate = _best_actions(tables, lam)
    most = escalate.shape[1] - 1

    def decide(rows: NDArray[np.int64], used: NDArray[np.int64]) -> Floats:
        chosen: Floats = escalate[rows, np.minimum(used, most)].astype(np.float64)
        return chosen

    return by_problem(tables, run_trees(tables, decide))


def _best_actions(tables: DecisionTables, lam: float) -> NDArray[np.bool_]:
    """Return (N, K + 1) whether to escalate at a node after so many escalations; one column without a cap."""
    cap = tables.max_escalations
    columns = 1 if cap is None else cap + 1
    value = np.full((tables.trees.nodes, columns), -np.inf)
    escalate = np.zeros((tables.trees.nodes, columns), bool)
    for rows in iterate_by_depth(tables.trees):
        options = []
        for action in (CONTINUE_SMALL, ESCALATE_LARGE):
            place = 2 * rows + action
            child = tables.child[place]
            later = value[np.maximum(child, 0)]
            if action == ESCALATE_LARGE and cap is not None:
                later = np.concatenate([later[:, 1:], np.full((len(rows), 1), -np.inf)], axis=1)
            here = (tables.solved[place] - lam * tables.cost[place])[:, None]
            total = here + np.where((child < 0)[:, None], 0.0, later)
            total[child == MISSING] = -np.inf
            if action == ESCALATE_LARGE and cap is not None:
                total[:, -1] = -np.inf
            options.append(total)
        escalate[rows] = options[1] > options[0]
        value[rows] = np.maximum(*options)
    return escalate


def query_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the better of always-small and always-large for every tree, known beforehand."""
    small, large = always_trees(tables)
    better = (large["correct"] - lam * large["cost"]) > (small["correct"] - lam * small["cost"])
    return by_problem(tables, {name: np.where(better, large[name], small[name]) for name in small})
