"""Settings of the learners, and what every training has: rounds over which λ rises while steps and exploration fall."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from rollouts.config import Count, NotNegative, Positive, settings
from rollouts.errors import ConfigError, did_you_mean

STARTS = ("random", "exact")
EXACT_RULES = ("auto", "linear", "quadratic", "mlp")


@settings
class PPOSettings:
    """Settings of PPO.

    Attributes:
        iterations: Rounds, after each of which the router is measured on validation.
        hidden: Units of each of the two tanh layers, of policy and value function alike.
        learning_rate: At the start; it falls linearly to a tenth.
        entropy: Weight of the entropy bonus at the start; it falls linearly to 0.
        anneal: Whether these two fall.
        normalize: Whether advantages are brought to mean 0 and deviation 1 in every minibatch.
        lam_start: Share of λ that the training begins with.
        lam_ramp: Share of the rounds over which it rises to λ.
        num_envs: Episodes that run side by side.
        n_steps: Decisions of each of them in an iteration.
        batch_size: Decisions in a minibatch.
        n_epochs: Passes over what an iteration collected.
        clip_range: PPO's clip range.
        gae_lambda: λ of generalised advantage estimation (not the trade-off λ).
        start: What the policy begins as: ``random``, or ``exact``, the rule of the exact learner, cloned; λ is then
            whole from the start.
    """

    iterations: Count = 32
    hidden: Count = 32
    learning_rate: Positive = 5e-3
    entropy: NotNegative = 0.003
    anneal: bool = True
    normalize: bool = True
    lam_start: Annotated[float, Field(gt=0, le=1)] = 0.2
    lam_ramp: Annotated[float, Field(ge=0, lt=1)] = 0.2
    num_envs: Count = 1024
    n_steps: Count = 16
    batch_size: Count = 2048
    n_epochs: Count = 4
    clip_range: Positive = 0.2
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    start: str = "random"

    section: ClassVar[str] = "ppo"

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        if self.start not in STARTS:
            raise ConfigError(f"Unknown --{self.section}.start {self.start!r}.{did_you_mean(self.start, STARTS)}")
        if self.num_envs * self.n_steps < 2:
            raise ConfigError(
                f"--{self.section}.num-envs * --{self.section}.n-steps is 1, expected at least 2 decisions in an "
                "iteration."
            )

    def lam_share(self, iteration: int) -> float:
        """Return the share of λ that applies in a round, from 0.

        It starts below λ: while λ is small, escalating pays almost everywhere, and a learner that begins at the full λ
        may never find out where it does.
        """
        ramp = self.lam_ramp * self.iterations
        return self.lam_start + (1 - self.lam_start) * min(1.0, iteration / ramp) if ramp else 1.0


PAPER: dict[str, Any] = {
    "hidden": 128, "learning_rate": 1e-4, "entropy": 0.01, "anneal": False, "normalize": False, "lam_start": 1.0,
    "lam_ramp": 0.0, "clip_range": 0.2, "gae_lambda": 0.95,
}  # fmt: skip
"""What the paper tells of its PPO (arXiv 2601.10245); batches, passes and the number of decisions it does not tell."""


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
class ExactSettings:
    """Settings of the exact learner (`agents.learners.exact`).

    Attributes:
        rule: ``linear``, ``quadratic``, ``mlp`` (one hidden layer), or ``auto``: the one that returns most on held-out
            problems.
        hidden: Units of ``mlp``.
    """

    rule: str = "quadratic"
    hidden: Count = 8

    section: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        if self.rule not in EXACT_RULES:
            raise ConfigError(f"Unknown --exact.rule {self.rule!r}.{did_you_mean(self.rule, EXACT_RULES)}")
