"""What is chosen on validation, and on which half of it: choices on one half, the verdict on the other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.base import Constant, Router, Threshold
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.run import run
from agents.evaluation.spread import spread
from rollouts.errors import StoreError
from rollouts.tree import CONTINUE_SMALL, Trees
from trim_env.tables import DecisionTables

CANDIDATES = 200


def halves(trees: Trees, split: str = "validation") -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tree indices of the choice half and of the verdict half of a split, told apart by hash of problem.

    Raises:
        StoreError: The split is empty, or all of its problems fall into one half.
    """
    indices = trees.select(split)
    second = np.array([_bit(problem) for problem in trees.problem_ids])[trees.problem[indices]]
    if second.all() or not second.any():
        raise StoreError(
            f"Split {split!r} has {len(np.unique(trees.problem[indices]))} problems, too few to be split in two "
            "(one half for choices, one for the verdict). Generate rollouts for more validation problems."
        )
    return indices[~second], indices[second]


def _bit(problem: str) -> bool:
    return bool(hashlib.blake2b(problem.encode("utf-8"), digest_size=1, person=b"trim-halves").digest()[0] & 1)


def thresholds(tables: DecisionTables, count: int = CANDIDATES) -> list[float]:
    """Return candidate thresholds: quantiles of the proposals' scores in the split, and one above all scores."""
    inside = np.isin(tables.trees.tree, tables.indices)
    scores = tables.trees.score[inside, CONTINUE_SMALL]
    levels = np.unique(np.quantile(scores[~np.isnan(scores)], np.linspace(0, 1, count)).astype(np.float32))
    return [*levels.tolist(), float(np.nextafter(np.float32(levels[-1]), np.float32(2)))]


@dataclass(frozen=True)
class Baselines:
    """The best constant and the best threshold for one λ, chosen on some trees."""

    constant: Constant
    threshold: Threshold


class Candidates:
    """Outcomes of all thresholds and both constants on the choice half, run once for all λ."""

    def __init__(self, tables: DecisionTables) -> None:
        """Run them."""
        self.thresholds: list[tuple[Router, Outcomes]] = [
            (router, run(router, tables)) for router in (Threshold(level) for level in thresholds(tables))
        ]
        self._constants = [(router, run(router, tables)) for router in (Constant(0), Constant(1))]

    def spread_over(self, large: Outcomes) -> list[float]:
        """Return the thresholds of 16 operating points that spread over the cost of always-large on the same trees."""
        swept = [(router.knob.value, outcomes) for router, outcomes in self.thresholds]
        return [level for level, _ in spread(swept, large)]

    def best(self, lam: float) -> Baselines:
        """Return those with the greatest mean return."""
        constant = max(self._constants, key=lambda item: float(item[1].returns(lam).mean()))[0]
        threshold = max(self.thresholds, key=lambda item: float(item[1].returns(lam).mean()))[0]
        assert isinstance(threshold, Threshold)
        return Baselines(constant, threshold)
