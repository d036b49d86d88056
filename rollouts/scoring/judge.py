"""Scores from a generative reward model: a chat model of a server is asked whether each step is right."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rollouts.errors import RequestFailed
from rollouts.models.server.judge import Judge
from rollouts.scoring.base import Failed, Scores
from rollouts.text.prompts import hash_of
from rollouts.text.splitting import BLANK_LINE, Splitting

PROMPT = """\
Here is a problem and the beginning of a solution, step by step.

Problem:
{question}

Steps before the last one:
{before}

Last step:
{step}

Is the last step right, given the problem and the steps before it? A step that builds on an earlier mistake is not.
Answer with one word, Yes or No."""
"""What a judge is asked unless the models file has another ``prompt``."""
_PLACES = re.compile(r"\{(question|before|step)\}")
_TRIES = 2  # of an answer that says nothing
_REMEMBERED = 1 << 16  # questions


class JudgeScorer:
    """One question per step, answered with a yes or no, whose probability is the score, or with a number.

    The probability is that of the token with which the verdict begins, if the server tells log-probabilities; else
    the score of a verdict is 1 or 0. A question that fails on a server that is well (`rollouts.models.server.http` says
    what is tried again), or whose answer twice says nothing, gives a `Failed` score.

    Attributes:
        spent: Requests, and tokens of prompts and answers, so far.
    """

    tolerance = 0.2  # a server's batches round differently
    incremental = True

    def __init__(
        self,
        name: str,
        judge: Judge,
        prompt: str,
        model: str,
        identity: Mapping[str, Any],
        splitting: Splitting = BLANK_LINE,
    ) -> None:
        """Name the model that is asked, what tells it from others, and how solutions are cut."""
        self.name = name
        self._splitting = splitting
        self.spent = Counter(dict.fromkeys(("requests_scorer", "prompt_scorer", "decoded_scorer"), 0))
        self._judge, self._prompt, self._model, self._identity = judge, prompt, model, dict(identity)
        self._asked: OrderedDict[bytes, asyncio.Task[float | Failed]] = OrderedDict()

    def process(self) -> Mapping[str, Any]:
        """Return model, prompts and whether probabilities are read."""
        said = self._prompt + (f"\0{self._judge.system_prompt}" if self._judge.system_prompt else "")
        return {
            "kind": "judge",
            "model": self._model,
            "template_hash": hash_of(said),
            "reads": "probabilities" if self._judge.tells else "words",
            "identities": {self._judge.role: self._identity},
        }

    def submit(self, question: str, steps: Sequence[str], known: int = 0) -> Future[Scores]:
        """Ask about every step of one path but the first `known`."""
        said = [self._splitting.said(step) for step in steps]
        texts = [judge_question(self._prompt, question, said[: end + 1]) for end in range(known, len(said))]
        future: Future[Scores] = self._judge.submit(lambda: self._path(known, texts))
        return future

    async def _path(self, known: int, texts: Sequence[str]) -> Scores:
        return [*[None] * known, *await asyncio.gather(*map(self._step, texts))]

    async def _step(self, text: str) -> float | Failed:
        """Ask a question, unless it was asked before: replicas of a problem often begin alike."""
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._ask(text))
            if len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)
        found = await asyncio.shield(self._asked[key])
        if isinstance(found, Failed):
            self._asked.pop(key, None)
        return found

    async def _ask(self, text: str) -> float | Failed:
        why = ""
        for _ in range(_TRIES):
            try:
                verdict = await self._judge.ask(text)
            except RequestFailed as error:
                why = str(error)
                break
            self.spent.update(requests_scorer=1, prompt_scorer=verdict.spent[0], decoded_scorer=verdict.spent[1])
            if verdict.score is not None:
                return verdict.score
            why = verdict.why
        return Failed(why)


def judge_question(prompt: str, question: str, steps: Sequence[str]) -> str:
    """Return what is asked about the last of some steps.

    Args:
        prompt: Text with ``{question}``, ``{before}`` and ``{step}``; other braces stand for themselves.
        question: The problem.
        steps: S steps, at least one.
    """
    before = "\n\n".join(f"Step {number}: {step.strip()}" for number, step in enumerate(steps[:-1], 1)) or "(none)"
    values = {"question": question, "before": before, "step": f"Step {len(steps)}: {steps[-1].strip()}"}
    return _PLACES.sub(lambda place: values[place[1]], prompt)
