"""TRIM-Agg without sampled actions: the exact gradient of a policy's expected return on rollout trees.

On a tree the expected return of a stochastic policy is a sum over states: a node and what is spent of the caps. With
p(s) the probability of escalating in state s, d(s) that of reaching s and Q the expected returns after either action,
both by one pass over the states, the gradient with respect to the policy's logit z(s) = ln p/(1 - p) is
d(s) p(s) (1 - p(s)) (Q1(s) - Q0(s)): the policy gradient theorem (Sutton et al. 2000) with nothing left to chance but
the models' texts. Those are frozen draws, one per node and replica: what is exact on them may be overfitted to them,
so choose on held-out problems.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.learners.settings import TreeSettings
from agents.routers.mlp import MLP, ConditionedMLP, for_lam
from agents.routers.sb3 import perceptron
from rollouts.errors import StoreError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE
from trim_env.episodes import Lam
from trim_env.features import lam_feature, left_feature
from trim_env.graph import Floats, Ints
from trim_env.tables import DecisionTables, missing


class Forest:
    """All states of some trees that the caps let a policy reach.

    Attributes:
        graph: The n states.
        trees: How many trees there are.
        missing: (m,) proposals, as tables address them, that the caps allow and that were not generated.
        seen: (n, d) what the policy is told in them: the features and, under a cap on large tokens, the share left.
    """

    def __init__(self, tables: DecisionTables) -> None:
        """Gather the states."""
        self.graph = tables.graph
        self.missing: Ints = self.graph.moved.taken.place[self.graph.missing]
        self.trees = len(tables.indices)
        self.seen = tables.features[self.graph.rows]
        if tables.max_large_tokens is not None:
            left = left_feature(self.graph.spent.left, tables.max_large_tokens)
            self.seen = np.concatenate([self.seen, left[:, None]], axis=1)
        self._solved, self._cost = tables.solved[self.graph.moved.taken.place], self.graph.moved.taken.cost

    def gradient(self, escalate: Floats, lam: float) -> tuple[float, Floats, Floats]:
        """Return the mean expected return, its derivatives with respect to the logits, and expected visits.

        Args:
            escalate: (n,) probabilities of escalating.
            lam: λ.

        Returns:
            The mean over trees, (n,) derivatives, and (n,) visits of states where the caps leave a choice, 0 of others.
        """
        both = np.stack([1 - escalate, escalate], axis=1)
        now = self._solved - lam * self._cost
        own = (both * now).sum(axis=1)
        value = self.graph.backward(lambda level, later: own[level] + (both[level] * later).sum(axis=1))
        worth = now + value[self.graph.child]
        reach = np.where(self.graph.open, self.graph.reach(both)[:-1], 0.0)
        slope = reach * escalate * (1 - escalate) * (worth[:, ESCALATE_LARGE] - worth[:, CONTINUE_SMALL])
        return float(value[self.graph.roots].mean()), slope / self.trees, reach / self.trees


class TreeAgg:
    """One training by the exact tree gradient, for one λ or for a range: `iterate` until `done`, then `router`.

    For a range of λ every minibatch has one λ, drawn log-uniformly, which the policy is told as its last feature.
    """

    def __init__(self, tables: DecisionTables, lam: Lam, settings: TreeSettings, seed: int) -> None:
        """Build network and optimiser.

        Raises:
            StoreError: Proposals that the caps allow were not generated.
        """
        import torch

        torch.set_num_threads(1)  # these networks are too small for a second thread to help
        self.tables, self.lam, self.settings, self.seed = tables, lam, settings, seed
        self.iteration = 0
        self._random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        inputs = tables.features.shape[1] + (tables.max_large_tokens is not None) + isinstance(lam, tuple)
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
        parts = -(-len(tables.indices) // settings.batch)
        shuffled = self._random.permutation(tables.indices)
        self._forests = [Forest(replace(tables, indices=np.sort(part))) for part in np.array_split(shuffled, parts)]
        absent = np.concatenate([forest.missing for forest in self._forests])
        if len(absent):
            raise StoreError(missing(tables, absent))

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

        lam, inputs = self._inputs(forest.seen)
        logits = self.network(inputs)
        z = logits[:, ESCALATE_LARGE] - logits[:, CONTINUE_SMALL]
        escalate = torch.sigmoid(z).detach().numpy().astype(np.float64)
        value, slope, visits = forest.gradient(escalate, share * lam)
        log_p = torch.nn.functional.logsigmoid(z)
        entropy = -(torch.sigmoid(z) * log_p + torch.sigmoid(-z) * (log_p - z))
        visited = torch.as_tensor(visits, dtype=torch.float32)
        loss = -(torch.as_tensor(slope, dtype=torch.float32) * z).sum()
        loss = loss - self.settings.entropy * left * (visited * entropy).sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return value

    def _inputs(self, seen: NDArray[np.float32]) -> tuple[float, Any]:
        """Return λ and the inputs of the network, which is told it, where (n, d) features are seen."""
        import torch

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

        wanted, seen = torch.as_tensor(actions, dtype=torch.float32), self.tables.features[rows]
        if self.tables.max_large_tokens is not None:  # imitate it whatever is left
            seen = np.concatenate([seen, self._random.random((len(rows), 1)).astype(np.float32)], axis=1)
        optimiser = torch.optim.Adam(self.network.parameters(), lr=3e-3)
        for _ in range(updates):
            part = self._random.integers(len(rows), size=min(1024, len(rows)))
            _, inputs = self._inputs(seen[part])
            logits = self.network(inputs)
            z = logits[:, ESCALATE_LARGE] - logits[:, CONTINUE_SMALL]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z, wanted[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def router(self) -> MLP | ConditionedMLP:
        """Return the policy as it is now."""
        weights, _ = perceptron(self.network)
        return for_lam("tree-agg", self.tables.schema.id, self.lam, weights, self.tables.max_large_tokens)
