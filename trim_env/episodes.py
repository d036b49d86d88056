"""E episodes side by side: which problems they run through, what they sum up, and what is told of those that end.

Where decisions come from is not known here: from compiled trees (`trim_env.vector`) or from models (`trim_env.live`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.trees.arrays import ASK, CONTINUE_SMALL, ESCALATE_LARGE, actions_of
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
_ALL: Any = slice(None)


class Steps(NamedTuple):
    """What n episodes did in one step; arrays of shape (n,).

    Attributes:
        action: Who wrote the accepted step, 0 or 1.
        cut_off: Whether the large model was cut off by the cap on its tokens.
        solved: 1 where a right solution has ended, else 0.
    """

    action: Array
    cost: Array
    large_tokens: Array
    small_tokens: Array
    cut_off: Array
    solved: Array
    done: Array


class UnknownRenderMode(ConfigError, TypeError):
    """Raised for a render mode that there is not; a TypeError too, on which others ask again without one."""


def spawn_seeds(seed: int, count: int) -> list[int]:
    """Return the 64-bit seeds of the environments of a vector with one seed.

    They are hashes (`numpy.random.SeedSequence`), not seed, seed + 1, ...: environments of neighbouring seeds would
    run through the same problems. Environment i has the same seed whatever the count.
    """
    return [int(each) for each in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


class EpisodesVectorEnv(VectorEnv[Array, Array, Array]):
    """What all vector environments of this package share; a subclass begins episodes and steps them.

    With ``autoreset_mode`` SAME_STEP, the default, episodes that end are replaced in the same step: ``final_obs``
    holds, (E, d), the observations before the replacement (those of the last decision: an ended solution has no
    proposal) and ``final_info``, arrays of shape (E,), what the single environment's ``info`` has at an end. Both are
    valid where ``_final_obs`` is true.

    With NEXT_STEP the observation at an end repeats that of the last decision, ``infos`` itself has what ``final_info``
    has above, valid where ``_correct`` (and so on) is true, and the next step ignores the action: it returns the first
    observation of a new episode, with reward 0.

    Environment i with ``reset(seed=s)`` runs through the same problems as a single environment with seed
    ``spawn_seeds(s, E)[i]``, and shares them with no environment of another seed.

    Attributes:
        lam_share: Share of λ that rewards charge, in (0, 1]: less than 1 only while a training warms up.
        totals: What the running episodes have come to: ``cost``, ``large_tokens`` and so on, arrays of shape (E,).
        taken: (E,) who wrote the steps that were accepted last, 0 or 1.
        asked: (E,) whether what is bought has been asked for at the decisions where episodes stand.
    """

    def __init__(
        self,
        num_envs: int,
        pool: NDArray[np.int64],
        schema: Schema,
        max_steps: int,
        lam: Lam,
        max_escalations: int | None,
        max_large_tokens: int | None = None,
        *,
        bought: NDArray[np.bool_] | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Set the spaces.

        Args:
            num_envs: E; this and what is not named here as of `trim_env.vector.TrimVectorEnv`.
            pool: (R,) numbers of the trees that episodes are drawn from.
            schema: Feature schema.
            max_steps: T, the most steps of an episode.
            lam: λ, or its range.
            max_escalations: K; None for no cap.
            max_large_tokens: M; None for no cap.
            bought: (d,) which features are seen only where they are asked for; None: there is no asking.
            autoreset_mode: SAME_STEP or NEXT_STEP, which some of Gymnasium's wrappers ask for.
            render_mode: None.

        Raises:
            ConfigError: An argument is out of range.
        """
        if num_envs < 1 or num_envs % 1 != 0:
            raise ConfigError(f"num_envs is {num_envs}, expected at least 1, a whole number.")
        if render_mode is not None:
            raise UnknownRenderMode(f"Unknown render_mode {render_mode!r}: the vector environment has none.")
        mode = _checked_mode(autoreset_mode)
        self.metadata = {"autoreset_mode": mode, "render_modes": []}
        self.num_envs = num_envs = int(num_envs)
        self.lam_range = checked_range(lam) if np.ndim(lam) else None
        self._lam = np.full(num_envs, self.lam_range[0]) if self.lam_range else checked_lam(lam)
        self.lam_share = 1.0
        low, high = schema.bounds(max_steps)
        if bought is not None:
            if schema.history:
                raise ConfigError(f"Schema {schema.name} tells of earlier steps; with ask, choose another.")
            low, high = np.append(np.minimum(low, 0), np.float32(0)), np.append(np.maximum(high, 0), np.float32(1))
        if max_large_tokens is not None:
            low, high = np.append(low, np.float32(0)), np.append(high, np.float32(1))
        if self.lam_range:
            low, high = np.append(low, np.float32(-LAM_BOUND)), np.append(high, np.float32(LAM_BOUND))
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2 if bought is None else 3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._pool, self._schema, self._bought = pool, schema, bought
        self._past = np.zeros((num_envs, max_steps, schema.history), np.float32)
        self._token_cap = max_large_tokens
        self._caps = [
            (cap, used)
            for cap, used in ((max_escalations, "escalations"), (max_large_tokens, "large_tokens"))
            if cap is not None
        ]
        self.totals: dict[str, Array] = {}
        self.taken: Array = np.zeros(num_envs, np.int64)
        self.asked: NDArray[np.bool_] = np.zeros(num_envs, bool)
        self._episode = self._seeds = np.zeros(num_envs, np.uint64)
        self._started = False
        self._next_step = mode is AutoresetMode.NEXT_STEP
        self._over: NDArray[np.bool_] | None = None  # NEXT_STEP: those that ended in the last step
        self._index = np.arange(num_envs)
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

    def action_masks(self) -> NDArray[np.bool_]:
        """Return (E, 2), or (E, 3), whether each action is possible.

        Escalating and asking are not, once a cap is reached, nor is asking twice.
        """
        masks = np.ones((self.num_envs, 2 if self._bought is None else 3), bool)
        for cap, used in self._caps:
            masks[:, ESCALATE_LARGE:] &= (self.totals[used] < cap)[:, None]
        masks[:, ASK:] &= ~self.asked[:, None]
        return masks

    def _observe(self, which: Any) -> Array:
        """Return the (n, d) observations of running episodes: features, history, asked, large tokens left, λ."""
        features = self._features(which)
        if self._schema.history:
            features = self._schema.observed(features, self._past[which], self.totals["steps"][which])
        columns: list[Array] = [features]
        if self._bought is not None:
            asked = self.asked[which][:, None]
            columns = [np.where(self._bought & ~asked, np.float32(0), features), asked.astype(np.float32)]
        if self._token_cap is not None:
            columns.append(left_feature(self._left(which), self._token_cap)[:, None])
        if self.lam_range:
            columns.append(lam_feature(self._lam[which])[:, None])  # type: ignore[index]
        return np.concatenate(columns, axis=1) if len(columns) > 1 else features

    def _left(self, which: Any) -> Array:
        """Return the (n,) tokens that the large model may still decode; without a cap something that is not read."""
        spent: Array = self.totals["large_tokens"][which]
        return spent if self._token_cap is None else self._token_cap - spent

    def _begin_episodes(self, which: Array, chosen: Sequence[tuple[int, int]] = ()) -> None:
        """Draw tree and λ of some episodes, (n,) of 0..E-1, and put them at the roots.

        Args:
            which: The episodes.
            chosen: Of all E episodes, those that have their tree chosen for them, with its number.
        """
        seeds, episode = self._seeds[which], self._episode[which]
        if self.lam_range:
            low, high = self.lam_range
            uniform = draw(seeds ^ _LAM_SALT, episode, 1 << 53) / (1 << 53)
            self._lam[which] = low * (high / low) ** uniform  # type: ignore[index]
        trees = self._pool[draw(seeds, episode, len(self._pool))]
        for index, tree in chosen:
            trees[index] = tree
        self._begin(which, trees)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start E episodes.

        Args:
            seed: Seeds of the draws of problems: one for each environment, or one that theirs are derived from
                (`spawn_seeds`); None goes on with the draws of the last reset (and seeds the first one from entropy).
            options: ``problem`` (an id, or E of them; None draws one) and ``replica`` (a number or E of them, by
                default 0) to start given ones.

        Raises:
            ConfigError: Unknown options, no such problem or replica, or seeds that are no whole numbers of at least 0
                (of environments, of 64 bits) or not one for each environment.
        """
        chosen = self._chosen(options) if options else []
        if seed is None and self._started:
            self._episode += np.uint64(1)
        else:
            self._seeds = self._seeds_from(seed)
            self._episode = np.zeros(self.num_envs, np.uint64)
        self.totals = {"cost": np.zeros(self.num_envs)}
        self.totals |= {name: np.zeros(self.num_envs, np.int64) for name in EPISODE_INFO[3:]}
        if self._bought is not None:
            self.totals["asked"] = np.zeros(self.num_envs, np.int64)
        self.asked = np.zeros(self.num_envs, bool)
        self._over = None
        self._begin_episodes(self._index, chosen)
        self._started = True
        self._seen = self._observe(_ALL)
        return self._seen.copy(), {}

    def _seeds_from(self, seed: int | Sequence[int] | None) -> NDArray[np.uint64]:
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        given, each = np.atleast_1d(np.asarray(seed, object)).tolist(), np.ndim(seed)
        whole = all(isinstance(one, int | np.integer) and 0 <= one and (one < 2**64 or not each) for one in given)
        if (each and len(given) != self.num_envs) or not whole:
            raise ConfigError(
                f"reset got seeds {seed} for {self.num_envs} environments: one each, none negative, of 64 bits."
            )
        return np.asarray(given if each else spawn_seeds(int(given[0]), self.num_envs), np.uint64)

    def _chosen(self, options: dict[str, Any]) -> list[tuple[int, int]]:
        """Return (episode, number of its tree) for each episode that has one chosen for it."""
        if set(options) - {"problem", "replica"} or "problem" not in options:
            raise ConfigError(f"reset got options {sorted(options)}, expected 'problem' and perhaps 'replica'.")
        try:
            names, replicas = (
                np.broadcast_to(np.asarray(each, object), self.num_envs).tolist()
                for each in (options["problem"], options.get("replica", 0))
            )
        except ValueError as error:
            raise ConfigError(f"reset got options for another number of episodes than {self.num_envs}.") from error
        found = []
        for index, (name, replica) in enumerate(zip(names, replicas, strict=True)):
            if name is not None:
                trees = self._replicas(str(name))
                if replica not in trees:
                    raise ConfigError(f"Problem {name!r} has no replica {replica}; it has {sorted(trees)}.")
                found.append((index, trees[replica]))
        return found

    def _replicas(self, problem: str) -> dict[int, int]:
        """Return the numbers of the trees of a problem by replica; raise `ConfigError` (`unknown_problem`) for none."""
        raise NotImplementedError

    def _begin(self, which: Array, trees: Array) -> None:
        """Put some episodes, (n,) of 0..E-1, at the roots of the (n,) trees of these numbers."""
        raise NotImplementedError

    def _features(self, which: Any) -> Array:
        """Return the (n, d) features where running episodes, (n,) of 0..E-1 or a slice of all, stand."""
        raise NotImplementedError

    def _take(self, which: Any, action: Array) -> Steps:
        """Take (n,) actions, escalations only where they are allowed, in running episodes."""
        raise NotImplementedError

    def _price(self, which: Array) -> Array:
        """Return the (n,) cost of asking in running episodes, (n,) of 0..E-1."""
        raise NotImplementedError

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Take (E,) actions.

        Raises:
            ConfigError: They are not (E,) of 0 and 1, and 2 (ASK) where there is asking, or there was no reset.
            StoreError: A proposal that is needed was not generated.
        """
        return self._step(self._checked(actions))

    def _checked(self, actions: Array) -> NDArray[np.int64]:
        action = actions_of(actions)
        if not self._started:
            raise ConfigError("No episodes yet: call reset() before the first step().")
        if action.shape != (self.num_envs,) or ((action < 0) | (action >= self.single_action_space.n)).any():
            raise ConfigError(
                f"step got actions {actions!r:.80} of shape {action.shape}; expected ({self.num_envs},) of 0 "
                "(CONTINUE_SMALL) and 1 (ESCALATE_LARGE)" + (" and 2 (ASK)." if self._bought is not None else ".")
            )
        return action

    def _step(self, action: NDArray[np.int64]) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        which: Any = _ALL
        acted: Any = 1
        if self._over is not None:  # these begin anew instead
            action[self._over] = CONTINUE_SMALL
            for values in self.totals.values():
                values[self._over] = 0
            self._renew(np.flatnonzero(self._over))
        if self._caps or self._bought is not None:
            masked = ~self.action_masks()[self._index, action]
            self.totals["masked"] += masked & (action == ESCALATE_LARGE)
            action[masked] = CONTINUE_SMALL
        asks = action == ASK
        if self._over is not None or asks.any():
            acted = ~asks if self._over is None else ~(asks | self._over)
            which = np.flatnonzero(acted)
        taken = self._take(which, action[which])
        if which is not _ALL:
            everywhere = Steps(*(np.zeros(self.num_envs, values.dtype) for values in taken))  # 0 where none was taken
            for whole, values in zip(everywhere, taken, strict=True):
                whole[which] = values
            taken = everywhere
        totals = self.totals
        if self._bought is not None:
            if asks.any():
                taken.cost[asks] = self._price(np.flatnonzero(asks))
            totals["asked"] += asks
            self.asked = asks
        totals["cost"] += taken.cost
        totals["large_tokens"] += taken.large_tokens
        totals["small_tokens"] += taken.small_tokens
        totals["cut_off"] += taken.cut_off
        totals["escalations"] += taken.action
        totals["steps"] += acted
        self.taken, done = taken.action, taken.done
        reward = taken.solved - self.lam_share * self._lam * taken.cost
        ends = done.any()
        infos = self._end(done, taken.solved) if ends else {}
        self._over = done if ends and self._next_step else None
        if self._over is None:
            seen = self._observe(_ALL)
        else:
            seen, running = self._seen.copy(), np.flatnonzero(~done)
            if len(running):
                seen[running] = self._observe(running)
        self._seen = seen
        return seen.copy(), reward, done, np.zeros(self.num_envs, bool), infos

    def _end(self, done: Array, solved: Array) -> dict[str, Any]:
        """Return what is known of the episodes that end, and let new ones begin in their places if now is the time.

        Args:
            done: (E,) bool.
            solved: (E,) 1 where the ended solution is correct.
        """
        final: dict[str, Any] = {"correct": solved == 1, "return": solved - self._lam * self.totals["cost"]}
        final |= self.totals
        ended = np.flatnonzero(done)
        self._finished["episodes"] += len(ended)
        for name in FINISHED[1:]:
            self._finished[name] += float(final[name][ended].sum())
        final |= {f"_{name}": done for name in ("correct", "return", *self.totals)}
        running = ~done
        for name, values in self.totals.items():
            self.totals[name] = values.copy() if self._next_step else values * running
        if self._next_step:
            return final
        self._renew(ended)
        return {"final_obs": self._seen, "_final_obs": done, "final_info": final, "_final_info": done}

    def _renew(self, which: Array) -> None:
        """Begin new episodes in some places, (n,) of 0..E-1."""
        self._episode[which] += np.uint64(1)
        self._begin_episodes(which)

    def take_finished(self) -> dict[str, float]:
        """Return sums over the episodes that ended since the last call: their number, and `FINISHED` of them."""
        taken, self._finished = self._finished, dict.fromkeys(FINISHED, 0.0)
        return taken


