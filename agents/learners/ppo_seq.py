"""TRIM-Seq: PPO over the whole sequence of scores and tokens; a small transformer takes the place of aggregation.

The objective, the rise of λ and everything else is that of TRIM-Agg (`agents.learners.ppo`); only the network
differs. It is a features extractor of Stable-Baselines3, shared by policy and value function, over the flat
observations of the `seq` schema. There is no dropout, so log-probabilities are the same while collecting and while
learning.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn import functional

from agents.learners.ppo import PPOAgg
from agents.learners.settings import SeqSettings
from agents.routers.base import Knob
from agents.routers.sb3 import perceptron
from agents.routers.seq import SeqPolicy
from rollouts.errors import ConfigError
from trim_env.episodes import Lam
from trim_env.tables import DecisionTables

NAME = "trim-seq"


class Block(nn.Module):
    """Pre-norm attention and perceptron; queries may be fewer than what they attend to."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.attend_norm, self.expand_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.join = (nn.Linear(width, width) for _ in range(4))
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, queries: Tensor, values: Tensor, known: Tensor) -> Tensor:
        """Return (n, q, w) queries that have attended to (n, l, w) values where these are known, (n, l)."""
        asked, given = self.attend_norm(queries), self.attend_norm(values)
        query, key, value = (
            layer(part).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.query, asked), (self.key, given), (self.value, given))
        )
        joined = functional.scaled_dot_product_attention(query, key, value, known[:, None, None, :])
        middle = queries + self.join(joined.transpose(1, 2).flatten(2))
        return middle + self.contract(torch.relu(self.expand(self.expand_norm(middle))))  # type: ignore[no-any-return]


class SeqExtractor(BaseFeaturesExtractor):
    """What stands at the proposal after attention over the steps so far, and the other features of the decision."""

    def __init__(
        self, observation_space: spaces.Box, *, steps: int, told: int, width: int, layers: int, heads: int
    ) -> None:
        """Make the layers.

        Args:
            observation_space: Flat: ``steps * told`` numbers of the sequence, then the other features; the first of
                those is the step number as a share of `steps`.
            steps: Most steps.
            told: Numbers that are told of each step.
            width: Units of a step.
            layers: Blocks.
            heads: Attention heads.
        """
        assert observation_space.shape is not None
        others = observation_space.shape[0] - steps * told
        super().__init__(observation_space, features_dim=width + others)
        self.steps, self.told = steps, told
        self.embed = nn.Linear(told, width)
        self.position = nn.Parameter(0.1 * torch.randn(steps, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, observations: Tensor) -> Tensor:
        """Return (n, width + others) features."""
        others = observations[:, self.steps * self.told :]
        position = (others[:, 0] * self.steps).round().long() - 1
        longest = int(position.max()) + 1
        pairs = observations[:, : longest * self.told].unflatten(1, (longest, self.told))
        values = self.embed(pairs) + self.position[:longest]
        known = torch.arange(longest) <= position[:, None]
        for block in self.blocks[:-1]:
            values = block(values, values, known)
        now = values[torch.arange(len(values)), position][:, None]
        now = self.blocks[-1](now, values, known)
        return torch.cat([self.norm(now[:, 0]), others], dim=1)


class PPOSeq(PPOAgg):
    """One training of TRIM-Seq for one λ; see `agents.learners.ppo.PPOAgg`."""

    def __init__(
        self, tables: DecisionTables, lam: Lam, settings: SeqSettings, seed: int, episodes: Any = None
    ) -> None:
        """Build environment and learner.

        Raises:
            ConfigError: A range of λ is asked for, or the tables' schema has no history.
        """
        if isinstance(lam, tuple) or not tables.schema.history:
            raise ConfigError("ppo-seq trains on a schema with a history (seq), for one λ at a time.")
        self.shape = settings
        super().__init__(tables, lam, settings, seed, episodes)

    def _network(self) -> dict[str, Any]:
        shape = {"width": self.shape.width, "layers": self.shape.layers, "heads": self.shape.heads}
        steps, told = self.tables.trees.meta["max_steps"], self.tables.schema.history
        return {
            **super()._network(),
            "features_extractor_class": SeqExtractor,
            "features_extractor_kwargs": {"steps": steps, "told": told, **shape},
        }

    def router(self) -> SeqPolicy:  # type: ignore[override]
        """Return the policy as it is now."""
        assert isinstance(self.lam, float)
        policy: Any = self.learner.policy
        head, _ = perceptron([*policy.mlp_extractor.policy_net, policy.action_net])
        weights = {name: values.numpy().copy() for name, values in policy.features_extractor.state_dict().items()}
        weights |= {f"head.{name}": values for name, values in head.items()}
        cap = self.tables.max_large_tokens
        return SeqPolicy(NAME, self.tables.schema.id, Knob("lam", self.lam), weights, self.shape.heads, cap)
