"""Routers of whole problems: who decides once, before anything is generated or when the small model has solved it.

Neither looks at steps, so neither is a `Router`. What becomes of both follows from two solutions of each tree, the one
that the small model writes by itself and the one that the large model does (`trim_env.graph.alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Knob, Named, parts_of


@runtime_checkable
class QueryRouter(Protocol):
    """Sends a question to one model or the other before anything is generated.

    The chosen model writes the whole solution in one request; the other is not called, and nothing is scored.

    Attributes:
        name: As in tables and plots.
        knob: What was set to trade accuracy for cost.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def knob(self) -> Knob: ...  # noqa: D102

    def sends(self, questions: Sequence[str]) -> Floats:
        """Return the (n,) probabilities of sending questions to the large model: 0 or 1 unless the router draws."""


@dataclass(frozen=True, eq=False)
class Attempts:
    """What the small model wrote by itself: R solutions, some of them of the same problem.

    Attributes:
        problems: (R,) ids of their problems.
        questions: Their R texts.
        replicas: (R,) which sample of the problem's each is.
        features: (R, d) float32 features of the last step in the cascade's schema; folds in it tell the steps before.
        last: From a position to the text of the last step.
        told: From a column of a score table to its (R,) values at the last step; NaN where there is none.
    """

    problems: NDArray[np.str_]
    questions: tuple[str, ...]
    replicas: NDArray[np.integer[Any]]
    features: NDArray[np.float32]
    last: Callable[[int], str]
    told: Callable[[str], Floats] = lambda _: np.zeros(0)


@runtime_checkable
class Cascade(Named, Protocol):
    """Lets the small model solve the problem; then keeps the solution, or has the large model start from scratch.

    The small model's solution is paid in any case, and so is whoever reads it for the cascade, once and as a whole.

    Its schema is of what it sees of the last step; ``least(...)`` and its like are of the steps before
    (`trim_env.features`).
    """

    def retries(self, attempts: Attempts) -> Floats:
        """Return the (R,) probabilities of starting again with the large model."""


@runtime_checkable
class VerifiedCascade(Cascade, Protocol):
    """A cascade whose solutions the small model may have verified itself, which is paid in any case."""

    def verifying(self, attempts: Attempts) -> Floats:
        """Return (R, 3) of each solution: samples, and tokens that the small model read and decoded for them."""


@runtime_checkable
class VotingCascade(Cascade, Protocol):
    """A cascade over several samples of the small model: all of them are paid, one is kept."""

    def keeps(self, attempts: Attempts) -> NDArray[np.int64]:
        """Return (R,) positions of the solutions that are kept, the same for all solutions of a problem."""


Whole = QueryRouter | Cascade


def decides_once(router: Any) -> bool:
    """Whether a router, or a part of a mixture, decides before anything is generated, and then never again."""
    return any(isinstance(part, QueryRouter) for part in parts_of(router))


@dataclass(frozen=True)
class OneModel:
    """Sends all questions to one model: what nothing is routed to.

    Attributes:
        action: 0 for the small model, 1 for the large one.
    """

    action: int
    schema: str = field(default="agg/1", init=False)

    @property
    def name(self) -> str:
        """The reference point's name."""
        return "the large model alone" if self.action else "the small model alone"

    @property
    def knob(self) -> Knob:
        """The action."""
        return Knob("action", self.action)

    def sends(self, questions: Sequence[str]) -> Floats:
        """Return (n,) zeros or ones."""
        return np.full(len(questions), float(self.action))
