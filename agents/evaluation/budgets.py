"""From a budget to a setting: users do not think in λ or thresholds, they have tokens to spend or a target to meet.

The knob is chosen on problems that the router was not fitted on. Where it is too coarse, two neighbouring settings are
mixed: each problem goes to one of them at random, with a stored probability, so that the expectation is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import Estimate, resample_weights
from agents.evaluation.curves import References
from agents.evaluation.outcomes import Outcomes
from agents.routers.base import AnyRouter, Knob, Mixture
from rollouts.errors import ConfigError

LEVEL = 0.9
"""Share of new sets of problems that a stated interval is to hold."""
Candidates = Sequence[tuple[AnyRouter, Outcomes]]


@dataclass(frozen=True)
class Calibration:
    """A setting that meets a target.

    Attributes:
        router: A router, or a mixture of two.
        target: ``budget`` (share of always-large's cost) or ``accuracy``.
        value: What was asked for.
    """

    router: AnyRouter | Mixture
    target: str
    value: float


def calibrate(
    candidates: Candidates, references: References, *, budget: float | None = None, accuracy: float | None = None
) -> Calibration:
    """Choose a setting, or a mixture of two, for a budget or for an accuracy.

    Only settings that no mixture of two others beats are mixed: the upper hull of accuracy over cost.

    Args:
        candidates: Routers of one kind with different knobs, always-small and always-large among them if wanted, and
            their outcomes on problems that they were not fitted on.
        references: Always-small and always-large on the same problems.
        budget: Cost to be met in expectation, as a share of always-large's, in (0, 1]; or
        accuracy: least accuracy to be met in expectation, at the least cost, in (0, 1).

    Raises:
        ConfigError: Not exactly one target, one out of range, or no setting reaches it.
    """
    if (budget is None) == (accuracy is None):
        raise ConfigError("Give either a budget or an accuracy to calibrate for.")
    cost = np.array([outcomes.cost.sum() for _, outcomes in candidates]) / references.large.cost.sum()
    solved = np.array([outcomes.correct.mean() for _, outcomes in candidates])
    hull = _hull(cost, solved)
    if budget is not None:
        name, value, along = "budget", budget, cost[hull]
    else:
        assert accuracy is not None
        name, value, along = "accuracy", accuracy, solved[hull]
    if not 0 < value <= 1:
        raise ConfigError(f"The {name} is {value:g}, expected a share above 0 and at most 1.")
    if value < along[0] and name == "budget":
        raise ConfigError(f"No setting costs as little as {100 * value:.1f} % of always-large; the cheapest costs "
                          f"{100 * along[0]:.1f} %.")  # fmt: skip
    if value > along[-1] and name == "accuracy":
        raise ConfigError(f"No setting reaches an accuracy of {100 * value:.1f} %; the best reaches "
                          f"{100 * along[-1]:.1f} %.")  # fmt: skip
    above = int(np.searchsorted(along, value))
    if above in (0, len(along)):  # met by an end: cheaper than the budget, or more accurate than asked for
        return Calibration(candidates[hull[min(above, len(along) - 1)]][0], name, value)
    share = float((value - along[above - 1]) / (along[above] - along[above - 1]))
    first, second = candidates[hull[above - 1]][0], candidates[hull[above]][0]
    return Calibration(second if share == 1 else Mixture(first, second, share, Knob(name, value)), name, value)


def _hull(cost: NDArray[Any], solved: NDArray[Any]) -> list[int]:
    """Return the upper hull of (cost, accuracy), from the cheapest to the most accurate."""
    hull: list[int] = []
    for i in np.lexsort((-solved, cost)).tolist():
        if hull and solved[i] <= solved[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (solved[b] - solved[a]) * (cost[i] - cost[a]) > (solved[i] - solved[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def reached(outcomes: Outcomes, references: References, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Return the share of always-large's cost and the accuracy, with 90 % intervals for new problems.

    A new set of as many problems differs from this one as this one does from the truth, so the intervals are those of a
    difference of two such sets: sqrt(2) times as wide as those of the mean.
    """
    weights = resample_weights(len(outcomes), seed=seed)

    def widened(value: float, samples: NDArray[Any]) -> Estimate:
        defined = samples[np.isfinite(samples)]
        ends = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high = (float(value + 2**0.5 * (end - value)) for end in ends)
        return Estimate(value, low, high, 1 - len(defined) / len(samples))

    shares = (weights @ outcomes.cost) / (weights @ references.large.cost)
    share = float(outcomes.cost.sum() / references.large.cost.sum())
    return widened(share, shares), widened(float(outcomes.correct.mean()), weights @ outcomes.correct)
