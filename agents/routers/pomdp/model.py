"""The decision process that is planned for, and its two presets; what was measured goes in, plain arrays come out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.pomdp.dynamics import Dynamics, expected_tokens
from agents.routers.pomdp.latent import Floats
from agents.routers.pomdp.observation import ObservationModel
from agents.routers.pomdp.sample import Kinds
from rollouts.errors import ConfigError, did_you_mean

PRESETS = ("measured", "paper")
_KINDS_OF_NUMBERS: dict[str, Any] = {"edges": np.float32, "level": np.int64}


@dataclass(frozen=True, eq=False)
class Model:
    """A POMDP of T steps; between steps the belief is one number. K kinds of proposals, B bins of scores, C contexts.

    Attributes:
        kinds: How proposals are sorted.
        edges: (B - 1,) float32 edges of the bins of scores (`agents.routers.pomdp.observation`).
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


def measured(observed: ObservationModel, dynamics: Dynamics, kinds: Kinds) -> Model:
    """Return the model as measured."""
    ends = np.broadcast_to(kinds.terminal.astype(np.float64), dynamics.kind.shape).copy()
    wrong = np.arange(kinds.count) == kinds.count - 1  # ends without an answer
    right = dynamics.end_value[0, wrong.astype(int)], dynamics.end_value[1, wrong.astype(int)]
    ends[-1] = 1.0
    return Model(
        kinds=kinds,
        edges=observed.edges,
        level=observed.level,
        small=observed.small,
        large=observed.large,
        kind=dynamics.kind,
        p_small=dynamics.p_small,
        p_large=dynamics.p_large,
        repair=dynamics.repair.value,
        ends=ends,
        large_ends=dynamics.large_ends,
        end_value=np.stack([right[0], right[1], right[1]], axis=1),
        large_end_value=dynamics.end_value[:, 0],
        tokens=expected_tokens(dynamics.token_line, dynamics.small_tokens),
        token_line=dynamics.token_line,
    )


def paper(observed: ObservationModel, dynamics: Dynamics) -> Model:
    """Return the model under the paper's assumptions, with constants measured from the same trees.

    One accuracy per model; scores are independent given the class; what is wrong stays wrong; scores of large steps
    tell nothing; whether a proposal is the last is not seen, only its hazard by step is known; future escalations
    cost the mean number of tokens, the present one as many as the proposal has.
    """
    steps, bins = len(dynamics.kind), observed.bins
    ends = np.array([[rate.value] for rate in dynamics.hazard])
    ends[-1] = 1.0
    line = np.zeros((steps, 1, 2))
    line[..., 1] = 1.0
    return Model(
        kinds=Kinds(np.zeros(0, np.float32), single=True),
        edges=observed.edges,
        level=np.zeros(bins, np.int64),
        small=observed.pooled[None, None],
        large=np.full((1, 2, bins), 1 / bins),
        kind=np.ones((steps, 1)),
        p_small=np.full((steps, 1), dynamics.small_right.value),
        p_large=np.full((2, 1), dynamics.large_right.value),
        repair=0.0,
        ends=ends,
        large_ends=ends,
        end_value=np.array([[1.0, 0.0, 0.0]]),
        large_end_value=np.array([1.0, 0.0]),
        tokens=np.full((steps, 1), dynamics.mean_large_tokens),
        token_line=line,
    )


def preset(name: str, observed: ObservationModel, dynamics: Dynamics, kinds: Kinds) -> Model:
    """Return the model of a preset.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"Unknown POMDP preset {name!r}.{did_you_mean(name, PRESETS)}")
    return measured(observed, dynamics, kinds) if name == "measured" else paper(observed, dynamics)
