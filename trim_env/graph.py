"""Walks through trees under the caps: a step of many at once, all that a policy does, and all that any policy could.

A walk stands at a node and has spent something of what the caps allow; both together are its state. What else a router
remembers of the path is kept by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, StoreError
from rollouts.text.steps import ROLES
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Graph
from trim_env.features import probabilities
from trim_env.tables import DecisionTables, Taken, missing

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Spent(NamedTuple):
    """Where n walks stand with the caps; arrays of shape (n,), or any other.

    Attributes:
        escalations: Steps that the large model wrote; 0 without a cap on them.
        left: Tokens that it may still decode; 0 without a cap on them.
    """

    escalations: Ints
    left: Ints

    def open(self, tables: DecisionTables) -> NDArray[np.bool_]:
        """Return where the caps still let the large model be called."""
        allowed = np.ones(self.left.shape, bool)
        if tables.max_escalations is not None:
            allowed &= self.escalations < tables.max_escalations
        if tables.max_large_tokens is not None:
            allowed &= self.left > 0
        return allowed


class Moved(NamedTuple):
    """What becomes of the actions of n walks; arrays of shape (n,), or any other.

    Attributes:
        accepted: 0 where the small model's step was accepted, 1 where the large model's.
        child: Row of the next node, -1 at an end, -2 if the proposal was not generated.
    """

    taken: Taken
    accepted: Ints
    child: Ints
    spent: Spent


def advance(tables: DecisionTables, rows: Ints, spent: Spent, actions: Ints) -> Moved:
    """Return what becomes of walks that stand at (n,) nodes and take (n,) actions.

    Escalating acts as continuing where the caps do not let the large model be called.
    """
    taken = tables.take(rows, np.where(spent.open(tables), actions, CONTINUE_SMALL), spent.left)
    accepted = taken.place - 2 * rows
    used = spent.escalations if tables.max_escalations is None else spent.escalations + accepted
    left = spent.left if tables.max_large_tokens is None else spent.left - taken.large_tokens
    return Moved(taken, accepted, tables.child[taken.place].astype(np.int64), Spent(used, left))


class Decisions(NamedTuple):
    """What the walks of one depth do: n actions; arrays of shape (n,).

    Attributes:
        tree: Position of the tree in the split.
        rows: Node.
        mass: Probability of getting there and acting so.
        walk: Position of the walk among those whom `Decide` was asked about.
    """

    tree: Ints
    rows: Ints
    spent: Spent
    mass: Floats
    moved: Moved
    walk: Ints


Decide = Callable[[Ints, Spent], Floats]  # ((n,) rows of nodes, what was spent so far) -> (n,) P(escalate)
Accept = Callable[[Ints, Ints, Ints], None]  # of m walks that go on: rows, positions among the n, accepted actions


def walk(tables: DecisionTables, decide: Decide, accept: Accept | None = None) -> Iterator[Decisions]:
    """Follow a policy through the trees of a split and yield, by depth, what it does, with the probabilities of it.

    Only what the policy reaches is visited. Where it draws, both branches are followed, and walks in equal states are
    merged: there are as many as the tree has, not as many as paths.

    Args:
        tables: The tables.
        decide: The policy.
        accept: Is told which walks go on, and how, by a policy that remembers them: they are then never merged, since
            it may tell them apart.

    Raises:
        StoreError: A proposal that the policy needs was not generated.
        ConfigError: The policy gives something else than a probability for each decision.
    """
    rows, spent = starts(tables)
    tree, mass = np.arange(len(rows)), np.ones(len(rows))
    while len(rows):
        escalate = np.where(spent.open(tables), probabilities(decide(rows, spent), len(rows)), 0.0)
        share = np.concatenate([1 - escalate, escalate])
        likely = np.flatnonzero(share > 0)
        action, at = np.divmod(likely, len(rows))
        before = Spent(*(each[at] for each in spent))
        moved = advance(tables, rows[at], before, action)
        if (moved.child == MISSING).any():
            raise StoreError(missing(tables, moved.taken.place))
        yield Decisions(tree[at], rows[at], before, mass[at] * share[likely], moved, at)
        on = np.flatnonzero(moved.child >= 0)
        going = at[on]
        if accept:
            accept(rows[going], going, moved.accepted[on])
        drawn = len(likely) > len(rows)
        rows, tree, mass = moved.child[on], tree[going], mass[going] * share[likely[on]]
        spent = Spent(*(each[on] for each in moved.spent))
        if drawn and not accept:
            keys, first, place = np.unique(_keys(tables, rows, spent), return_index=True, return_inverse=True)
            (rows, spent), tree, mass = _states(tables, keys), tree[first], np.bincount(place, mass).astype(float)


@dataclass(frozen=True, eq=False)
class States(Graph):
    """All n states that the caps let any policy reach.

    Attributes:
        open: (n,) whether the caps let the large model be called.
    """

    rows: Ints
    spent: Spent
    open: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class StateGraph(States):
    """The states with what is paid between them."""

    moved: Moved

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(n, 2) whether what an action leads to was not generated."""
        return np.equal(self.moved.child, MISSING)


