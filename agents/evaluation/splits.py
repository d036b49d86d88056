"""What is chosen on validation: choices on one half and the verdict on the other (docs/design.md, section 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import resample_weights
from agents.evaluation.curves import TOLERANCE, References, per_cost
from agents.evaluation.health import Health, assess
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.walk import Settings, references, run
from agents.routers.base import Constant, Router, Threshold
from rollouts.errors import StoreError
from rollouts.trees.arrays import Trees
from trim_env.tables import DecisionTables

CANDIDATES = 200
OPERATING_POINTS = 16
Record = dict[str, float]
Setting = TypeVar("Setting")


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


def thresholds(tables: DecisionTables, count: int = CANDIDATES, schema: str = Threshold.schema) -> list[float]:
    """Return candidate thresholds: quantiles of the first feature, the proposals' score, and one above all."""
    inside = np.isin(tables.trees.tree, tables.indices)
    scores = tables.in_schema(schema)[inside, 0]
    levels = np.unique(np.quantile(scores[~np.isnan(scores)], np.linspace(0, 1, count)).astype(np.float32))
    return [*levels.tolist(), float(np.nextafter(np.float32(levels[-1]), np.float32(np.inf)))]


def spread(
    candidates: Sequence[tuple[Setting, Outcomes]], large: Outcomes, count: int = OPERATING_POINTS
) -> list[tuple[Setting, Outcomes]]:
    """Choose operating points that spread over c in (0, 1).

    Targets are `count` equally spaced costs i / (count + 1). Each gets a candidate of its own such that the total
    distance between targets and candidates is least. Candidates with the same c (as neighbouring thresholds that
    decide alike) count as one: the one with the higher accuracy, then the first. Candidates outside (0, 1) are
    never chosen. Knobs chosen here on validation are then evaluated on other problems.

    Args:
        candidates: (knob or router, outcomes on validation), in any order.
        large: Always escalating on the same problems.
        count: Points to choose at most.

    Returns:
        Chosen candidates by ascending c, fewer than `count` where there are fewer distinct ones.

    Raises:
        DataError: A candidate is on other problems than `large`.
    """
    for _, outcomes in candidates:
        outcomes.paired_with(large)
    c = np.array([float(per_cost(outcomes.cost.sum(), large.cost.sum())) for _, outcomes in candidates])
    accuracy = np.array([outcomes.correct.mean() for _, outcomes in candidates])
    order = [i for i in np.lexsort((-accuracy, c)) if TOLERANCE < c[i] < 1 - TOLERANCE]
    distinct = [i for n, i in enumerate(order) if n == 0 or c[i] - c[order[n - 1]] > TOLERANCE]
    if len(distinct) > count:
        from scipy.optimize import linear_sum_assignment

        targets = np.arange(1, count + 1) / (count + 1)
        _, taken = linear_sum_assignment(np.abs(targets[:, None] - c[distinct]))
        distinct = [distinct[j] for j in sorted(taken)]
    return [candidates[i] for i in distinct]


@dataclass(frozen=True)
class Baselines:
    """The best constant and the best threshold for one λ, chosen on some trees."""

    constant: Constant
    threshold: Threshold


class Candidates:
    """Outcomes of all thresholds and both constants on the choice half, run once for all λ."""

    def __init__(self, tables: DecisionTables, schema: str = Threshold.schema) -> None:
        """Run them; thresholds are those on the first feature of a schema."""
        levels = thresholds(tables, schema=schema)
        self.thresholds: list[tuple[Router, Outcomes]] = [
            (router, run(router, tables)) for router in (Threshold(level, schema=schema) for level in levels)
        ]
        self._constants = [(router, run(router, tables)) for router in (Constant(0), Constant(1))]

    def spread_over(self, large: Outcomes) -> Settings:
        """Return 16 thresholds that spread over the cost of always-large on the same trees."""
        return [(router.knob.value, router, outcomes) for router, outcomes in spread(self.thresholds, large)]

    def best(self, lam: float) -> Baselines:
        """Return those with the greatest mean return."""
        constant = max(self._constants, key=lambda item: float(item[1].returns(lam).mean()))[0]
        threshold = max(self.thresholds, key=lambda item: float(item[1].returns(lam).mean()))[0]
        assert isinstance(threshold, Threshold)
        return Baselines(constant, threshold)


class Validation:
    """Both halves of the validation split, with what simple rules reach on them."""

    def __init__(self, tables: Callable[[Any], DecisionTables], trees: Trees, split: str = "validation") -> None:
        """Prepare the halves.

        Args:
            tables: From tree indices to tables.
            trees: Compiled trees.
            split: The split.
        """
        choice, verdict = halves(trees, split)
        self.choice, self.verdict = tables(choice), tables(verdict)
        self.references: tuple[References, References] = (references(self.choice), references(self.verdict))
        self.candidates = Candidates(self.choice)
        self._weights = tuple(resample_weights(len(each.small), 1000) for each in self.references)

    def assess(self, router: Any, lam: float, *, final: bool) -> Health:
        """Assess a router on the choice half or, finally, on the verdict half, against rules chosen on the former."""
        tables, which = (self.verdict, 1) if final else (self.choice, 0)
        simple = self.candidates.best(lam)
        return assess(
            run(router, tables),
            (simple.constant.name, run(simple.constant, tables)),
            (f"the best threshold ({simple.threshold.threshold:.3f})", run(simple.threshold, tables)),
            self.references[which].large,
            lam,
            self._weights[which],
        )

    def measure(self, outcomes: Outcomes, lam: float) -> Record:
        """Return mean return, accuracy, large-token share and escalation rate on the choice half."""
        large = max(float(self.references[0].large.cost.sum()), 1e-12)
        return {
            "return": float(outcomes.returns(lam).mean()),
            "accuracy": float(outcomes.correct.mean()),
            "share": float(outcomes.cost.sum()) / large,
            "escalation_rate": float(outcomes.escalations.sum() / outcomes.steps.sum()),
        }
