"""What a router did on a set of problems: the one currency that metrics, tables and plots deal in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import DataError

Floats = NDArray[np.float64]
OPTIONAL = ("asked", "scorer_calls", "serial_calls")
"""Columns of `Outcomes` that some have not."""


class Solutions(NamedTuple):
    """Single solutions, one for each tree, in the order of the trees; arrays of shape (R,)."""

    correct: Floats
    escalations: Floats


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Outcomes of one router on P problems, averaged over the replicas of each problem.

    Attributes:
        problem_ids: Ids of the P problems; paired comparisons need the same ids in the same order.
        correct: (P,) share of replicas solved, in [0, 1].
        cost: (P,) cost in the unit of the cost model; with the default model the large tokens.
        large_tokens: (P,) tokens that the large model decoded.
        small_tokens: (P,) tokens that the small model decoded, accepted or not.
        discarded_tokens: (P,) those of them that an escalation threw away.
        escalations: (P,) steps that the large model wrote.
        steps: (P,) accepted steps.
        asked: (P,) steps at which it asked, of a router that does (`agents.routers.asking`); else None.
        scorer_calls: (P,) calls of whoever reads what the small model wrote so that the router may decide: a scorer,
            the large model. Like `serial_calls` None of what stands for no router, such as oracles.
        serial_calls: (P,) calls that wait for each other: of a model for a step or a whole solution, of those who read
            in between.
        solutions: What was averaged; None of outcomes that were made of others.
    """

    problem_ids: tuple[str, ...]
    correct: Floats
    cost: Floats
    large_tokens: Floats
    small_tokens: Floats
    discarded_tokens: Floats
    escalations: Floats
    steps: Floats
    asked: Floats | None = None
    scorer_calls: Floats | None = None
    serial_calls: Floats | None = None
    solutions: Solutions | None = None

    def __post_init__(self) -> None:
        """Check that all arrays have one value for each problem."""
        for name in (*self.columns(), *OPTIONAL):
            values = getattr(self, name)
            if values is not None and values.shape != (len(self),):
                raise DataError(f"Outcomes: {name} has shape {values.shape} for {len(self)} problems.")

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of the arrays that all have."""
        others = ("problem_ids", "solutions", *OPTIONAL)
        return tuple(each.name for each in fields(cls) if each.name not in others)

    def __len__(self) -> int:
        """Return P."""
        return len(self.problem_ids)

    def returns(self, lam: float) -> Floats:
        """Return (P,) mean returns ``correct - lam * cost``."""
        return self.correct - lam * self.cost

    def take(self, index: NDArray[Any]) -> Outcomes:
        """Return the outcomes of some problems."""
        ids = tuple(np.asarray(self.problem_ids, object)[index].tolist())
        return Outcomes(ids, **_columns([self], lambda values: values[index]))

    def paired_with(self, other: Outcomes) -> None:
        """Check that another router's outcomes are on the same problems in the same order.

        Raises:
            DataError: They are not.
        """
        if self.problem_ids != other.problem_ids:
            raise DataError(
                f"Outcomes of {len(self)} and {len(other)} problems cannot be paired: the problems differ. "
                "Evaluate both routers on the same split of the same rollouts."
            )


def _columns(several: Sequence[Outcomes], combine: Callable[..., Floats]) -> dict[str, Any]:
    """Return columns that are made of those of several outcomes; None where one has none."""
    found = {name: [getattr(each, name) for each in several] for name in (*Outcomes.columns(), *OPTIONAL)}
    return {name: combine(*each) for name, each in found.items() if not any(values is None for values in each)}


def combined(several: Sequence[Outcomes], combine: Callable[..., Floats]) -> Outcomes:
    """Return outcomes each column of which is made of the (P,) columns of several on the same problems.

    Raises:
        DataError: They are on different problems.
    """
    for other in several[1:]:
        several[0].paired_with(other)
    return Outcomes(several[0].problem_ids, **_columns(several, combine))


def mix(first: Outcomes, second: Outcomes, share: float) -> Outcomes:
    """Return expected outcomes when each problem goes to `second` with probability `share`, else to `first`."""
    return combined([first, second], lambda one, other: (1 - share) * one + share * other)
