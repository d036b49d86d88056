"""Scores of a process reward model as noisy observations of the hidden class: probabilities of bins of scores.

Scores of such models pile up near 0 and 1. Bins between quantiles of all scores are as fine as the scores are dense,
so the piles stay where they are, and so do values that occur exactly often; a kernel estimate would smear them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.learners.pomdp.latent import CLASSES, Latent
from agents.learners.pomdp.sample import Sample
from agents.routers.pomdp.belief import S0, S1, S2, Floats, Ints
from rollouts.errors import DataError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE

LEAST_PER_CLASS = 30  # fewer labelled steps of a class than these tell nothing of its scores
_UNIFORM = 0.5  # pseudo-steps per bin, for a class as a whole
_POOLED = 20.0  # pseudo-steps of the coarser shares behind each finer ones
_KERNEL = np.array([0.25, 0.5, 0.25])


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


def observations(seen: Sample, latent: Latent) -> ObservationModel:
    """Estimate what scores tell from (weights of) what is hidden at the nodes of a sample.

    Finer shares are shrunk towards coarser ones: those of a kind in a context to those of the context, these to
    those of the class.

    Raises:
        DataError: Too few steps of a class.
    """
    bins, contexts = len(seen.edges) + 1, int(seen.level.max()) + 2
    counts = np.zeros((contexts, seen.kinds.count, 3, bins))
    own = np.zeros((contexts, 3, bins))
    small = seen.present[:, CONTINUE_SMALL]
    large = seen.present[:, ESCALATE_LARGE] & ~seen.ends[:, ESCALATE_LARGE]  # scores of last steps change nothing
    by_small, by_large = (latent.classes(action) for action in (CONTINUE_SMALL, ESCALATE_LARGE))
    for each in range(3):
        place = seen.context[small], seen.kind[small], seen.bin[small, CONTINUE_SMALL]
        np.add.at(counts[:, :, each], place, by_small[small, each])
        np.add.at(own[:, each], (seen.context[large], seen.bin[large, ESCALATE_LARGE]), by_large[large, each])
    total = np.stack([counts.sum(axis=(0, 1, 3)), own.sum(axis=(0, 2))])
    _need_steps(total[0])
    pooled = _towards(counts.sum(axis=(0, 1)), np.full(bins, 1 / bins), _UNIFORM * bins)
    by_context = _towards(counts.sum(axis=1), pooled, _POOLED)
    by_kind = _towards(counts, by_context[:, None], _POOLED)
    two = np.stack([counts.sum(axis=1)[:, S0], counts.sum(axis=1)[:, S1] + counts.sum(axis=1)[:, S2]], axis=1)
    base = _towards(two.sum(axis=0), np.full(bins, 1 / bins), _UNIFORM * bins)
    halves = np.stack([own[:, S0], own[:, S1] + own[:, S2]], axis=1)
    of_large = _towards(halves, _towards(two, base, _POOLED), _POOLED)
    return ObservationModel(seen.edges, seen.level, by_kind, of_large, pooled, total)


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
