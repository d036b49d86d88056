"""The decision process that is planned for, as plain arrays, and how it reads what a router is shown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.pomdp.belief import Floats, Ints
from trim_env.features import logit

SCHEMA = "agg+/1"
SCORE, TOKENS, TERMINAL, HAS_ANSWER = 0, 2, 4, 5  # columns of the schema
_KINDS_OF_NUMBERS: dict[str, Any] = {"edges": np.float32, "level": np.int64}


@dataclass(frozen=True, eq=False)
class Kinds:
    """Sorts proposals by what is seen of them besides the score: J token bins, then ends with and without an answer.

    Attributes:
        token_edges: (J - 1,) float32 edges of the token bins, in the scale of the schema, ln(tokens / 20).
        single: All proposals are of one kind, 0, as in the paper's model, which sees no ends.
    """

    token_edges: NDArray[np.float32]
    single: bool = False

    @property
    def count(self) -> int:
        """K."""
        return 1 if self.single else len(self.token_edges) + 3

    @property
    def terminal(self) -> NDArray[np.bool_]:
        """(K,) whether accepting a proposal of the kind ends the episode."""
        return np.arange(self.count) > len(self.token_edges) if not self.single else np.zeros(1, bool)

    def of(self, features: NDArray[np.float32]) -> Ints:
        """Return the (n,) kinds of proposals from their (n, d) features."""
        if self.single:
            return np.zeros(len(features), np.int64)
        inner = np.searchsorted(self.token_edges, features[:, TOKENS], side="right")
        ends = self.count - 2 + (features[:, HAS_ANSWER] < 0.5)
        return np.where(features[:, TERMINAL] > 0.5, ends, inner).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Model:
    """A POMDP of T steps; between steps the belief is one number. K kinds of proposals, B bins of scores, C contexts.

    Attributes:
        kinds: How proposals are sorted.
        edges: (B - 1,) float32 edges of the bins of scores, in the scale of `as_feature`.
        level: (B,) int64 level of each bin; a context is the level of the last accepted step's score, or, last of
            C, the start.
        small: (C, K, 3, B) P(bin of the proposal's score | context, kind, S0, S1, S2).
        large: (C, 2, B) P(bin of the large step's score | context, trajectory right, wrong).
        kind: (T, K) P(kind | step).
        p_small: (T, K) P(small step right | prefix right, step, kind).
        p_large: (2, K) P(large step right | prefix right, small step right or wrong, kind).
        repair: P(a large step mends a broken prefix).
        ends: (T, K) P(the episode ends when the proposal is accepted); 0 or 1 where the end is seen.
        large_ends: (T, K) P(it ends with the large step | kind of the proposal).
        end_value: (K, 3) P(correct | it ends with the proposal, S0, S1, S2).
        large_end_value: (2,) P(correct | it ends with the large step, trajectory right, wrong).
        tokens: (T, K) E[large tokens], for planning.
        token_line: (T, K, 2) intercept and slope of E[large tokens | small tokens], for deciding.
    """

    kinds: Kinds
    edges: NDArray[np.float32]
    level: NDArray[np.int64]
    small: Floats
    large: Floats
    kind: Floats
    p_small: Floats
    p_large: Floats
    repair: float
    ends: Floats
    large_ends: Floats
    end_value: Floats
    large_end_value: Floats
    tokens: Floats
    token_line: Floats

    @property
    def steps(self) -> int:
        """T."""
        return len(self.kind)

    @property
    def contexts(self) -> int:
        """C."""
        return len(self.small)

    def contexts_at(self, step: int) -> range:
        """Return the contexts in which a step, from 0, can be: only the start at the first one, never later."""
        if self.contexts == 1:
            return range(1)
        return range(self.contexts - 1) if step else range(self.contexts - 1, self.contexts)

    def to_plain(self) -> dict[str, Any]:
        """Return it as lists and numbers."""
        plain: dict[str, Any] = {"kinds": {"token_edges": self.kinds.token_edges.tolist(), "single": self.kinds.single}}
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            plain[each.name] = value if each.name == "repair" else value.tolist()
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Model:
        """Return the model from what `to_plain` gave.

        Raises:
            KeyError, TypeError, ValueError: It is not that.
        """
        kinds = Kinds(np.array(plain["kinds"]["token_edges"], np.float32), bool(plain["kinds"]["single"]))
        arrays: dict[str, Any] = {}
        for each in fields(cls)[1:]:
            arrays[each.name] = np.array(plain[each.name], _KINDS_OF_NUMBERS.get(each.name, np.float64))
        arrays["repair"] = float(plain["repair"])
        model = cls(kinds, **arrays)
        model.check()
        return model

    def check(self) -> None:
        """Check shapes and probabilities.

        Raises:
            ValueError: They do not fit together.
        """
        steps, kinds, bins = self.steps, self.kinds.count, len(self.edges) + 1
        wanted = {
            "level": (bins,),
            "small": (self.contexts, kinds, 3, bins),
            "large": (self.contexts, 2, bins),
            "end_value": (kinds, 3),
            "large_end_value": (2,),
            "p_large": (2, kinds),
            "token_line": (steps, kinds, 2),
            **{name: (steps, kinds) for name in ("kind", "p_small", "ends", "large_ends", "tokens")},
        }
        for name, shape in wanted.items():
            values = getattr(self, name)
            if values.shape != shape or not np.isfinite(values).all():
                raise ValueError(f"{name} has shape {values.shape} or values that are no numbers, expected {shape}")
            if name not in ("tokens", "token_line", "level") and ((values < 0) | (values > 1)).any():
                raise ValueError(f"{name} is not made of probabilities")
        if not 0 <= self.repair <= 1:
            raise ValueError(f"repair is {self.repair}, expected a probability")
        if not (np.diff(self.edges) > 0).all() or not np.isfinite(self.edges).all():
            raise ValueError("edges are not ascending numbers")
        if self.level.min() < 0 or self.level.max() > max(self.contexts - 2, 0):
            raise ValueError(f"level is not made of numbers of contexts, expected less than {self.contexts}")
        if (self.ends[-1] < 1).any() or (self.large_ends[-1] < 1).any():
            raise ValueError("ends and large_ends let the last step be followed by another one")


def tokens_in(features: NDArray[np.float32]) -> Floats:
    """Return the (n,) tokens of the proposals."""
    return 20.0 * np.exp(features[:, TOKENS].astype(np.float64))


def as_feature(scores: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return scores in the scale of the schema ``agg+``: log-odds, clipped at 1e-4, divided by 3; NaN stays NaN."""
    return logit(np.asarray(scores, np.float64)).astype(np.float32)


def to_bins(edges: NDArray[np.float32], values: NDArray[np.float32]) -> Ints:
    """Return the (n,) bins, 0..len(edges), of scores in the scale of `as_feature`."""
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def expected_tokens(line: Floats, small: Floats | NDArray[Any]) -> Floats:
    """Return E[large tokens], at least 1, from (..., 2) intercepts and slopes and (...) small tokens."""
    return np.maximum(line[..., 0] + line[..., 1] * small, 1.0)
