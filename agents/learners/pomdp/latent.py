"""What is hidden: whether the prefix, the small model's proposal and the large model's proposal are right.

A proposal makes the trajectory one of three classes (paper, section on TRIM-POMDP): S0, all steps right; S1, an
earlier step wrong; S2, only the newest step wrong. Here every node of compiled trees gets a weight for each
combination, so that exact labels (one combination has weight 1) and posteriors of EM are the same kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.routers.pomdp.belief import RIGHT, WRONG, Floats, Ints
from rollouts.trees.arrays import MISSING, Trees, graph_of

CLASSES = ("S0", "S1", "S2")


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


def labelled(trees: Trees, rows: Ints) -> Latent:
    """Return what exact step labels say.

    A node below an unlabelled step has weight 0 unless a step before that one is wrong already. Below a right prefix,
    a node counts if every proposal that it has is labelled; a missing one is spread evenly.
    """
    graph, label = graph_of(trees), trees.label
    right = graph.reach(label == 1)[:-1] > 0
    broken = np.zeros(trees.nodes + 1)
    broken[graph.child[right[:, None] & (label == 0)]] = 1.0
    wrong = graph.reach(np.ones(label.shape), broken[:-1])[:-1] > 0
    label = label[rows]
    share = np.stack([label == 1, label == 0], axis=2) + 0.5 * (trees.child[rows] == MISSING)[:, :, None]
    weight = np.zeros((len(rows), 2, 2, 2))
    weight[:, RIGHT] = right[rows, None, None] * share[:, 0, :, None] * share[:, 1, None, :]
    weight[wrong[rows], WRONG, WRONG, WRONG] = 1.0
    return Latent(rows, weight)
