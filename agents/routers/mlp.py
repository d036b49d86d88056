"""A trained network as NumPy arrays: the same decisions as in training, without the training stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Knob, Mixture
from rollouts.errors import ArtefactError, ConfigError, did_you_mean
from trim_env.features import lam_feature

Weights = Mapping[str, NDArray[np.float32]]


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _erf(x: Floats) -> Floats:
    result: Floats = np.vectorize(math.erf, otypes=[np.float64])(x)
    return result


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / 2**0.5)),
    "square": np.square,
}
"""What the units of hidden layers compute, with torch's default parameters, by the name that artefacts hold.

With ``square``, a quadratic rule is a perceptron: a quadratic form is a sum of squares of linear ones, with signs.
"""


def _check(weights: Weights, activation: str) -> None:
    """Raise `ArtefactError` unless the layers fit together and end in two finite logits."""
    if activation not in ACTIVATIONS:
        raise ArtefactError(f"The policy's activation is {activation!r}.{did_you_mean(activation, ACTIVATIONS)}")
    width: int | None = None
    for layer in range(len(weights) // 2):
        try:
            weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        except KeyError as error:
            raise ArtefactError(f"The policy's weights lack {error}.") from error
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or width not in (None, weight.shape[1]):
            raise ArtefactError(f"The policy's layer {layer} has shapes {weight.shape} and {bias.shape}.")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ArtefactError(f"The policy's layer {layer} has weights that are not finite.")
        width = weight.shape[0]
    if width != 2:
        raise ArtefactError(f"The policy ends in {width} outputs, expected one logit for each of 2 actions.")


@dataclass(frozen=True, eq=False)
class MLP:
    """A perceptron over one schema's features; escalates where that logit is the greater one.

    Attributes:
        weights: ``0.weight`` (h, d), ``0.bias`` (h,), ``1.weight``, ... up to the two logits, float32.
        max_large_tokens: Cap M on large tokens that it was trained under; it then takes one feature more than the
            schema has, the share of M that is left.
        activation: What the units of hidden layers compute (`ACTIVATIONS`).
    """

    name: str
    schema: str
    knob: Knob
    weights: Weights
    max_large_tokens: int | None = None
    activation: str = "tanh"
    _layers: tuple[tuple[Floats, Floats], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the layers fit together."""
        _check(self.weights, self.activation)
        numbers = range(len(self.weights) // 2)
        layers = ((self.weights[f"{layer}.weight"].T, self.weights[f"{layer}.bias"]) for layer in numbers)
        object.__setattr__(self, "_layers", tuple((w.astype(np.float64), b.astype(np.float64)) for w, b in layers))

    @property
    def size(self) -> int:
        """Number of features that it takes, d."""
        return int(self.weights["0.weight"].shape[1])

    def logits(self, features: NDArray[np.float32]) -> Floats:
        """Return (n, 2) logits of the actions for (n, d) features.

        Computed in float64: whichever library multiplies, and however many rows at once, decides the same.
        """
        values = features.astype(np.float64)
        *hidden, (weight, bias) = self._layers
        activate = ACTIVATIONS[self.activation]
        for inner, offset in hidden:
            values = activate(values @ inner + offset)
        return values @ weight + bias

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) of 0 and 1: the argmax action."""
        logits = self.logits(features)
        return (logits[:, 1] > logits[:, 0]).astype(np.float64)


def at(router: Any, lam: float) -> Any:
    """Return a router for one λ: what a policy for a range becomes there, any other as it is."""
    assert not isinstance(router, Mixture)  # mixed for a budget, not for a λ
    return router.at(lam) if isinstance(router, ConditionedMLP) else router


@dataclass(frozen=True, eq=False)
class ConditionedMLP:
    """A perceptron for every λ in a range: it takes λ as one more feature, after those of the schema; else as `MLP`.

    Attributes:
        low: Least λ that it was trained for.
        high: Greatest.
        weights: As of `MLP`; the first layer has one column more, the last.
    """

    name: str
    schema: str
    low: float
    high: float
    weights: Weights
    max_large_tokens: int | None = None
    activation: str = "tanh"

    def __post_init__(self) -> None:
        """Check layers and range."""
        _check(self.weights, self.activation)
        if not 0 < self.low < self.high < np.inf:
            raise ArtefactError(f"The policy's range of λ is {self.low:g} to {self.high:g}.")

    def holds(self, lam: float) -> bool:
        """Return whether it was trained for a λ."""
        return self.low * (1 - 1e-9) <= lam <= self.high * (1 + 1e-9)

    def at(self, lam: float) -> MLP:
        """Return the router for one λ: as λ is constant then, its column becomes part of the first bias.

        Raises:
            ConfigError: It was not trained for this λ.
        """
        if not self.holds(lam):
            raise ConfigError(
                f"lam is {lam:g}; this policy was trained for {self.low:g} to {self.high:g}. "
                "Choose one in that range, or train over a wider one (--lam-range)."
            )
        own = at_lam(self.weights, lam)
        return MLP(self.name, self.schema, Knob("lam", lam), own, self.max_large_tokens, self.activation)


def at_lam(weights: Weights, lam: float) -> Weights:
    """Return the weights for one λ of a perceptron that is told λ as its last feature."""
    weight = weights["0.weight"]
    bias = weights["0.bias"] + weight[:, -1] * lam_feature(lam)
    return {**weights, "0.weight": np.ascontiguousarray(weight[:, :-1]), "0.bias": bias.astype(np.float32)}


def for_lam(
    name: str,
    schema: str,
    lam: float | tuple[float, float],
    weights: Weights,
    max_large_tokens: int | None = None,
    activation: str = "tanh",
) -> MLP | ConditionedMLP:
    """Return the router of a network that was trained for one λ, or for a range, of which λ is then its last input."""
    if isinstance(lam, tuple):
        return ConditionedMLP(name, schema, *lam, weights, max_large_tokens, activation)
    return MLP(name, schema, Knob("lam", float(lam)), weights, max_large_tokens, activation)
