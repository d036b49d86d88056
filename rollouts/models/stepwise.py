"""The step logic over a backend: from a prefix to the next step, or to the whole rest cut into steps."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from rollouts.config import Limits, Sampling
from rollouts.models.base import Backend, Completion, CompletionRequest
from rollouts.models.futures import forward
from rollouts.text.likelihood import Likelihood
from rollouts.text.prompts import PromptFormat
from rollouts.text.splitting import BLANK_LINE, Splitting
from rollouts.text.steps import (
    CLOSE,
    DELIMITER,
    BlankLines,
    Cutter,
    Prefix,
    Segment,
    Step,
    StopReason,
    closes_box,
    cut_segments,
    normalise,
    prefix_hash,
)

Fits = Callable[[str, Sequence[str]], bool]
_RAW = "\u0120\u010a\u2581"  # how vocabularies write blanks and line ends


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request gave.

    Attributes:
        steps: Consecutive steps from the prefix on, at least one; only the last can be terminal.
        decoded: Tokens decoded, whether kept or not.
        dropped: Segments thrown away because the ids before them were not those of their node's prompt.
        cut_tokens: Tokens decoded after the terminal step, or thrown away with dropped segments.
        reason: Why the last step failed, where it did.
    """

    steps: tuple[Step, ...]
    decoded: int
    dropped: int = 0
    cut_tokens: int = 0
    reason: str = ""


class StepWriter(Protocol):
    """Anything that continues prefixes step by step; the interface that trees are grown through.

    Attributes:
        whole_paths: Whether `submit` with ``whole`` may return more than one step.
    """

    role: str
    whole_paths: bool

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """Ask for the next step of `prefix`, or for the whole rest."""


def draw_seed(run_seed: int, prefix: Prefix, role: str, attempt: int = 0) -> int:
    """Return the 63-bit seed of one draw, a function of (seed, problem, replica, prefix, role)."""
    key = f"{run_seed}|{prefix.problem}|{prefix.replica}|{prefix_hash(prefix.steps)}|{role}|{attempt}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def close_step(
    prefix: Prefix,
    earlier: Sequence[Step],
    segment: Segment,
    ending: StopReason,
    limits: Limits,
    fits: Fits,
    prompt_tokens: int,
    splitting: Splitting = BLANK_LINE,
) -> Step:
    """Turn a segment into a step: decide why it ended (docs/design.md, section 1).

    A thinking block that has reached its budget, or a step of it that has reached its own limit, is closed by force.

    Args:
        prefix: Where the generation began.
        earlier: Steps already cut from the same generation.
        segment: The candidate, no longer than the limits allow.
        ending: Why an incomplete segment ended.
        limits: The run's limits.
        fits: Whether a prefix leaves room in every role's window.
        prompt_tokens: Length of the prompt at `prefix`.
        splitting: How solutions are cut into steps.
    """
    tokens = segment.end - segment.start
    used = prefix.used_tokens + sum(step.tokens for step in earlier) + tokens
    before = [*prefix.steps, *(step.text for step in earlier)]
    thinking, forced = splitting.thinking(before), False
    spent = used >= splitting.steps.max_thinking_tokens if segment.complete else ending is StopReason.LENGTH
    if thinking and spent and used < limits.solution_tokens:
        forced = CLOSE not in segment.text
        closed = f"{segment.text.rstrip()}\n{CLOSE}{DELIMITER}" if forced else segment.text
        segment = replace(segment, text=closed, complete=True)
    texts = [*before, segment.text]
    if not thinking and closes_box(segment.text):
        reason = StopReason.BOXED
    elif not segment.complete:
        reason = ending
    elif used >= limits.solution_tokens:
        reason = StopReason.LENGTH
    elif len(texts) >= limits.max_steps:
        reason = StopReason.MAX_STEPS
    elif not fits(prefix.question, texts):
        reason = StopReason.CONTEXT
    else:
        reason = StopReason.FORCED if forced else StopReason.DELIMITER
    return Step(segment.text, tokens, reason, prompt_tokens + segment.start, thinking=thinking)


