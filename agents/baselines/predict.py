"""Accuracy and cost predicted from the question, and the best of several arms (Route-to-Reason, CONCUR).

An arm is a model with a strategy: here the small model, the large one, and routers of steps at fixed settings, which is
what a strategy can be on trees. Route-to-Reason predicts with one pair of networks over embeddings of model, strategy
and question, CONCUR with a pair for each arm; with few arms the two are one method, and ours is the latter: an arm that
is added leaves the networks of the others as they were. With the two models alone the choice is a threshold on gain
over cost, a `agents.routers.text.TextRouter`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.baselines.routellm import Features
from agents.evaluation.outcomes import Outcomes, combined
from agents.routers.base import Floats, Knob
from agents.routers.mlp import Weights
from agents.routers.text import Preference, TextRouter, layers, softmax
from rollouts.errors import DataError

HIDDEN, EPOCHS, PATIENCE, BATCH = 256, 100, 5, 32
SMALL, LARGE = "small", "large"


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predictions for named arms.

    Attributes:
        weights: Of both perceptrons of each arm: ``ARM.accuracy.0.weight``, ``ARM.cost.0.weight``, ...
    """

    features: Features
    weights: Weights
    arms: tuple[str, ...]

    def __call__(self, questions: Sequence[str]) -> tuple[Floats, Floats]:
        """Return the (n, a) accuracies and the (n, a) costs of all arms, in units of the large model's mean cost."""
        embedded = self.features(questions)
        right = [softmax(layers(embedded, self.weights, f"{arm}.accuracy."))[:, 1] for arm in self.arms]
        cost = [np.logaddexp(0, layers(embedded, self.weights, f"{arm}.cost.")[:, 0]) for arm in self.arms]
        return np.stack(right, axis=1), np.stack(cost, axis=1)


def fit(
    questions: Sequence[str], arms: Mapping[str, tuple[Floats, Floats]], features: Features, seed: int
) -> Predictor:
    """Fit the networks of all arms.

    Args:
        questions: P training questions.
        arms: (P,) accuracies and (P,) costs of each arm by its name, costs in units of the large model's mean cost.
        features: Of questions.
        seed: Seed; each network's own follows from it, the arm's name and what is predicted.
    """
    embedded, weights = features(questions), dict[str, NDArray[np.float32]]()
    for arm, (right, cost) in arms.items():
        for what, target in (("accuracy", right), ("cost", cost)):
            own = hashlib.blake2b(f"{seed} {arm} {what}".encode(), digest_size=4).digest()
            found = _network(embedded, target, what == "accuracy", int.from_bytes(own, "little"))
            weights |= {f"{arm}.{what}.{name}": each for name, each in found.items()}
    return Predictor(features, weights, tuple(arms))


def _network(embedded: Floats, target: Floats, chance: bool, seed: int) -> dict[str, NDArray[np.float32]]:
    """Fit one perceptron with a hidden layer: cross-entropy of two classes, or squared error behind a softplus."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    inputs, wanted = (torch.tensor(each, dtype=torch.float32) for each in (embedded, target))
    sizes = (embedded.shape[1], HIDDEN, 2 if chance else 1)
    parameters = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        bound = fan_in**-0.5
        for shape in ((fan_out, fan_in), (fan_out,)):
            parameters.append(torch.nn.Parameter(bound * (2 * torch.rand(shape, generator=generator) - 1)))
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(functional.linear(inputs[rows], *parameters[:2]))
        output = functional.linear(hidden, *parameters[2:])
        if chance:
            return functional.cross_entropy(output, torch.stack([1 - wanted[rows], wanted[rows]], dim=1))
        return functional.mse_loss(functional.softplus(output[:, 0]), wanted[rows])

    order = torch.randperm(len(wanted), generator=generator)
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    best, kept, waited = float("inf"), [each.detach().clone() for each in parameters], 0
    for _ in range(EPOCHS):
        for rows in training[torch.randperm(len(training), generator=generator)].split(BATCH):
            optimiser.zero_grad()
            loss_of(rows).backward()
            optimiser.step()
        with torch.no_grad():
            reached = float(loss_of(held_out if len(held_out) else training))
        if reached < best:
            best, kept, waited = reached, [each.detach().clone() for each in parameters], 0
        elif (waited := waited + 1) >= PATIENCE:
            break
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    return {name: each.numpy().astype(np.float32) for name, each in zip(names, kept, strict=True)}


def gain_over_cost(predictor: Predictor) -> TextRouter:
    """Return the router of the two models: argmax of w * accuracy - (1 - w) * cost, threshold (1 - w) / w."""
    return _of_models("gain over cost", "gain", predictor)


def doubt(predictor: Predictor) -> TextRouter:
    """Return SATER's refusal: the small model declines where it would be right with less than some confidence."""
    return _of_models("refusal", "doubt", predictor)


def _of_models(name: str, head: str, predictor: Predictor) -> TextRouter:
    own = {key: each for key, each in predictor.weights.items() if key.startswith((f"{SMALL}.", f"{LARGE}."))}
    return TextRouter(name, Knob("threshold", 0.0), Preference(head, predictor.features, own))


def best_arm(right: Floats, cost: Floats, weight: float) -> NDArray[np.int64]:
    """Return for each question the arm with the greatest w * accuracy - (1 - w) * cost."""
    arms: NDArray[np.int64] = (weight * right - (1 - weight) * cost).argmax(axis=1)
    return arms


def allocate(right: Floats, cost: Floats, budget: float, units: int = 20_000) -> NDArray[np.int64]:
    """Return the arms of a whole batch with the most predicted accuracy whose predicted cost stays within a budget.

    A dynamic programme over the questions and what is spent (a knapsack with one choice for each question), exact up to
    costs being rounded up to a unit of budget / `units`. It needs the whole batch before the first answer.

    Args:
        right: (n, a) predicted accuracies.
        cost: (n, a) predicted costs.
        budget: Of the whole batch.
        units: What the budget is cut into.

    Raises:
        DataError: Not even the cheapest arms stay within the budget.
    """
    step = budget / units if budget > 0 else 1.0
    price = np.ceil(cost / step - 1e-9).astype(np.int64)
    if price.min(axis=1).sum() > (limit := units if budget > 0 else 0):
        raise DataError(f"The cheapest arms cost {cost.min(axis=1).sum():g} together; the budget is {budget:g}.")
    value, chosen = np.zeros(limit + 1), np.zeros((len(right), limit + 1), np.int8)
    for row in range(len(right)):
        options = np.full((right.shape[1], limit + 1), -np.inf)
        for arm, (gain, paid) in enumerate(zip(right[row], price[row], strict=True)):
            if paid <= limit:
                options[arm, paid:] = value[: limit + 1 - paid] + gain
        chosen[row], value = options.argmax(axis=0), options.max(axis=0)
    arms, left = np.zeros(len(right), np.int64), limit
    for row in reversed(range(len(right))):
        arms[row] = chosen[row, left]
        left -= int(price[row, arms[row]])
    return arms


def chosen(arms: Sequence[Outcomes], choice: NDArray[np.int64]) -> Outcomes:
    """Return outcomes that are of one arm for each problem.

    Raises:
        DataError: The arms' outcomes are on different problems.
    """
    return combined(arms, lambda *each: np.stack(each)[choice, np.arange(len(choice))])
