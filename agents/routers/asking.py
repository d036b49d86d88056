"""A router that buys what it reads: it decides from what is free whether to ask, and reads the rest where it did."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Knob
from agents.routers.mlp import MLP, Weights
from rollouts.errors import ArtefactError
from trim_env.features import schema_named

HEADS = ("ask", "free", "told")


@dataclass(frozen=True, eq=False)
class Asking:
    """Three perceptrons over one schema's features: whether to ask, who writes if not, and who writes if it did.

    The first two are given 0 for features that read what is bought. What was bought at earlier steps is not remembered:
    whoever is asked reads the whole path, and so tells its accepted steps, too.

    Attributes:
        source: Who is asked: ``scorer`` or ``large`` (`trim_env.costs`).
        facts: What is told then (`rollouts.trees.columns`): ``score``, columns of score tables.
        weights: As of `MLP`, of each perceptron (`HEADS`), after its name: ``ask.0.weight``.
    """

    name: str
    schema: str
    knob: Knob
    source: str
    facts: tuple[str, ...]
    weights: Weights
    max_large_tokens: int | None = None
    activation: str = "tanh"
    bought: NDArray[np.bool_] = field(init=False, repr=False)
    _heads: dict[str, MLP] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that there is something to ask for, and that the layers fit together."""
        bought = schema_named(self.schema).reading(self.facts)
        if not bought.any():
            raise ArtefactError(
                f"No feature of {self.schema} reads {', '.join(self.facts)}, which the policy asks for."
            )
        object.__setattr__(
            self, "bought", np.append(bought, [False] * (self.max_large_tokens is not None)).astype(bool)
        )
        object.__setattr__(self, "_heads", {head: self._head(head) for head in HEADS})

    def _head(self, head: str) -> MLP:
        own = {
            name.removeprefix(f"{head}."): each for name, each in self.weights.items() if name.startswith(f"{head}.")
        }
        if "0.weight" not in own or own["0.weight"].shape[-1] != len(self.bought):
            raise ArtefactError(f"The policy's perceptron {head!r} does not take the features of {self.schema}.")
        return MLP(self.name, self.schema, self.knob, own, self.max_large_tokens, self.activation)

    def asks(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return (n,) whether it asks, given (n, d) features; those that it would buy are not read."""
        return self._heads["ask"].probability(self._free(features)) > 0

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) of 0 and 1: whether it escalates, having asked where it asks."""
        free = self._heads["free"].probability(self._free(features))
        return np.where(self.asks(features), self._heads["told"].probability(features), free)

    def _free(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(self.bought, np.float32(0), features)
