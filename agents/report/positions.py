"""Where in solutions a router escalates, with intervals over problems."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import Estimate, estimate
from agents.evaluation.outcomes import Floats
from agents.report.walks import ANSWERED, Paths
from rollouts.trees.arrays import ESCALATE_LARGE

PARTS = 10
"""Equal parts of a solution, from its first to its last step."""


def positions(paths: Paths, problem: NDArray[np.integer[Any]], weights: Floats) -> dict[str, Any]:
    """Count decisions and escalations by step number, and escalations by part of the solution.

    Args:
        paths: A router's paths through R trees.
        problem: (R,) position of each tree's problem, 0..P-1.
        weights: (S, P) bootstrap resamples of the problems, from `bootstrap.resample_weights`.
    """
    reached = (paths.rows >= 0) & (paths.actions != ANSWERED)
    escalated = paths.actions == ESCALATE_LARGE
    steps = np.maximum(paths.steps, 1)
    part = (PARTS * (np.arange(reached.shape[1]) + 0.5) / steps[:, None]).astype(int).clip(0, PARTS - 1)
    parts = np.stack([(escalated & (part == i)).sum(axis=1) for i in range(PARTS)], axis=1)
    solutions = np.ones((len(steps), 1))
    decisions, escalations, in_parts, trees = (
        by_problem(each, problem, weights.shape[1]) for each in (reached, escalated, parts, solutions)
    )
    everything = escalations.sum(axis=1, keepdims=True)
    return {
        "decisions": decisions.sum(axis=0).astype(int).tolist(),
        "escalations": escalations.sum(axis=0).astype(int).tolist(),
        "share": ratios(escalations, decisions, weights),  # of the decisions of a step
        "per_100": ratios(100 * escalations, trees, weights),  # in 100 solutions
        "parts": ratios(in_parts, everything, weights),  # of all escalations, by tenth
    }


def by_problem(values: NDArray[Any], problem: NDArray[np.integer[Any]], count: int) -> Floats:
    """Return (P, n) sums of (R, n) values over the trees of each problem."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, problem, values)
    return sums


def ratios(over: Floats, under: Floats, weights: Floats) -> list[Estimate]:
    """Return the ratio of the sums of two (P, n) arrays, column by column, with intervals; NaN over nothing."""
    above, below = weights @ over, weights @ under
    with np.errstate(invalid="ignore", divide="ignore"):
        value = over.sum(axis=0) / under.sum(axis=0)
        samples = above / below
    value, samples = (np.where(np.isfinite(each), each, np.nan) for each in (value, samples))
    return [estimate(value[i], samples[:, i]) for i in range(over.shape[1])]
