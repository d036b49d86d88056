"""AutoMix's self-verification: the small model is asked several times whether a solution of its own is right.

As in Aggarwal et al. (arXiv 2310.12963): a few worked examples, answers drawn at temperature 1, and what counts is the
share of them that find the solution correct. It is of whole solutions, and so no `Scorer` of steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import date as Date
from typing import Any

from rollouts.config import Sampling
from rollouts.models.base import Backend, Completion, CompletionRequest
from rollouts.models.futures import forward, settled
from rollouts.models.server.judge import verdict_in
from rollouts.scoring.base import Failed, described
from rollouts.text.prompts import PromptFormat, hash_of
from rollouts.text.steps import SMALL

PROMPT = """\
Problems with proposed solutions follow. Find out whether the last solution is right: work the problem out yourself in \
a few sentences, compare, and end with a line "Verdict: correct" or "Verdict: incorrect".

Problem: A pen costs 3 dollars. What do 4 pens cost?
Proposed solution: 4 pens cost 3 + 4 = 7 dollars. The answer is 7.
Evaluation: Each of the 4 pens costs 3 dollars, so they cost 4 * 3 = 12 dollars together. The solution adds instead.
Verdict: incorrect

Problem: Half of 18 cookies are eaten. How many are left?
Proposed solution: 18 / 2 = 9 cookies are eaten, so 18 - 9 = 9 are left. The answer is 9.
Evaluation: Half of 18 is 9, and 18 - 9 = 9 are left, as the solution says.
Verdict: correct

Problem: A train goes 60 miles in an hour. How far does it go in 3 hours?
Proposed solution: In 3 hours it goes 60 * 3 = 180 miles. The answer is 180.
Evaluation: Three times 60 miles are 180 miles. The solution has the same.
Verdict: correct

Problem: {question}
Proposed solution: {solution}
Evaluation:"""
SAMPLES, MOST_TOKENS, SAMPLING = 8, 250, Sampling(temperature=1.0)
Verified = tuple[int, int, int, int]
"""Of one solution: verdicts that it is correct, samples, and tokens that were read and decoded for all of them."""
UNSAMPLED: Verified = (0, 0, 0, 0)


class Verifier:
    """Several samples for each solution. One without a verdict does not find it correct."""

    name, columns, roles = "verification", ("yes", "samples", "read", "decoded"), (SMALL,)

    def __init__(
        self, backend: Backend, tokenizer: Any, model: str, date: Date | None = None, samples: int = SAMPLES
    ) -> None:
        """Name the model that is asked; `date` as of `PromptFormat`."""
        self.backend, self.model, self.samples = backend, model, samples
        self.prompts = PromptFormat(tokenizer, None, name=backend.role, date=date)

    def process(self) -> Mapping[str, Any]:
        """Return model, prompt, template and number of samples."""
        return described(self.name, self, prompt_hash=hash_of(PROMPT), samples=self.samples)

    def submit(self, question: str, solution: str) -> Future[Verified | Failed]:
        """Draw the verdicts on a solution: no samples if it does not fit into the window, `Failed` if one failed."""
        ids = self.prompts.ids(PROMPT.format(question=question, solution=solution.strip()))
        if len(ids) + MOST_TOKENS > self.backend.window:
            return settled(UNSAMPLED)
        result: Future[Verified | Failed] = Future()
        drawn: list[Completion] = []

        def take(completion: Completion) -> None:
            drawn.append(completion)
            if len(drawn) == self.samples:
                result.set_result(_counted(drawn, len(ids)))

        for number in range(self.samples):
            seed = hashlib.blake2b(repr((ids, number)).encode(), digest_size=8).digest()
            request = CompletionRequest(ids, MOST_TOKENS, SAMPLING, seed=int.from_bytes(seed, "little") >> 1)
            forward(self.backend.submit(request), take, result)
        return result


def _counted(drawn: Sequence[Completion], read: int) -> Verified | Failed:
    for each in drawn:
        if each.finish == "failed":
            return Failed(each.detail)
    found = [verdict_in(each.text, cut=each.finish == "length") for each in drawn]
    yes = sum(each is not None and each > 0.5 for each in found)
    return yes, len(drawn), read * len(drawn), sum(each.tokens for each in drawn)
