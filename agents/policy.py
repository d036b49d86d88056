"""A trained network as NumPy arrays: the same decisions as in training, without the training stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.base import Floats, Knob
from rollouts.errors import ArtefactError

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class MLP:
    """A perceptron with tanh units over one schema's features; escalates where that logit is the greater one.

    Attributes:
        name: As in tables and plots.
        schema: Feature schema with version.
        knob: λ that it was trained for.
        weights: ``0.weight`` (h, d), ``0.bias`` (h,), ``1.weight``, ... up to the two logits, float32.
    """

    name: str
    schema: str
    knob: Knob
    weights: Weights

    def __post_init__(self) -> None:
        """Check that the layers fit together."""
        width: int | None = None
        for layer in range(self.layers):
            try:
                weight, bias = self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]
            except KeyError as error:
                raise ArtefactError(f"The policy's weights lack {error}.") from error
            if weight.ndim != 2 or bias.shape != weight.shape[:1] or width not in (None, weight.shape[1]):
                raise ArtefactError(f"The policy's layer {layer} has shapes {weight.shape} and {bias.shape}.")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ArtefactError(f"The policy's layer {layer} has weights that are not finite.")
            width = weight.shape[0]
        if width != 2:
            raise ArtefactError(f"The policy ends in {width} outputs, expected one logit for each of 2 actions.")

    @property
    def layers(self) -> int:
        """Number of linear layers."""
        return len(self.weights) // 2

    @property
    def size(self) -> int:
        """Number of features that it takes, d."""
        return int(self.weights["0.weight"].shape[1])

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (n, 2) logits of the actions for (n, d) features."""
        values = np.asarray(features, np.float32)
        for layer in range(self.layers):
            values = values @ self.weights[f"{layer}.weight"].T + self.weights[f"{layer}.bias"]
            if layer < self.layers - 1:
                values = np.tanh(values)
        return values

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) of 0 and 1: the argmax action."""
        logits = self.logits(features)
        return (logits[:, 1] > logits[:, 0]).astype(np.float64)
