"""Scores from a process reward model: one forward pass gives P(all steps so far are right) at every step tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rollouts.errors import BackendError
from rollouts.models.base import Backend, PoolingRequest
from rollouts.models.futures import forward, settled
from rollouts.scoring.base import Scores
from rollouts.text.prompts import RewardFormat


@dataclass(eq=False)
class RewardScorer:
    """A process reward model in the layout of Qwen2.5-Math-PRM behind any backend that can pool."""

    name: str
    backend: Backend
    prompts: RewardFormat
    model: str
    tolerance: float = field(default=5e-3, init=False)

    def process(self) -> Mapping[str, Any]:
        """Return model and input format."""
        return {
            "kind": "prm",
            "model": self.model,
            "step_tag": self.prompts.step_tag,
            "template_hash": self.prompts.template_hash,
            "identities": {self.backend.role: dict(self.backend.identity)},
        }

    def submit(self, question: str, steps: Sequence[str]) -> Future[Scores]:
        """Score one path with one forward pass over the steps that fit."""
        ids, kept = fitting_input(self.prompts, self.backend.window, question, steps)
        unread: Scores = [None] * (len(steps) - kept)
        if kept == 0:
            return settled(unread)
        result: Future[Scores] = Future()

        def take(scores: Scores) -> None:
            if len(scores) != kept:
                raise BackendError(f"{self.backend.role}: {len(scores)} scores came back for {kept} steps.")
            result.set_result(scores + unread)

        forward(self.backend.submit(PoolingRequest(ids)), take, result)
        return result


def fitting_input(
    prompts: RewardFormat, window: int, question: str, steps: Sequence[str]
) -> tuple[tuple[int, ...], int]:
    """Return the input over as many leading steps as fit into a window, and how many these are."""
    kept = len(steps)
    while len(ids := prompts.ids(question, steps[:kept])) > window and kept:
        kept -= 1
    return ids, kept
