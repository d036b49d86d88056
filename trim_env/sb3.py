"""The Stable-Baselines3 face of a vector environment: no loop over environments, dicts for ended episodes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv


class SB3VecEnv(VecEnv):
    """A ``VecEnv`` over `trim_env.vector.TrimVectorEnv` or `trim_env.live.LiveVectorEnv`.

    ``infos[i]`` of an ended episode has ``terminal_observation``, ``episode`` (``r``: return, ``l``: steps) and what
    the environment's ``final_info`` says; all others share one empty dict, which must not be written to.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], seed: int | None = None) -> None:
        """Wrap a vector environment; `seed` seeds the first reset."""
        self.env = env
        self._next_seed = seed
        self._infos: list[dict[str, Any]] = [{}] * env.num_envs
        self.render_mode = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Start all episodes; return (E, d) observations."""
        observations, _ = self.env.reset(seed=self._next_seed)
        self._next_seed = None
        return observations  # type: ignore[no-any-return]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset; environment i gets ``seed + i``."""
        self._next_seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        return [self._next_seed + offset for offset in range(self.num_envs)]

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
        """Return an attribute of the vector environment, once for each index."""
        if attr_name == "render_mode":
            return [None] * len(list(self._get_indices(indices)))
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment: of all episodes, whatever `indices` says."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector environment once; return its result once for each index."""
        return [getattr(self.env, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Return False for each index: there are no wrappers around single episodes."""
        return [False] * len(list(self._get_indices(indices)))