def _checked_mode(mode: str | AutoresetMode) -> AutoresetMode:
    offered = (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
    for each in offered:
        if mode in (each, each.name, each.value):
            return each
    raise ConfigError(f"autoreset_mode is {mode!r}.{did_you_mean(str(mode), [each.name for each in offered])}")


def unknown_problem(name: str, known: Collection[str]) -> ConfigError:
    """Return the error for a problem that is not in the rollouts."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"They have {len(known)}, the first is {next(iter(known))!r}."
    return ConfigError(f"No problem {name!r} in these rollouts. {hint}")


def checked_range(lam: Any) -> tuple[float, float]:
    """Return a range of λ.

    Raises:
        ConfigError: It is empty, or its lower end is not above 0.
    """
    ends = tuple(checked_lam(value) for value in lam)
    if len(ends) != 2 or not 0 < ends[0] < ends[1]:
        told = " to ".join(f"{end:g}" for end in ends)
        raise ConfigError(f"The range of lam is {told}, expected two numbers above 0, the lower one first.")
    return ends


def checked_lam(lam: Any) -> float:
    """Return λ as a float.

    Raises:
        ConfigError: It is negative or no number.
    """
    try:
        value = float(lam)
    except (TypeError, ValueError):
        value = np.nan
    if not (np.isfinite(value) and value >= 0):
        raise ConfigError(f"lam is {lam}, expected a number of at least 0: the reward lost per unit of cost.")
    return value
