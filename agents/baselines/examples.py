"""What query-level methods learn from: questions, and what either model came to on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.walk import alone
from agents.routers.base import Floats
from trim_env.tables import DecisionTables


@dataclass(frozen=True, eq=False)
class Examples:
    """P problems, averaged over replicas; a column for the small and for the large model.

    Attributes:
        correct: (P, 2) share of solutions that are right.
    """

    questions: Sequence[str]
    correct: Floats

    @classmethod
    def of(cls, tables: DecisionTables) -> Examples:
        """Return those of the trees of a split."""
        both = alone(tables)
        return cls(questions_of(tables), np.stack([both.small.correct, both.large.correct], axis=1))

    @property
    def gain(self) -> Floats:
        """(P,) accuracy of the large model less that of the small one: above 0 where it wins, 0 at a tie."""
        return self.correct[:, 1] - self.correct[:, 0]

    @property
    def outcome(self) -> NDArray[np.int64]:
        """(P,) 0 where the large model wins, 1 at a tie, 2 where the small one does."""
        return 1 - np.sign(self.gain).astype(np.int64)


def questions_of(tables: DecisionTables) -> list[str]:
    """Return the questions of a split, in the order of the problems in `Outcomes`."""
    return [tables.trees.questions[each] for each in np.unique(tables.trees.problem[tables.indices]).tolist()]


def as_float32(**weights: Floats | float | Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """Return weights as they are stored; names have dots for their double underscores."""
    return {name.replace("__", "."): np.asarray(each, np.float32) for name, each in weights.items()}
