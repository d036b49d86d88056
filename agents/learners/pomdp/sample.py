"""What can be seen at the nodes of trees, as a POMDP sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.pomdp.belief import Floats, Ints
from agents.routers.pomdp.model import SCHEMA, TOKENS, Kinds, as_feature, to_bins
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, TERMINAL, Trees
from rollouts.trees.columns import columns_of
from trim_env.features import schema_named

TOKEN_BINS = 3
BINS = 24
LEVELS = 12


def score_edges(scores: NDArray[np.floating[Any]], bins: int = BINS) -> NDArray[np.float32]:
    """Return at most ``bins - 1`` ascending edges between quantiles of the scores, in the scale of `as_feature`.

    A value that makes up more than a bin's share of the scores is an edge once, and begins a bin.
    """
    values = as_feature(scores[~np.isnan(scores)])
    return np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf")).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Sample:
    """M nodes with what is seen at them.

    Attributes:
        rows: (M,) rows of the nodes, ascending.
        kind: (M,) kind of the small model's proposal.
        step: (M,) step number minus 1, 0..T-1.
        level: (B,) level of each bin of scores: groups of neighbours, as what comes next remembers a score.
        context: (M,) level of the score of the last accepted step; the number of levels at a root.
        bin: (M, 2) bin of the score of each model's proposal; 0 where there is none.
        ends: (M, 2) whether accepting it ends the episode.
        answered: (M, 2) whether it states an answer.
        same: (M,) whether both models wrote the same step.
        tokens: (M, 2) tokens of the proposals.
    """

    trees: Trees
    rows: Ints
    kinds: Kinds
    edges: NDArray[np.float32]
    kind: Ints
    step: Ints
    level: Ints
    context: Ints
    bin: Ints
    present: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    same: NDArray[np.bool_]
    tokens: Floats
    max_steps: int


def sample(trees: Trees, rows: Ints, *, levels: int = LEVELS) -> Sample:
    """Gather what is seen at some rows; edges of scores are quantiles of the scores there."""
    features = schema_named(SCHEMA)(columns_of(trees, rows), trees.child[rows, CONTINUE_SMALL] != MISSING)
    child, scores = trees.child[rows], trees.score[rows]
    present = child != MISSING
    inner = (child[:, CONTINUE_SMALL] >= 0)[:, None] & np.array([True, False])
    cuts = np.quantile(features[:, TOKENS][inner[:, 0]], np.arange(1, TOKEN_BINS) / TOKEN_BINS) if inner.any() else []
    kinds = Kinds(np.unique(np.asarray(cuts, np.float32)))
    edges = score_edges(scores[present])
    bins = len(edges) + 1
    level = np.arange(bins) * levels // bins
    both = child[:, CONTINUE_SMALL] == child[:, ESCALATE_LARGE]
    ended = both & (child[:, CONTINUE_SMALL] == TERMINAL) & _same_text(trees, rows, both)
    return Sample(
        trees=trees,
        rows=rows,
        kinds=kinds,
        edges=edges,
        kind=kinds.of(features),
        step=np.asarray(trees.depth[rows], np.int64),
        level=level,
        context=_contexts(trees, rows, edges, level),
        bin=np.where(present, to_bins(edges, as_feature(scores)), 0),
        present=present,
        ends=child == TERMINAL,
        answered=np.asarray(trees.has_answer[rows]),
        same=(both & (child[:, CONTINUE_SMALL] >= 0)) | ended,
        tokens=np.asarray(trees.tokens[rows], np.float64),
        max_steps=int(trees.meta["max_steps"]),
    )


def _contexts(trees: Trees, rows: Ints, edges: NDArray[np.float32], level: Ints) -> Ints:
    before = np.full(trees.nodes, np.nan)
    for action in (CONTINUE_SMALL, ESCALATE_LARGE):
        child = trees.child[:, action]
        before[child[child >= 0]] = trees.score[child >= 0, action]
    before = before[rows]
    return np.where(np.isnan(before), level.max() + 1, level[to_bins(edges, as_feature(before))])


def _same_text(trees: Trees, rows: Ints, where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    same = np.zeros(len(rows), bool)
    for place in np.flatnonzero(where & (trees.child[rows, CONTINUE_SMALL] == TERMINAL)):
        same[place] = trees.proposal(rows[place], CONTINUE_SMALL) == trees.proposal(rows[place], ESCALATE_LARGE)
    return same
