"""Recursive Bayes filter over S0, S1, S2, for n episodes at once.

Between steps a belief is one number, g = P(all accepted steps are right). The score of a proposal turns it into
probabilities of the three classes; accepting a proposal turns those into the next g.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
S0, S1, S2 = 0, 1, 2
RIGHT, WRONG = 0, 1


def predicted(g: Floats, p_small: Floats) -> Floats:
    """Return (..., 3) probabilities of the classes of a proposal of the small model before its score is seen.

    Args:
        g: (...) P(prefix right).
        p_small: (...) P(small step right | prefix right).
    """
    return np.stack([g * p_small, 1 - g, g * (1 - p_small)], axis=-1)


def corrected(classes: Floats, likelihood: Floats) -> tuple[Floats, Floats]:
    """Return the (..., 3) probabilities given the score, and its (...) probability; both arguments are (..., 3).

    A score that is impossible tells nothing.
    """
    joint = classes * likelihood
    total = joint.sum(axis=-1)
    return np.where(total[..., None] > 0, joint / np.where(total > 0, total, 1.0)[..., None], classes), total


def after_large(classes: Floats, p_large: Floats, repair: float | NDArray[np.float64]) -> Floats:
    """Return g once the large model has written the step instead, before the score of its step is seen.

    Args:
        classes: (..., 3) given the score of the proposal that was thrown away.
        p_large: (2, ...) P(large step right | prefix right, the proposal was right or wrong).
        repair: P(a large step mends a broken prefix).
    """
    mended: Floats = p_large[RIGHT] * classes[..., S0] + p_large[WRONG] * classes[..., S2] + repair * classes[..., S1]
    return mended


def scored(g: Floats, likelihood: Floats) -> Floats:
    """Return g given the score of the large model's step; `likelihood` is (..., 2), of right and wrong."""
    right, wrong = g * likelihood[..., RIGHT], (1 - g) * likelihood[..., WRONG]
    total = right + wrong
    return np.where(total > 0, right / np.where(total > 0, total, 1.0), g)
