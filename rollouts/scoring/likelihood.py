"""Scores without a reward model: the least token probability of a step under the small or the large model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rollouts.errors import ConfigError
from rollouts.models.base import Backend, LogprobRequest
from rollouts.models.futures import forward, settled
from rollouts.scoring.base import Scores
from rollouts.text.prompts import PromptFormat


@dataclass(eq=False)
class LikelihoodScorer:
    """Least token probability of each step, at temperature 1, in one prefill pass per path; nothing is decoded.

    A step is as doubtful as its most surprising token. End-of-sequence tokens are not counted; a step without
    any text scores 0. A backend that gives no log-probabilities of prompts is a ConfigError.
    """

    name: str
    backend: Backend
    prompts: PromptFormat
    model: str
    tolerance: float = field(default=2e-2, init=False)  # probabilities near 1/2 feel the rounding of bfloat16 logits

    def __post_init__(self) -> None:
        """Check that the backend gives log-probabilities of prompts."""
        if not self.backend.capabilities.prompt_logprobs:
            raise ConfigError(
                f"Scorer {self.name!r}: the backend of {self.backend.role!r} gives no prompt log-probabilities."
            )

    def process(self) -> Mapping[str, Any]:
        """Return model and prompt format."""
        return {
            "kind": "likelihood",
            "model": self.model,
            "template_hash": self.prompts.template_hash,
            "identities": {self.backend.role: dict(self.backend.identity)},
        }

    def submit(self, question: str, steps: Sequence[str]) -> Future[Scores]:
        """Score one path with one prefill pass over the steps that fit."""
        ids, positions = self.prompts.step_spans(question, steps)
        kept = len(steps)
        while kept and positions[kept] >= self.backend.window:
            kept -= 1
        unread: Scores = [None] * (len(steps) - kept)
        if kept == 0 or positions[kept] == positions[0]:
            return settled([*[0.0] * kept, *unread])
        result: Future[Scores] = Future()

        def take(logprobs: list[float]) -> None:
            scores: Scores = []
            for start, end in zip(positions[:kept], positions[1 : kept + 1], strict=True):
                span = logprobs[start - positions[0] : end - positions[0]]
                scores.append(min(1.0, math.exp(min(span))) if span else 0.0)
            result.set_result(scores + unread)

        forward(self.backend.submit(LogprobRequest(ids[: positions[kept]], positions[0])), take, result)
        return result
