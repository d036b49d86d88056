"""E episodes side by side: which problems they run through, what they sum up, and what is told of those that end.

Where decisions come from is not known here: from compiled trees (`trim_env.vector`) or from models (`trim_env.live`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rollouts.errors import ConfigError
from trim_env.features import LAM_BOUND, Schema, lam_feature, left_feature
from trim_env.tables import draw

EPISODE_INFO = (
    "correct",
    "return",
    "cost",
    "large_tokens",
    "small_tokens",
    "escalations",
    "masked",
    "cut_off",
    "steps",
)
FINISHED = ("episodes", "correct", "return", "cost", "large_tokens", "escalations", "steps")
Array = NDArray[Any]
Lam = float | tuple[float, float]
_LAM_SALT = np.uint64(0x6C616D)


class EpisodesVectorEnv(VectorEnv[Array, Array, Array]):
    """What all vector environments of this package share; a subclass begins episodes and steps them.

    Episodes that end are replaced in the same step (``autoreset_mode`` SAME_STEP): ``final_obs`` holds, (E, d), the
    observations before the replacement (those of the last decision: an ended solution has no proposal) and
    ``final_info``, arrays of shape (E,), what the single environment's ``info`` has at an end. Both are valid where
    ``_final_obs`` is true.

    Environment i with ``reset(seed=s)`` runs through the same problems as a single environment with seed s + i.
    """

    def __init__(
        self,
        num_envs: int,
        trees: int,
        schema: Schema,
        max_steps: int,
        lam: Lam,
        max_escalations: int | None,
        max_large_tokens: int | None = None,
    ) -> None:
        """Set the spaces.

        Args:
            num_envs: E.
            trees: R, the number of trees that episodes are drawn from.
            schema: Feature schema.
            max_steps: T, the most steps of an episode.
            lam: Reward per unit of cost, λ; with (low, high) every episode draws its own, log-uniformly, and sees it
                as one more feature after those of the schema (`trim_env.features.lam_feature`).
            max_escalations: Cap K on escalations per episode; None for none.
            max_large_tokens: Cap M on the tokens that the large model decodes in an episode; None for none. With one,
                the share that is left is a feature after those of the schema, and before λ.

        Raises:
            ConfigError: An argument is out of range.
        """
        if num_envs < 1:
            raise ConfigError(f"num_envs is {num_envs}, expected at least 1.")
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.num_envs = num_envs
        self.lam_range = checked_range(lam) if isinstance(lam, tuple) else None
        self._lam = np.full(num_envs, lam[0]) if isinstance(lam, tuple) else checked_lam(lam)
        self._share = 1.0
        low, high = schema.observed_bounds(max_steps)
        if max_large_tokens is not None:
            low, high = np.append(low, np.float32(0)), np.append(high, np.float32(1))
        if self.lam_range:
            ends = np.array([-LAM_BOUND, LAM_BOUND], np.float32)
            low, high = np.append(low, ends[0]), np.append(high, ends[1])
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._trees, self._schema = trees, schema
        self._past = np.zeros((num_envs, max_steps, schema.history), np.float32)
        self._position: Array = np.zeros(num_envs, np.int64)  # accepted steps at the last observation
        self._cap, self._token_cap = max_escalations, max_large_tokens
        self._left: Array = np.full(num_envs, max_large_tokens or 0, np.int64)
        self._episode = self._seeds = np.zeros(num_envs, np.uint64)
        self._started = False
        self._finished = dict.fromkeys(FINISHED, 0.0)

    @property
    def lam(self) -> float | NDArray[np.float64]:
        """Reward per unit of cost, λ: one for all, or (E,) where each running episode has its own.

        One for all may be set between steps and applies from the next one on.
        """
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        if self.lam_range:
            raise ConfigError("Each episode draws its own lam here; it cannot be set.")
        self._lam = checked_lam(value)

    @property
    def lam_share(self) -> float:
        """Share of λ that rewards charge, in (0, 1]: less than 1 only while a training warms up."""
        return self._share

    @lam_share.setter
    def lam_share(self, value: float) -> None:
        self._share = float(value)

    def _charged(self, cost: Array) -> Array:
        """Return what rewards lose for (E,) costs."""
        charged: Array = self._share * self._lam * cost
        return charged

    def _observe(self) -> Array:
        """Return the (E, d) observations where the episodes stand."""
        if self._token_cap is not None:
            self._left = self._token_cap - self._totals["large_tokens"]
        self._position = self._totals["steps"].copy()
        return self._completed(self._observations())

    def _completed(self, features: Array) -> Array:
        """Return (E, d) features with all that they lack: history, share of large tokens left, λ, as last observed."""
        if self._schema.history:
            features = self._schema.observed(features, self._past, self._position)
        columns: list[Array] = [features]
        if self._token_cap is not None:
            columns.append(left_feature(self._left, self._token_cap)[:, None])
        if self.lam_range:
            columns.append(lam_feature(self._lam)[:, None])
        return np.concatenate(columns, axis=1) if len(columns) > 1 else features

    def _begin_episodes(self, which: Array) -> None:
        """Draw tree and λ of some episodes, (n,) of 0..E-1, and put them at the roots."""
        seeds, episode = self._seeds[which], self._episode[which]
        if self.lam_range:
            low, high = self.lam_range
            uniform = draw(seeds ^ _LAM_SALT, episode, 1 << 53) / (1 << 53)
            self._lam[which] = low * (high / low) ** uniform  # type: ignore[index]
        self._begin(which, draw(seeds, episode, self._trees))

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start E episodes.

        Args:
            seed: Seeds of the draws of problems: one for each environment, or s for s, s + 1, ...; None goes on
                with the draws of the last reset (and seeds the first one from entropy).
            options: None are known.

        Raises:
            ConfigError: Options, or seeds that are negative or not one for each environment.
        """
        if options:
            raise ConfigError(f"Unknown reset options {sorted(options)}; the vector environment has none.")
        if seed is None and self._started:
            self._episode += np.uint64(1)
        else:
            self._seeds = self._seeds_from(seed)
            self._episode = np.zeros(self.num_envs, np.uint64)
        self._totals = {"cost": np.zeros(self.num_envs)}
        self._totals |= {name: np.zeros(self.num_envs, np.int64) for name in EPISODE_INFO[3:]}
        self._begin_episodes(np.arange(self.num_envs))
        self._started = True
        return self._observe(), {}

    def _seeds_from(self, seed: int | Sequence[int] | None) -> NDArray[np.uint64]:
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        first = np.atleast_1d(np.asarray(seed)).astype(object)
        seeds = [first[0] + offset for offset in range(self.num_envs)] if np.ndim(seed) == 0 else first.tolist()
        if len(seeds) != self.num_envs or min(seeds) < 0:
            raise ConfigError(f"reset got seeds {seed} for {self.num_envs} environments: one each, none negative.")
        return np.asarray(seeds, np.uint64)

    def _begin(self, which: Array, positions: Array) -> None:
        """Put some episodes, (n,) of 0..E-1, at the roots of the trees at (n,) positions of 0..R-1."""
        raise NotImplementedError

    def _observations(self) -> Array:
        """Return the (E, d) features where the episodes stand."""
        raise NotImplementedError

    def _allowed(self, actions: Array) -> NDArray[np.int64]:
        """Return (E,) actions with what the caps forbid replaced by 0, and count that."""
        action = np.array(actions, np.int64)
        if not self._started:
            raise ConfigError("No episodes yet: call reset() before the first step().")
        if action.shape != (self.num_envs,) or (action >> 1).any():
            found = f"values in {action.min()}..{action.max()}" if action.size else "none"
            raise ConfigError(
                f"step got actions of shape {action.shape}, {found}; expected ({self.num_envs},) of 0 "
                "(CONTINUE_SMALL) and 1 (ESCALATE_LARGE)."
            )
        for cap, used in ((self._cap, "escalations"), (self._token_cap, "large_tokens")):
            if cap is not None:
                masked = (action == 1) & (self._totals[used] >= cap)
                action[masked] = 0
                self._totals["masked"] += masked
        return action

    def _count(self, action: Array, cost: Array, large_tokens: Array, small_tokens: Array, cut_off: Array) -> None:
        """Add what (E,) accepted proposals, and large steps that were cut off, took to the running episodes' sums."""
        totals = self._totals
        totals["cut_off"] += cut_off
        totals["cost"] += cost
        totals["large_tokens"] += large_tokens
        totals["small_tokens"] += small_tokens
        totals["escalations"] += action
        totals["steps"] += 1

    def _replace(self, done: Array, solved: Array, last: Array) -> dict[str, Any]:
        """Begin new episodes where `done`; return what is known of the ended ones.

        Args:
            done: (E,) bool.
            solved: (E,) 1 where the ended solution is correct.
            last: (E, d) features of the last decisions.
        """
        ended = np.flatnonzero(done)
        if not len(ended):
            return {}
        last = self._completed(last)
        final: dict[str, Any] = {"correct": solved == 1, "return": solved - self._lam * self._totals["cost"]}
        running = ~done
        for name, values in self._totals.items():
            final[name] = values
            self._totals[name] = values * running
        self._finished["episodes"] += len(ended)
        for name in FINISHED[1:]:
            self._finished[name] += float(final[name][ended].sum())
        final |= {f"_{name}": done for name in EPISODE_INFO}
        self._episode[ended] += np.uint64(1)
        self._begin_episodes(ended)
        return {"final_obs": last, "_final_obs": done, "final_info": final, "_final_info": done}

    def take_finished(self) -> dict[str, float]:
        """Return sums over the episodes that ended since the last call: their number, and `FINISHED` of them."""
        taken, self._finished = self._finished, dict.fromkeys(FINISHED, 0.0)
        return taken

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint needs to go on exactly here; see `restore`.

        Raises:
            ConfigError: There are no episodes yet.
        """
        if not self._started:
            raise ConfigError("No episodes yet: call reset() before state().")
        kept = {"seeds": self._seeds, "episode": self._episode, **self._totals, **self._place()}
        if self.lam_range:
            kept["lam"] = np.asarray(self._lam)
        if self._schema.history:
            kept["past"] = self._past
        return {name: values.copy() for name, values in kept.items()}

    def restore(self, state: dict[str, Array]) -> Array:
        """Go on from a `state` of an environment over the same trees; return the (E, d) observations.

        Raises:
            ConfigError: The state is of another number of environments.
        """
        if len(state["seeds"]) != self.num_envs:
            raise ConfigError(f"The state is of {len(state['seeds'])} environments; this has {self.num_envs}.")
        self._seeds, self._episode = state["seeds"].copy(), state["episode"].copy()
        self._totals = {name: state[name].copy() for name in EPISODE_INFO[2:]}
        if self.lam_range:
            self._lam = state["lam"].copy()
        if self._schema.history:
            self._past = state["past"].copy()
        self._go_to(state)
        self._started = True
        return self._observe()

    def _place(self) -> dict[str, Array]:
        """Return where the episodes stand, as arrays of length E."""
        raise NotImplementedError

    def _go_to(self, state: dict[str, Array]) -> None:
        """Put the episodes where `_place` said that they were."""
        raise NotImplementedError


def checked_range(lam: tuple[float, float]) -> tuple[float, float]:
    """Return a range of λ.

    Raises:
        ConfigError: It is empty, or its lower end is not above 0.
    """
    low, high = (checked_lam(value) for value in lam)
    if not 0 < low < high:
        raise ConfigError(
            f"The range of lam is {low:g} to {high:g}, expected two numbers above 0, the lower one first."
        )
    return low, high


def checked_lam(lam: float) -> float:
    """Return λ as a float.

    Raises:
        ConfigError: It is negative or no number.
    """
    if not (np.isfinite(lam) and lam >= 0):
        raise ConfigError(f"lam is {lam}, expected a number of at least 0: the reward lost per unit of cost.")
    return float(lam)
