"""Scores from a process reward model: one forward pass gives P(all steps so far are right) after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rollouts.errors import BackendError
from rollouts.models.base import Backend, PoolingRequest
from rollouts.models.futures import settled
from rollouts.scoring.base import Scores, asked
from rollouts.text.prompts import RewardFormat, RewardLayout


def process_of(prompts: RewardLayout, model: str) -> dict[str, Any]:
    """Return what decides the scores of a reward model, but for what is in it: its name and input format."""
    known = {"step_tag": prompts.step_tag} if isinstance(prompts, RewardFormat) else {"layout": prompts.layout}
    return {"kind": "prm", "model": model, **known, "template_hash": prompts.template_hash}


def rounding(engine: Mapping[str, Any]) -> float:
    """Return the `tolerance` of scores that an engine gives, by its number format; servers do not tell theirs.

    In bfloat16 what follows a step in a pass moves its hidden states: by 1 % in a real model of 0.5B, which is 0.1 of a
    logit of 3, and 0.03 of a probability near one half.
    """
    return 5e-3 if engine.get("dtype") in ("float32", "float64") else 5e-2


@dataclass(eq=False)
class RewardScorer:
    """A process reward model of any layout behind any backend that can pool."""

    name: str
    backend: Backend
    prompts: RewardLayout
    model: str
    tolerance: float = 5e-3
    incremental: bool = field(default=True, init=False)

    def process(self) -> Mapping[str, Any]:
        """Return model and input format."""
        return {**process_of(self.prompts, self.model), "identities": {self.backend.role: dict(self.backend.identity)}}

    def submit(self, question: str, steps: Sequence[str], known: int = 0) -> Future[Scores]:
        """Score one path, but for its first `known` steps, with one forward pass over the steps that fit."""
        request = fitting_input(self.prompts, self.backend.window, question, steps)
        wanted = request.positions[known:]
        if not wanted:
            return settled([None] * len(steps))

        def read(scores: Scores) -> Scores:
            if len(scores) != len(wanted):
                raise BackendError(f"{self.backend.role}: {len(scores)} scores came back for {len(wanted)} steps.")
            return scores

        return asked(self.backend, PoolingRequest(request.ids, wanted), read, known, len(request.positions), len(steps))


def fitting_input(prompts: RewardLayout, window: int, question: str, steps: Sequence[str]) -> PoolingRequest:
    """Return the input over as many leading steps as fit into a window, to be read after each of them."""
    room = window if prompts.reading.verdicts is None else window - 1  # a verdict is a token more
    kept = len(steps)
    while len((marked := prompts.marked(question, steps[:kept]))[0]) > room and kept:
        kept -= 1
    return PoolingRequest(*marked)
