"""Scores without a reward model: the model itself is asked how sure it is of a step, from 0 to 9."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import date as Date
from functools import partial
from typing import Any

from rollouts.config import Sampling
from rollouts.errors import ConfigError
from rollouts.models.base import Backend, Completion, CompletionRequest
from rollouts.models.futures import forward, settled
from rollouts.scoring.base import Failed, Scores, described
from rollouts.text.prompts import PromptFormat

_INSTRUCTION = (
    "You check solutions of mathematics problems step by step. You are given a problem and the first steps of a "
    "solution. Judge only whether the last of these steps, and everything it builds on, is right. Reply with one "
    "digit from 0 (certainly wrong) to 9 (certainly right) and nothing else."
)
_GREEDY = Sampling(temperature=0.0)
_MOST_TOKENS = 8
_DIGIT = re.compile(r"(?<![0-9.,])[0-9](?![0-9]|[.,][0-9])")


class SelfEvaluationScorer:
    """One short question per step, answered greedily; the digit divided by 9 is the score.

    It costs one request per step rather than one pass per path. A reply without such a digit, and a step that does
    not fit into the window, has no score; one whose request failed can be asked about again.
    """

    tolerance = 0.12  # one digit
    incremental = True

    def __init__(self, name: str, backend: Backend, tokenizer: Any, model: str, date: Date | None = None) -> None:
        """Name the model that is asked; `date` as of `PromptFormat`."""
        self.name = name
        self.backend = backend
        self._told = ""
        try:
            self.prompts = PromptFormat(tokenizer, _INSTRUCTION, name=backend.role, date=date)
        except ConfigError:  # a template that knows no system message, or one that says here what else is wrong
            self.prompts, self._told = PromptFormat(tokenizer, name=backend.role, date=date), _INSTRUCTION + "\n\n"
        self.model = model

    def process(self) -> Mapping[str, Any]:
        """Return model, instruction and template."""
        return described("self-evaluation", self)

    def _question(self, question: str, steps: Sequence[str]) -> str:
        listed = "\n\n".join(f"Step {number}: {step.strip()}" for number, step in enumerate(steps, 1))
        return (
            f"{self._told}Problem: {question}\n\n{listed}\n\nHow certain is it that step {len(steps)} is right (0-9)?"
        )

    def submit(self, question: str, steps: Sequence[str], known: int = 0) -> Future[Scores]:
        """Ask about every step of one path but the first `known`."""
        places = range(known, len(steps))
        prompts = {place: self.prompts.ids(self._question(question, steps[: place + 1])) for place in places}
        asked = {place: ids for place, ids in prompts.items() if len(ids) + _MOST_TOKENS <= self.backend.window}
        scores: Scores = [None] * len(steps)
        if not asked:
            return settled(scores)
        result: Future[Scores] = Future()
        missing = set(asked)

        def take(place: int, completion: Completion) -> None:
            failed = completion.finish == "failed"
            scores[place] = Failed(completion.detail) if failed else read_digit(completion.text)
            missing.remove(place)
            if not missing:
                result.set_result(scores)

        for place, ids in asked.items():
            answer = self.backend.submit(CompletionRequest(ids, _MOST_TOKENS, _GREEDY))
            forward(answer, partial(take, place), result)
        return result


def read_digit(reply: str) -> float | None:
    """Return the first digit of a reply that stands alone divided by 9, or None: "10" and "0.9" have other scales."""
    digit = _DIGIT.search(reply)
    return None if digit is None else int(digit[0]) / 9.0
