"""TRIM-Agg without sampled actions: the exact gradient of a policy's expected return on complete trees.

On a complete tree the expected return of a stochastic policy is a sum over its nodes. With p(s) the probability of
escalating at node s, d(s) that of reaching s and Q the expected returns after either action, both by one pass over
the tree, the gradient with respect to the policy's logit z(s) = ln p/(1 - p) is d(s) p(s) (1 - p(s)) (Q1(s) - Q0(s)):
the policy gradient theorem (Sutton et al. 2000) with nothing left to chance but the models' texts. Those are frozen
draws, one per node and replica: what is exact on them may be overfitted to them, so choose on held-out problems.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from agents.learners.settings import LearnerSettings
from agents.routers.base import Knob
from agents.routers.mlp import MLP, ConditionedMLP
from rollouts.errors import ConfigError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING
from trim_env.episodes import Lam
from trim_env.features import lam_feature
from trim_env.tables import DecisionTables

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_complete(tables: DecisionTables) -> None:
    """Raise `ConfigError` where what is allowed at a node depends on how it was reached."""
    if tables.max_escalations is not None:
        raise ConfigError(
            f"The exact tree gradient needs complete trees; these are cut at {tables.max_escalations} escalations. "
            "Train ppo-agg, or generate without --max-escalations."
        )
    if tables.max_large_tokens is not None:
        raise ConfigError(
            f"The exact tree gradient knows no cap on large tokens ({tables.max_large_tokens}). Train ppo-agg."
        )


class Forest:
    """The nodes of some complete trees, level by level, for passes in both directions.

    Attributes:
        rows: (n,) rows of the nodes in the compiled trees, by depth.
        trees: How many trees there are.
        roots: (trees,) positions of the roots in `rows`.
    """

    def __init__(self, tables: DecisionTables, indices: Ints) -> None:
        """Gather the nodes.

        Args:
            tables: The tables.
            indices: (trees,) indices of the trees.

        Raises:
            ConfigError: Escalations are capped, or proposals are missing: the trees are not complete.
        """
        check_complete(tables)
        trees = tables.trees
        inside = np.flatnonzero(np.isin(trees.tree, indices))
        depth = trees.depth[inside]
        order = np.argsort(depth, kind="stable")
        self.rows: Ints = inside[order].astype(np.int64)
        self.trees = len(indices)
        bounds = np.searchsorted(depth[order], np.arange(int(depth.max(initial=0)) + 2))
        self._levels = [slice(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        position = np.full(trees.nodes, -1, np.int64)
        position[self.rows] = np.arange(len(self.rows))
        self.roots: Ints = position[trees.root[indices]]
        place = 2 * self.rows[:, None] + np.arange(2)
        child = tables.child[place]
        if (child == MISSING).any():
            raise ConfigError(
                f"The exact tree gradient needs complete trees; {int((child == MISSING).sum())} proposals are missing."
            )
        # an end is one more position, whose value stays 0 and whose reach nobody asks for
        self._child = np.where(child >= 0, position[np.maximum(child, 0)], len(self.rows))
        self._solved, self._cost = tables.solved[place], tables.cost[place]

    def gradient(self, escalate: Floats, lam: float) -> tuple[float, Floats]:
        """Return the mean expected return, and its derivative with respect to each node's logit.

        Args:
            escalate: (n,) probabilities of escalating at `rows`.
            lam: λ.
        """
        value = self.values(escalate, lam)
        later = self._solved - lam * self._cost + value[self._child]
        slope = self.reach(escalate)[:-1] * escalate * (1 - escalate) * (later[:, ESCALATE_LARGE] - later[:, 0])
        return float(value[self.roots].mean()), slope / self.trees

    def values(self, escalate: Floats, lam: float) -> Floats:
        """Return the (n + 1,) expected returns from every node on; the last is 0."""
        value = np.zeros(len(self.rows) + 1)
        both = np.stack([1 - escalate, escalate], axis=1)
        now = (both * (self._solved - lam * self._cost)).sum(axis=1)
        for level in reversed(self._levels):
            value[level] = now[level] + (both[level] * value[self._child[level]]).sum(axis=1)
        return value

    def reach(self, escalate: Floats) -> Floats:
        """Return the (n + 1,) probabilities of reaching every node of its tree; the last is that of ending."""
        reach = np.zeros(len(self.rows) + 1)
        np.add.at(reach, self.roots, 1.0)
        for level in self._levels:
            for action, share in ((CONTINUE_SMALL, 1 - escalate[level]), (ESCALATE_LARGE, escalate[level])):
                np.add.at(reach, self._child[level, action], reach[level] * share)
        return reach


@dataclass(frozen=True)
class TreeSettings(LearnerSettings):
    """Settings of the exact tree gradient.

    Attributes:
        updates: Gradient steps in a round.
        batch: Trees in a minibatch.
        entropy: Weight of the entropy bonus at the start; it falls linearly to 0.
        weight_decay: Of AdamW.
    """

    updates: int = 16
    batch: int = 1000
    entropy: float = 0.03
    weight_decay: float = 0.0

    section: ClassVar[str] = "tree"
    counts: ClassVar[tuple[str, ...]] = (*LearnerSettings.counts, "updates", "batch")

    def __post_init__(self) -> None:
        """Check what would otherwise fail later."""
        super().__post_init__()
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"tree.weight_decay is {self.weight_decay}, expected a number of at least 0.")


class TreeAgg:
    """One training by the exact tree gradient, for one λ or for a range: `iterate` until `done`, then `router`.

    For a range of λ every minibatch has one λ, drawn log-uniformly, which the policy is told as its last feature.
    """

    def __init__(
        self,
        tables: DecisionTables,
        lam: Lam,
        settings: TreeSettings,
        seed: int,
        outputs: Sequence[KVWriter] = (),
    ) -> None:
        """Build network and optimiser.

        Raises:
            ConfigError: The trees are not complete.
        """
        import torch
        from stable_baselines3.common.logger import Logger

        torch.set_num_threads(1)  # these networks are too small for a second thread to help
        self.tables, self.lam, self.settings, self.seed = tables, lam, settings, seed
        self.iteration = 0
        self._random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        inputs = tables.features.shape[1] + isinstance(lam, tuple)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(inputs, settings.hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(settings.hidden, settings.hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(settings.hidden, 2),
        )
        torch.nn.init.orthogonal_(self.network[-1].weight, gain=0.01)
        torch.nn.init.zeros_(self.network[-1].bias)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), weight_decay=settings.weight_decay)
        self._logger = Logger(folder=None, output_formats=list(outputs))
        parts = -(-len(tables.indices) // settings.batch)
        shuffled = self._random.permutation(tables.indices)
        self._forests = [Forest(tables, np.sort(part)) for part in np.array_split(shuffled, parts)]

    @property
    def done(self) -> bool:
        """Whether all iterations are done."""
        return self.iteration >= self.settings.iterations

    def iterate(self) -> dict[str, float]:
        """Make the updates of one round; return what is to be logged."""
        settings = self.settings
        progress = self.iteration / settings.iterations
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * progress)
        share = settings.lam_share(self.iteration)
        found = [
            self._update(self._forests[self._random.integers(len(self._forests))], share, 1 - progress)
            for _ in range(settings.updates)
        ]
        self.iteration += 1
        return {"iteration": self.iteration, "lam_share": share, "train/return": float(np.mean(found))}

    def _update(self, forest: Forest, share: float, left: float) -> float:
        import torch

        lam, inputs = self._inputs(forest.rows)
        logits = self.network(inputs)
        z = logits[:, ESCALATE_LARGE] - logits[:, CONTINUE_SMALL]
        escalate = torch.sigmoid(z).detach().numpy().astype(np.float64)
        value, slope = forest.gradient(escalate, share * lam)
        log_p = torch.nn.functional.logsigmoid(z)
        entropy = -(torch.sigmoid(z) * log_p + torch.sigmoid(-z) * (log_p - z))
        visited = torch.as_tensor(forest.reach(escalate)[:-1] / forest.trees, dtype=torch.float32)
        loss = -(torch.as_tensor(slope, dtype=torch.float32) * z).sum()
        loss = loss - self.settings.entropy * left * (visited * entropy).sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return value

    def _inputs(self, rows: Ints) -> tuple[float, Any]:
        """Return λ and the (n, d) inputs of the network at some nodes."""
        import torch

        seen = self.tables.features[rows]
        if not isinstance(self.lam, tuple):
            return self.lam, torch.as_tensor(seen)
        low, high = self.lam
        lam = float(low * (high / low) ** self._random.random())
        told = np.broadcast_to(lam_feature(lam), (len(seen), 1))
        return lam, torch.as_tensor(np.concatenate([seen, told], axis=1))

    def imitate(self, actions: NDArray[np.int64], rows: Ints, updates: int = 400) -> None:
        """Warm start: fit the policy to given actions at some nodes by behaviour cloning.

        Args:
            actions: (n,) of 0 and 1.
            rows: (n,) nodes.
            updates: Minibatches to learn from.
        """
        import torch

        wanted = torch.as_tensor(actions, dtype=torch.float32)
        optimiser = torch.optim.Adam(self.network.parameters(), lr=3e-3)
        for _ in range(updates):
            part = self._random.integers(len(rows), size=min(1024, len(rows)))
            _, inputs = self._inputs(rows[part])
            logits = self.network(inputs)
            z = logits[:, ESCALATE_LARGE] - logits[:, CONTINUE_SMALL]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z, wanted[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs, as tensors and plain values."""
        return copy.deepcopy({
            "iteration": self.iteration,
            "policy": self.network.state_dict(),
            "optimizer": self.optimiser.state_dict(),
            "generator": json.dumps(self._random.bit_generator.state),
        })  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a training with the same tables, settings and seed."""
        self.iteration = int(state["iteration"])
        self.network.load_state_dict(state["policy"])
        self.optimiser.load_state_dict(state["optimizer"])
        self._random.bit_generator.state = json.loads(state["generator"])

    def log(self, record: Mapping[str, float]) -> None:
        """Send a record, by its step, to the logger's outputs."""
        for name, value in record.items():
            self._logger.record(name, value)
        self._logger.dump(int(record["step"]))

    def router(self) -> MLP | ConditionedMLP:
        """Return the policy as it is now."""
        state = self.network.state_dict()
        weights = {
            f"{place}.{kind}": state[f"{2 * place}.{kind}"].numpy().copy()
            for place in range(3)
            for kind in ("weight", "bias")
        }
        if isinstance(self.lam, tuple):
            return ConditionedMLP("tree-agg", self.tables.schema.id, *self.lam, weights)
        return MLP("tree-agg", self.tables.schema.id, Knob("lam", self.lam), weights)
