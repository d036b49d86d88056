"""Runs any router over the trees of a split and returns what became of every problem, exactly.

Expectations are exact in the router's own randomness: where a router draws, both branches are followed with their
probabilities. What remains is the sampling of problems and of the models' texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.curves import References
from agents.evaluation.outcomes import Outcomes, mix
from agents.routers.base import AnyRouter, Mixture, StatefulRouter, told_cap
from rollouts.errors import ConfigError, StoreError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING
from trim_env.features import left_feature
from trim_env.tables import DecisionTables, Taken, missing

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Seen = Callable[[Ints, Ints], NDArray[np.float32]]  # (rows of nodes, large tokens left), both (n,) -> (n, d) features


class Spent(NamedTuple):
    """Where n paths stand with the caps; arrays of shape (n,).

    Attributes:
        escalations: Steps that the large model wrote.
        left: Tokens that it may still decode; 0 without a cap on them.
    """

    escalations: Ints
    left: Ints

    def open(self, tables: DecisionTables) -> NDArray[np.bool_]:
        """Return where the caps still let the large model be called."""
        allowed = np.ones(len(self.left), bool)
        if tables.max_escalations is not None:
            allowed &= self.escalations < tables.max_escalations
        if tables.max_large_tokens is not None:
            allowed &= self.left > 0
        return allowed


Decide = Callable[[Ints, Spent], Floats]  # ((n,) rows of nodes, what was spent so far) -> (n,) P(escalate)


def run(router: AnyRouter | Mixture, tables: DecisionTables) -> Outcomes:
    """Return the outcomes of a router on the split of some tables.

    Raises:
        StoreError: A proposal that the router needs was not generated.
        ConfigError: It has to be told what is left of a cap on large tokens, and the tables have none.
    """
    if isinstance(router, Mixture):
        return mix(run(router.first, tables), run(router.second, tables), router.share)
    if isinstance(router, StatefulRouter):
        return by_problem(tables, run_trees(tables, router))
    seen = seen_by(router, tables)
    return by_problem(tables, run_trees(tables, lambda rows, spent: router.probability(seen(rows, spent.left))))


def seen_by(router: AnyRouter, tables: DecisionTables) -> Seen:
    """Return what a router is told at nodes where so many large tokens are left.

    Raises:
        ConfigError: It has to be told what is left of a cap, and the tables have none.
    """
    features, cap, wanted = tables.in_schema(router.schema), tables.max_large_tokens, told_cap(router)
    if wanted is None:
        return lambda rows, _: features[rows]
    if cap is None:
        raise ConfigError(
            f"{router.name} was trained under a cap of {wanted} large tokens for a problem and has to be told what is "
            "left of it; no cap is set here. Set one (max_large_tokens)."
        )
    return lambda rows, left: np.concatenate([features[rows], left_feature(left, cap)[:, None]], axis=1)


def references(tables: DecisionTables) -> References:
    """Return the outcomes of always-small and always-large in the same trees; no cap binds always-large."""
    small, large = always_trees(tables)
    return References(by_problem(tables, small), by_problem(tables, large))


def always_trees(tables: DecisionTables) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return the outcomes of each tree, as `run_trees` does, of always-small and of always-large (uncapped)."""
    small = run_trees(tables, lambda rows, _: np.zeros(len(rows)))
    free = replace(tables, max_escalations=None, max_large_tokens=None)
    return small, run_trees(free, lambda rows, _: np.ones(len(rows)))


