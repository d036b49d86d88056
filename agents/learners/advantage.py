"""One-deviation advantages: escalate where one large step, and the small model alone after it, is worth its price.

The label is that of CITER (Zheng et al., 2025, "CITER: Collaborative Inference for Efficient Large Language Model
Decoding with Token-Level Routing", https://arxiv.org/abs/2502.01976), for steps instead of tokens: what is returned
more where the large model writes this step and the small one all that follow than where the small model writes all. On
trees both are known, so that the label is exact; on trees that are closed under K escalations too, where fewer than K
are used. Two networks predict what is gained and what it costs; the router escalates where the gain is above λ times
the cost. R2-Reasoner's allocator (https://arxiv.org/abs/2506.05901) is that rule on given steps. That later steps may
be escalated, too, is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.evaluation.forest import Forest
from agents.learners.supervised import Examples, fit_network, output, squared
from agents.routers.base import Floats, Knob
from agents.routers.mlp import MLP, Weights
from rollouts.trees.arrays import PART
from trim_env.tables import DecisionTables

NAME = "advantage"


@dataclass(frozen=True, eq=False)
class Advantage:
    """Networks for the gain and the cost of one escalation.

    Attributes:
        networks: Perceptrons whose second logits are the expected gain in solved problems, and the expected cost in
            units of `unit`.
        unit: A cost.
        max_large_tokens: Cap M, of which they are told the share left.
        explained: Shares of the variance of gain and of cost that they explain on the choice half of validation.
    """

    networks: list[Weights]
    unit: float
    schema: str
    max_large_tokens: int | None
    explained: list[float]

    def router(self, lam: float) -> MLP:
        """Return the router for one λ: both networks side by side, λ times the cost as the logit of continuing."""
        weights = {name: np.concatenate([each[name] for each in self.networks]) for name in ("0.weight", "0.bias")}
        gain, cost = (each["1.weight"][1] for each in self.networks)
        gain_offset, cost_offset = (each["1.bias"][1] for each in self.networks)
        price = np.float32(lam * self.unit)
        weights["1.weight"] = np.stack([np.append(0 * gain, price * cost), np.append(gain, 0 * cost)])
        weights["1.bias"] = np.array([price * cost_offset, gain_offset], np.float32)
        return MLP(NAME, self.schema, Knob("lam", lam), weights, self.max_large_tokens)

    def report(self) -> dict[str, Any]:
        """Return how well they tell, as JSON holds it."""
        return dict(zip(("gain_explained", "cost_explained"), self.explained, strict=True))


def fit(tables: DecisionTables, choice: DecisionTables, seed: int) -> Advantage:
    """Fit both networks on training trees; they are judged on the choice half of validation.

    Raises:
        StoreError: Proposals that the caps allow were not generated.
    """
    forest, judge = Forest(tables.sample(PART, seed)), Forest(choice.sample(PART, seed))
    (gain, cost), (gain_there, cost_there) = one_deviation(forest), one_deviation(judge)
    unit = float(np.abs(cost).mean()) or 1.0
    networks, explained = [], []
    for here, there in ((gain, gain_there), (cost / unit, cost_there / unit)):
        held_out = Examples.of(judge, there)
        networks.append(fit_network(Examples.of(forest, here), held_out, squared, seed))
        explained.append(_explained(held_out, networks[-1]))
    return Advantage(networks, unit, tables.schema.id, tables.max_large_tokens, explained)


def one_deviation(forest: Forest) -> tuple[Floats, Floats]:
    """Return what one escalation gains in solved problems and what it costs, the small model alone after it.

    Returns:
        (n,) gains, of -1, 0 and 1, and (n,) costs, in the unit of the cost model; 0 where the caps leave no choice.
    """
    prices = np.array([0.0, 1.0])
    _, _, returned = forest.passes(np.zeros((len(forest.graph.rows), 2)), prices)
    return returned[:, 0], returned[:, 0] - returned[:, 1]


def _explained(examples: Examples, weights: Weights) -> float:
    target, weight = examples.target, examples.weight
    error, _ = examples.loss(output(weights, examples.forest), squared)
    variance = float(weight @ (target - weight @ target) ** 2)
    return 1 - error / variance if variance else 0.0