@dataclass(frozen=True, slots=True)
class StepRules:
    """What decides how one model continues prefixes, wherever it runs.

    Attributes:
        window: Most tokens of prompt and completion together.
        fits: Whether a prefix leaves room in every role's window.
        seed: Run seed, for backends whose draws depend on the request only.
        likelihood: Whether steps get statistics of their tokens.
    """

    role: str
    prompts: PromptFormat
    window: int
    sampling: Sampling
    limits: Limits
    fits: Fits
    seed: int = 0
    likelihood: bool = False
    splitting: Splitting = BLANK_LINE

    def most(self, steps: Sequence[str], used: int, *, whole: bool = False) -> float:
        """Return the most tokens that the next step may have, or the whole path, if that ends before the solution."""
        own = math.inf if whole else self.limits.step_tokens
        if not self.splitting.thinking(steps):
            return own
        return min(own, max(1, self.splitting.steps.max_thinking_tokens - used))


class Draft:
    """A generation in the making: which request comes next, and what came of the answers. It sends nothing itself.

    A step that begins with decorative blocks takes several requests.

    Attributes:
        generation: The result; None as long as `request` is to be sent and its answer given to `take`.
    """

    def __init__(self, rules: StepRules, prefix: Prefix, *, whole: bool = False) -> None:
        """Render the prompt.

        Args:
            rules: How the model continues prefixes.
            prefix: Where it continues.
            whole: Ask for the whole rest rather than for one step.
        """
        self.rules = rules
        self.prefix = prefix
        self.whole = whole
        self.generation: Generation | None = None
        self.prompt = rules.prompts.ids(prefix.question, prefix.steps)
        self.room = rules.window - len(self.prompt)
        left = rules.limits.solution_tokens - prefix.used_tokens
        self.budget = int(min(left, self.room, rules.most(prefix.steps, prefix.used_tokens, whole=whole)))
        thinking = rules.splitting.thinking(prefix.steps)
        self.cutter = rules.splitting.cutter(thinking=thinking, marks=rules.prompts.marks)
        self.text, self.tokens, self.attempt = "", 0, 0
        self.likelihood: Likelihood | None = Likelihood(())
        self.ids: tuple[int, ...] = ()
        if self.budget <= 0:
            self.generation = Generation((Step("", 0, StopReason.CONTEXT, len(self.prompt)),), 0)

    def request(self) -> CompletionRequest:
        """Return the request that comes next."""
        return CompletionRequest(
            prompt_ids=self.prompt + self.ids,
            max_tokens=self.budget - self.tokens,
            sampling=self.rules.sampling,
            stop=self.cutter.whole_stops if self.whole else self.cutter.stops,
            seed=draw_seed(self.rules.seed, self.prefix, self.rules.role, self.attempt),
            likelihood=self.rules.likelihood,
            about=self.prefix.question,
        )

    def take(self, completion: Completion) -> None:
        """Take the answer to the last request; one that thinks though it should not, or is no text, has failed."""
        reason = completion.detail
        raw = self._is_raw(completion)
        if raw:
            reason = (
                f"the backend reads its tokenizer otherwise than tokenizer.json has it: {completion.text[:40]!r}. "
                'Set tokenizer_class to "PreTrainedTokenizerFast" in its tokenizer_config.json.'
            )
        thinks = not self.rules.splitting.thinks and completion.text.lstrip().startswith("<think>")
        if thinks:
            reason = (
                "the model writes '<think>' although thinking is switched off. Let both models think (split = "
                '"thinking" in [steps]), or use a model that can switch it off.'
            )
        if raw or thinks or completion.finish == "failed":
            failed = Step("", completion.tokens, StopReason.FAILED, len(self.prompt))
            self.generation = Generation((failed,), self.tokens + completion.tokens, reason=reason)
        elif self.whole:
            self.generation = self._cut(completion)
        else:
            self._take_step(completion)

    def _is_raw(self, completion: Completion) -> bool:
        """Whether a text is pieces of a vocabulary: transformers builds some tokenizers anew, by a wrong class."""
        found = [mark for mark in _RAW if mark in completion.text]
        if not found or completion.token_ids is None:
            return False
        own = "".join(self.rules.prompts.pieces(self.prompt + self.ids, completion.token_ids))
        return any(mark not in own for mark in found)

    def _take_step(self, completion: Completion) -> None:
        rules = self.rules
        self.text += completion.text
        self.tokens += completion.tokens
        self.ids += completion.token_ids or rules.prompts.encode(completion.text)
        self.likelihood = _joined(self.likelihood, completion)
        segment = self._first(completion)
        if completion.finish == "stop" and not segment.complete and self.tokens < self.budget:
            self.attempt += 1
            return
        kept = segment.end
        step = close_step(
            self.prefix,
            (),
            segment,
            self._ending(completion),
            rules.limits,
            rules.fits,
            len(self.prompt),
            rules.splitting,
        )
        self.generation = Generation(
            (_told(step, self.likelihood, 0, kept),), self.tokens, cut_tokens=self.tokens - kept
        )

    def _first(self, completion: Completion) -> Segment:
        """Return the first step of what was decoded; what follows it is decoded in vain."""
        pieces = self.rules.prompts.pieces(self.prompt, self.ids)
        if not isinstance(self.cutter, BlankLines):
            first = next(iter(cut_segments(pieces, self.cutter)), Segment("", 0, 0, False))
            return replace(first, end=min(first.end, self.tokens) if first.complete else self.tokens)
        text, complete = normalise(self.text)
        kept = self.tokens
        if complete and (completion.finish != "stop" or normalise(self.text[:-1])[1]):
            # It ended at a blank line that is no stop string.
            kept = min(kept, cut_segments(pieces)[0].end)
        return Segment(text, 0, kept, complete)

    def _ending(self, completion: Completion) -> StopReason:
        """Return why an incomplete segment at the end of the generation ended."""
        if completion.finish == "eos":
            return StopReason.EOS
        return StopReason.CONTEXT if self.budget == self.room else StopReason.LENGTH

    def _cut(self, completion: Completion) -> Generation:
        rules, prefix, limits = self.rules, self.prefix, self.rules.limits
        ids = completion.token_ids or ()
        pieces = list(rules.prompts.pieces(self.prompt, ids))
        segments = cut_segments(pieces, self.cutter) or [Segment("", 0, completion.tokens, False)]
        steps: list[Step] = []
        dropped, kept, cutter = 0, 0, self.cutter
        likelihood = _joined(Likelihood(()), completion)
        for index, segment in enumerate(segments):
            if steps:
                node = rules.prompts.ids(prefix.question, [*prefix.steps, *(step.text for step in steps)])
                if node != self.prompt + ids[: segment.start]:
                    dropped = len(segments) - index
                    break
            ending, before = self._ending(completion), [*prefix.steps, *(step.text for step in steps)]
            most = int(rules.most(before, prefix.used_tokens + sum(step.tokens for step in steps)))
            end = segment.start + most
            if segment.end > end or (segment.complete and not _ends(pieces[segment.start : end], cutter)):
                text = cutter.tidy("".join(pieces[segment.start : end]))
                segment, ending = Segment(text, segment.start, end, False), StopReason.LENGTH
            elif segment.end - segment.start == most and completion.finish == "length":
                ending = StopReason.LENGTH
            step = close_step(prefix, steps, segment, ending, limits, rules.fits, len(self.prompt), rules.splitting)
            cutter = cutter.then(step.text)
            steps.append(_told(step, likelihood, segment.start, segment.end))
            kept = segment.end
            if step.terminal:
                break
        return Generation(tuple(steps), completion.tokens, dropped, completion.tokens - kept)


