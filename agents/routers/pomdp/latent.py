"""What is hidden: whether the prefix, the small model's proposal and the large model's proposal are right.

A proposal makes the trajectory one of three classes (paper, section on TRIM-POMDP): S0, all steps right; S1, an
earlier step wrong; S2, only the newest step wrong. Here every node of compiled trees gets a weight for each
combination, so that exact labels (one combination has weight 1) and posteriors of EM are the same kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees, iterate_by_depth

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
S0, S1, S2 = 0, 1, 2
CLASSES = ("S0", "S1", "S2")
RIGHT, WRONG = 0, 1


@dataclass(frozen=True, eq=False)
class Latent:
    """Weights of what is hidden at M nodes; index 0 means right, 1 wrong.

    Attributes:
        rows: (M,) rows of the nodes.
        weight: (M, 2, 2, 2) weight of (accepted prefix, small step's trajectory, large step's trajectory). Sums to
            1 at a node of which all is known, to 0 where it is not.
    """

    rows: Ints
    weight: Floats

    def classes(self, action: int) -> Floats:
        """Return (M, 3) weights of S0, S1, S2 for one model's proposals; a mended trajectory counts as S0."""
        pair = self.weight.sum(axis=3 - action)  # over the other model's proposal
        return np.stack([pair[:, :, RIGHT].sum(axis=1), pair[:, WRONG, WRONG], pair[:, RIGHT, WRONG]], axis=1)

    @property
    def prefix(self) -> Floats:
        """(M, 2) weights of a right and of a wrong prefix."""
        weight: Floats = self.weight.sum(axis=(2, 3))
        return weight


def rows_of(trees: Trees, indices: NDArray[np.int64]) -> Ints:
    """Return the rows of the nodes of some trees, ascending."""
    member = np.zeros(len(trees.root), bool)
    member[indices] = True
    return np.flatnonzero(member[trees.tree])


def labelled(trees: Trees, rows: Ints) -> Latent:
    """Return what exact step labels say.

    A node below an unlabelled step has weight 0 unless a step before that one is wrong already. Below a right prefix,
    a node counts if every proposal that it has is labelled; a missing one is spread evenly.
    """
    state = np.zeros(trees.nodes, np.int8)  # of the prefix: 1 right, 0 wrong, -1 unknown
    state[trees.root] = 1
    for group in reversed(list(iterate_by_depth(trees))):
        for action in (CONTINUE_SMALL, ESCALATE_LARGE):
            child = trees.child[group, action]
            label, before = trees.label[group, action], state[group]
            after = np.where(before == 1, label, before)
            state[child[child >= 0]] = after[child >= 0]
    prefix, label = state[rows], trees.label[rows]
    share = np.stack([label == 1, label == 0], axis=2) + 0.5 * (trees.child[rows] == MISSING)[:, :, None]
    weight = np.zeros((len(rows), 2, 2, 2))
    weight[:, RIGHT] = (prefix == 1)[:, None, None] * share[:, 0, :, None] * share[:, 1, None, :]
    weight[prefix == 0, WRONG, WRONG, WRONG] = 1.0
    return Latent(rows, weight)
