"""Compiled trees that were changed so that the best router is known."""

from dataclasses import replace

import numpy as np


def telling(trees):
    """Return trees whose scores tell the future: the score of a proposal is whether accepting it is right.

    A router that reads its features reaches the oracle at a small λ: escalate exactly where it pays.
    """
    score = trees.score.copy()
    value = np.zeros(trees.nodes)
    for row in reversed(range(trees.nodes)):
        options = []
        for action in (0, 1):
            child = trees.child[row, action]
            later = value[child] if child >= 0 else float(trees.correct[row, action] == 1)
            options.append(later - 0.001 * trees.tokens[row, 1] * action)
        score[row, 0] = 0.9 if options[0] >= options[1] else 0.1
        value[row] = max(options)
    return replace(trees, score=score)
