"""How a reward model is fitted: settings alone, light to import."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rollouts.config import Count, NotNegative, Positive, settings


@settings
class Recipe:
    """How to fit a reward model.

    Attributes:
        layers: Blocks of the trunk that are kept, from the first on; default: of all, three quarters and half of them
            those that fit held-out problems best, or all where blocks are trained.
        added: Fresh blocks after them that are trained; they change nothing at first.
        unfreeze: How many of the last of the trunk's own blocks are trained too.
        token_weight: While blocks are trained, weight of every token of a step relative to the tag at its end. The
            value after a step is the target at all of its tokens, and the mean of theirs where steps begin alike.
        epochs: Most passes over the problems; it ends once held-out problems have gained nothing for a while.
        rate: Peak learning rate of the head and of fresh blocks.
        trunk_rate: Peak learning rate of unfrozen blocks.
        batch_tokens: Tokens of one batch of paths.
        seed: Of the problems that are held out, of weights and order: the same on one machine gives the same model.
    """

    layers: Count | None = None
    added: Annotated[int, Field(ge=0)] = 0
    unfreeze: Annotated[int, Field(ge=0)] = 0
    token_weight: NotNegative = 0.3
    epochs: Count = 20
    rate: Positive = 1e-3
    trunk_rate: Positive = 2e-5
    batch_tokens: Count = 512
    seed: int = 0

    @property
    def more(self) -> bool:
        """Whether more than the head learns."""
        return bool(self.added or self.unfreeze)
