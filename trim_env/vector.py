"""Thousands of episodes at once: every step is a handful of array gathers."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from rollouts.errors import ConfigError, StoreError, did_you_mean
from rollouts.trees.arrays import MISSING
from trim_env.costs import SCORER, SOURCES, CostModel, source_of
from trim_env.episodes import Array, EpisodesVectorEnv, Lam, Steps, unknown_problem
from trim_env.features import DEFAULT_SCHEMA, Schema
from trim_env.tables import DecisionTables, Rollouts, decision_tables, missing


class TrimVectorEnv(EpisodesVectorEnv):
    """E episodes of `trim_env.env.TrimEnv` stepped together; see there for observations, actions and rewards.

    Seeds, options of `reset`, and what is told of episodes that end: `trim_env.episodes.EpisodesVectorEnv`.

    Attributes:
        node: (E,) rows of the nodes where episodes stand, negative once one has ended.
    """

    def __init__(
        self,
        rollouts: Rollouts | DecisionTables = "quickstart",
        split: str | None = "train",
        num_envs: int = 1024,
        *,
        lam: Lam = 3e-4,
        schema: str | Schema = DEFAULT_SCHEMA,
        cost: str | CostModel = "decode-only",
        max_escalations: int | None = None,
        max_large_tokens: int | None = None,
        ask: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Load the trees.

        Args:
            rollouts: Compiled trees, the path of a store or the name of a bundled one, or tables that were built
                before, for which `split`, `schema`, `cost` and both caps are left out: they have their own.
            split: Split that episodes are drawn from; None for all.
            num_envs: E.
            lam: Reward per unit of cost, λ; with (low, high) every episode draws its own, log-uniformly, and sees it
                as one more feature after those of the schema.
            schema: Feature schema (`trim_env.features.schema_named`); modules of your own are imported.
            cost: Cost model (`trim_env.costs.cost_model`), likewise.
            max_escalations: Cap K on escalations per episode.
            max_large_tokens: Cap M on the tokens that the large model decodes in an episode; with one, the share left
                is one more feature, after those of the schema and before λ.
            ask: ``scorer`` or ``large``, whose features are 0 and cost nothing until action 2 (ASK) asks for them; one
                more feature, after those of the schema, says whether it has. None: no such action.
            autoreset_mode: When episodes that end are replaced; see `trim_env.episodes.EpisodesVectorEnv`.
            render_mode: None; single environments render.

        Raises:
            StoreError: The store cannot be used, or the split is empty.
            ConfigError: An argument is out of range or unknown.
        """
        caps: dict[str, Any] = {"max_escalations": max_escalations, "max_large_tokens": max_large_tokens}
        if not isinstance(rollouts, DecisionTables):
            rollouts = decision_tables(rollouts, split, schema=schema, cost=cost, imports=True, **caps)
        elif (split, schema, cost, *caps.values()) != ("train", DEFAULT_SCHEMA, "decode-only", None, None):
            raise ConfigError(
                "Tables that were built before have a split, a schema, a cost model and caps of their own: name what "
                "is to be another where they are built (decision_tables)."
            )
        whole = tables = rollouts
        bought = None
        if ask is not None:
            if ask not in SOURCES:
                raise ConfigError(f"ask is {ask!r}.{did_you_mean(ask, SOURCES)}")
            scorer = tables.trees.meta["scorer"]
            bought = tables.schema.reading([each for each in tables.schema.facts if source_of(each, scorer) == ask])
            if not any(bought):
                asked = "the scorer" if ask == SCORER else "the large model"
                raise ConfigError(f"ask is {ask!r}: schema {tables.schema.name} reads nothing that {asked} tells.")
            tables = tables.charged(tables.schema, ask)
        self.tables, self._prices = tables, whole.cost - tables.cost if ask else whole.cost[:0]
        self._roots = np.array(tables.trees.root, np.int64)
        super().__init__(
            num_envs,
            tables.indices,
            tables.schema,
            tables.trees.meta["max_steps"],
            lam,
            tables.max_escalations,
            tables.max_large_tokens,
            bought=bought,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )
        self.node = np.zeros(self.num_envs, np.int64)

    def _take(self, which: Any, action: Array) -> Steps:
        tables, rows = self.tables, self.node[which]
        place, cost, large_tokens, cut_off = tables.take(rows, action, self._left(which))
        child = tables.child.take(place)
        if child.min(initial=0) == MISSING:
            raise StoreError(missing(tables, place))
        if tables.schema.history:
            position = self.totals["steps"][which]
            self._past[self._index[which], position] = tables.accepted.take(place, axis=0)
        if self._bought is not None:  # before an escalation it may cost something else
            cost = cost + action * self.asked[which] * (self._prices[2 * rows + 1] - self._prices[2 * rows])
        accepted, solved = place - 2 * rows, tables.solved.take(place)
        self.node[which] = child
        return Steps(accepted, cost, large_tokens, tables.small_tokens.take(place), cut_off, solved, child < 0)

    def _price(self, which: Array) -> Array:
        return self._prices[2 * self.node[which]]

    def _begin(self, which: Array, trees: Array) -> None:
        self.node[which] = self._roots[trees]

    def _features(self, which: Any) -> Array:
        features: Array = self.tables.features.take(self.node[which], axis=0)
        return features

    def _replicas(self, problem: str) -> dict[int, int]:
        trees = self.tables.trees
        if problem not in trees.problem_ids:
            raise unknown_problem(problem, trees.problem_ids)
        found = np.flatnonzero(trees.problem == trees.problem_ids.index(problem)).tolist()
        return {int(trees.replica[tree]): tree for tree in found}
