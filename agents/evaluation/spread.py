"""Choosing a method's operating points among many candidates, on validation (design §7)."""

from __future__ import annotations

import numpy as np

from agents.evaluation.curves import TOLERANCE, Points, per_cost
from agents.evaluation.outcomes import Floats, Outcomes

OPERATING_POINTS = 16


def spread(candidates: Points, large: Outcomes, count: int = OPERATING_POINTS) -> list[tuple[float, Outcomes]]:
    """Choose operating points that spread over c in (0, 1).

    Targets are `count` equally spaced costs i / (count + 1). Each gets a candidate of its own such that the total
    distance between targets and candidates is least. Candidates with the same c (as neighbouring thresholds that
    decide alike) count as one: the one with the higher accuracy, then the first. Candidates outside (0, 1) are
    never chosen. Knobs chosen here on validation are then evaluated on other problems.

    Args:
        candidates: (knob, outcomes on validation), in any order.
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
        targets = np.arange(1, count + 1) / (count + 1)
        distinct = [distinct[j] for j in assign(targets, c[distinct])]
    return [candidates[i] for i in distinct]


def assign(targets: Floats, values: Floats) -> list[int]:
    """Give each target a value of its own with the least total distance.

    Both are ascending, so some best assignment keeps their order and dynamic programming over both finds it.

    Args:
        targets: (n,) ascending.
        values: (m,) ascending, m >= n.

    Returns:
        n ascending indices into `values`.
    """
    cheapest = np.zeros(len(values) + 1)  # [j]: least distance of the targets so far among the first j values
    taken = []
    for target in targets:
        using = np.concatenate([[np.inf], cheapest[:-1] + np.abs(values - target)])
        cheapest = np.minimum.accumulate(using)
        taken.append(using)
    chosen, end = [], len(values) + 1
    for using in reversed(taken):
        end = int(np.argmin(using[:end]))
        chosen.append(end - 1)
    return chosen[::-1]
