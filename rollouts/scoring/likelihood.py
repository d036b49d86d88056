"""Signals without a reward model: what the small or the large model makes of the tokens of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rollouts.errors import ConfigError
from rollouts.models.base import Backend, LogprobRequest
from rollouts.models.futures import settled
from rollouts.scoring.base import Scores, asked, described
from rollouts.text.likelihood import STATISTICS, WORTHLESS, Likelihood, as_score
from rollouts.text.prompts import PromptFormat
from rollouts.text.steps import ROLES


@dataclass(eq=False)
class LikelihoodScorer:
    """Statistics of each step's tokens, at temperature 1, in one prefill pass per path; nothing is decoded.

    A step is as doubtful as its most surprising token: the column ``score`` is the probability of that. End-of-sequence
    tokens are not counted; a step without any text is worth nothing (`rollouts.text.likelihood.WORTHLESS`). A backend
    that gives no log-probabilities of prompts is a ConfigError.

    Attributes:
        columns: ``("score",)``, or `rollouts.text.likelihood.STATISTICS`.
        roles: Whose steps are looked at.
    """

    name: str
    backend: Backend
    prompts: PromptFormat
    model: str
    columns: tuple[str, ...] = ("score",)
    roles: tuple[str, ...] = ROLES
    incremental: bool = field(default=True, init=False)
    tolerance: float = field(default=2e-2, init=False)  # probabilities near 1/2 feel the rounding of bfloat16 logits

    def __post_init__(self) -> None:
        """Check that the backend gives log-probabilities of prompts."""
        if not self.backend.capabilities.prompt_logprobs:
            raise ConfigError(
                f"Scorer {self.name!r}: the backend of {self.backend.role!r} gives no prompt log-probabilities."
            )

    def process(self) -> Mapping[str, Any]:
        """Return model and prompt format."""
        return described("likelihood", self)

    def submit(self, question: str, steps: Sequence[str], known: int = 0) -> Future[Scores]:
        """Score one path, but for its first `known` steps, with one prefill pass over the steps that fit."""
        ids, positions = self.prompts.step_spans(question, steps)
        kept = len(steps)
        while kept and positions[kept] >= self.backend.window:
            kept -= 1
        known = min(known, kept)
        first = positions[known]
        if positions[kept] == first:
            return settled([*[None] * known, *[self._told(WORTHLESS)] * (kept - known), *[None] * (len(steps) - kept)])

        def read(found: Likelihood) -> Scores:
            spans = zip(positions[known:kept], positions[known + 1 : kept + 1], strict=True)
            return [self._told(found.statistics(start - first, end - first)) for start, end in spans]

        request = LogprobRequest(ids[: positions[kept]], first, self.columns == STATISTICS)
        return asked(self.backend, request, read, known, kept, len(steps))

    def _told(self, statistics: tuple[float, ...]) -> Any:
        return statistics if self.columns == STATISTICS else as_score(STATISTICS[0], statistics[0])
