"""Two methods on the same problems: one sentence on their paired difference that says no more than it shows."""

from __future__ import annotations

import numpy as np

from agents.evaluation.bootstrap import Estimate, paired_curves
from agents.evaluation.curves import Curve, Method, References
from agents.evaluation.outcomes import Floats

HEADLINE = 80


def number(x: float) -> str:
    """Write a number with one decimal, or with one significant digit where that would hide it."""
    return f"{x:.1f}" if abs(x) >= 0.05 or x == 0 else f"{x:.1g}"


def _interval(each: Estimate, sign: int = 1) -> str:
    low, high = sorted((sign * each.low, sign * each.high))
    return f"95 % interval {number(low)} % to {number(high)} %"


def difference(names: tuple[str, str], first: Method, second: Method, references: References, weights: Floats) -> str:
    """Say what can be said about the cost at which two methods recover most of the gap, on (R, P) resamples.

    Raises:
        DataError: Points and references are not on the same problems.
    """
    percent = paired_curves(first, second, references, weights)[f"cpt_{HEADLINE}_percent"]
    if np.isnan(percent.value):
        return "There is no gap to recover: always-large does not solve more of these problems than always-small."
    goal = f"{HEADLINE} % of the gap between always-small and always-large"
    methods = zip(names, (first, second), strict=True)
    if mixing := [name for name, each in methods if Curve.of(each, references).by_mixing(HEADLINE)]:
        goal += f" ({' and '.join(mixing)} only by mixing with always-large)"
    one, other = names
    signed = f"{number(percent.value)} % for {one} against {other}, {_interval(percent)}"
    if not percent.shown:
        reason = f", undefined in {number(100 * percent.undefined)} % of resamples" if percent.undefined else ""
        return f"No difference in the cost of recovering {goal} could be shown ({signed}{reason})."
    sign, word = (1, "more") if percent.value > 0 else (-1, "less")
    size = number(sign * percent.value)
    return f"{one} recovers {goal} at {size} % {word} cost than {other} ({_interval(percent, sign)})."
