"""Runs any router over the trees of a split and returns what became of every problem, exactly.

Expectations are exact in the router's own randomness: where a router draws, both branches are followed with their
probabilities. What remains is the sampling of problems and of the models' texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.curves import Method, References
from agents.evaluation.outcomes import Outcomes, Solutions, mix
from agents.routers.asking import Asking
from agents.routers.base import AnyRouter, Mixture, Router, StatefulRouter, is_blind, told_cap
from rollouts.errors import ConfigError
from trim_env.features import left_feature
from trim_env.graph import Decide, Decisions, Floats, Ints, Moved, Spent, walk
from trim_env.tables import DecisionTables

Settings = Sequence[tuple[float, AnyRouter | Mixture, Outcomes]]
"""Settings of a method: knob, router, and what it comes to on the problems that choose."""
Seen = Callable[[Ints, Ints], NDArray[np.float32]]  # (rows of nodes, large tokens left), both (n,) -> (n, d) features


def run(router: AnyRouter | Mixture, tables: DecisionTables) -> Outcomes:
    """Return the outcomes of a router on the split of some tables.

    Raises:
        StoreError: A proposal that the router needs was not generated.
        ConfigError: It has to be told what is left of a cap on large tokens, and the tables have none.
    """
    if isinstance(router, Mixture):
        return mix(run(router.first, tables), run(router.second, tables), router.share)
    return by_problem(tables, run_trees(tables, router))


def measured(settings: Settings, choosing: References, tables: DecisionTables) -> Method:
    """Return the settings of a method on the split of some tables; `choosing` is where their outcomes are from."""
    points = [(knob, run(router, tables)) for knob, router, _ in settings]
    return Method.chosen(points, [(knob, outcomes) for knob, _, outcomes in settings], choosing)


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
    tables = tables.charged(None)
    small = run_trees(tables, lambda rows, _: np.zeros(len(rows)))
    free = replace(tables, max_escalations=None, max_large_tokens=None)
    return small, run_trees(free, lambda rows, _: np.ones(len(rows)))


def run_trees(tables: DecisionTables, policy: AnyRouter | Decide) -> dict[str, Floats]:
    """Return the expected outcome of each tree of the split: the fields of `Outcomes` as (R,) arrays."""
    if isinstance(policy, Asking):
        return _run_asking(tables, policy)
    if isinstance(policy, Router | StatefulRouter):
        tables = tables.charged(None if is_blind(policy) else policy.schema)
    count = len(tables.indices)
    totals = {name: np.zeros(count) for name in Outcomes.columns()}
    for done in decisions(tables, policy):
        for name, values in outcomes_of(tables, done.moved).items():
            totals[name] += np.bincount(done.tree, done.mass * values, minlength=count)
    return totals


def _run_asking(tables: DecisionTables, router: Asking) -> dict[str, Floats]:
    """As `run_trees`, of a router that pays where it asks, and how often it does: not where caps leave no choice."""
    whole, tables = tables.charged(router.schema), tables.charged(router.schema, router.source)
    price, seen = whole.cost - tables.cost, seen_by(router, tables)
    totals = {name: np.zeros(len(tables.indices)) for name in (*Outcomes.columns(), "asked")}
    for done in decisions(tables, router):
        asked = router.asks(seen(done.rows, done.spent.left)) & done.spent.open(tables)
        values = outcomes_of(tables, done.moved) | {"asked": asked}
        values["cost"] = (
            values["cost"] + asked * price[2 * done.rows + (done.moved.accepted | done.moved.taken.cut_off)]
        )
        for name, each in values.items():
            totals[name] += np.bincount(done.tree, done.mass * each, minlength=len(tables.indices))
    return totals


def decisions(tables: DecisionTables, policy: AnyRouter | Decide) -> Iterator[Decisions]:
    """Return all that a router does, by depth (`trim_env.graph.walk`)."""
    if not isinstance(policy, Router | StatefulRouter):
        return walk(tables, policy)
    seen = seen_by(policy, tables)
    if isinstance(policy, Router):
        return walk(tables, lambda rows, spent: policy.probability(seen(rows, spent.left)))
    state, trees = policy.start(len(tables.indices)), tables.trees  # a row for each walk under way

    def decide(rows: Ints, spent: Spent) -> Floats:
        nonlocal state
        escalate, state = policy.decide(seen(rows, spent.left), state)
        return escalate

    def accept(rows: Ints, going: Ints, actions: Ints) -> None:
        nonlocal state
        at = rows, actions
        state = policy.accept(state[going], actions, trees.score[at], trees.accepted_tokens[at])

    return walk(tables, decide, accept)


def outcomes_of(tables: DecisionTables, moved: Moved) -> dict[str, NDArray[Any]]:
    """Return what actions add to the fields of `Outcomes`, in their order; arrays shaped as those of `moved`."""
    small = tables.small_tokens[moved.taken.place]
    return {
        "correct": tables.solved[moved.taken.place],
        "cost": moved.taken.cost,
        "large_tokens": moved.taken.large_tokens,
        "small_tokens": small,
        "discarded_tokens": small * moved.accepted,
        "escalations": moved.accepted,
        "steps": np.ones(moved.accepted.shape),
    }


def by_problem(tables: DecisionTables, totals: dict[str, Floats]) -> Outcomes:
    """Average the outcomes of trees over the replicas of each problem."""
    problems, position = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
    replicas = np.bincount(position)
    ids = tuple(tables.trees.problem_ids[problem] for problem in problems)
    means = {name: np.bincount(position, totals[name]) / replicas for name in Outcomes.columns()}
    asked = np.bincount(position, totals["asked"]) / replicas if "asked" in totals else None
    return Outcomes(ids, **means, solutions=Solutions(totals["correct"], totals["escalations"]), asked=asked)
