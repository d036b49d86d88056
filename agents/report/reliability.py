"""Whether the scorer's numbers mean what they say: scores in bins against how often what they score is right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.outcomes import Floats
from agents.report.positions import by_problem, ratios
from agents.report.walks import Paths
from rollouts.trees.arrays import CONTINUE_SMALL, Trees
from rollouts.trees.stats import auc, right_so_far

BINS = 10


def reliability(
    name: str,
    text: str,
    scores: Floats,
    right: NDArray[np.bool_],
    problem: NDArray[np.integer[Any]],
    weights: Floats,
) -> dict[str, Any]:
    """Compare scores with what came true, in bins of equal width.

    ``error`` is the mean distance of score and share over the bins, weighted by counts: the expected calibration error.
    ``auc`` is P(a right one scores above a wrong one); NaN if all are alike.

    Args:
        name: Of the question that is answered.
        text: The question.
        scores: (n,) in [0, 1].
        right: (n,) whether what was scored is right.
        problem: (n,) position of its problem, 0..P-1.
        weights: As of `agents.report.positions.positions`.
    """
    inside = np.minimum((BINS * scores).astype(int), BINS - 1)[:, None] == np.arange(BINS)
    counts, good = (by_problem(each, problem, weights.shape[1]) for each in (inside, inside & right[:, None]))
    bins: list[dict[str, Any]] = [
        {
            "low": i / BINS,
            "high": (i + 1) / BINS,
            "count": count,
            "score": float(scores[inside[:, i]].mean()),
            "right": share,  # of what they score
        }
        for i, (count, share) in enumerate(zip(inside.sum(axis=0).tolist(), ratios(good, counts, weights), strict=True))
        if count
    ]
    error = sum(each["count"] * abs(each["score"] - each["right"].value) for each in bins) / max(len(scores), 1)
    return {"name": name, "text": text, "bins": bins, "error": error, "auc": auc(scores, right), "count": len(scores)}


def scorer_reliability(
    trees: Trees, small: Paths, problem: NDArray[np.integer[Any]], weights: Floats
) -> list[dict[str, Any]]:
    """Return what `reliability` says of the scorer on the small model's own solutions, the paths of always-small.

    Against exact labels of steps (where the trees have them), against the end of the solution, and the least score of a
    solution against its end.
    """
    path, at = np.nonzero(small.rows >= 0)
    rows = small.rows[path, at]
    scores = np.asarray(trees.score[rows, CONTINUE_SMALL], np.float64)
    least = np.full(len(small.rows), np.inf)
    np.minimum.at(least, path, scores)
    found = [
        ("solution", "Score of a step: is the finished solution right?", scores, small.correct[path], problem[path]),
        ("least", "Least score of a solution: is it right?", least, small.correct, problem),
    ]
    labelled = np.asarray(trees.label[rows, CONTINUE_SMALL] >= 0)
    if labelled.any():
        right = right_so_far(trees)[rows, CONTINUE_SMALL][labelled]
        text = "Score of a step: are all steps up to it right? (exact labels)"
        found.insert(0, ("steps", text, scores[labelled], right, problem[path[labelled]]))
    return [reliability(*each, weights) for each in found]
