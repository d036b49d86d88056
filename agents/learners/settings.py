"""Settings of the learners, and what every training has: rounds over which λ rises while steps and exploration fall."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from rollouts.config import Count, NotNegative, Positive, settings
from rollouts.errors import ConfigError


@settings
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

    iterations: Count = 32
    hidden: Count = 32
    learning_rate: Positive = 5e-3
    entropy: NotNegative = 0.003
    lam_start: Annotated[float, Field(gt=0, le=1)] = 0.2
    lam_ramp: Annotated[float, Field(ge=0, lt=1)] = 0.2

    section: ClassVar[str] = ""

    def lam_share(self, iteration: int) -> float:
        """Return the share of λ that applies in a round, from 0.

        It starts below λ: while λ is small, escalating pays almost everywhere, and a learner that begins at the full λ
        may never find out where it does.
        """
        ramp = self.lam_ramp * self.iterations
        return self.lam_start + (1 - self.lam_start) * min(1.0, iteration / ramp) if ramp else 1.0


@settings
class PPOSettings(LearnerSettings):
    """Settings of PPO.

    Attributes:
        hidden: Units of each of the two tanh layers, of policy and value function alike.
        num_envs: Episodes that run side by side.
        n_steps: Decisions of each of them in an iteration.
        batch_size: Decisions in a minibatch.
        n_epochs: Passes over what an iteration collected.
        clip_range: PPO's clip range.
        gae_lambda: λ of generalised advantage estimation (not the trade-off λ).
    """

    num_envs: Count = 1024
    n_steps: Count = 16
    batch_size: Count = 2048
    n_epochs: Count = 4
    clip_range: Positive = 0.2
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95

    section: ClassVar[str] = "ppo"

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        if self.num_envs * self.n_steps < 2:
            raise ConfigError(
                f"--{self.section}.num-envs * --{self.section}.n-steps is 1, expected at least 2 decisions in an "
                "iteration."
            )


@settings
class SeqSettings(PPOSettings):
    """Settings of the learner of TRIM-Seq (`agents.learners.ppo_seq`): those of PPO, and the shape of its transformer.

    Attributes:
        learning_rate: At the start; it falls linearly to a tenth.
        width: Units of a step.
        layers: Attention blocks.
        heads: Attention heads of each; they share the width.
    """

    learning_rate: Positive = 2e-3
    width: Count = 32
    layers: Count = 1
    heads: Count = 4

    section: ClassVar[str] = "seq"

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(
                f"--seq.width is {self.width}, --seq.heads {self.heads}, expected a width that the heads divide."
            )


@settings
class TreeSettings(LearnerSettings):
    """Settings of the exact tree gradient.

    Attributes:
        updates: Gradient steps in a round.
        batch: Trees in a minibatch.
        entropy: Weight of the entropy bonus at the start; it falls linearly to 0.
        weight_decay: Of AdamW.
    """

    updates: Count = 16
    batch: Count = 1000
    entropy: NotNegative = 0.03
    weight_decay: NotNegative = 0.0

    section: ClassVar[str] = "tree"
