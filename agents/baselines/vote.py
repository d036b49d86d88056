"""Two parts of SATER that need no other small model: refusal before (`agents.baselines.predict.doubt`), a vote after.

SATER trains the small model to answer briefly and to refuse; that would be another store.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Knob
from agents.routers.whole import Attempts
from rollouts.tasks.answers import final_answer


@dataclass(frozen=True)
class Vote:
    """Draws all replicas of the small model's solution; starts again if too few of them agree.

    Kept is the first solution with the answer that most have (of several such answers the one that came first). A
    solution without an answer agrees with no other.

    Attributes:
        agreement: Least share of the solutions that must have that answer.
    """

    agreement: float
    name: str = "vote"
    schema: str = field(default="step/1", init=False)  # nobody reads the solutions

    @property
    def knob(self) -> Knob:
        """The agreement."""
        return Knob("agreement", self.agreement)

    def retries(self, attempts: Attempts) -> Floats:
        """Return (R,) of 0 and 1."""
        return (_voted(attempts)[1] < self.agreement - 1e-9).astype(np.float64)

    def keeps(self, attempts: Attempts) -> NDArray[np.int64]:
        """Return (R,) positions of the solutions that are kept."""
        return _voted(attempts)[0]


def _voted(attempts: Attempts) -> tuple[NDArray[np.int64], Floats]:
    """Return for each attempt which one its problem keeps, and the share of the attempts at it with that answer."""
    answers = [final_answer(attempts.last(place)) for place in range(len(attempts.problems))]
    _, problem = np.unique(attempts.problems, return_inverse=True)
    kept, share = np.zeros(len(problem), np.int64), np.zeros(len(problem))
    for members in np.split(np.argsort(problem, kind="stable"), np.flatnonzero(np.diff(np.sort(problem))) + 1):
        own = [answers[place] for place in members]
        votes = [1 if answer is None else own.count(answer) for answer in own]
        best = int(np.argmax(votes))
        kept[members], share[members] = members[best], votes[best] / len(members)
    return kept, share
