"""TRIM-Seq as NumPy arrays: a small transformer over the scores and tokens of a solution so far.

The pairs (score, tokens) of the accepted steps and of the proposal, as the `seq` schema transforms them, are embedded
with a learned position each; pre-norm attention blocks follow; what stands at the proposal is read out, joined by the
other features of the decision, and a perceptron with tanh units makes two logits of it. The training stack is not
needed (`agents.learners.ppo_seq` trains it).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Ints, Knob, Scores, Tokens
from agents.routers.mlp import Weights
from rollouts.errors import ArtefactError
from trim_env.features import schema_named

SCHEMA = "seq/1"
_EPS = 1e-5  # of layer norms, as torch has it
_ROWS = 4096  # sequences computed together
_BLOCK = ("attend_norm", "query", "key", "value", "join", "expand_norm", "expand", "contract")


def _shapes(weights: Weights, heads: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that all weights must have, going by those that are free."""
    width, hidden = weights["embed.weight"].shape[0], weights["head.0.weight"].shape[0]
    steps, extras = weights["position"].shape[0], weights["head.0.weight"].shape[1] - width
    inner = weights["blocks.0.expand.weight"].shape[0]
    told = schema_named(SCHEMA)
    if heads < 1 or width % heads or extras < told.size - told.history:
        raise ArtefactError(f"The policy has {heads} heads for a width of {width}, and {extras} other features.")
    shapes: dict[str, tuple[int, ...]] = {"position": (steps, width)}
    linear = {"embed": (width, told.history), "head.0": (hidden, width + extras), "head.1": (hidden, hidden)}
    linear["head.2"] = (2, hidden)
    for block in range(_blocks(weights)):
        for name in _BLOCK[1:5]:
            linear[f"blocks.{block}.{name}"] = (width, width)
        linear |= {f"blocks.{block}.expand": (inner, width), f"blocks.{block}.contract": (width, inner)}
        for name in ("attend_norm", "expand_norm"):
            shapes |= {f"blocks.{block}.{name}.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def _blocks(weights: Weights) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def _check(weights: Weights, heads: int) -> None:
    """Raise `ArtefactError` unless the weights are those of one network, all finite."""
    try:
        wanted = _shapes(weights, heads)
    except (KeyError, IndexError, ValueError) as error:
        raise ArtefactError(f"The policy's weights lack {error} or are malformed.") from error
    found = {name: values.shape for name, values in weights.items()}
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        name = odd[0]
        raise ArtefactError(f"The policy's {name} has shape {found.get(name)}, expected {wanted.get(name)}.")
    if not all(np.isfinite(values).all() for values in weights.values()):
        raise ArtefactError("The policy has weights that are not finite.")


@dataclass(frozen=True, eq=False)
class SeqPolicy:
    """A router with state (`agents.routers.base.StatefulRouter`); escalates where that logit is the greater one.

    Attributes:
        schema: Feature schema with version, one with a history.
        weights: As `agents.learners.ppo_seq.SeqExtractor` names them, and ``head.0``, ``head.1``, ``head.2``; float32.
        heads: Attention heads.
    """

    name: str
    schema: str
    knob: Knob
    weights: Weights
    heads: int
    max_large_tokens: int | None = None
    _exact: dict[str, Floats] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the weights fit together."""
        _check(self.weights, self.heads)
        object.__setattr__(self, "_exact", {name: values.astype(np.float64) for name, values in self.weights.items()})

    @property
    def max_steps(self) -> int:
        """Most steps of a solution, T."""
        return int(self.weights["position"].shape[0])

    def start(self, n: int) -> Floats:
        """Return the (n, 1 + 2 T) state of n episodes: the number of accepted steps, and their pairs in order."""
        return np.zeros((n, 1 + schema_named(self.schema).history * self.max_steps))

    def decide(self, features: NDArray[np.float32], state: Floats) -> tuple[Floats, Floats]:
        """Return the (n,) probabilities of escalating, 0 or 1, and the state, which a proposal does not change."""
        schema = schema_named(self.schema)
        past = state[:, 1:].reshape(len(state), self.max_steps, schema.history).astype(np.float32)
        logits = self.logits(schema.observed(np.asarray(features, np.float32), past, self._position(state)))
        return (logits[:, 1] > logits[:, 0]).astype(np.float64), state

    def accept(self, state: Floats, actions: Ints, scores: Scores, tokens: Tokens) -> Floats:
        """Return the state with the pairs of the accepted steps added."""
        schema, position, after = schema_named(self.schema), self._position(state), state.copy()
        rows = np.arange(len(state))
        past = after[:, 1:].reshape(len(state), self.max_steps, schema.history)
        past[rows, position] = schema.accepted(np.asarray(scores, np.float32), tokens)
        return np.concatenate([position[:, None] + 1.0, past.reshape(state[:, 1:].shape)], axis=1)

    def _position(self, state: Floats) -> NDArray[np.int64]:
        return np.minimum(state[:, 0].astype(np.int64), self.max_steps - 1)

    def logits(self, observations: NDArray[np.float32]) -> Floats:
        """Return (n, 2) logits of the actions for (n, d) observations of the schema, as the environment gives them."""
        parts = np.split(observations, range(_ROWS, len(observations), _ROWS))
        return np.concatenate([self._logits(part.astype(np.float64)) for part in parts])

    def _logits(self, observations: Floats) -> Floats:
        told, steps = schema_named(self.schema).history, self.max_steps
        rest = observations[:, told * steps :]
        position = np.rint(rest[:, 0] * steps).astype(np.int64) - 1
        longest = int(position.max(initial=0)) + 1
        pairs = observations[:, : told * longest].reshape(len(observations), longest, told)
        values = self._linear("embed", pairs) + self._exact["position"][:longest]
        padding = np.arange(longest) > position[:, None]
        rows = np.arange(len(values))
        last = _blocks(self.weights) - 1
        for block in range(last):
            values = self._block(f"blocks.{block}", values, values, padding)
        now = self._block(f"blocks.{last}", values[rows, position][:, None], values, padding)[:, 0]
        hidden = np.concatenate([self._norm("norm", now), rest], axis=1)
        for layer in range(2):
            hidden = np.tanh(self._linear(f"head.{layer}", hidden))
        return self._linear("head.2", hidden)

    def _block(self, name: str, queries: Floats, values: Floats, padding: NDArray[np.bool_]) -> Floats:
        """Return (n, q, w) queries after one block; they attend to (n, l, w) values that are no padding, (n, l)."""
        asked, known = (self._norm(f"{name}.attend_norm", each) for each in (queries, values))
        query = self._split(self._linear(f"{name}.query", asked))
        key, value = (self._split(self._linear(f"{name}.{part}", known)) for part in ("key", "value"))
        scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1])
        scores = np.where(padding[:, None, None, :], -np.inf, scores)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        joined = shares / shares.sum(axis=-1, keepdims=True) @ value
        joined = joined.swapaxes(1, 2).reshape(queries.shape)
        middle = queries + self._linear(f"{name}.join", joined)
        inner = np.maximum(self._linear(f"{name}.expand", self._norm(f"{name}.expand_norm", middle)), 0)
        return middle + self._linear(f"{name}.contract", inner)

    def _split(self, values: Floats) -> Floats:
        """Return (n, heads, l, w / heads) of (n, l, w)."""
        return values.reshape(*values.shape[:2], self.heads, -1).swapaxes(1, 2)

    def _linear(self, name: str, values: Floats) -> Floats:
        return values @ self._exact[f"{name}.weight"].T + self._exact[f"{name}.bias"]

    def _norm(self, name: str, values: Floats) -> Floats:
        centred = values - values.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + _EPS)
        result: Floats = scaled * self._exact[f"{name}.weight"] + self._exact[f"{name}.bias"]
        return result
