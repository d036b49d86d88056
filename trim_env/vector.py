"""Thousands of episodes at once: every step is a handful of array gathers."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollouts.errors import StoreError
from rollouts.trees.arrays import MISSING
from trim_env.costs import CostModel
from trim_env.episodes import EPISODE_INFO, FINISHED, Array, EpisodesVectorEnv, Lam, checked_lam
from trim_env.features import DEFAULT_SCHEMA, Schema
from trim_env.tables import DecisionTables, Rollouts, decision_tables, missing


class TrimVectorEnv(EpisodesVectorEnv):
    """E episodes of `trim_env.env.TrimEnv` stepped together; see there for observations, actions and rewards.

    Seeds, and what is told of episodes that end: `trim_env.episodes.EpisodesVectorEnv`.
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
    ) -> None:
        """Load the trees.

        Args:
            rollouts: Compiled trees, the path of a store or the name of a bundled one, or tables that were built
                before (`split`, `schema`, `cost` and both caps are then theirs).
            split: Split that episodes are drawn from; None for all.
            num_envs: E.
            lam: Reward per unit of cost, λ; with (low, high) every episode draws its own, log-uniformly, and sees it
                as one more feature after those of the schema.
            schema: Feature schema (`trim_env.features.SCHEMAS`).
            cost: Cost model (`trim_env.costs.cost_model`).
            max_escalations: Cap K on escalations per episode.
            max_large_tokens: Cap M on the tokens that the large model decodes in an episode; with one, the share left
                is one more feature, after those of the schema and before λ.

        Raises:
            StoreError: The store cannot be used, or the split is empty.
            ConfigError: An argument is out of range or unknown.
        """
        self.tables = (
            rollouts
            if isinstance(rollouts, DecisionTables)
            else decision_tables(
                rollouts,
                split,
                schema=schema,
                cost=cost,
                max_escalations=max_escalations,
                max_large_tokens=max_large_tokens,
            )
        )
        self._roots = self.tables.roots
        caps = self.tables.max_escalations, self.tables.max_large_tokens
        steps = self.tables.trees.meta["max_steps"]
        super().__init__(num_envs, len(self._roots), self.tables.schema, steps, lam, *caps)
        self._node = np.zeros(num_envs, np.int64)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Take (E,) actions.

        Raises:
            ConfigError: They are not (E,) of 0 and 1, or there was no reset.
            StoreError: A proposal that is needed was not generated.
        """
        tables, last = self.tables, self._node
        place, cost, large_tokens, cut_off = tables.take(last, self._allowed(actions), self._left)
        child = tables.child.take(place)
        if child.min() == MISSING:
            raise StoreError(missing(tables, place))
        solved = tables.solved.take(place)
        reward = solved - self._charged(cost)
        if tables.schema.history:
            self._past[np.arange(self.num_envs), self._position] = tables.accepted.take(place, axis=0)
        self._count(place - 2 * last, cost, large_tokens, tables.small_tokens.take(place), cut_off)
        self._node, done = child, child < 0
        infos = self._replace(done, solved, tables.features.take(last, axis=0)) if done.any() else {}
        return self._observe(), reward, done, np.zeros(self.num_envs, bool), infos

    def _begin(self, which: Array, positions: Array) -> None:
        self._node[which] = self._roots[positions]

    def _observations(self) -> Array:
        return self.tables.features.take(self._node, axis=0)

    def _place(self) -> dict[str, Array]:
        return {"node": self._node}

    def _go_to(self, state: dict[str, Array]) -> None:
        self._node = state["node"].copy()


__all__ = ["EPISODE_INFO", "FINISHED", "TrimVectorEnv", "checked_lam"]
