"""Thousands of episodes at once: every step is a handful of array gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rollouts.errors import ConfigError, StoreError
from rollouts.tree import MISSING
from trim_env.features import DEFAULT_SCHEMA, Schema
from trim_env.reward import CostModel
from trim_env.tables import DecisionTables, Rollouts, decision_tables, draw, missing

EPISODE_INFO = ("correct", "return", "cost", "large_tokens", "small_tokens", "escalations", "masked", "steps")
FINISHED = ("episodes", "correct", "cost", "large_tokens", "escalations", "steps")
Array = NDArray[Any]


class TrimVectorEnv(VectorEnv[Array, Array, Array]):
    """E episodes of `trim_env.env.TrimEnv` stepped together; see there for observations, actions and rewards.

    Episodes that end are replaced in the same step (``autoreset_mode`` SAME_STEP): ``final_obs`` holds, (E, d), the
    observations before the replacement (those of the last decision: an ended solution has no proposal) and
    ``final_info``, arrays of shape (E,), what the single environment's ``info`` has at an end. Both are valid where
    ``_final_obs`` is true.

    Environment i with ``reset(seed=s)`` runs through the same problems as a single environment with seed s + i.
    """

    def __init__(
        self,
        rollouts: Rollouts | DecisionTables = "quickstart",
        split: str | None = "train",
        num_envs: int = 1024,
        *,
        lam: float = 3e-4,
        schema: str | Schema = DEFAULT_SCHEMA,
        cost: str | CostModel = "decode-only",
        max_escalations: int | None = None,
    ) -> None:
        """Load the trees.

        Args:
            rollouts: Compiled trees, the path of a store or the name of a bundled one, or tables that were built
                before (`split`, `schema`, `cost` and `max_escalations` are then theirs).
            split: Split that episodes are drawn from; None for all.
            num_envs: E.
            lam: Reward per unit of cost, λ.
            schema: Feature schema (`trim_env.features.SCHEMAS`).
            cost: Cost model (`trim_env.reward.cost_model`).
            max_escalations: Cap K on escalations per episode.

        Raises:
            StoreError: The store cannot be used, or the split is empty.
            ConfigError: An argument is out of range or unknown.
        """
        if num_envs < 1:
            raise ConfigError(f"num_envs is {num_envs}, expected at least 1.")
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.tables = (
            rollouts
            if isinstance(rollouts, DecisionTables)
            else decision_tables(rollouts, split, schema=schema, cost=cost, max_escalations=max_escalations)
        )
        self.num_envs = num_envs
        self.lam = lam
        low, high = self.tables.schema.bounds()
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._roots = self.tables.roots
        self._started = False
        self._finished = dict.fromkeys(FINISHED, 0.0)

    @property
    def lam(self) -> float:
        """Reward per unit of cost, λ; it may be set between steps and applies from the next one on."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._lam = checked_lam(value)
        self._reward = self.tables.solved - self._lam * self.tables.cost

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start E episodes.

        Args:
            seed: Seeds of the draws of problems: one for each environment, or s for s, s + 1, ...; None goes on
                with the draws of the last reset (and seeds the first one from entropy).
            options: None are known.
        """
        if options:
            raise ConfigError(f"Unknown reset options {sorted(options)}; the vector environment has none.")
        count = self.num_envs
        if seed is not None or not self._started:
            if seed is None:
                seed = int(np.random.SeedSequence().generate_state(1)[0])
            seeds = [seed + offset for offset in range(count)] if isinstance(seed, int) else list(seed)
            if len(seeds) != count:
                raise ConfigError(f"reset got {len(seeds)} seeds for {count} environments.")
            self._seeds = np.asarray(seeds, np.uint64)
            self._episode = np.zeros(count, np.uint64)
            self._started = True
        else:
            self._episode += np.uint64(1)
        self._node = self._roots[draw(self._seeds, self._episode, len(self._roots))]
        self._totals = {"cost": np.zeros(count)} | {name: np.zeros(count, np.int64) for name in EPISODE_INFO[3:]}
        return self.tables.features[self._node], {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Take (E,) actions.

        Raises:
            StoreError: A proposal that is needed was not generated.
        """
        tables, totals, node = self.tables, self._totals, self._node
        action = np.asarray(actions).astype(np.int64)
        if tables.max_escalations is not None:
            masked = (action == 1) & (totals["escalations"] >= tables.max_escalations)
            action[masked] = 0
            totals["masked"] += masked
        place = 2 * node + action
        child = tables.child.take(place)
        done = child < 0
        if child.min() == MISSING:
            raise StoreError(missing(tables, place))
        reward = self._reward.take(place)
        totals["cost"] += tables.cost.take(place)
        totals["large_tokens"] += tables.large_tokens.take(place)
        totals["small_tokens"] += tables.small_tokens.take(place)
        totals["escalations"] += action
        totals["steps"] += 1
        infos = self._replace(done, place, child) if done.any() else {}
        self._node = child
        return tables.features.take(child, axis=0), reward, done, np.zeros(self.num_envs, bool), infos

    def _replace(self, done: Array, place: Array, child: Array) -> dict[str, Any]:
        """Put new episodes where some have ended, in `child`; return what is known about those."""
        solved = self.tables.solved.take(place)
        final: dict[str, Any] = {"correct": solved == 1, "return": solved - self.lam * self._totals["cost"]}
        ended = np.flatnonzero(done)
        self._finished["episodes"] += len(ended)
        for name in FINISHED[1:]:
            self._finished[name] += float((solved if name == "correct" else self._totals[name])[ended].sum())
        running = ~done
        for name, values in self._totals.items():
            final[name] = values
            self._totals[name] = values * running
        final |= {f"_{name}": done for name in EPISODE_INFO}
        self._episode[ended] += np.uint64(1)
        child[ended] = self._roots[draw(self._seeds[ended], self._episode[ended], len(self._roots))]
        return {
            "final_obs": self.tables.features.take(self._node, axis=0),
            "_final_obs": done,
            "final_info": final,
            "_final_info": done,
        }

    def take_finished(self) -> dict[str, float]:
        """Return sums over the episodes that ended since the last call: their number, and `FINISHED` of them."""
        taken, self._finished = self._finished, dict.fromkeys(FINISHED, 0.0)
        return taken

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint needs to go on exactly here; see `restore`."""
        kept = {"seeds": self._seeds, "episode": self._episode, "node": self._node, **self._totals}
        return {name: values.copy() for name, values in kept.items()}

    def restore(self, state: dict[str, Array]) -> Array:
        """Go on from a `state` of an environment with the same tables; return the (E, d) observations."""
        self._seeds, self._episode = state["seeds"].copy(), state["episode"].copy()
        self._node, self._started = state["node"].copy(), True
        self._totals = {name: state[name].copy() for name in EPISODE_INFO[2:]}
        return self.tables.features[self._node]


def checked_lam(lam: float) -> float:
    """Return λ as a float.

    Raises:
        ConfigError: It is negative or no number.
    """
    if not (np.isfinite(lam) and lam >= 0):
        raise ConfigError(f"lam is {lam}, expected a number of at least 0: the reward lost per unit of cost.")
    return float(lam)
