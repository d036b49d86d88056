"""The two presets of the decision process: as measured, and under the paper's assumptions."""

from __future__ import annotations

import numpy as np

from agents.learners.pomdp.dynamics import Dynamics
from agents.learners.pomdp.observation import ObservationModel
from agents.routers.pomdp.model import Kinds, Model, expected_tokens


def measured(observed: ObservationModel, dynamics: Dynamics, kinds: Kinds) -> Model:
    """Return the model as measured."""
    ends = np.broadcast_to(kinds.terminal.astype(np.float64), dynamics.kind.shape).copy()
    wrong = np.arange(kinds.count) == kinds.count - 1  # ends without an answer
    right = dynamics.end_value[0, wrong.astype(int)], dynamics.end_value[1, wrong.astype(int)]
    ends[-1] = 1.0
    return Model(
        kinds=kinds,
        edges=observed.edges,
        level=observed.level,
        small=observed.small,
        large=observed.large,
        kind=dynamics.kind,
        p_small=dynamics.p_small,
        p_large=dynamics.p_large,
        repair=dynamics.repair.value,
        ends=ends,
        large_ends=dynamics.large_ends,
        end_value=np.stack([right[0], right[1], right[1]], axis=1),
        large_end_value=dynamics.end_value[:, 0],
        tokens=expected_tokens(dynamics.token_line, dynamics.small_tokens),
        token_line=dynamics.token_line,
    )


def paper(observed: ObservationModel, dynamics: Dynamics) -> Model:
    """Return the model under the paper's assumptions, with constants measured from the same trees.

    One accuracy per model; scores are independent given the class; what is wrong stays wrong; scores of large steps
    tell nothing; whether a proposal is the last is not seen, only its hazard by step is known; future escalations
    cost the mean number of tokens, the present one as many as the proposal has.
    """
    steps, bins = len(dynamics.kind), observed.bins
    ends = np.array([[rate.value] for rate in dynamics.hazard])
    ends[-1] = 1.0
    line = np.zeros((steps, 1, 2))
    line[..., 1] = 1.0
    return Model(
        kinds=Kinds(np.zeros(0, np.float32), single=True),
        edges=observed.edges,
        level=np.zeros(bins, np.int64),
        small=observed.pooled[None, None],
        large=np.full((1, 2, bins), 1 / bins),
        kind=np.ones((steps, 1)),
        p_small=np.full((steps, 1), dynamics.small_right.value),
        p_large=np.full((2, 1), dynamics.large_right.value),
        repair=0.0,
        ends=ends,
        large_ends=ends,
        end_value=np.array([[1.0, 0.0, 0.0]]),
        large_end_value=np.array([1.0, 0.0]),
        tokens=np.full((steps, 1), dynamics.mean_large_tokens),
        token_line=line,
    )
