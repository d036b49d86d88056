"""What a model makes of the tokens of a step: log-probabilities, entropies, and the statistics that are kept."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rollouts.text.steps import LARGE, ROLES, SMALL

STATISTICS = ("min_logprob", "mean_logprob", "total_logprob", "max_entropy", "first_entropy")
"""Of the tokens of a step, in nats: least, mean and total log-probability, greatest entropy, entropy at the first."""
LOOKED_AT = {SMALL: (SMALL,), LARGE: ROLES}
"""Whose steps a model's statistics are of: the large model looks at the small one's, not the other way round."""
WORTHLESS = (-math.inf, -math.inf, -math.inf, math.inf, math.inf)
"""The statistics of a step without text."""
UNSCORED = 1.0
"""Stands for the score of an accepted step that has none: it leaves the least score and the product as they are."""
TOP = 20  # log-probabilities that servers give at most by default


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Consecutive tokens, each given all before it, as the model has them at temperature 1, whatever it was sampled at.

    Attributes:
        entropies: Entropies of the distributions that they come from (`top_entropy`); empty if nobody asked for them.
    """

    logprobs: tuple[float, ...]
    entropies: tuple[float, ...] = ()

    def __add__(self, other: Likelihood) -> Likelihood:
        """Return the tokens of both, one after the other."""
        return Likelihood(self.logprobs + other.logprobs, self.entropies + other.entropies)

    def statistics(self, start: int = 0, end: int | None = None) -> tuple[float, ...]:
        """Return `STATISTICS` of the tokens from a place on, before another."""
        logprobs, entropies = self.logprobs[start:end], self.entropies[start:end]
        if not logprobs:
            return WORTHLESS
        total = math.fsum(logprobs)
        return min(logprobs), total / len(logprobs), total, max(entropies, default=math.nan), [*entropies, math.nan][0]


def top_entropy(logprobs: Iterable[float]) -> float:
    """Return the entropy of the `TOP` likeliest tokens, all others taken for one, from their log-probabilities.

    It is the same whatever a backend tells besides, and at most the entropy of all tokens.
    """
    known = [(math.exp(value), value) for value in heapq.nlargest(TOP, logprobs) if value > -math.inf]
    rest = 1 - math.fsum(probability for probability, _ in known)
    found = -math.fsum(probability * value for probability, value in known)
    return max(0.0, found - (rest * math.log(rest) if rest > 1e-12 else 0.0))


def as_score(column: str, value: float) -> float | None:
    """Return a column of a score table as a score in [0, 1], higher is better; None where it cannot be one.

    A score is itself, a log-probability its probability, an entropy of H nats exp(-H).
    """
    if column.endswith("_logprob"):
        return math.exp(min(value, 0.0))
    if column.endswith("_entropy"):
        return math.exp(-max(value, 0.0))
    return value if column == "score" else None


def first_of(columns: Sequence[str]) -> str:
    """Return the column of a table that stands for it as a score."""
    return next((name for name in ("score", "min_logprob") if name in columns), columns[0])
