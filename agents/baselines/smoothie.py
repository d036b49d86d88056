"""Smoothie (Guha et al., arXiv 2412.04692): whose outputs are nearest to the others', without labels.

Voters are the replicas of both models. The cost has no place in it; the threshold on the difference is ours.
"""

from __future__ import annotations

import numpy as np

from agents.baselines.examples import as_float32, questions_of
from agents.baselines.routellm import Features
from agents.evaluation.walk import solutions
from agents.routers.base import Floats, Knob
from agents.routers.text import CharTfidf, Preference, TextRouter
from rollouts.errors import DataError
from trim_env.tables import DecisionTables

NEAREST = 20


def distances(outputs: Floats) -> Floats:
    """Return the (P, k, k) squared distances of (P, k, d) outputs."""
    squares = (outputs**2).sum(axis=2)
    inner = outputs @ outputs.transpose(0, 2, 1)
    found: Floats = np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * inner, 0)
    return found


def fit(tables: DecisionTables, features: Features, count: int = NEAREST) -> TextRouter:
    """Remember how far the outputs are from each other, for the nearest `count` questions of each new one.

    Args:
        tables: Problems whose outputs are compared; nothing is read of which are right.
        features: Of questions.
        count: Neighbours.

    Raises:
        DataError: There are fewer than three voters for a problem.
    """
    trees = tables.trees
    problem, replica = trees.problem[tables.indices], trees.replica[tables.indices]
    problems, place = np.unique(problem, return_inverse=True)
    several = int(np.bincount(place).min())
    if 2 * several < 3:
        raise DataError(
            f"Smoothie compares at least three outputs for a question; these problems have {2 * several}, one of each "
            "model for each replica. Generate more replicas."
        )
    texts = [solutions(tables, action) for action in (0, 1)]
    embed = CharTfidf.fit([*texts[0], *texts[1]])
    order = np.lexsort((replica, place))
    first = np.searchsorted(place[order], np.arange(len(problems)))
    voters = order[first[:, None] + np.arange(several)]  # (P, several) trees
    outputs = np.concatenate([embed(each)[voters] for each in texts], axis=1)
    weights = as_float32(
        memory=features(questions_of(tables)),
        told=distances(outputs),
        large=np.repeat([0.0, 1.0], several),
        count=count,
    )
    return TextRouter("Smoothie", Knob("threshold", 0.0), Preference("smoothie", features, weights))
