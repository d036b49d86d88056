"""The route of one request: propose, score, decide, escalate, until the solution ends. Knows nothing of HTTP.

The loop is that of docs/design.md, section 1. What a model that does not answer changes is marked in the changed step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from agents.deploy.policy import Session
from agents.routers.asking import Asking
from agents.serve import tracing
from agents.serve.config import Fallback
from agents.serve.ledger import SCORER, Ledger, Spent
from agents.serve.models import Models, Task
from agents.serve.sources import Sources, Told
from agents.serve.stops import StopText
from agents.serve.upstreams import Unavailable
from rollouts.tasks.answers import final_answer
from rollouts.text.likelihood import STATISTICS, UNSCORED
from rollouts.text.steps import CLOSE, DELIMITER, LARGE, ROLES, SMALL, Step, StopReason
from rollouts.trees.arrays import ASK, CONTINUE_SMALL, ESCALATE_LARGE
from rollouts.trees.columns import facts_of
from trim_env.features import schema_named

if TYPE_CHECKING:
    from agents.serve.shadow import Shadow

_CUT_OFF = (StopReason.LENGTH, StopReason.FORCED)
ENDING = "The service is shutting down."


class RouteFailed(Exception):
    """Raised when no model that could write the next step answers, or not in time.

    Attributes:
        status: The HTTP status that says the same.
    """

    def __init__(self, message: str, status: int = 503) -> None:
        """Say why, without upstreams' own words."""
        super().__init__(message)
        self.status = status


class UnderWay:
    """A request that can be ended from outside, whatever it waits for."""

    _limit: asyncio.Timeout | None = None
    _cut = False

    def cut(self) -> None:
        """End with an error."""
        self._cut = True
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(-1)

    @asynccontextmanager
    async def _in_time(self, deadline: float) -> AsyncIterator[None]:
        """Raise TimeoutError at a deadline, in the event loop's time, or when it is cut."""
        try:
            async with asyncio.timeout_at(-1 if self._cut else deadline) as self._limit:
                yield
        finally:
            self._limit = None  # what is over cannot be cut any more


