"""What every learner's training has: rounds over which λ rises while steps and exploration get smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rollouts.errors import ConfigError


@dataclass(frozen=True)
class LearnerSettings:
    """Settings that all learners share.

    Attributes:
        iterations: Rounds, after each of which the router is measured on validation.
        hidden: Units of each of the two tanh layers.
        learning_rate: At the start; it falls linearly to a tenth.
        entropy: Weight of the entropy bonus at the start; it falls linearly to 0.
        lam_start: Share of λ that the training begins with.
        lam_ramp: Share of the rounds over which it rises to λ.
    """

    iterations: int = 32
    hidden: int = 32
    learning_rate: float = 5e-3
    entropy: float = 0.003
    lam_start: float = 0.2
    lam_ramp: float = 0.2

    section: ClassVar[str] = ""  # as users name these settings
    counts: ClassVar[tuple[str, ...]] = ("iterations", "hidden")  # at least 1 each

    def __post_init__(self) -> None:
        """Check what would otherwise fail later.

        Raises:
            ConfigError: A value is out of range.
        """
        for name in self.counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.section}.{name} is {getattr(self, name)}, expected at least 1.")
        for name, fine, expected in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("entropy", 0 <= self.entropy < math.inf, "a number of at least 0"),
            ("lam_start", 0 < self.lam_start <= 1, "a share above 0 and at most 1"),
            ("lam_ramp", 0 <= self.lam_ramp < 1, "a share of at least 0 and below 1"),
        ):
            if not fine:
                raise ConfigError(f"{self.section}.{name} is {getattr(self, name)}, expected {expected}.")

    def lam_share(self, iteration: int) -> float:
        """Return the share of λ that applies in a round, from 0.

        It starts below λ: while λ is small, escalating pays almost everywhere, and a learner that begins at the full λ
        may never find out where it does.
        """
        ramp = self.lam_ramp * self.iterations
        return self.lam_start + (1 - self.lam_start) * min(1.0, iteration / ramp) if ramp else 1.0