def _ends(pieces: Sequence[str], cutter: Cutter) -> bool:
    """Whether these tokens alone tell that a step ends in them: some ends are certain only by what follows."""
    ends = list(accumulate(map(len, pieces)))
    return cutter.end("".join(pieces), lambda length: bisect_left(ends, length) + 1) is not None


def _joined(before: Likelihood | None, completion: Completion) -> Likelihood | None:
    """Return what is known of the tokens so far, without the end of the sequence, which is none of a step's text."""
    found = completion.likelihood
    if before is None or found is None or len(found.logprobs) != completion.tokens:
        return None
    kept = len(found.logprobs) - (completion.finish == "eos")
    return before + Likelihood(found.logprobs[:kept], found.entropies[:kept])


def _told(step: Step, likelihood: Likelihood | None, start: int = 0, end: int | None = None) -> Step:
    return step if likelihood is None else replace(step, statistics=likelihood.statistics(start, end))


class StepModel:
    """Steps from a backend that continues prefixes."""

    def __init__(self, backend: Backend, rules: StepRules) -> None:
        """Take a backend for completions, and how its model continues prefixes."""
        self.role = backend.role
        self.backend = backend
        self.whole_paths = backend.capabilities.token_ids
        self._rules = rules

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """Ask for the next step of a prefix, or for the whole rest where token ids make that possible."""
        future: Future[Generation] = Future()
        self._ask(Draft(self._rules, prefix, whole=whole and self.whole_paths), future)
        return future

    def _ask(self, draft: Draft, future: Future[Generation]) -> None:
        if draft.generation is not None:
            future.set_result(draft.generation)
            return

        def take(completion: Completion) -> None:
            draft.take(completion)
            self._ask(draft, future)

        forward(self.backend.submit(draft.request()), take, future)
