"""Arbitrage: escalate where the large model's step is likely to score higher than the small one's.

The rule of Maheswaran et al. (2025, "Arbitrage: Efficient Reasoning via Advantage-Aware Speculation",
https://arxiv.org/abs/2512.05033): Δ is the score of the large model's step minus that of the small one's at the same
prefix, a router predicts whether Δ > 0, and escalates where the probability is above τ. Theirs reads the text; this one
reads features, and learns from all states of the training trees with both classes weighted alike. As both proposals
were scored in the trees, the scorer is needed for training alone where the features read something else
(``--schema free``). τ is part of the last bias, so that the router is an ordinary perceptron.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from agents.evaluation.forest import Forest
from agents.evaluation.oracle import scores_of_both
from agents.evaluation.splits import CANDIDATES
from agents.learners.supervised import Examples, fit_network, logistic, output
from agents.routers.base import Floats, Knob
from agents.routers.mlp import MLP, Weights
from rollouts.errors import StoreError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, PART
from rollouts.trees.stats import auc
from trim_env.tables import DecisionTables

NAME = "arbitrage"


@dataclass(frozen=True, eq=False)
class Arbitrage:
    """A network that predicts whether Δ > 0; where to cut is chosen on validation.

    Attributes:
        weights: Of the perceptron whose second logit is the log-odds of Δ > 0.
        max_large_tokens: Cap M, of which it is told the share left.
        share: Share of the training states in which Δ > 0.
    """

    weights: Weights
    schema: str
    max_large_tokens: int | None
    held_out: Examples
    share: float

    @cached_property
    def cuts(self) -> Floats:
        """Log-odds to choose among: those of the states of validation, and one above all."""
        found = np.unique(np.quantile(self._logits, np.linspace(0, 1, CANDIDATES)))
        return np.append(found - 1e-6, found[-1] + 1)

    @cached_property
    def _logits(self) -> Floats:
        return output(self.weights, self.held_out.forest)

    def cut(self, log_odds: float) -> MLP:
        """Return the router that escalates above such log-odds; its knob is the probability τ."""
        bias = self.weights["1.bias"] - np.array([0, log_odds], np.float32)
        knob = Knob("threshold", float(1 / (1 + np.exp(-log_odds))))
        return MLP(NAME, self.schema, knob, {**self.weights, "1.bias": bias}, self.max_large_tokens)

    def router(self, lam: float) -> MLP:
        """Return the router with the τ that returns most on the choice half of validation."""
        returns = self.held_out.forest.returns(self._logits[:, None] > self.cuts, lam)
        return self.cut(float(self.cuts[int(returns.argmax())]))

    def report(self) -> dict[str, Any]:
        """Return how well it tells, as JSON holds it."""
        counted = self.held_out.weight > 0
        found = auc(self._logits[counted], self.held_out.target[counted] > 0)
        return {"share": self.share, "auc": None if np.isnan(found) else found}


def fit(tables: DecisionTables, choice: DecisionTables, seed: int) -> Arbitrage:
    """Fit the network on training trees; it is judged on the choice half of validation.

    Raises:
        StoreError: Proposals that the caps allow were not generated or have no score, or Δ > 0 is nowhere.
    """
    examples, held_out = (_examples(each.sample(PART, seed)) for each in (tables, choice))
    share = float((examples.target * examples.forest.graph.open).sum() / max(examples.forest.graph.open.sum(), 1))
    if share == 0:
        raise StoreError(
            f"{tables.trees.meta['store']}: at no decision of the training trees does the large model's step score "
            "higher than the small one's: arbitrage has nothing to learn. Use another scorer or agent."
        )
    weights = fit_network(examples, held_out, logistic, seed)
    return Arbitrage(weights, tables.schema.id, tables.max_large_tokens, held_out, share)


def _examples(tables: DecisionTables) -> Examples:
    forest = Forest(tables)
    score = scores_of_both(tables)[forest.graph.rows]
    return Examples.of(forest, score[:, ESCALATE_LARGE] > score[:, CONTINUE_SMALL], balanced=True)
