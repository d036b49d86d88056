"""From trees to everything that a model is made of, with or without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.pomdp.dynamics import Dynamics, measure
from agents.pomdp.latent import Floats, Latent, labelled
from agents.pomdp.observation import ObservationModel, fit_observations
from agents.pomdp.sample import Kinds, Sample
from rollouts.tree import CONTINUE_SMALL, ESCALATE_LARGE


def observations(seen: Sample, latent: Latent) -> ObservationModel:
    """Estimate what scores tell from (weights of) what is hidden at the nodes of a sample.

    Raises:
        DataError: Too few steps of a class.
    """
    small = seen.present[:, CONTINUE_SMALL]
    large = seen.present[:, ESCALATE_LARGE] & ~seen.ends[:, ESCALATE_LARGE]  # scores of last steps change nothing
    return fit_observations(
        seen.edges,
        seen.level,
        (seen.bin[small, 0], seen.context[small], seen.kind[small], latent.classes(CONTINUE_SMALL)[small]),
        (seen.bin[large, 1], seen.context[large], latent.classes(ESCALATE_LARGE)[large]),
        seen.kinds.count,
    )
