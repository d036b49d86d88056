"""The Stable-Baselines3 face of a vector environment: no loop over environments, dicts for ended episodes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from rollouts.errors import ConfigError
from trim_env.episodes import spawn_seeds


class SB3VecEnv(VecEnv):
    """A ``VecEnv`` over `trim_env.vector.TrimVectorEnv` or `trim_env.live.LiveVectorEnv`.

    ``infos[i]`` of an ended episode has ``terminal_observation``, ``episode`` (``r``: return, ``l``: steps) and what
    the environment's ``final_info`` says; all others share one empty dict, which must not be written to.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], seed: int | None = None) -> None:
        """Wrap a vector environment; `seed` seeds the first reset.

        Raises:
            ConfigError: The environment does not replace ended episodes in the same step.
        """
        if env.metadata["autoreset_mode"] is not AutoresetMode.SAME_STEP:
            raise ConfigError(
                "Stable-Baselines3 wants ended episodes replaced in the same step: autoreset_mode SAME_STEP."
            )
        self.env = env
        self._next_seed = seed
        self._infos: list[dict[str, Any]] = [{}] * env.num_envs
        self.render_mode = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Start all episodes, those with options (`set_options`) as these say; return (E, d) observations."""
        options: dict[str, Any] = {}
        for name in {name for each in self._options for name in each}:
            options[name] = [each.get(name, 0 if name == "replica" else None) for each in self._options]
        observations, _ = self.env.reset(seed=self._next_seed, options=options)
        self._next_seed = None
        self._reset_options()
        return observations  # type: ignore[no-any-return]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset; return the environments' seeds (`trim_env.episodes.spawn_seeds`)."""
        self._next_seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        return spawn_seeds(self._next_seed, self.num_envs)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take note of (E,) actions."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take them; return observations, rewards, dones and infos."""
        observations, rewards, terminated, _, extra = self.env.step(self._actions)
        infos = self._infos
        if extra:
            infos = infos.copy()
            ended = np.flatnonzero(extra["_final_info"])
            final = {name: values[ended].tolist() for name, values in extra["final_info"].items() if name[0] != "_"}
            last = extra["final_obs"][ended]
            for place, index in enumerate(ended.tolist()):
                info = {name: values[place] for name, values in final.items()}
                info["episode"] = {"r": info["return"], "l": info["steps"], "t": 0.0}
                info["terminal_observation"] = last[place]
                infos[index] = info
        return observations, rewards.astype(np.float32), terminated, infos

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the vector environment for each index: its row of an array of E, else the whole."""
        return self._told(getattr(self.env, attr_name), indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment, of all episodes.

        Raises:
            ConfigError: Only some of them are meant.
        """
        if len(set(self._get_indices(indices))) < self.num_envs:
            raise ConfigError(f"All {self.num_envs} episodes share {attr_name}: leave out indices.")
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector environment once; return for each index what `get_attr` would of its result."""
        return self._told(getattr(self.env, method_name)(*args, **kwargs), indices)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Return for each index whether it is as if wrapped: infos tell of ended episodes as those of ``Monitor``."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _told(self, value: Any, indices: Any) -> list[Any]:
        own = isinstance(value, np.ndarray) and value.shape[:1] == (self.num_envs,)
        return [value[index] if own else value for index in self._get_indices(indices)]
