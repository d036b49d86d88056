"""Scores from a generative reward model: a chat model of a server is asked whether each step is right."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from rollouts.config import ScorerConfig
from rollouts.errors import RequestFailed
from rollouts.models.identity import served
from rollouts.models.server.http import Server, Servers
from rollouts.models.server.judge import Terms, judge_payload, read_verdict_of
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
        terms: The fields that its server takes.
        tells: Whether its server tells log-probabilities.
    """

    tolerance = 0.2  # a server's batches round differently
    incremental = True

    def __init__(
        self, name: str, scorer: ScorerConfig, identity: Mapping[str, Any], splitting: Splitting = BLANK_LINE
    ) -> None:
        """Connect, and find out which request fields the server takes by asking a first question.

        Args:
            name: Name of the score table.
            scorer: Of kind ``judge``.
            identity: What tells its model from others besides what its server says.
            splitting: How solutions are cut.

        Raises:
            ConfigError: No key, or the server refuses the question.
            BackendError: The server is not there, refuses the key, or has no such model.
        """
        assert scorer.model is not None
        self.name, self.terms = name, Terms()
        self.spent = Counter(dict.fromkeys(("requests_scorer", "prompt_scorer", "decoded_scorer"), 0))
        self._scorer, self._model, self._splitting = scorer, scorer.model, splitting
        self._prompt = scorer.prompt or PROMPT
        self._asked: OrderedDict[bytes, asyncio.Task[float | Failed]] = OrderedDict()
        self._known: Mapping[str, Any] = {}  # till then requests are adapted to what servers take
        self._http = Servers("scorer", scorer.model)
        self._known = self._http.meet(self._identify)
        self.tells = bool(self._known["logprobs"])
        self._identity = {**identity, **served(self.describe())}

    async def _identify(self, server: Server) -> dict[str, Any]:
        def adapt(refusal: str, _: Any) -> bool:
            yielded = None if self._known else self.terms.yielding(refusal)
            self.terms = yielded or self.terms
            return yielded is not None

        probe = judge_question(self._prompt, "What is 1 + 1?", ["1 + 1 = 2."])
        verdict, told = await server.chat(lambda: self._payload(probe), read_verdict_of, adapt)
        return {**told, "logprobs": verdict.tells}

    def _payload(self, content: str) -> dict[str, Any]:
        asked = judge_payload(content, self._scorer.system_prompt, self._scorer.max_tokens, self.terms)
        return {"model": self._model.model, **asked}

    def process(self) -> Mapping[str, Any]:
        """Return model, prompts and whether probabilities are read."""
        said = self._prompt + (f"\0{self._scorer.system_prompt}" if self._scorer.system_prompt else "")
        return {
            "kind": "judge",
            "model": self._model.display_name,
            "template_hash": hash_of(said),
            "reads": "probabilities" if self.tells else "words",
            "identities": {"scorer": self._identity},
        }

    def describe(self) -> dict[str, Any]:
        """Return the servers' version and number, the model's name, and how they are asked."""
        return self._http.described("judge", **asdict(self.terms))

    def close(self) -> None:
        """Cancel what is pending and disconnect."""
        self._http.close()

    def submit(self, question: str, steps: Sequence[str], known: int = 0) -> Future[Scores]:
        """Ask about every step of one path but the first `known`."""
        said = [self._splitting.said(step) for step in steps]
        texts = [judge_question(self._prompt, question, said[: end + 1]) for end in range(known, len(said))]
        return self._http.submit(lambda: self._path(known, texts))

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
        why, payload, most = "", self._payload(text), self._scorer.max_tokens
        for _ in range(_TRIES):
            try:
                verdict = await self._http.post("chat/completions", payload, read_verdict_of, most)
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
