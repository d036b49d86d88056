"""Takeover: once a router escalates, the large model writes all that follows (the paper's ablation of single steps)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.routers.asking import Asking
from agents.routers.base import Floats, Ints, Knob, Router, Scores, StatefulRouter, Tokens, Undrafted, told_cap
from rollouts.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Takeover:
    """One way: from the first escalation on the small model is not asked any more, nor is who reads its proposals.

    On trees it is exempt from a cap on escalations, as always-large is: what follows the first is no decision. The
    large model's path from there must have been generated, which in trees that are closed under K it mostly is not:
    that is an error there (``rollouts expand``).
    """

    trigger: Router | StatefulRouter

    def __post_init__(self) -> None:
        """Check that the trigger is one whose decisions alone are charged, and needs no cap that could not be kept.

        Raises:
            ConfigError: It asks, decides before there are proposals, is no router of steps, or was trained under a cap.
        """
        if not isinstance(self.trigger, Router | StatefulRouter) or isinstance(self.trigger, Asking | Undrafted):
            raise ConfigError(
                f"takeover: {self.trigger.name} cannot be its trigger; that is one router which decides on each "
                "proposal from all that it reads."
            )
        if (cap := told_cap(self.trigger)) is not None:
            raise ConfigError(
                f"{self.name}: {self.trigger.name} was trained under a cap of {cap} large tokens, which a takeover "
                "does not keep. Train it without."
            )

    @property
    def name(self) -> str:
        """As in tables and plots."""
        return f"takeover by {self.trigger.name}"

    @property
    def schema(self) -> str:
        """That of the trigger."""
        return self.trigger.schema

    @property
    def knob(self) -> Knob:
        """That of the trigger."""
        return self.trigger.knob

    @property
    def goes_on(self) -> bool:
        """What follows the first escalation is one request."""
        return True

    def start(self, n: int) -> Floats:
        """Return whether the large model has taken over, and what the trigger remembers."""
        own = self.trigger.start(n) if isinstance(self.trigger, StatefulRouter) else np.zeros((n, 0))
        return np.concatenate([np.zeros((n, 1)), own], axis=1)

    def decide(self, features: NDArray[np.float32], state: Floats) -> tuple[Floats, Floats]:
        """Return 1 once it was escalated, before that what the trigger says."""
        if isinstance(self.trigger, StatefulRouter):
            chance, own = self.trigger.decide(features, state[:, 1:])
        else:
            chance, own = self.trigger.probability(features), state[:, 1:]
        return np.where(self.undrafted(features, state), 1.0, chance), np.concatenate([state[:, :1], own], axis=1)

    def accept(self, state: Floats, actions: Ints, scores: Scores, tokens: Tokens) -> Floats:
        """Return the state after accepted steps."""
        own = state[:, 1:]
        if isinstance(self.trigger, StatefulRouter):
            own = self.trigger.accept(own, actions, scores, tokens)
        return np.concatenate([np.maximum(state[:, :1], actions[:, None]), own], axis=1)

    def undrafted(self, features: NDArray[np.float32], state: Floats) -> NDArray[np.bool_]:
        """Return where the large model has taken over."""
        return state[:, 0] > 0