class _CapSpent(Exception):
    """Raised when only the large model could write the next step, and the policy's caps leave it nothing."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """An accepted step and how it came about.

    Attributes:
        step: Number, from 1.
        action: What the policy decided: 0 continue, 1 escalate; None if it was not asked, or asked in vain.
        asked: Whether the policy asked for what it buys (`agents.routers.asking.Asking`); None if it buys nothing.
        asked_tokens: Tokens that were read for the answer; None if it did not ask.
        score: Score of the small model's proposal; None if there is none, or not yet.
        tokens: Tokens of the proposal; None if there was none.
        large_score: Score of the large model's step; None if there is none, or not yet: one request scores a whole
            path, so it comes with the next proposal's.
        large_tokens: Tokens that the large model decoded; None if it was not asked.
        late_scores: Scores of the steps just before this one that had none yet.
        fallback: What happened instead of what should have; None normally.
        rejected: Text of the small model's proposal, where the large model's step took its place.
        thinking: Whether it is part of the thinking block.
    """

    step: int
    author: str
    action: int | None = None
    chance: float | None = None
    asked: bool | None = None
    asked_tokens: int | None = None
    score: float | None = None
    tokens: int | None
    large_score: float | None = None
    large_tokens: int | None
    late_scores: tuple[float, ...] = ()
    fallback: str | None = None
    stop_reason: str
    text: str
    rejected: str | None = None
    thinking: bool = False

    @property
    def said(self) -> str:
        """Its text as clients are told it."""
        return self.text.replace(CLOSE + DELIMITER, "", 1) if self.thinking else self.text

    @property
    def escalated(self) -> bool:
        """Whether the policy decided that the large model writes the step, and it did."""
        return self.action == ESCALATE_LARGE and self.author == LARGE

    def plain(self, *, text: bool = True) -> dict[str, Any]:
        """Return it as JSON holds it, with or without its text."""
        return {name: value for name, value in vars(self).items() if text or name != "text"}


@dataclass(frozen=True)
class _Owed:
    """An accepted step that the policy's session has not been told of, as its score is not known yet.

    Attributes:
        decided: Whether the policy's session knows its proposal.
        same: The small model's proposal, where it is of the same text.
    """

    step: Step
    author: str
    decided: bool
    same: Step | None = None


@dataclass(eq=False)
class Route(UnderWay):
    """One request that is routed; its state is here and nowhere else.

    Attributes:
        task: What is asked of the models.
        session: The policy's decisions for it.
        when_scorer_fails: Who writes a step whose proposal cannot be scored; ``error`` ends the request.
        when_small_fails: Whether the large model writes steps without a proposal, or the request ends.
        sources: What the policy reads, and from where.
        only: The model that writes all steps, without proposals, scores and decisions; None: the policy decides.
        policy: Name of the policy.
        author: Who writes all steps, where the policy has decided for the whole problem; None: it decides step by step.
        questions: What of it went into questions of the policy that were answered.
        written: The accepted steps, and how they came about.
        accepted: The same as their author wrote them.
        drawn: Whole steps that a model wrote, accepted or not: the place that each was written for, and its author.
        said: What of each accepted step is given to the client once the step is there.
        ended: Why it ended: a stop reason of the last step, ``stop`` (a stop text of the request), ``time``, ``cap``
            (of the policy, spent while the small model was away), or None while it is under way.
        shadow: What the policy would have done, where one model answers alone (`agents.serve.shadow`).
    """

    task: Task
    session: Session
    when_scorer_fails: Fallback = "small"
    when_small_fails: Literal["large", "error"] = "large"
    sources: Sources = Sources()
    only: Literal["small", "large"] | None = None
    policy: str = ""
    author: str | None = None
    ledger: Ledger = field(default_factory=Ledger)
    questions: Spent = field(default_factory=Spent)
    written: list[Written] = field(default_factory=list)
    accepted: list[Step] = field(default_factory=list)
    drawn: list[tuple[int, str, Step]] = field(default_factory=list)
    used: int = 0
    stops: StopText = field(default_factory=StopText)
    said: list[str] = field(default_factory=list)
    ended: str | None = None
    shadow: Shadow | None = None
    _owed: list[_Owed] = field(default_factory=list)
    _stopped: str | None = None
    _span = "step"

    def __post_init__(self) -> None:
        """Take the policy's cap on large tokens while nothing is spent, and what it buys, from whom."""
        self._cap, router = self.session.large_tokens_left, self.session.router
        self.source = router.source if isinstance(router, Asking) else None
        self._bought = router.facts if isinstance(router, Asking) else ()
        self._whole = bool(self._bought) and any(
            fold.fact in self._bought for fold in schema_named(router.schema).folds
        )

    @property
    def _texts(self) -> tuple[str, ...]:
        return tuple(step.text for step in self.written)

    @property
    def text(self) -> str:
        """The solution so far, or the answer where thinking comes before it, up to a stop text of the request."""
        return self._told(thinking=False) + self.stops.held

    @property
    def reasoning(self) -> str:
        """What was thought so far."""
        return self._told(thinking=True)

    def _told(self, *, thinking: bool) -> str:
        given = zip(self.written, self.said, strict=True)
        return "".join(said for step, said in given if step.thinking is thinking)

    @property
    def finish_reason(self) -> str:
        """How OpenAI's interface calls its end."""
        return "stop" if self.ended in (StopReason.BOXED, StopReason.EOS, "stop") else "length"

    async def steps(self, models: Models, deadline: float) -> AsyncGenerator[Written, None]:
        """Yield the steps as they are accepted, until the solution ends or time is up.

        Args:
            models: Who writes and scores.
            deadline: In the event loop's time. What was accepted until then is the answer.

        Raises:
            RouteFailed: No model that could go on answers or may, time was up before the first step, or it was `cut`.
        """
        while self.ended is None:
            try:
                told: dict[str, Any] = {"step": len(self.written) + 1, "policy": self.policy}
                async with self._in_time(deadline):
                    with tracing.current().step(self._span, told):
                        step, note = await self._next(models)
                        told |= note.plain(text=False) | {"rejected": None}
            except TimeoutError:
                if self._cut:
                    raise RouteFailed(ENDING) from None
                self.ended = "time"
                if not self.written:
                    raise RouteFailed("Time was up before the first step.", 504) from None
                return
            except _CapSpent as error:
                self.ended, self._stopped = "cap", f"step {len(self.written) + 1}: {error}"
                if not self.written:
                    raise RouteFailed(f"The first step cannot be written: {error}.") from error
                return
            self.used += step.tokens
            self.accepted.append(step)
            self.written.append(note)
            self.said.append(note.said if note.thinking else self.stops.feed(note.text))
            if self.stops.matched is not None or step.terminal:
                self.ended = step.stop_reason if self.stops.matched is None else "stop"
                self._settle([None] * len(self.written))
            yield note

    async def _write(self, models: Models, role: str, most: int | None = None) -> Step:
        """Return a model's next step, of at most so many tokens."""
        step = await models.step(role, self.task, self._texts, self.used, self.ledger, most=most)
        if most is None or step.tokens < most or step.stop_reason not in _CUT_OFF:
            self.drawn.append((len(self.written), role, step))
        return step

    async def _next(self, models: Models) -> tuple[Step, Written]:
        """Return the next accepted step, and how it came about."""
        earlier = self._texts
        thinking = self.task.splitting.thinking(earlier)
        author = self.only or self.author or self.task.splitting.author(thinking=thinking)
        if author is not None:
            return await self._alone(models, author)
        try:
            proposal = await self._write(models, SMALL)
        except Unavailable as fault:
            return await self._without_small(models, fault)
        if not proposal.terminal:
            asyncio.get_running_loop().call_soon(models.prepare, self.task, (*earlier, proposal.text))
        texts = [*earlier, proposal.text]
        try:
            scores, *seen = await asyncio.gather(*self._readings(models, texts))
        except Unavailable as fault:
            return await self._without_scorer(models, proposal, fault)
        late = self._settle(scores[:-1])
        action = self.session.decide(
            **self._free(self._known(proposal, scores[-1], (SMALL, proposal.statistics), *seen))
        )
        if asked := action == ASK:
            try:
                scores, answer = await self._answer(models, proposal, texts, scores)
            except Unavailable as fault:
                known = {"asked": True, "score": scores[-1], "late_scores": late}
                return await self._without_scorer(models, proposal, fault, **known)
            late += self._late(scores[:-1])
            action = self.session.decide(**answer)
        common = {
            "action": action,
            "chance": self.session.chance,
            "asked": asked,
            "proposal": proposal,
            "score": scores[-1],
            "late_scores": late,
        }
        if action == CONTINUE_SMALL:
            self.session.accept()
            return proposal, self._note(proposal, SMALL, **common)
        return await self._escalate(models, proposal, common)

    async def _alone(self, models: Models, author: str) -> tuple[Step, Written]:
        """Let the one model write that is asked, or that writes the answer or all: there is nothing to decide."""
        self._settle([None] * len(self.written))
        words = None
        try:
            step = await self._write(models, author)
        except Unavailable as fault:
            if self.only is not None:
                raise RouteFailed(f"The model does not answer: {_brief(fault)}.") from fault
            if author == SMALL:
                return await self._without_small(models, fault)
            words, author = _words(fault, "the small model wrote the step"), SMALL
            try:
                step = await self._write(models, author)
            except Unavailable as second:
                raise RouteFailed(f"Neither model answers: {_brief(fault)}; {_brief(second)}.") from second
        proposal, large = (step, None) if author == SMALL else (None, step)
        return step, self._note(step, author, proposal, large, fallback=words)

    def _readings(self, models: Models, texts: Sequence[str]) -> list[Coroutine[Any, Any, Any]]:
        """Return what is asked about every proposal: the scores of its path, and what the large model makes of it."""
        scores = models.scores if self.sources.scorer and self.source != SCORER else _nobody
        looks = [models.looked_at] if self.sources.large and self.source != LARGE else []
        return [ask(self.task, texts, self.ledger) for ask in (scores, *looks)]

    async def _answer(
        self, models: Models, proposal: Step, texts: Sequence[str], scores: list[float | None]
    ) -> tuple[list[float | None], dict[str, Any]]:
        """Ask for what the policy buys; return the scores of the path's steps, and what its session is told.

        Raises:
            Unavailable: There is no usable answer.
        """
        spent, asked = self.ledger.roles[str(self.source)], (self.task, texts, self.ledger)
        before, looks = spent.prompt_tokens, list[Told]([(LARGE, None)] * len(texts))
        if self.source == SCORER:
            scores = await models.scores(*asked)
        elif self._whole:
            looks = await models.looked_at_each(*asked)
        else:
            looks[-1] = await models.looked_at(*asked)
        self.questions.add(spent.prompt_tokens - before)
        steps, authors = [*self.accepted, proposal], [*(step.author for step in self.written), SMALL]
        *accepted, last = (
            {name: value for name, value in self._known(step, score, look, (author, step.statistics)).items()
             if name in self._bought}
            for step, author, score, look in zip(steps, authors, scores, looks, strict=True)
        )  # fmt: skip
        return scores, {**last, "accepted": accepted}

    def _known(self, step: Step, score: float | None, *told: Told) -> dict[str, Any]:
        """Return what sessions want to know of a step, from its score and what the models have told of it."""
        signals = self.sources.signals(UNSCORED if score is None else score, *told)
        score = self.sources.score(signals) if score is None else score
        return {**facts_of(replace(step, tokens=max(step.tokens, 1)), score), **signals}

    def _free(self, known: dict[str, Any]) -> dict[str, Any]:
        """Return what is known of a step without what the policy buys."""
        return {name: value for name, value in known.items() if name not in self._bought}

    def _settle(self, scores: Sequence[float | None]) -> tuple[float, ...]:
        """Tell the session of the steps that had no score; `scores` are those of all accepted steps."""
        first = len(self.written) - len(self._owed)
        for place, owed in enumerate(self._owed, first):
            if not self.session.decides_once:
                self._tell(owed, scores[place])
        self._owed = []
        return self._late(scores)

    def _late(self, scores: Sequence[float | None]) -> tuple[float, ...]:
        """Note scores of accepted steps that had none; return these."""
        late = []
        for place, (step, score) in enumerate(zip(self.written, scores, strict=True)):
            name = "large_score" if step.author == LARGE else "score"
            if score is not None and getattr(step, name) is None:
                late.append(score)
                known: dict[str, Any] = {name: score}
                self.written[place] = replace(step, **known)
        return tuple(late)

    def _tell(self, owed: _Owed, score: float | None) -> None:
        if not owed.decided:  # as if it had been proposed; what is not known of it leaves what it may lower as it is
            unknown = {role: (0.0,) * len(STATISTICS) for role in ROLES}
            known = self._known(owed.step, score, *unknown.items(), (owed.author, owed.step.statistics))
            self.session.decide(**self._free(known))
        self.session.override(ESCALATE_LARGE if owed.author == LARGE else CONTINUE_SMALL)
        if owed.author == SMALL:
            self.session.accept()
            return
        left, tokens = self.session.large_tokens_left, max(owed.step.tokens, 1)
        tokens = tokens if left is None else min(tokens, left)
        told = [(LARGE, owed.step.statistics), *([(SMALL, owed.same.statistics)] if owed.same is not None else [])]
        self.session.accept(**{**self._known(owed.step, score, *told), "tokens": tokens})

    async def _large(self, models: Models) -> tuple[Step | None, bool]:
        """Return the large model's next step, and whether it is whole: the policy's caps may end it, or leave none."""
        most = self._most()
        if most == 0:
            return None, False
        step = await self._write(models, LARGE, most)
        return step, self.drawn[-1:] == [(len(self.written), LARGE, step)]

    def _most(self) -> int | None:
        """Return the most tokens that the large model may decode now; None without a cap.

        What counts is what was decoded, or may have been, whoever asked for it and whatever became of it.
        """
        waiting = sum(owed.author == LARGE for owed in self._owed)
        if self.session.escalations_left is not None and self.session.escalations_left <= waiting:
            return 0
        return None if self._cap is None else max(self._cap - self.ledger.roles[LARGE].most_decoded, 0)

    async def _escalate(self, models: Models, proposal: Step, common: dict[str, Any]) -> tuple[Step, Written]:
        """Let the large model write the step; keep the proposal if it does not answer or has too few tokens left."""
        try:
            step, whole = await self._large(models)
            words = "the policy's cap on large tokens was reached, the proposal was kept"
        except Unavailable as fault:
            step, whole, words = None, False, _words(fault, "the proposal was kept")
        if step is None or not whole:
            unknown = self.ledger.roles[LARGE].most_decoded - self.session.large_tokens
            left = self.session.large_tokens_left
            self.session.accept(action=CONTINUE_SMALL, wasted=0 if left is None else min(max(unknown, 0), left))
            return proposal, self._note(proposal, SMALL, large=step, fallback=words, **common)
        self._owed.append(_Owed(step, LARGE, True, proposal if proposal.text == step.text else None))
        return step, self._note(step, LARGE, large=step, **common)

    async def _without_small(self, models: Models, fault: Unavailable) -> tuple[Step, Written]:
        """Let the large model write a step for which there is no proposal."""
        if self.when_small_fails == "error":
            raise RouteFailed(f"There is no proposal: {_brief(fault)}.") from fault
        try:
            step, whole = await self._large(models)
        except Unavailable as second:
            raise RouteFailed(f"Neither model answers: {_brief(fault)}; {_brief(second)}.") from second
        if step is None:
            raise _CapSpent(_words(fault, "the policy's cap leaves the large model nothing")) from fault
        words = "the large model wrote the step" if whole else "the large model wrote up to the policy's cap"
        self._owed.append(_Owed(step, LARGE, decided=False))
        return step, self._note(step, LARGE, large=step, fallback=_words(fault, words))

    async def _without_scorer(
        self, models: Models, proposal: Step, fault: Unavailable, *, asked: bool = False, **known: Any
    ) -> tuple[Step, Written]:
        """Do what is configured for proposals that cannot be scored; `asked`: the policy has asked, and waits."""
        if self.when_scorer_fails == "error":
            raise RouteFailed(f"The proposal cannot be scored: {_brief(fault)}.") from fault
        words, large = "the proposal was kept", None
        common = {"asked": asked, "proposal": proposal, **known}
        if self.when_scorer_fails == "large":
            try:
                large, whole = await self._large(models)
            except Unavailable as second:
                words = _words(second, words)
            else:
                if large is not None and whole:
                    self._owed.append(_Owed(large, LARGE, decided=asked))
                    words = _words(fault, "the large model wrote the step")
                    return large, self._note(large, LARGE, large=large, fallback=words, **common)
                words = "the policy's cap was reached, the proposal was kept"
        self._owed.append(_Owed(proposal, SMALL, decided=asked))
        return proposal, self._note(proposal, SMALL, large=large, fallback=_words(fault, words), **common)

    def _note(
        self,
        step: Step,
        author: str,
        proposal: Step | None = None,
        large: Step | None = None,
        asked: bool = False,
        **more: Any,
    ) -> Written:
        paid = sum(each.asked_tokens or 0 for each in self.written)
        return Written(
            step=len(self.written) + 1,
            author=author,
            asked=asked if self._bought else None,
            asked_tokens=self.questions.prompt_tokens - paid if asked else None,
            tokens=None if proposal is None else proposal.tokens,
            large_tokens=None if large is None else large.tokens,
            stop_reason=step.stop_reason.value,
            text=step.text,
            rejected=proposal.text if proposal is not None and author == LARGE else None,
            thinking=step.thinking,
            **more,
        )

    def usage(self) -> dict[str, Any]:
        """Return what was spent, in OpenAI's shape and by model.

        ``prompt_tokens`` are those of the problem's prompt, once, as the small model reads it. ``completion_tokens``
        are all that were decoded, by either model, discarded proposals included, as OpenAI counts them.
        ``models`` tells what each upstream has decoded and read; there a prefix counts each time that it was sent, and
        ``aborted_tokens`` are the most that may have been decoded for answers that never came.
        """
        models: dict[str, dict[str, int]] = {}
        for role in (SMALL, LARGE):
            spent = self.ledger.roles[role]
            accepted = sum(self.counted(step) for step in self.written if step.author == role)
            models[role] = {**asdict(spent), "discarded_tokens": spent.completion_tokens - accepted}
        decoded = sum(each["completion_tokens"] for each in models.values())
        discarded = sum(each["discarded_tokens"] for each in models.values())
        thought = sum(self.counted(step) for step in self.written if step.thinking)
        hidden = thought + sum(each["reasoning_tokens"] for each in models.values())
        read, scorer = ("requests", "prompt_tokens"), asdict(self.ledger.roles[SCORER])
        models[SCORER] = {name: spent for name, spent in scorer.items() if spent or name in read}  # judges decode, too
        return {
            "prompt_tokens": self.ledger.prompt_tokens,
            "completion_tokens": decoded,
            "total_tokens": self.ledger.prompt_tokens + decoded,
            "completion_tokens_details": {
                "accepted_tokens": self.used,
                "rejected_prediction_tokens": discarded,
                "reasoning_tokens": hidden,
            },
            "models": models,
        }

    @property
    def large_token_share(self) -> float:
        """Share of the answer's tokens that the large model wrote."""
        return sum(self.counted(step) for step in self.written if step.author == LARGE) / max(self.used, 1)

    @staticmethod
    def counted(step: Written) -> int:
        """Return the tokens that its author decoded for a step."""
        return (step.large_tokens if step.author == LARGE else step.tokens) or 0

    @property
    def _thought(self) -> dict[str, Any]:
        """How many steps were thinking, and whether a limit closed the block."""
        steps = [step for step in self.written if step.thinking]
        return {"steps": len(steps), "forced": any(step.stop_reason == StopReason.FORCED for step in steps)}

    def summary(self, *, trace: bool) -> dict[str, Any]:
        """Return what happened, and each step of it if `trace` asks for it."""
        decided = {"for": "problem", "model": self.author, "chance": self.session.chance}
        summary: dict[str, Any] = {
            "steps": len(self.written),
            "escalations": sum(step.escalated for step in self.written),
            **({"asked": self.questions.requests, "asked_tokens": self.questions.prompt_tokens} if self.source else {}),
            "large_steps": sum(step.author == LARGE for step in self.written),
            "large_token_share": self.large_token_share,
            "fallbacks": [f"step {step.step}: {step.fallback}" for step in self.written if step.fallback]
            + ([] if self._stopped is None else [self._stopped]),
            "ended": self.ended,
            "answer": final_answer(self.text),
            **({"thinking": self._thought} if self.task.splitting.thinks else {}),
            **({"policy": self.policy} if self.policy else {}),
            **({"decided": decided} if self.author and self.only is None else {}),
            "knob": {"name": self.session.knob.name, "value": self.session.knob.value},
            **({} if self.shadow is None else {"shadow": self.shadow.report()}),
        }
        if trace:
            summary["trace"] = [step.plain() for step in self.written]
        return summary


async def _nobody(_: Task, steps: Sequence[str], __: Ledger) -> list[float | None]:
    """Return what `Models.scores` does where no scorer is asked."""
    return [None] * len(steps)


def _brief(fault: Unavailable) -> str:
    """Return a fault without the upstream's own words."""
    return f"{fault.role} ({fault.kind})"


def _words(fault: Unavailable, instead: str) -> str:
    return f"{_brief(fault)}: {instead}"
