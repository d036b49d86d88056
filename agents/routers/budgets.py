"""From a budget to a setting: users do not think in λ or thresholds, they have tokens to spend or a target to meet.

Of routers for one setting each, `calibrate` chooses one or mixes two (each problem goes to one of them at random, with
a stored probability, so that the expectation is met); of a policy for a range of λ, `LamCosts` looks the λ up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.routers.base import AnyRouter, Floats, Knob, Mixture
from rollouts.errors import ConfigError


@dataclass(frozen=True)
class Measured:
    """A setting on problems that it was not fitted on.

    Attributes:
        share: Its cost as a share of always-large's.
        accuracy: Share of the problems that it solves.
    """

    router: AnyRouter
    share: float
    accuracy: float


def calibrate(
    measured: Sequence[Measured], *, budget: float | None = None, accuracy: float | None = None
) -> AnyRouter | Mixture:
    """Choose a setting, or a mixture of two, for a budget or for an accuracy.

    Only settings that no mixture of two others beats are mixed: the upper hull of accuracy over cost.

    Args:
        measured: Routers with different knobs, always-small and always-large among them if wanted.
        budget: Cost to be met in expectation, as a share of always-large's, in (0, 1]; or
        accuracy: least accuracy to be met in expectation, at the least cost, in (0, 1].

    Raises:
        ConfigError: Not exactly one target, one out of range, or no setting reaches it.
    """
    if (budget is None) == (accuracy is None):
        raise ConfigError("Give either a budget or an accuracy to calibrate for.")
    ends = upper_hull([each.share for each in measured], [each.accuracy for each in measured])
    hull = [measured[i] for i in ends]
    name, value = ("budget", budget) if budget is not None else ("accuracy", accuracy)
    along = [each.share if name == "budget" else each.accuracy for each in hull]
    assert value is not None
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
        return hull[min(above, len(along) - 1)].router
    share = float((value - along[above - 1]) / (along[above] - along[above - 1]))
    first, second = hull[above - 1].router, hull[above].router
    return second if share == 1 else Mixture(first, second, share, Knob(name, value))


def upper_hull(shares: Sequence[float] | Floats, accuracies: Sequence[float] | Floats) -> list[int]:
    """Return positions of the points on the upper hull of accuracy over cost, the cheapest first."""
    hull: list[int] = []
    for i in np.lexsort((-np.asarray(accuracies), np.asarray(shares))).tolist():
        if hull and accuracies[i] <= accuracies[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rise, run = accuracies[b] - accuracies[a], shares[b] - shares[a]
            if rise * (shares[i] - shares[a]) > (accuracies[i] - accuracies[a]) * run:
                break
            hull.pop()
        hull.append(i)
    return hull


class LamCosts:
    """What the λ of a policy for a range come to, as its artefact says under ``budgets``.

    A share is the greatest one of all λ that are not smaller: where the measured ones go up and down, the budget is
    kept all the same.

    Attributes:
        shares: (n,) shares of always-large's cost, ascending; empty where the artefact says nothing.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Read rows with ``lam`` and ``share``."""
        ordered = sorted(rows, key=lambda row: -float(row["lam"]))
        shares = np.array([float(row["share"]) for row in ordered])
        self.shares: Floats
        self.shares, first = np.unique(np.maximum.accumulate(shares), return_index=True)
        self._logs = np.log([float(ordered[index]["lam"]) for index in first])

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and greatest share that may be asked for; None where nothing is known."""
        return (float(self.shares[0]), 1.0) if len(self.shares) else None

    def lam(self, budget: float, name: str) -> float:
        """Return the λ at which a share of always-large's cost is spent; `name` is the policy's, for messages.

        Raises:
            ConfigError: Nothing is known, or the budget is out of range.
        """
        if self.range is None:
            raise ConfigError(f"The artefact of {name} does not say what each lam costs; name lam instead.")
        if not 0 < budget <= 1:
            raise ConfigError(f"budget is {budget:g}, expected a share of always-large's cost, above 0 and at most 1.")
        if budget < self.shares[0]:
            raise ConfigError(f"budget is {budget:g}; the cheapest setting of {name} costs {self.shares[0]:.3g}.")
        return float(np.exp(np.interp(budget, self.shares, self._logs)))
