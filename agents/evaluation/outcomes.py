"""What a router did on a set of problems: the one currency that metrics, tables and plots deal in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import DataError

Floats = NDArray[np.float64]


class Solutions(NamedTuple):
    """Single solutions, one for each tree, in the order of the trees; arrays of shape (R,)."""

    correct: Floats
    escalations: Floats


class Calls(NamedTuple):
    """Calls of models for a problem, averaged over its replicas; arrays of shape (P,).

    Attributes:
        scorer: Of whoever reads what the small model wrote so that the router may decide: a scorer, the large model.
        serial: Of all that wait for each other: a step or a whole solution of either model, what is read in between.
    """

    scorer: Floats
    serial: Floats


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
        solutions: What was averaged; None after mixing or taking some of the problems.
        asked: (P,) steps at which it asked, of a router that does (`agents.routers.asking`); None likewise.
        calls: Calls of models; None of those that stand for no router, such as oracles.
    """

    problem_ids: tuple[str, ...]
    correct: Floats
    cost: Floats
    large_tokens: Floats
    small_tokens: Floats
    discarded_tokens: Floats
    escalations: Floats
    steps: Floats
    solutions: Solutions | None = None
    asked: Floats | None = None
    calls: Calls | None = None

    def __post_init__(self) -> None:
        """Check that all arrays have one value for each problem."""
        for name in self.columns():
            values = getattr(self, name)
            if values.shape != (len(self.problem_ids),):
                raise DataError(f"Outcomes: {name} has shape {values.shape} for {len(self.problem_ids)} problems.")

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of the arrays."""
        others = ("problem_ids", "solutions", "asked", "calls")
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
        calls = self.calls and Calls(*(each[index] for each in self.calls))
        return Outcomes(ids, **{name: getattr(self, name)[index] for name in self.columns()}, calls=calls)

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


def mix(first: Outcomes, second: Outcomes, share: float) -> Outcomes:
    """Return expected outcomes when each problem goes to `second` with probability `share`, else to `first`."""
    first.paired_with(second)

    def mixed(one: Floats, other: Floats) -> Floats:
        return (1 - share) * one + share * other

    columns: dict[str, Any] = {n: mixed(getattr(first, n), getattr(second, n)) for n in Outcomes.columns()}
    calls = Calls(*map(mixed, first.calls, second.calls)) if first.calls and second.calls else None
    return Outcomes(first.problem_ids, **columns, calls=calls)
