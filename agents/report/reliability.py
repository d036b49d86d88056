"""Whether the scorer's numbers mean what they say: scores in bins against how often what they score is right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import estimate
from agents.evaluation.outcomes import Floats
from agents.report.positions import triple
from agents.report.walks import Paths
from rollouts.trees.arrays import CONTINUE_SMALL, Trees
from rollouts.trees.stats import auc, right_so_far

BINS = 10


def reliability(
    scores: Floats, right: NDArray[np.bool_], problem: NDArray[np.integer[Any]], weights: Floats
) -> dict[str, Any]:
    """Compare scores with what came true, in bins of equal width.

    Args:
        scores: (n,) in [0, 1].
        right: (n,) whether what was scored is right.
        problem: (n,) position of its problem, 0..P-1.
        weights: (S, P) bootstrap resamples of the problems.

    Returns:
        ``bins``, of those that hold something: ``low`` and ``high`` edge, ``count``, mean ``score``, share
        ``right`` with interval; ``error``, the mean distance of score and share weighted by counts (the expected
        calibration error); ``auc``, P(a right one scores above a wrong one), NaN if all are alike; ``count``.
    """
    place = np.minimum((BINS * scores).astype(int), BINS - 1)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for i in range(BINS):
        inside = place == i
        count = int(inside.sum())
        if not count:
            continue
        among = np.bincount(problem[inside], minlength=weights.shape[1])
        good = np.bincount(problem[inside], right[inside], minlength=weights.shape[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = (weights @ good) / (weights @ among)
        score, share = float(scores[inside].mean()), float(right[inside].mean())
        error += count * abs(score - share)
        found = triple(estimate(share, samples))
        bins.append({"low": i / BINS, "high": (i + 1) / BINS, "count": count, "score": score, "right": found})
    total = max(len(scores), 1)
    return {"bins": bins, "error": error / total, "auc": auc(scores, right), "count": len(scores)}


def scorer_reliability(
    trees: Trees, small: Paths, problem: NDArray[np.integer[Any]], weights: Floats
) -> list[dict[str, Any]]:
    """Return what `reliability` says of the scorer on the small model's own solutions.

    Args:
        trees: The trees.
        small: Paths of always-small through R of them.
        problem: (R,) position of each path's problem.
        weights: (S, P) bootstrap resamples of the problems.

    Returns:
        A list with a ``name`` and a ``text`` each: against exact labels of steps (where the trees have them), against
        the end of the solution, and the least score of a solution against its end.
    """
    path, at = np.nonzero(small.rows >= 0)
    rows = small.rows[path, at]
    scores = np.asarray(trees.score[rows, CONTINUE_SMALL], np.float64)
    found = []
    labelled = np.asarray(trees.label[rows, CONTINUE_SMALL] >= 0)
    if labelled.any():
        right = right_so_far(trees)[rows, CONTINUE_SMALL]
        found.append(
            {"name": "steps", "text": "Score of a step: are all steps up to it right? (exact labels)"}
            | reliability(scores[labelled], right[labelled], problem[path[labelled]], weights)
        )
    found.append(
        {"name": "solution", "text": "Score of a step: is the finished solution right?"}
        | reliability(scores, small.correct[path], problem[path], weights)
    )
    least = np.full(len(small.rows), np.inf)
    np.minimum.at(least, path, scores)
    found.append(
        {"name": "least", "text": "Least score of a solution: is it right?"}
        | reliability(least, small.correct, problem, weights)
    )
    return found
