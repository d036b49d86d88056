"""Two routers on the same problems: paired differences, and one sentence that says no more than they show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.evaluation.bootstrap import Difference, difference, paired_curves, paired_means, paired_returns
from agents.evaluation.curves import Curve, Points, References
from agents.evaluation.outcomes import Floats, Outcomes

MIN_DIFFERING = 10
"""On fewer problems with different results the percentile bootstrap finds differences that a sign test does not."""
HEADLINE = 80


@dataclass(frozen=True)
class Comparison:
    """Differences of two routers at one operating point each, first minus second.

    Attributes:
        first: Name of the first router.
        second: Name of the second.
        problems: Number of problems.
        differing: Problems on which their accuracies differ.
        accuracy: Difference in accuracy, as a share.
        large_tokens: Difference in large tokens per problem.
        large_tokens_percent: The same in percent of the second's; NaN if that uses none.
        returns: Difference in mean return.
        sentence: What accuracy and tokens show, in plain words.
    """

    first: str
    second: str
    problems: int
    differing: int
    accuracy: Difference
    large_tokens: Difference
    large_tokens_percent: Difference
    returns: Difference
    sentence: str


@dataclass(frozen=True)
class CurveComparison:
    """Differences of two curves, first minus second: see `uncertainty.paired_curves`; with a sentence on CPT(80 %)."""

    first: str
    second: str
    metrics: dict[str, Difference]
    sentence: str


def compare(names: tuple[str, str], first: Outcomes, second: Outcomes, lam: float, weights: Floats) -> Comparison:
    """Compare two routers at one operating point each.

    Args:
        names: Of the first and the second router.
        first: Outcomes of the first router.
        second: Outcomes of the second, on the same problems.
        lam: λ of the returns, reward per unit of cost.
        weights: (R, P) from `resample_weights`.

    Raises:
        DataError: The outcomes are not on the same problems.
    """
    returns = paired_returns(first, second, lam, weights)
    accuracy = paired_means(first.correct, second.correct, weights)
    tokens = paired_means(first.large_tokens, second.large_tokens, weights)
    samples = _percent(weights @ first.large_tokens, weights @ second.large_tokens)
    percent = difference(_percent(first.large_tokens.mean(), second.large_tokens.mean()), samples)
    differing = int((first.correct != second.correct).sum())
    sentence = _accuracy_clause(names, accuracy, differing, len(first)) + _token_clause(names, tokens, percent)
    return Comparison(*names, len(first), differing, accuracy, tokens, percent, returns, sentence)


def compare_curves(
    names: tuple[str, str], first: Points, second: Points, references: References, weights: Floats
) -> CurveComparison:
    """Compare the curves of two methods.

    Args:
        names: Of the first and the second method.
        first: Operating points of the first method.
        second: Operating points of the second.
        references: Always-small and always-large.
        weights: (R, P) from `resample_weights`.

    Raises:
        DataError: Points and references are not on the same problems.
    """
    metrics = paired_curves(first, second, references, weights)
    curves = [Curve.of(points, references) for points in (first, second)]
    mixing = [name for name, curve in zip(names, curves, strict=True) if curve.by_mixing(HEADLINE)]
    sentence = _cpt_sentence(names, metrics[f"cpt_{HEADLINE}_percent"], mixing)
    return CurveComparison(*names, metrics, sentence)


def _percent(own: Floats, other: Floats) -> Floats:
    """Return how much more the first is than the second, in percent; NaN if that is 0."""
    change: Floats = 100 * (own / np.where(other > 0, other, np.nan) - 1)
    return change


def number(x: float) -> str:
    """Write a number with one decimal, or with one significant digit where that would hide it."""
    return f"{x:.1f}" if abs(x) >= 0.05 or x == 0 else f"{x:.1g}"


def _interval(each: Difference, factor: float = 1.0, unit: str = "") -> str:
    """Write the interval of a difference."""
    low, high = sorted((factor * each.low, factor * each.high))
    return f"95 % interval {number(low)}{unit} to {number(high)}{unit}"


def _accuracy_clause(names: tuple[str, str], accuracy: Difference, differing: int, problems: int) -> str:
    """Say what can be said about accuracy."""
    first, second = names
    if not differing:
        return f"{first} and {second} do equally well on every one of the {problems:,} problems"
    signed = f"{first} minus {second}: {number(100 * accuracy.value)} points, {_interval(accuracy, 100)}"
    if differing < MIN_DIFFERING:
        return (
            f"{first} and {second} differ on only {differing} of {problems:,} problems, too few for a claim about "
            f"accuracy ({signed})"
        )
    if not accuracy.shown:
        return f"No difference in accuracy could be shown ({signed})"
    sign, word = (1, "more") if accuracy.value > 0 else (-1, "fewer")
    size = number(sign * 100 * accuracy.value)
    return f"{first} solves {size} points {word} problems than {second} ({_interval(accuracy, sign * 100)})"


def _token_clause(names: tuple[str, str], tokens: Difference, percent: Difference) -> str:
    """Say what can be said about large tokens: in percent, or per problem where the second router uses none."""
    first, second = names
    if tokens.value == tokens.low == tokens.high == 0:
        return f"; {first} and {second} use equally many large-model tokens."
    each, unit, per = (tokens, "", " per problem") if percent.undefined else (percent, " %", "")
    if not each.shown:
        signed = f"{first} minus {second}: {number(each.value)}{unit}{per}, {_interval(each, 1, unit)}"
        return f"; no difference in large-model tokens could be shown ({signed})."
    sign, word = (1, "more") if each.value > 0 else (-1, "fewer")
    size = number(sign * each.value)
    return f"; {first} uses {size}{unit} {word} large-model tokens{per} ({_interval(each, sign, unit)})."


def _cpt_sentence(names: tuple[str, str], percent: Difference, mixing: list[str]) -> str:
    """Say what can be said about the cost of recovering most of the gap."""
    first, second = names
    goal = f"{HEADLINE} % of the gap between always-small and always-large"
    if np.isnan(percent.value):
        return "There is no gap to recover: always-large does not solve more of these problems than always-small."
    if mixing:
        goal += f" ({' and '.join(mixing)} only by mixing with always-large)"
    signed = f"{number(percent.value)} % for {first} against {second}, {_interval(percent, 1, ' %')}"
    if not percent.shown:
        reason = f", undefined in {number(100 * percent.undefined)} % of resamples" if percent.undefined else ""
        return f"No difference in the cost of recovering {goal} could be shown ({signed}{reason})."
    sign, word = (1, "more") if percent.value > 0 else (-1, "less")
    size = number(sign * percent.value)
    return f"{first} recovers {goal} at {size} % {word} cost than {second} ({_interval(percent, sign, ' %')})."