def run_trees(tables: DecisionTables, decide: Decide | StatefulRouter) -> dict[str, Floats]:
    """Return the expected outcome of each tree of the split: the fields of `Outcomes` as (R,) arrays.

    Paths of a router with state are never merged: it may tell them apart.
    """
    count = len(tables.indices)
    path = _Path(decide, tables) if isinstance(decide, StatefulRouter) else None
    totals = {name: np.zeros(count) for name in Outcomes.columns()}
    rows, tree, weight = tables.roots, np.arange(count), np.ones(count)
    spent = Spent(np.zeros(count, np.int64), np.full(count, tables.max_large_tokens or 0, np.int64))
    counted = tables.max_large_tokens is not None
    while len(rows):
        escalate = path.decide(rows, spent) if path else decide(rows, spent)  # type: ignore[operator]
        escalate = np.where(spent.open(tables), escalate, 0.0)
        branches = []
        for action, share in ((CONTINUE_SMALL, 1 - escalate), (ESCALATE_LARGE, escalate)):
            taken = np.flatnonzero(share > 0)
            owner, mass, used, left = tree[taken], (weight * share)[taken], *(each[taken] for each in spent)
            found = tables.take(rows[taken], np.full(len(taken), action), left)
            child, accepted = tables.child[found.place], found.place - 2 * rows[taken]
            if (child == MISSING).any():
                raise StoreError(missing(tables, found.place))
            _add(totals, tables, found, owner, mass, accepted)
            left = left - found.large_tokens if counted else left
            on = child >= 0
            branches.append([each[on] for each in (child, owner, mass, used + accepted, left, taken, accepted)])
        before = rows
        rows, tree, weight, used, left, taken, accepted = (
            np.concatenate(parts) for parts in zip(*branches, strict=True)
        )
        spent = Spent(used, left)
        if path:
            path.accept(before, taken, accepted)
        elif ((escalate > 0) & (escalate < 1)).any():
            rows, tree, spent, weight = _merged(rows, tree, spent, weight)
    return totals


class _Path:
    """The states of a router's episodes, one for each path under way."""

    def __init__(self, router: StatefulRouter, tables: DecisionTables) -> None:
        self._router, self._trees = router, tables.trees
        self._seen = seen_by(router, tables)
        self._state = router.start(len(tables.indices))

    def decide(self, rows: Ints, spent: Spent) -> Floats:
        escalate, self._state = self._router.decide(self._seen(rows, spent.left), self._state)
        return escalate

    def accept(self, rows: Ints, going: Ints, actions: Ints) -> None:
        """Keep some paths, (n,) positions in `rows`, in which the small model's (0) or the large one's step stands."""
        place = rows[going], actions
        scores, tokens = self._trees.score[place], self._trees.accepted_tokens[place]
        self._state = self._router.accept(self._state[going], actions, scores, tokens)


def _add(
    totals: dict[str, Floats], tables: DecisionTables, found: Taken, owner: Ints, mass: Floats, accepted: Ints
) -> None:
    for name, values in outcomes_of(tables, found, accepted).items():
        totals[name] += np.bincount(owner, mass * values, minlength=len(totals[name]))


def outcomes_of(tables: DecisionTables, found: Taken, accepted: Ints) -> dict[str, NDArray[Any]]:
    """Return what (n,) decisions add to the fields of `Outcomes`, in their order.

    Args:
        tables: The tables.
        found: What became of the decisions.
        accepted: (n,) 0 where the small model's, 1 where the large model's step was accepted.
    """
    small = tables.small_tokens[found.place]
    return {
        "correct": tables.solved[found.place],
        "cost": found.cost,
        "large_tokens": found.large_tokens,
        "small_tokens": small,
        "discarded_tokens": small * accepted,
        "escalations": accepted,
        "steps": np.ones(len(accepted)),
    }


def _merged(rows: Ints, tree: Ints, spent: Spent, weight: Floats) -> tuple[Ints, Ints, Spent, Floats]:
    """Add up the weights of equal (node, what was spent): there are as many as the tree has, not as many as paths."""
    keys, first, place = np.unique(np.stack([rows, *spent]), axis=1, return_index=True, return_inverse=True)
    summed = np.bincount(place.reshape(-1), weight).astype(np.float64)
    merged, used, left = keys.astype(np.int64)
    return merged, tree[first], Spent(used, left), summed


def by_problem(tables: DecisionTables, totals: dict[str, Floats]) -> Outcomes:
    """Average the outcomes of trees over the replicas of each problem."""
    problems, position = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
    replicas = np.bincount(position)
    ids = tuple(tables.trees.problem_ids[problem] for problem in problems)
    return Outcomes(ids, *(np.bincount(position, totals[name]) / replicas for name in Outcomes.columns()))