def reachable(tables: DecisionTables) -> StateGraph:
    """Return all states that the caps let a walk through the trees of a split reach."""
    keys, roots = np.unique(_keys(tables, *starts(tables)), return_inverse=True)
    states, moves, children, levels, size = [], [], [], [], 0
    while len(keys):
        rows, spent = _states(tables, keys)
        states.append((rows, *spent))
        levels.append(slice(size, size + len(rows)))
        size += len(rows)
        both = np.tile([CONTINUE_SMALL, ESCALATE_LARGE], len(rows))
        moved = advance(tables, np.repeat(rows, 2), Spent(*(np.repeat(each, 2) for each in spent)), both)
        moves.append((*moved.taken, moved.accepted, moved.child, *moved.spent))
        on = moved.child >= 0
        keys, place = np.unique(
            _keys(tables, moved.child[on], Spent(*(each[on] for each in moved.spent))), return_inverse=True
        )
        child = np.full(len(on), -1)
        child[on] = size + place
        children.append(child)
    rows, *spent_at = (np.concatenate(parts) for parts in zip(*states, strict=True))
    *taken, accepted, child, used, left = (np.concatenate(parts).reshape(-1, 2) for parts in zip(*moves, strict=True))
    position = np.concatenate(children).reshape(-1, 2)
    return StateGraph(
        child=np.where(position < 0, size, position),
        levels=levels,
        roots=roots,
        rows=rows,
        spent=Spent(*spent_at),
        open=Spent(*spent_at).open(tables),
        moved=Moved(Taken(*taken), accepted, child, Spent(used, left)),
    )


class Alone(NamedTuple):
    """What either model comes to that writes the whole solution of each of R trees in one request; arrays (R, 2)."""

    correct: Floats
    tokens: Floats
    prompt_tokens: Floats
    steps: Floats
    last: Ints


def alone(tables: DecisionTables) -> Alone:
    """Return what either model does alone in the trees of a split; no caps.

    Raises:
        StoreError: A part of such a solution was not generated.
        ConfigError: One model writes all answers, whoever thought.
    """
    if (by := (tables.trees.meta.get("splitting") or {}).get("answer_by")) in ROLES:
        raise ConfigError(
            "Routers of whole problems need solutions that one model writes alone; in these rollouts every answer is "
            f"the {by} model's (answer_by = {by!r})."
        )
    free = replace(tables, max_escalations=None, max_large_tokens=None)
    trees, shape = tables.trees, (len(tables.indices), 2)
    correct, tokens, steps, last = (*(np.zeros(shape) for _ in range(3)), np.zeros(shape, np.int64))
    constants: tuple[Decide, Decide] = (lambda rows, _: np.zeros(len(rows)), lambda rows, _: np.ones(len(rows)))
    for action, constant in enumerate(constants):
        for done in walk(free, constant):
            own = done.tree, action
            correct[own] = tables.solved[done.moved.taken.place]
            tokens[own] += trees.tokens[done.rows, action]
            steps[own] += 1
            last[own] = done.rows
    return Alone(correct, tokens, np.asarray(trees.prompt_tokens[tables.roots], np.float64), steps, last)


def starts(tables: DecisionTables) -> tuple[Ints, Spent]:
    """Return where walks through the trees of a split begin, and that nothing is spent there."""
    none = np.zeros(len(tables.indices), np.int64)
    return tables.roots, Spent(none, none + (tables.max_large_tokens or 0))


def _shape(tables: DecisionTables) -> tuple[int, int, int]:
    return tables.trees.nodes, (tables.max_escalations or 0) + 1, (tables.max_large_tokens or 0) + 1


def _keys(tables: DecisionTables, rows: Ints, spent: Spent) -> Ints:
    """Return a number for each state."""
    return np.ravel_multi_index((rows, *spent), _shape(tables))


def _states(tables: DecisionTables, keys: Ints) -> tuple[Ints, Spent]:
    rows, *spent = np.unravel_index(keys, _shape(tables))
    return rows, Spent(*spent)
