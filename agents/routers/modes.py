"""Routing by modes of effort, from which it takes good steps to get down and one bad step to get up (PATS-like)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Ints, Knob, Scores, Tokens

COMPLEX, MEDIUM, SIMPLE = 0, 1, 2


@dataclass(frozen=True)
class Modes:
    """Hysteresis over three modes: it begins complex, a good step makes it one mode simpler, a bad one complex again.

    The transitions are those of PATS (Wang et al., 2025, https://arxiv.org/abs/2505.19250), where modes are numbers of
    candidates that one model writes for a step. Here they are who writes it: in the complex mode the large model, in
    the medium one it redoes bad proposals, in the simple one those that would be rejected. So this is *PATS-like*.

    Attributes:
        bad: Score of an accepted step below which it becomes complex, and that of proposals to redo in the medium mode.
        good: Score from which on it becomes simpler.
        rejected: Score of proposals to redo in the simple mode.
    """

    bad: float = 0.75
    good: float = 0.85
    rejected: float = 0.4
    name: str = "PATS-like"
    schema: str = "agg/1"

    @property
    def knob(self) -> Knob:
        """The score below which a step is bad."""
        return Knob("threshold", self.bad)

    def start(self, n: int) -> Floats:
        """Return the complex mode."""
        return np.full((n, 1), float(COMPLEX))

    def decide(self, features: NDArray[np.float32], state: Floats) -> tuple[Floats, Floats]:
        """Return 1 for proposals below what the mode asks for."""
        asked = np.array([np.inf, self.bad, self.rejected], np.float32)[state[:, 0].astype(int)]
        return (features[:, 0] < asked).astype(np.float64), state

    def accept(self, state: Floats, actions: Ints, scores: Scores, tokens: Tokens) -> Floats:
        """Return the modes after accepted steps, by their scores."""
        simpler = np.minimum(state[:, 0] + (scores >= np.float32(self.good)), SIMPLE)
        return np.where(scores < np.float32(self.bad), float(COMPLEX), simpler)[:, None]
