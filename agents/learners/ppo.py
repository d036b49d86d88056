"""TRIM-Agg: PPO over the aggregated features, with Stable-Baselines3 doing the learning.

What makes it not collapse (measured in ``results/robustness.md``): escalating costs at once and pays off only at the
end, and only if the rest goes well, so at a high λ the first thing that PPO learns is never to escalate, from where
it does not come back. Here λ starts at a fifth of its value and rises to it during the first part of the training:
the policy learns where escalating helps before it learns to save.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from agents.learners.settings import LearnerSettings
from agents.routers.base import Knob
from agents.routers.mlp import MLP, ConditionedMLP
from rollouts.errors import ArtefactError, ConfigError
from trim_env.episodes import Lam
from trim_env.features import lam_feature
from trim_env.tables import DecisionTables

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter

NAME = "trim-agg"


@dataclass(frozen=True)
class PPOSettings(LearnerSettings):
    """Settings of PPO.

    Attributes:
        hidden: Units of each of the two tanh layers, of policy and value function alike.
        num_envs: Episodes that run side by side.
        n_steps: Decisions of each of them in an iteration.
        batch_size: Decisions in a minibatch.
        n_epochs: Passes over what an iteration collected.
        clip_range: PPO's clip range.
        gae_lambda: λ of generalised advantage estimation (not the trade-off λ).
    """

    num_envs: int = 1024
    n_steps: int = 16
    batch_size: int = 2048
    n_epochs: int = 4
    clip_range: float = 0.2
    gae_lambda: float = 0.95

    section: ClassVar[str] = "ppo"
    counts: ClassVar[tuple[str, ...]] = (*LearnerSettings.counts, "num_envs", "n_steps", "batch_size", "n_epochs")

    def __post_init__(self) -> None:
        """Check what would otherwise fail later."""
        super().__post_init__()
        if self.num_envs * self.n_steps < 2:
            raise ConfigError(
                f"{self.section}.num_envs * {self.section}.n_steps is 1, expected at least 2 decisions in an iteration."
            )


@dataclass(frozen=True)
class SeqSettings(PPOSettings):
    """Settings of the learner of TRIM-Seq (`agents.learners.ppo_seq`): those of PPO, and the shape of its transformer.

    Attributes:
        learning_rate: At the start; it falls linearly to a tenth.
        width: Units of a step.
        layers: Attention blocks.
        heads: Attention heads of each; they share the width.
    """

    learning_rate: float = 2e-3
    width: int = 32
    layers: int = 1
    heads: int = 4

    section: ClassVar[str] = "seq"
    counts: ClassVar[tuple[str, ...]] = (*PPOSettings.counts, "width", "layers", "heads")

    def __post_init__(self) -> None:
        """Check what would otherwise fail later."""
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(
                f"seq.width is {self.width}, seq.heads {self.heads}, expected a width that the heads divide."
            )


class PPOAgg:
    """One training of TRIM-Agg for one λ: `iterate` until `done`, then `router`.

    Everything that randomness or time has changed is in `state`, so that a restored training goes on exactly as it
    would have (in one process and on one machine; Stable-Baselines3 draws from the global generators of NumPy and
    torch, which are set here).
    """

    def __init__(
        self,
        tables: DecisionTables,
        lam: Lam,
        settings: PPOSettings,
        seed: int,
        outputs: Sequence[KVWriter] = (),
    ) -> None:
        """Build environment and learner; a pair (low, high) of λ trains one policy for all values between."""
        import torch
        from stable_baselines3 import PPO
        from stable_baselines3.common.logger import Logger

        from trim_env.sb3 import SB3VecEnv
        from trim_env.vector import TrimVectorEnv

        torch.set_num_threads(1)  # these networks are too small for a second thread to help
        self.settings, self.lam, self.seed = settings, lam, seed
        self.iteration = 0
        self.tables = tables
        self.env = TrimVectorEnv(tables, num_envs=settings.num_envs, lam=lam)
        self.learner = PPO(
            "MlpPolicy",
            SB3VecEnv(self.env, seed),
            n_steps=settings.n_steps,
            batch_size=min(settings.batch_size, settings.num_envs * settings.n_steps),
            n_epochs=settings.n_epochs,
            learning_rate=lambda _: settings.learning_rate * (1 - 0.9 * self.progress),
            clip_range=settings.clip_range,
            gamma=1.0,
            gae_lambda=settings.gae_lambda,
            ent_coef=settings.entropy,
            policy_kwargs=self._network(),
            seed=seed,
            device="cpu",
        )
        self.learner.set_logger(Logger(folder=None, output_formats=list(outputs)))
        self._steps = settings.num_envs * settings.n_steps

    def _network(self) -> dict[str, Any]:
        """Return what Stable-Baselines3 is told of the network."""
        import torch

        width = [self.settings.hidden, self.settings.hidden]
        return {"net_arch": {"pi": width, "vf": width}, "activation_fn": torch.nn.Tanh}

    @property
    def progress(self) -> float:
        """Share of the iterations that are done."""
        return self.iteration / self.settings.iterations

    @property
    def done(self) -> bool:
        """Whether all iterations are done."""
        return self.iteration >= self.settings.iterations

    def iterate(self) -> dict[str, float]:
        """Collect and learn once; return what is to be logged."""
        self.env.lam_share = self.settings.lam_share(self.iteration)
        self.learner.ent_coef = self.settings.entropy * (1 - self.progress)
        self.learner.ep_info_buffer = None  # a fresh one: figures are those of this iteration
        self.learner.learn(self._steps, log_interval=None, reset_num_timesteps=self.iteration == 0)
        self.iteration += 1
        logged = {name: float(value) for name, value in self.learner.logger.name_to_value.items()}
        return {
            "iteration": self.iteration,
            "decisions": self.learner.num_timesteps,
            "lam_share": self.env.lam_share,
            **{f"train/{name}": value for name, value in self._episodes().items()},
            **{name: value for name, value in logged.items() if name.startswith("train/")},
        }

    def log(self, record: Mapping[str, float]) -> None:
        """Send a record, by its step, to the Stable-Baselines3 logger's outputs."""
        logger = self.learner.logger
        logger.name_to_value.clear()
        for name, value in record.items():
            logger.record(name, value)
        logger.dump(int(record["step"]))

    def _episodes(self) -> dict[str, float]:
        """Return means over the episodes that ended in this iteration, at the λ that was asked for."""
        totals = self.env.take_finished()
        episodes = max(1.0, totals["episodes"])
        return {
            "return": totals["return"] / episodes,
            "accuracy": totals["correct"] / episodes,
            "large_tokens": totals["large_tokens"] / episodes,
            "escalation_rate": totals["escalations"] / max(1.0, totals["steps"]),
        }

    def router(self) -> MLP | ConditionedMLP:
        """Return the policy as it is now."""
        policy = self.learner.policy
        state = policy.state_dict()
        names = [name for name in state if name.startswith("mlp_extractor.policy_net.") and name.endswith(".weight")]
        layers = [*(name.removesuffix(".weight") for name in names), "action_net"]
        weights = {
            f"{place}.{kind}": state[f"{layer}.{kind}"].numpy().copy()
            for place, layer in enumerate(layers)
            for kind in ("weight", "bias")
        }
        if isinstance(self.lam, tuple):
            return ConditionedMLP(NAME, self.tables.schema.id, *self.lam, weights, self.tables.max_large_tokens)
        return MLP(NAME, self.tables.schema.id, Knob("lam", self.lam), weights, self.tables.max_large_tokens)

    def imitate(self, actions: NDArray[np.int64], rows: NDArray[np.int64], updates: int = 400) -> None:
        """Warm start: fit the policy to given actions at some nodes by behaviour cloning.

        Args:
            actions: (n,) of 0 and 1.
            rows: (n,) nodes.
            updates: Minibatches to learn from.
        """
        import torch

        policy = self.learner.policy
        seen, draw = self.tables.observed(rows), np.random.default_rng(self.seed)
        if self.tables.max_large_tokens is not None:  # imitate it whatever is left
            seen = np.concatenate([seen, draw.random((len(rows), 1)).astype(np.float32)], axis=1)
        if isinstance(self.lam, tuple):  # and whatever λ is
            low, high = self.lam
            told = lam_feature(low * (high / low) ** draw.random(len(rows)))
            seen = np.concatenate([seen, told[:, None]], axis=1)
        features = torch.as_tensor(seen)
        wanted = torch.as_tensor(actions)
        generator = torch.Generator().manual_seed(self.seed)
        optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
        for _ in range(updates):
            part = torch.randint(len(rows), (min(1024, len(rows)),), generator=generator)
            distribution: Any = policy.get_distribution(features[part]).distribution
            likely = distribution.log_prob(wanted[part]).mean()
            loss = -likely - 0.05 * distribution.entropy().mean()  # soft enough to keep exploring
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs, as tensors and plain values."""
        import torch

        learner = self.learner
        generator: Any = np.random.get_state(legacy=True)
        name, keys, position, has_gauss, gauss = generator
        return {
            "iteration": self.iteration,
            "num_timesteps": learner.num_timesteps,
            "updates": learner._n_updates,
            "policy": learner.policy.state_dict(),
            "optimizer": learner.policy.optimizer.state_dict(),
            "torch_generator": torch.get_rng_state(),
            "numpy_generator": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "episodes": {key: torch.from_numpy(_signed(value)) for key, value in self.env.state().items()},
            "episode_starts": torch.from_numpy(np.asarray(learner._last_episode_starts)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a training with the same tables and settings."""
        import torch

        learner = self.learner
        learner._setup_learn(self._steps)  # allocates what the first call of learn() would
        self.iteration = int(state["iteration"])
        learner.policy.load_state_dict(state["policy"])
        learner.policy.optimizer.load_state_dict(state["optimizer"])
        learner.num_timesteps, learner._n_updates = int(state["num_timesteps"]), int(state["updates"])
        episodes = {key: value.numpy() for key, value in state["episodes"].items()}
        learner._last_obs = self.env.restore({
            key: value.astype(np.uint64) if key in ("seeds", "episode") else value for key, value in episodes.items()
        })  # fmt: skip
        learner._last_episode_starts = state["episode_starts"].numpy()
        torch.set_rng_state(state["torch_generator"])
        name, keys, position, has_gauss, gauss = state["numpy_generator"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))


def _signed(values: NDArray[Any]) -> NDArray[Any]:
    """Return unsigned integers as signed ones, which torch can hold, bit for bit."""
    return values.view(np.int64) if values.dtype == np.uint64 else values


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the old or the new one, never half of one."""
    import torch

    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as handle:
        torch.save(dict(state), handle)
    Path(handle.name).replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; it holds tensors and plain values, and loading executes nothing.

    Raises:
        ArtefactError: It is damaged.
    """
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise ArtefactError(
            f"{path}: damaged checkpoint ({type(error).__name__}). Delete it to start again."
        ) from error
    return state
