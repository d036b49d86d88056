"""Routers of somebody else's: one with weights, one that remembers; of ours they use no class but `Knob`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.routers.base import Knob


@dataclass(frozen=True)
class Linear:
    """Escalates where a weighted sum of the features is above 0: a rule fitted to tell wrong proposals."""

    lam: float
    weights: dict[str, np.ndarray]
    name: str = "linear"
    schema: str = "agg+/1"

    @property
    def knob(self):
        return Knob("lam", self.lam)

    @classmethod
    def fit(cls, tables, lam, seed):
        rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
        seen = np.column_stack([tables.features[rows], np.ones(len(rows))])
        gain = tables.solved.reshape(-1, 2)[rows]
        wanted = gain[:, 1] - gain[:, 0] + 0.3 * (tables.trees.score[rows, 0] < 0.5) - lam * 10
        found, *_ = np.linalg.lstsq(seen, wanted, rcond=None)
        return cls(lam, {"sum": found.astype(np.float32)})

    def probability(self, features):
        return (features @ self.weights["sum"][:-1] + self.weights["sum"][-1] > 0).astype(float)

    def to_plain(self):
        return {"lam": self.lam}

    @classmethod
    def from_plain(cls, plain, weights):
        return cls(plain["lam"], weights)


@dataclass(frozen=True)
class Patient:
    """Escalates a bad proposal after so many good steps; keeps their number as its state."""

    lam: float
    after: int
    name: str = "patient"
    schema: str = "agg/1"

    @property
    def knob(self):
        return Knob("lam", self.lam)

    @classmethod
    def fit(cls, tables, lam, seed):
        return cls(lam, 1 + seed)

    def start(self, n):
        return np.zeros((n, 1))

    def decide(self, features, state):
        return ((state[:, 0] >= self.after) & (features[:, 0] < 0.6)).astype(float), state

    def accept(self, state, actions, scores, tokens):
        return state + (scores > 0.5)[:, None]

    def to_plain(self):
        return {"lam": self.lam, "after": self.after}

    @classmethod
    def from_plain(cls, plain):
        return cls(**plain)


class Unfit:
    """Makes no router."""

    @classmethod
    def fit(cls, tables, lam, seed):
        return 3
