"""Runs any router over the trees of a split and returns what became of every problem, exactly.

Expectations are exact in the router's own randomness: where a router draws, both branches are followed with their
probabilities. What remains is the sampling of problems and of the models' texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from agents.base import AnyRouter, Mixture, StatefulRouter
from agents.evaluation.metrics import References
from agents.evaluation.outcomes import Outcomes, mix
from rollouts.errors import StoreError
from rollouts.tree import CONTINUE_SMALL, ESCALATE_LARGE, MISSING
from trim_env.tables import DecisionTables, missing

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Decide = Callable[[Ints, Ints], Floats]  # (rows of nodes, escalations so far) -> P(escalate); both (n,)


def run(router: AnyRouter | Mixture, tables: DecisionTables) -> Outcomes:
    """Return the outcomes of a router on the split of some tables.

    Raises:
        StoreError: A proposal that the router needs was not generated.
    """
    if isinstance(router, Mixture):
        return mix(run(router.first, tables), run(router.second, tables), router.share)
    if isinstance(router, StatefulRouter):
        return by_problem(tables, run_trees(tables, router))
    features = tables.in_schema(router.schema)
    return by_problem(tables, run_trees(tables, lambda rows, _: router.probability(features[rows])))


def references(tables: DecisionTables) -> References:
    """Return the outcomes of always-small and always-large in the same trees; the cap does not bind always-large."""
    small, large = always_trees(tables)
    return References(by_problem(tables, small), by_problem(tables, large))


def always_trees(tables: DecisionTables) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return the outcomes of each tree, as `run_trees` does, of always-small and of always-large (uncapped)."""
    small = run_trees(tables, lambda rows, _: np.zeros(len(rows)))
    return small, run_trees(replace(tables, max_escalations=None), lambda rows, _: np.ones(len(rows)))


def run_trees(tables: DecisionTables, decide: Decide | StatefulRouter) -> dict[str, Floats]:
    """Return the expected outcome of each tree of the split: the fields of `Outcomes` as (R,) arrays.

    Paths of a router with state are never merged: it may tell them apart.
    """
    count = len(tables.indices)
    path = _Path(decide, tables) if isinstance(decide, StatefulRouter) else None
    totals = {name: np.zeros(count) for name in Outcomes.columns()}
    rows, tree = tables.roots, np.arange(count)
    used, weight = np.zeros(count, np.int64), np.ones(count)
    while len(rows):
        escalate = path.decide(rows) if path else decide(rows, used)  # type: ignore[operator]
        if tables.max_escalations is not None:
            escalate = np.where(used < tables.max_escalations, escalate, 0.0)
        branches, going = [], []
        for action, share in ((CONTINUE_SMALL, 1 - escalate), (ESCALATE_LARGE, escalate)):
            taken = np.flatnonzero(share > 0)
            place, owner, mass = 2 * rows[taken] + action, tree[taken], (weight * share)[taken]
            child = tables.child[place]
            if (child == MISSING).any():
                raise StoreError(missing(tables, place))
            _add(totals, tables, place, owner, mass, action)
            on = child >= 0
            branches.append((child[on], owner[on], used[taken][on] + action, mass[on]))
            going.append(taken[on])
        if path:
            path.accept(rows, *going)
        rows, tree, used, weight = (np.concatenate(parts) for parts in zip(*branches, strict=True))
        if not path and ((escalate > 0) & (escalate < 1)).any():
            rows, tree, used, weight = _merged(rows, tree, used, weight)
    return totals


class _Path:
    """The states of a router's episodes, one for each path under way."""

    def __init__(self, router: StatefulRouter, tables: DecisionTables) -> None:
        self._router, self._trees = router, tables.trees
        self._features = tables.in_schema(router.schema)
        self._state = router.start(len(tables.indices))

    def decide(self, rows: Ints) -> Floats:
        escalate, self._state = self._router.decide(self._features[rows], self._state)
        return escalate

    def accept(self, rows: Ints, small: Ints, large: Ints) -> None:
        """Keep the paths in which the small model's, and then those in which the large model's step was accepted."""
        going = np.concatenate([small, large])
        actions = np.repeat([CONTINUE_SMALL, ESCALATE_LARGE], [len(small), len(large)])
        place = rows[going], actions
        scores, tokens = self._trees.score[place], self._trees.accepted_tokens[place]
        self._state = self._router.accept(self._state[going], actions, scores, tokens)


def _add(
    totals: dict[str, Floats], tables: DecisionTables, place: Ints, owner: Ints, mass: Floats, action: int
) -> None:
    count = len(totals["correct"])
    small, large = tables.small_tokens[place], tables.large_tokens[place]
    for name, values in (
        ("correct", tables.solved[place]),
        ("cost", tables.cost[place]),
        ("large_tokens", large),
        ("small_tokens", small),
        ("discarded_tokens", small * action),
        ("escalations", np.full(len(place), action)),
        ("steps", np.ones(len(place))),
    ):
        totals[name] += np.bincount(owner, mass * values, minlength=count)


def _merged(rows: Ints, tree: Ints, used: Ints, weight: Floats) -> tuple[Ints, Ints, Ints, Floats]:
    """Add up the weights of equal (node, escalations): there are as many as the tree has, not as many as paths."""
    keys, first, place = np.unique(np.stack([rows, used]), axis=1, return_index=True, return_inverse=True)
    summed = np.bincount(place.reshape(-1), weight).astype(np.float64)
    return keys[0].astype(np.int64), tree[first], keys[1].astype(np.int64), summed


def by_problem(tables: DecisionTables, totals: dict[str, Floats]) -> Outcomes:
    """Average the outcomes of trees over the replicas of each problem."""
    problems, position = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
    replicas = np.bincount(position)
    ids = tuple(tables.trees.problem_ids[problem] for problem in problems)
    return Outcomes(ids, *(np.bincount(position, totals[name]) / replicas for name in Outcomes.columns()))
