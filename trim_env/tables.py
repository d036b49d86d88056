"""A split of compiled trees as look-up tables: what an environment step gathers from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, StoreError, did_you_mean
from rollouts.store.store import score_command
from rollouts.text.likelihood import STATISTICS
from rollouts.text.steps import LARGE, ROLES
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees
from rollouts.trees.columns import columns_of
from rollouts.trees.compile import compile_store
from trim_env.costs import CostModel, charges_signals, cost_model, edge_costs, sources_of
from trim_env.features import DEFAULT_SCHEMA, Schema, schema_named

if TYPE_CHECKING:
    from trim_env.graph import Alone, StateGraph

Rollouts = Trees | str | Path


class Taken(NamedTuple):
    """What becomes of actions at n nodes; arrays of shape (n,).

    Attributes:
        place: ``2 * row + action`` of the proposal that is accepted: the small model's where the large one was cut off.
        cut_off: Whether the large model was cut off by the cap on its tokens.
    """

    place: NDArray[np.int64]
    cost: NDArray[np.float64]
    large_tokens: NDArray[np.int64]
    cut_off: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DecisionTables:
    """Tables over the N nodes of compiled trees; a proposal is addressed by ``2 * row + action``.

    Attributes:
        indices: (R,) the trees that episodes are drawn from.
        max_escalations: K: most escalations of an episode; None without a cap.
        max_large_tokens: M: most tokens that the large model decodes in an episode; None without a cap.
        features: (N, d) float32.
        accepted: (2N, h) what later observations tell of the proposal once it is accepted, in schemas with a history.
        child: (2N,) row of the next node, -1 at an end, -2 if the proposal was not generated; those of the trees.
        cost: (2N,) cost of taking the proposal, with what `sources` charge for reading it.
        solved: (2N,) 1 where the proposal ends a solution that is correct, else 0.
        large_tokens: (2N,) tokens that the large model decodes when the proposal is taken.
        small_tokens: (2N,) tokens that the small model has decoded for its own proposal at that node.
    """

    trees: Trees
    indices: NDArray[np.int64]
    schema: Schema
    cost_model: CostModel
    max_escalations: int | None
    max_large_tokens: int | None
    features: NDArray[np.float32]
    accepted: NDArray[np.float32]
    child: NDArray[np.int32]
    cost: NDArray[np.float64]
    solved: NDArray[np.float64]
    large_tokens: NDArray[np.int64]
    small_tokens: NDArray[np.int64]
    sources: frozenset[str]
    _others: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @property
    def roots(self) -> NDArray[np.int64]:
        """(R,) rows of the roots of the split's trees."""
        return np.array(self.trees.root[self.indices], np.int64)

    def on(self, indices: NDArray[np.int64]) -> DecisionTables:
        """Return the same tables for episodes in other trees."""
        return replace(self, indices=indices)

    def parts(self, nodes: int | None = None) -> list[DecisionTables]:
        """Return the tables for parts of the trees, in their order (`Trees.parted`); of few nodes these alone."""
        parts = self.trees.parted(self.indices, nodes)
        return [self] if len(parts) == 1 else [self.on(each) for each in parts]

    def sample(self, nodes: int, seed: int = 0) -> DecisionTables:
        """Return the tables for trees of so many nodes at most, problems drawn at random; for all if these are few."""
        sizes = self.trees.sizes[self.indices]
        if sizes.sum() <= nodes:
            return self
        rank = np.random.default_rng(seed).permutation(len(self.trees.problem_ids))
        order = np.argsort(rank[self.trees.problem[self.indices]], kind="stable")
        return self.on(np.sort(self.indices[order[np.cumsum(sizes[order]) <= nodes]]))

    @cached_property
    def graph(self) -> StateGraph:
        """All states that the caps let a walk through the split's trees reach."""
        from trim_env.graph import reachable

        return reachable(self)

    @cached_property
    def alone(self) -> Alone:
        """What either model comes to that writes whole solutions by itself; no caps."""
        from trim_env.graph import alone

        return alone(self)

    def take(self, rows: NDArray[np.int64], actions: NDArray[np.int64], left: NDArray[np.int64]) -> Taken:
        """Return what becomes of (n,) actions at (n,) nodes under the cap on large tokens (docs/design.md, section 5).

        A large step of more tokens than are left is cut off after exactly those: they are paid, the truncated step is
        thrown away and the small model's proposal is accepted instead.

        Args:
            rows: Nodes.
            actions: Actions that are open: escalations only where something is left.
            left: Tokens that the large model may still decode in each episode; not read without a cap.
        """
        place = 2 * rows + actions
        cost, decoded = self.cost.take(place), self.large_tokens.take(place)
        if self.max_large_tokens is None:
            return Taken(place, cost, decoded, np.zeros(len(place), bool))
        paid, cut_off = cut(decoded, left)
        return Taken(place - cut_off, cost - self.cost_model.large_decode * (decoded - paid), paid, cut_off)

    def observed(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return observations at (n,) nodes; where they tell a history, that of one of the paths that lead there."""
        if not self.schema.history:
            return self.features[rows]
        before = np.full(self.trees.nodes, -1, np.int64)  # a proposal that leads to a node
        leads = np.flatnonzero(self.child >= 0)
        before[self.child[leads]] = leads
        past = np.zeros((len(rows), self.trees.meta["max_steps"], self.schema.history), np.float32)
        at, depth = np.asarray(rows, np.int64), np.asarray(self.trees.depth[rows], np.int64)
        for back in range(1, int(depth.max(initial=0)) + 1):
            on = np.flatnonzero(depth >= back)
            past[on, depth[on] - back] = self.accepted[before[at[on]]]
            at = np.where(depth >= back, before[at] // 2, at)
        return self.schema.observed(self.features[rows], past, depth)

    def charged(self, schema: str | Schema | None, but: str = "") -> DecisionTables:
        """Return the tables with what a router with this schema pays for what it reads.

        Args:
            schema: The schema; None: it reads nothing.
            but: ``scorer`` or ``large``, which is not charged: it is paid where it is asked.
        """
        if not charges_signals(self.cost_model):
            return self
        wanted = frozenset[str]() if schema is None else sources_of(schema_named(schema), self.trees.meta["scorer"])
        wanted -= {but}
        if wanted == self.sources:
            return self
        return replace(self, cost=_costs(self.trees, self.cost_model, wanted), sources=wanted)

    def in_schema(self, name: str) -> NDArray[np.float32]:
        """Return (N, d) features of the same nodes in another schema, given by its name or ``name/version``."""
        schema = schema_named(name)
        if schema == self.schema:
            return self.features
        if schema.id not in self._others:
            self._others[schema.id] = _features(self.trees, schema)
        return self._others[schema.id]


def decision_tables(
    rollouts: Rollouts,
    split: str | None = "train",
    *,
    schema: str | Schema = DEFAULT_SCHEMA,
    cost: str | CostModel = "decode-only",
    max_escalations: int | None = None,
    max_large_tokens: int | None = None,
    indices: NDArray[Any] | None = None,
    imports: bool = False,
) -> DecisionTables:
    """Build the tables.

    Args:
        rollouts: Compiled trees, the path of a rollout store, or the name of a bundled one (``quickstart``).
        split: Split that episodes are drawn from; None for all trees.
        schema: Feature schema, or its name (`trim_env.features.schema_named`).
        cost: Cost model, or its name, likewise.
        max_escalations: A cap on escalations per episode, K; it cannot exceed the K that the store is closed
            under, which is the default.
        max_large_tokens: A cap on the tokens that the large model decodes in an episode, M.
        indices: Draw from these trees instead of from a whole split.
        imports: Import the modules that both names name.

    Raises:
        StoreError: The store cannot be used, or the split is empty.
        ConfigError: Unknown schema or cost model, features or costs that are no numbers, a K that the store does
            not support, or an M below 1.
    """
    trees = rollouts if isinstance(rollouts, Trees) else compile_store(rollouts, split=split)
    schema, model = schema_named(schema, imports=imports), cost_model(cost, imports=imports)
    sources = sources_of(schema, trees.meta["scorer"])
    others: dict[str, Any] = trees.by_parts(lambda part: {"accepted": _accepted(part, schema), **_counted(part)})
    checked_answers(trees.meta.get("splitting"), max_large_tokens)
    return DecisionTables(
        trees=trees,
        indices=trees.select(split) if indices is None else np.asarray(indices, np.int64),
        schema=schema,
        cost_model=model,
        max_escalations=checked_cap(trees.meta["max_escalations"], max_escalations),
        max_large_tokens=checked_token_cap(max_large_tokens),
        features=_features(trees, schema),
        child=np.asarray(trees.child).reshape(-1),
        cost=_costs(trees, model, sources),
        sources=sources,
        **others,
    )


def _counted(trees: Trees) -> dict[str, NDArray[Any]]:
    """Return what of the tables neither schema nor cost model decide."""
    tokens = np.asarray(trees.tokens, np.int64)
    large = tokens[:, ESCALATE_LARGE, None] * np.stack([trees.large_alone, np.ones(trees.nodes, bool)], axis=1)
    small = np.repeat(tokens[:, CONTINUE_SMALL], 2)
    solved = np.array(trees.correct.reshape(-1) == 1, np.float64)
    return {"solved": solved, "large_tokens": large.reshape(-1), "small_tokens": small}


def _costs(trees: Trees, model: CostModel, sources: frozenset[str]) -> NDArray[np.float64]:
    return trees.by_parts(lambda part: {"": np.nan_to_num(edge_costs(model, part, sources).reshape(-1))})[""]


def _features(trees: Trees, schema: Schema) -> NDArray[np.float32]:
    _check_signals(trees, schema)

    def computed(part: Trees) -> dict[str, NDArray[np.float32]]:
        return {"": schema(columns_of(part, folds=schema.folds), part.child[:, CONTINUE_SMALL] != MISSING)}

    return trees.by_parts(computed)[""]


def rollouts_hash(trees: Trees, schema: str | Schema) -> str:
    """Return the hash of what a router with these features is trained on: of columns of score tables only those."""
    read = schema_named(schema).signals
    if not set(read) <= trees.signals.keys():
        return f"{trees.meta['hash']}, without {', '.join(read)}"
    digest = hashlib.blake2b(digest_size=6)
    for name in read:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(trees.signals[name]).data)
    return f"{trees.meta['hash']}+{digest.hexdigest()}" if read else str(trees.meta["hash"])


def _check_signals(trees: Trees, schema: Schema) -> None:
    """Raise `StoreError` if a small proposal lacks a column of a score table that a schema reads."""
    there = trees.child[:, CONTINUE_SMALL] != MISSING
    for name in schema.signals:
        table, _, column = name.rpartition(".")
        remedy = f" Run `{score_command(trees.meta['store'], table)}`."
        if name not in trees.signals:
            known = did_you_mean(name, trees.signals) if trees.signals else ""
            if table in ROLES and column not in STATISTICS:
                remedy = ""  # no command makes such a column
            raise StoreError(f"Schema {schema.name} reads {name}, which these rollouts do not have.{known}{remedy}")
        lacking = int(np.isnan(trees.signals[name][there, CONTINUE_SMALL]).sum())
        if lacking:
            raise StoreError(
                f"{lacking} of {int(there.sum())} proposals of the small model have no {name}, which schema "
                f"{schema.name} reads.{remedy}"
            )


def _accepted(trees: Trees, schema: Schema) -> NDArray[np.float32]:
    if not schema.history:
        return np.zeros((2 * trees.nodes, 0), np.float32)
    return schema.accepted(np.nan_to_num(trees.score.reshape(-1)), trees.accepted_tokens.reshape(-1))


def checked_cap(closed: int | None, wanted: int | None) -> int | None:
    """Return the cap on escalations to use.

    Args:
        closed: K of the trees: every path with at most so many escalations is there; None: every path.
        wanted: The cap asked for; None: that of the trees.

    Raises:
        ConfigError: It is no whole number of at least 0, or above what the trees hold.
    """
    if wanted is None:
        return closed
    if wanted < 0 or wanted % 1 != 0:
        raise ConfigError(f"max_escalations is {wanted}, expected at least 0, a whole number.")
    if closed is not None and wanted > closed:
        raise ConfigError(f"max_escalations is {wanted}; these trees hold every path with at most {closed} escalations")
    return int(wanted)


def checked_token_cap(wanted: int | None) -> int | None:
    """Return the cap on the large model's tokens to use; None for none.

    Raises:
        ConfigError: It is no whole number of at least 1.
    """
    if wanted is not None and (wanted < 1 or wanted % 1 != 0):
        raise ConfigError(
            f"max_large_tokens is {wanted}, expected at least 1, a whole number: the tokens that the large model may "
            "decode for a problem. Leave it out for no cap; always-small needs none."
        )
    return None if wanted is None else int(wanted)


def checked_answers(splitting: Mapping[str, Any] | None, max_large_tokens: int | None) -> None:
    """Refuse a cap on the large model's tokens where it writes every answer, and so could not be cut off.

    Raises:
        ConfigError: There are both.
    """
    if max_large_tokens is not None and (splitting or {}).get("answer_by") == LARGE:
        raise ConfigError(
            "max_large_tokens caps what the large model decodes, but these rollouts have it write every answer "
            '(answer_by = "large"): cap its escalations instead (max_escalations).'
        )


def cut(decoded: NDArray[np.int64], left: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return what large steps come to where only so many tokens are left: tokens that are paid, and which are cut off.

    Args:
        decoded: (n,) tokens of the whole steps, 0 where the large model is not called.
        left: (n,) tokens that it may still decode.
    """
    return np.minimum(decoded, left), decoded > left


def missing(tables: DecisionTables, place: NDArray[np.int64]) -> str:
    """Return the message for proposals that were asked for and not generated."""
    count = int((tables.child[place] == MISSING).sum())
    roles = "large" if (place[tables.child[place] == MISSING] % 2).any() else "small"
    return (
        f"{count} {roles} proposals at decisions that an episode reached were not generated "
        f"(K = {tables.trees.meta['max_escalations']}). Expand the store (`python -m rollouts expand`), cap the "
        "escalations (max_escalations), or use the live environment."
    )


_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def draw(seeds: NDArray[np.uint64], episodes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Return (n,) positions in 0..count-1: a function of seed and episode number alone (SplitMix64).

    So an episode of environment i of a vector is that of a single environment with its seed, and a checkpoint
    needs no more than two counters.
    """
    with np.errstate(over="ignore"):
        z = _finish(seeds * _MIX[0] + _MIX[1]) + (episodes + np.uint64(1)) * _MIX[0]
        return (_finish(z) % np.uint64(count)).astype(np.int64)


def _finish(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX[1]
    z = (z ^ (z >> np.uint64(27))) * _MIX[2]
    return z ^ (z >> np.uint64(31))
