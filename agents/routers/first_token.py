"""Routers that look at the first token of a step alone (GlimpRouter)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Knob
from trim_env.features import nats, schema_named

_SCHEMA = "small.first_entropy,terminal"


@dataclass(frozen=True)
class FirstToken:
    """Escalates where the small model is in doubt at the first token of a step, and at the last step always.

    The rule of GlimpRouter: entropy of the 20 likeliest first tokens (here all others count as one more instead of
    being left out, `rollouts.text.likelihood.top_entropy`). As one token is enough to decide, nothing is drafted where
    it escalates. A final step is known by what the small model writes, so that one is drafted.

    Attributes:
        entropy: Nats from which on it escalates.
        last: Whether final steps are always the large model's.
    """

    entropy: float
    last: bool = True
    name: str = "first token"

    @property
    def schema(self) -> str:
        """The entropy of the first token, and whether the proposal ends the solution."""
        return schema_named(_SCHEMA).id

    @property
    def knob(self) -> Knob:
        """The entropy."""
        return Knob("threshold", self.entropy)

    @property
    def goes_on(self) -> bool:
        """Each step is a request of its own."""
        return False

    def _doubtful(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return features[:, 0] <= np.float32(nats(np.array(self.entropy, np.float32)))

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) of 0 and 1."""
        return (self._doubtful(features) | (self.last & (features[:, 1] > 0))).astype(np.float64)

    def undrafted(self, features: NDArray[np.float32], state: Floats) -> NDArray[np.bool_]:
        """Return where the first token was enough."""
        return self._doubtful(features)
