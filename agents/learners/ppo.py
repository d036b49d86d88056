"""TRIM-Agg: PPO over the aggregated features, with Stable-Baselines3 doing the learning.

What makes it not collapse (measured in ``results/robustness.md``): escalating costs at once and pays off only at the
end, and only if the rest goes well, so at a high λ the first thing that PPO learns is never to escalate, from where
it does not come back. Here λ starts at a fifth of its value and rises to it during the first part of the training:
the policy learns where escalating helps before it learns to save.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from agents.evaluation.walk import seen_by
from agents.learners.settings import PPOSettings
from agents.routers.base import Router
from agents.routers.mlp import MLP, ConditionedMLP, at, for_lam
from agents.routers.sb3 import perceptron
from rollouts.trees.arrays import CONTINUE_SMALL, PART
from trim_env.episodes import EpisodesVectorEnv, Lam
from trim_env.features import lam_feature, left_feature
from trim_env.tables import DecisionTables

NAME = "trim-agg"


class PPOAgg:
    """One training of TRIM-Agg for one λ: `iterate` until `done`, then `router`.

    The same seed gives the same router, in one process and on one machine: Stable-Baselines3 draws from the global
    generators of NumPy and torch, which are set here.
    """

    def __init__(
        self,
        tables: DecisionTables,
        lam: Lam,
        settings: PPOSettings,
        seed: int,
        episodes: Callable[..., EpisodesVectorEnv] | None = None,
    ) -> None:
        """Build environment and learner; a pair (low, high) of λ trains one policy for all values between.

        Args:
            tables: Tables to train on, or those whose schema and caps `episodes` have.
            lam: λ, or its range.
            settings: Settings.
            seed: Of all that is drawn.
            episodes: From ``num_envs`` and ``lam`` to the environment; default: that of the tables.
        """
        import torch
        from stable_baselines3 import PPO
        from stable_baselines3.common.logger import Logger

        from trim_env.sb3 import SB3VecEnv
        from trim_env.vector import TrimVectorEnv

        torch.set_num_threads(1)  # these networks are too small for a second thread to help
        self.settings, self.lam, self.seed = settings, lam, seed
        self.iteration = 0
        self.tables = tables
        self.env = (episodes or partial(TrimVectorEnv, tables))(num_envs=settings.num_envs, lam=lam)
        self.learner = PPO(
            "MlpPolicy",
            SB3VecEnv(self.env, seed),
            n_steps=settings.n_steps,
            batch_size=min(settings.batch_size, settings.num_envs * settings.n_steps),
            n_epochs=settings.n_epochs,
            learning_rate=lambda _: settings.learning_rate * (1 - 0.9 * self._annealed),
            normalize_advantage=settings.normalize,
            clip_range=settings.clip_range,
            gamma=1.0,
            gae_lambda=settings.gae_lambda,
            ent_coef=settings.entropy,
            policy_kwargs=self._network(),
            seed=seed,
            device="cpu",
        )
        self.learner.set_logger(Logger(folder=None, output_formats=[]))
        self._steps = settings.num_envs * settings.n_steps

    def _network(self) -> dict[str, Any]:
        """Return what Stable-Baselines3 is told of the network."""
        import torch

        width = [self.settings.hidden, self.settings.hidden]
        return {"net_arch": {"pi": width, "vf": width}, "activation_fn": torch.nn.Tanh}

    @property
    def _annealed(self) -> float:
        return self.iteration / self.settings.iterations if self.settings.anneal else 0.0

    @property
    def done(self) -> bool:
        """Whether all iterations are done."""
        return self.iteration >= self.settings.iterations

    def iterate(self) -> dict[str, float]:
        """Collect and learn once; return what is to be logged."""
        self.env.lam_share = self.settings.lam_share(self.iteration)
        self.learner.ent_coef = self.settings.entropy * (1 - self._annealed)
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
        policy: Any = self.learner.policy
        weights, _ = perceptron([*policy.mlp_extractor.policy_net, policy.action_net])
        return for_lam(NAME, self.tables.schema.id, self.lam, weights, self.tables.max_large_tokens)

    def imitate(self, rule: Router | ConditionedMLP, updates: int = 400) -> None:
        """Warm start: fit the policy to a rule by behaviour cloning, whatever is left of a cap and whatever λ is.

        Args:
            rule: A rule for one λ, or for a range.
            updates: Minibatches to learn from.
        """
        import torch

        policy, tables, draw = self.learner.policy, self.tables, np.random.default_rng(self.seed)
        tables = tables.sample(PART, self.seed)
        rows = tables.trees.rows_of(tables.indices)
        rows = rows[~np.isnan(tables.trees.score[rows, CONTINUE_SMALL])]  # on always-large's path they may be missing
        seen, left = tables.observed(rows), np.zeros(len(rows), np.int64)
        if tables.max_large_tokens is not None:
            left = draw.integers(tables.max_large_tokens + 1, size=len(rows))
            seen = np.concatenate([seen, left_feature(left, tables.max_large_tokens)[:, None]], axis=1)
        low, high = self.lam if isinstance(self.lam, tuple) else (self.lam, self.lam)
        lams = np.geomspace(low, high, 8) if low < high else np.array([low])
        drawn = draw.integers(len(lams), size=len(rows))
        if low < high:
            seen = np.concatenate([seen, lam_feature(lams[drawn])[:, None]], axis=1)
        wanted = torch.zeros(len(rows), dtype=torch.int64)
        for number, lam in enumerate(lams.tolist()):
            shown, own = at(rule, lam), drawn == number
            assert isinstance(shown, Router)
            chosen = shown.probability(seen_by(shown, tables)(rows[own], left[own]))
            wanted[torch.as_tensor(own)] = torch.as_tensor(chosen > 0.5, dtype=torch.int64)
        features = torch.as_tensor(seen)
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
