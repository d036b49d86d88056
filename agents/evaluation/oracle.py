"""Clairvoyant reference points: what a router could reach that knows how every solution ends.

They also exploit the sampling noise of the frozen draws, so they bound what can be reached from above, loosely.
"""

from __future__ import annotations

import numpy as np

from agents.evaluation.outcomes import Outcomes
from agents.evaluation.walk import always_trees, by_problem, outcomes_of
from rollouts.errors import StoreError
from trim_env.tables import DecisionTables


def tree_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the best path through every tree within the caps, by backward induction with hindsight.

    Raises:
        StoreError: A tree holds no whole path within the caps.
    """
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
    return by_problem(tables, {name: total[tables.indices] for name, total in totals.items()})


def query_oracle(tables: DecisionTables, lam: float) -> Outcomes:
    """Return the outcomes of the better of always-small and always-large for every tree, known beforehand; no caps."""
    small, large = always_trees(tables)
    better = (large["correct"] - lam * large["cost"]) > (small["correct"] - lam * small["cost"])
    return by_problem(tables, {name: np.where(better, large[name], small[name]) for name in small})
