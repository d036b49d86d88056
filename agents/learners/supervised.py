"""Networks that predict what trees tell of single states, for rules that were not learned from returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.forest import Forest, Scale, chances, least
from agents.learners.exact import Perceptron
from agents.routers.base import Floats, Knob
from agents.routers.mlp import MLP, Weights, at_lam

_HIDDEN = 16
_ROUNDS, _ITERATIONS, _PATIENCE = 10, 20, 2  # rounds without a better fit of held-out states before it is stopped
_NO_LAM = 1.0  # the perceptron has a column for λ, which is constant here

Loss = Callable[[Floats, Floats], tuple[Floats, Floats]]
"""From (n,) outputs and targets to (n,) losses and their derivatives with respect to the outputs."""


def logistic(outputs: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Return the cross-entropy of targets of 0 and 1, given log-odds."""
    _, p, _ = chances(outputs)
    return np.logaddexp(0, outputs) - targets * outputs, p - targets


def squared(outputs: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Return squared errors."""
    return (outputs - targets) ** 2, 2 * (outputs - targets)


@dataclass(frozen=True, eq=False)
class Examples:
    """States with what is to be predicted of them.

    Attributes:
        weight: (n,) shares of the loss, 0 of states that do not count; the sum is 1.
    """

    forest: Forest
    target: Floats
    weight: Floats

    @classmethod
    def of(cls, forest: Forest, target: NDArray[Any], *, balanced: bool = False) -> Examples:
        """Count the states in which the caps leave a choice; balanced: both classes as much as each other."""
        weight, wanted = forest.graph.open.astype(np.float64), np.asarray(target, np.float64)
        if balanced:
            for value in (0.0, 1.0):
                of_class = wanted == value
                weight[of_class] /= max(weight[of_class].sum(), 1.0)
        return cls(forest, wanted, weight / max(weight.sum(), 1e-12))

    def loss(self, outputs: Floats, loss: Loss) -> tuple[float, Floats]:
        """Return the mean loss and its derivatives."""
        each, slope = loss(outputs, self.target)
        return float(self.weight @ each), self.weight * slope


def fit_network(examples: Examples, held_out: Examples, loss: Loss, seed: int) -> Weights:
    """Return a perceptron with one hidden layer that predicts the target by the logit of escalating; the other is 0.

    Args:
        examples: What it learns from.
        held_out: Other problems: training stops where it no longer fits them better.
        loss: `logistic` or `squared`.
        seed: Of the first parameters.
    """
    rule = Perceptron(Scale([examples.forest], [_NO_LAM]), _HIDDEN, seed)
    penalty, at = rule.penalty / len(examples.forest.problem), rule.start

    def total(parameters: Floats) -> tuple[float, Floats]:
        outputs, back = rule.logits(parameters)
        value, slope = examples.loss(outputs[:, 0], loss)
        value += float(penalty @ parameters**2)
        return value, back(slope[:, None]) + 2 * penalty * parameters

    best, since = np.inf, 0
    found: Weights = {}
    for _ in range(_ROUNDS):
        at = least(total, at, _ITERATIONS)
        weights = at_lam(rule.weights(at), _NO_LAM)
        value, _ = held_out.loss(output(weights, held_out.forest), loss)
        since += 1
        if value < best:
            best, found, since = value, weights, 0
        if since == _PATIENCE:
            break
    return found


def output(weights: Weights, forest: Forest) -> Floats:
    """Return the (n,) logits of escalating in all states."""
    return MLP("", "", Knob("lam", 0.0), weights).logits(forest.seen)[:, 1]
