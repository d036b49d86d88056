"""Scores of a process reward model as noisy observations of the hidden class: probabilities of bins of scores.

Scores of such models pile up near 0 and 1. Bins between quantiles of all scores are as fine as the scores are dense,
so the piles stay where they are, and so do values that occur exactly often; a kernel estimate would smear them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.learners.pomdp.latent import CLASSES
from agents.routers.pomdp.belief import S0, S1, S2, Floats, Ints
from agents.routers.pomdp.model import as_feature
from rollouts.errors import DataError

BINS = 24
LEVELS = 12
LEAST_PER_CLASS = 30  # fewer labelled steps of a class than these tell nothing of its scores
_UNIFORM = 0.5  # pseudo-steps per bin, for a class as a whole
_POOLED = 20.0  # pseudo-steps of the coarser shares behind each finer ones
_KERNEL = np.array([0.25, 0.5, 0.25])


def score_edges(scores: NDArray[np.floating[Any]], bins: int = BINS) -> NDArray[np.float32]:
    """Return at most ``bins - 1`` ascending edges between quantiles of the scores, in the scale of `as_feature`.

    A value that makes up more than a bin's share of the scores is an edge once, and begins a bin.
    """
    values = as_feature(scores[~np.isnan(scores)])
    return np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf")).astype(np.float32)


def levels_of(bins: int, levels: int) -> Ints:
    """Return the (B,) level of each bin of scores: groups of neighbours, as what comes next remembers a score."""
    return np.arange(bins, dtype=np.int64) * levels // bins


def smoothed(counts: Floats) -> Floats:
    """Return (..., B) counts with a little moved to the neighbouring bins, which are narrow where scores are dense."""
    bins = counts.shape[-1]
    padded = np.concatenate([counts[..., :1], counts, counts[..., -1:]], axis=-1)
    result: Floats = np.sum([share * padded[..., i : i + bins] for i, share in enumerate(_KERNEL)], axis=0)
    return result


@dataclass(frozen=True, eq=False)
class ObservationModel:
    """P(bin of the score | class, level of the score before).

    A reward model reads the whole prefix: its scores are anything but independent given the class, and a belief that
    took them so would be far too sure of itself. So each score is conditioned on the level of the last accepted
    step's score; C contexts are M such levels and, last, the start, where there is none.

    Attributes:
        edges: (B - 1,) float32 edges of the bins, in the scale of `as_feature`.
        level: (B,) level of each bin, 0..M-1.
        small: (C, K, 3, B) for the small model's proposals of K kinds (`agents.routers.pomdp.model.Kinds`), given
            S0, S1, S2.
        large: (C, 2, B) for the large model's steps, given that all steps up to it are right, or not.
        pooled: (3, B) for the small model's proposals whatever their context and kind.
        counts: (2, 3) (expected) number of S0, S1, S2 behind them: the small model's, the large model's.
    """

    edges: NDArray[np.float32]
    level: Ints
    small: Floats
    large: Floats
    pooled: Floats
    counts: Floats

    @property
    def bins(self) -> int:
        """B."""
        return len(self.edges) + 1


def fit_observations(
    edges: NDArray[np.float32],
    level: Ints,
    small: tuple[Ints, Ints, Ints, Floats],
    large: tuple[Ints, Ints, Floats],
    kinds: int,
) -> ObservationModel:
    """Estimate the model from steps with (weights of) classes.

    Finer shares are shrunk towards coarser ones: those of a kind in a context to those of the context, these to
    those of the class.

    Args:
        edges: Edges of the bins.
        level: (B,) level of each bin.
        small: The small model's proposals: (n,) bins, (n,) contexts, (n,) kinds, (n, 3) weights of S0, S1, S2.
        large: The large model's: (m,) bins, (m,) contexts, (m, 3) weights.
        kinds: K.

    Raises:
        DataError: Too few steps of a class.
    """
    bins, contexts = len(edges) + 1, int(level.max()) + 2
    place, context, kind, weight = small
    counts = np.zeros((contexts, kinds, 3, bins))
    own = np.zeros((contexts, 3, bins))
    for each in range(3):
        np.add.at(counts[:, :, each], (context, kind, place), weight[:, each])
        np.add.at(own[:, each], (large[1], large[0]), large[2][:, each])
    total = np.stack([counts.sum(axis=(0, 1, 3)), own.sum(axis=(0, 2))])
    _need_steps(total[0])
    pooled = _towards(counts.sum(axis=(0, 1)), np.full(bins, 1 / bins), _UNIFORM * bins)
    by_context = _towards(counts.sum(axis=1), pooled, _POOLED)
    by_kind = _towards(counts, by_context[:, None], _POOLED)
    two = np.stack([counts.sum(axis=1)[:, S0], counts.sum(axis=1)[:, S1] + counts.sum(axis=1)[:, S2]], axis=1)
    base = _towards(two.sum(axis=0), np.full(bins, 1 / bins), _UNIFORM * bins)
    halves = np.stack([own[:, S0], own[:, S1] + own[:, S2]], axis=1)
    by_large = _towards(halves, _towards(two, base, _POOLED), _POOLED)
    return ObservationModel(edges, level, by_kind, by_large, pooled, total)


def _towards(counts: Floats, base: Floats, strength: float) -> Floats:
    """Return (..., B) shares of smoothed counts and of `strength` more that are spread as `base`."""
    result: Floats = (smoothed(counts) + strength * base) / (counts.sum(axis=-1, keepdims=True) + strength)
    return result


def _need_steps(counts: Floats) -> None:
    if (counts < LEAST_PER_CLASS).any():
        found = ", ".join(f"{count:.0f} of {name}" for name, count in zip(CLASSES, counts, strict=True))
        raise DataError(
            f"Too few steps with known class to estimate what scores tell: {found}; expected at least "
            f"{LEAST_PER_CLASS} of each (S0: all steps right, S1: an earlier one wrong, S2: only the newest one "
            "wrong). Label more solutions, or generate rollouts of more problems."
        )
