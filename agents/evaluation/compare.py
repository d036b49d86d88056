"""Two methods on the same problems: paired differences, and one sentence that says no more than they show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.evaluation.bootstrap import Estimate, paired_curves
from agents.evaluation.curves import Curve, Method, References
from agents.evaluation.outcomes import Floats

HEADLINE = 80


@dataclass(frozen=True)
class CurveComparison:
    """Differences of two curves, first minus second: see `bootstrap.paired_curves`; with a sentence on CPT(80 %)."""

    first: str
    second: str
    metrics: dict[str, Estimate]
    sentence: str


def compare_curves(
    names: tuple[str, str], first: Method, second: Method, references: References, weights: Floats
) -> CurveComparison:
    """Compare the curves of two methods.

    Args:
        names: Of the first and the second method.
        first: The first method.
        second: The second.
        references: Always-small and always-large.
        weights: (R, P) from `resample_weights`.

    Raises:
        DataError: Points and references are not on the same problems.
    """
    metrics = paired_curves(first, second, references, weights)
    curves = [Curve.of(method, references) for method in (first, second)]
    mixing = [name for name, curve in zip(names, curves, strict=True) if curve.by_mixing(HEADLINE)]
    sentence = _cpt_sentence(names, metrics[f"cpt_{HEADLINE}_percent"], mixing)
    return CurveComparison(*names, metrics, sentence)


def number(x: float) -> str:
    """Write a number with one decimal, or with one significant digit where that would hide it."""
    return f"{x:.1f}" if abs(x) >= 0.05 or x == 0 else f"{x:.1g}"


def _interval(each: Estimate, sign: int = 1) -> str:
    low, high = sorted((sign * each.low, sign * each.high))
    return f"95 % interval {number(low)} % to {number(high)} %"


def _cpt_sentence(names: tuple[str, str], percent: Estimate, mixing: list[str]) -> str:
    """Say what can be said about the cost of recovering most of the gap."""
    first, second = names
    goal = f"{HEADLINE} % of the gap between always-small and always-large"
    if np.isnan(percent.value):
        return "There is no gap to recover: always-large does not solve more of these problems than always-small."
    if mixing:
        goal += f" ({' and '.join(mixing)} only by mixing with always-large)"
    signed = f"{number(percent.value)} % for {first} against {second}, {_interval(percent)}"
    if not percent.shown:
        reason = f", undefined in {number(100 * percent.undefined)} % of resamples" if percent.undefined else ""
        return f"No difference in the cost of recovering {goal} could be shown ({signed}{reason})."
    sign, word = (1, "more") if percent.value > 0 else (-1, "less")
    size = number(sign * percent.value)
    return f"{first} recovers {goal} at {size} % {word} cost than {second} ({_interval(percent, sign)})."
