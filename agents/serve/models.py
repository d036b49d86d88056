"""The small model, the large model and the scorer as a route asks them: prompts, steps and scores of the rollouts.

What is sent and how answers become steps is the code that the rollouts were generated with; here it only waits for
upstream servers instead of for engines.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from agents.serve.ledger import SCORER, Ledger
from agents.serve.metrics import Metrics
from agents.serve.several import Upstreams
from agents.serve.sources import Sources, Told
from agents.serve.upstreams import Probe, Unavailable
from rollouts.config import FamilyConfig, GeneratorConfig, Limits, ModelConfig, Sampling, ScorerConfig
from rollouts.errors import BackendError, ConfigError
from rollouts.family import Family
from rollouts.models.base import Completion, CompletionRequest, LogprobRequest
from rollouts.models.server.chat import Said, StepChat, read_said
from rollouts.models.server.judge import Terms, Verdict, judge_payload, read_verdict_of
from rollouts.models.server.wire import Exchange, Send, Wire, score_exchanges, smallest_input
from rollouts.models.stepwise import Draft, StepRules
from rollouts.scoring.judge import PROMPT, judge_question
from rollouts.scoring.prm import fitting_input
from rollouts.text.layouts import reward_layout
from rollouts.text.likelihood import WORTHLESS
from rollouts.text.prompts import PromptFormat, Reading, RewardLayout, Turns, has_room
from rollouts.text.splitting import BLANK_LINE, Splitting
from rollouts.text.steps import LARGE, ROLES, SMALL, Prefix, Step, StopReason, prefix_hash

_SYSTEM_PROMPTS = 32  # formats of system prompts that requests bring, kept at hand
_QUESTIONS, _BROUGHT = 16 << 20, 1 << 20  # bytes of rendered questions kept at hand for each format, own and brought
_SCORES = 1 << 16  # scores kept at hand where each takes a request
_CHARACTERS = 16  # no text has as many of them per token
_EVERYTHING, _NOTHING = Sources(), MappingProxyType[str, Any]({})


@dataclass(frozen=True)
class Task:
    """What is asked of the models for one request.

    Attributes:
        reward: Input format of the reward model, if it is asked.
        chat: The large model's settings for this request, where it is asked by chat.
    """

    question: str
    formats: Mapping[str, PromptFormat]
    sampling: Mapping[str, Sampling]
    limits: Limits
    reward: RewardLayout | None = None
    chat: GeneratorConfig | None = None
    turns: Turns = ()
    splitting: Splitting = BLANK_LINE


class Models:
    """Three upstreams, and what is needed to ask them."""

    def __init__(
        self, config: FamilyConfig, timeout_s: float, metrics: Metrics, sources: Sources = _EVERYTHING
    ) -> None:
        """Load tokenizers and prepare connections to the servers of a family, which have to tell some sources.

        Raises:
            ConfigError: A role cannot be served as it is configured.
        """
        self.family = Family(config)
        self.limits = self.family.limits
        self.sources = sources
        roles: dict[str, tuple[ModelConfig, Probe]] = {
            role: (config.generator(role), _generates(sources.told_by(role), role == LARGE and sources.large))
            for role in ROLES
        }
        self.chat: StepChat | None = None
        if config.large.chat_only:
            if sources.told_by(LARGE):
                raise ConfigError(
                    "large: the policy reads what the large model makes of steps; one that can only be asked by chat "
                    "tells none of it."
                )
            self.chat = StepChat(LARGE, config.large)
            roles[LARGE] = config.large, _chats(self.chat)
        self.continuing = [role for role in ROLES if not config.generator(role).chat_only]
        self._reward: RewardLayout | None = None
        self._judge: _Judge | None = None
        self._told: OrderedDict[int, float] = OrderedDict()  # scores that took a request of their own, by path
        if sources.scorer:
            scorer, prompts = config.scorer, self.family.reward_prompts
            assert scorer is not None and scorer.model is not None
            if prompts is None:
                self._judge = _Judge(scorer)
                roles[SCORER] = scorer.model, self._judge.probe()
            else:
                kept: dict[str, Any] = {"remembered": _QUESTIONS, "splitting": self.family.splitting}
                self._reward = reward_layout(scorer, prompts.tokenizer, date=self.family.date, **kept)
                roles[SCORER] = scorer.model, _scores(self._reward.reading)
        self.upstreams = {
            role: Upstreams(role, model, probe, timeout_s, metrics) for role, (model, probe) in roles.items()
        }
        self._brought = lru_cache(maxsize=_SYSTEM_PROMPTS)(partial(self._with_system_prompt, remembered=_BROUGHT))
        self._own = {
            role: self._with_system_prompt(role, config.generator(role).system_prompt, _QUESTIONS)
            for role in self.continuing
        }

    def _with_system_prompt(self, role: str, system_prompt: str | None, remembered: int) -> PromptFormat:
        tokenizer = self.family.prompts(role).tokenizer
        date, marks = self.family.date, self.family.marks(role)
        return PromptFormat(tokenizer, system_prompt, name=role, date=date, remembered=remembered, marks=marks)

    async def start(self) -> None:
        """Ask every upstream once; those without an answer are asked again in the background.

        Raises:
            ConfigError: A server does not do what is needed of it.
        """
        for upstream in self.upstreams.values():
            await upstream.start()

    async def close(self) -> None:
        """Disconnect."""
        for upstream in self.upstreams.values():
            await upstream.close()

    def window(self, role: str) -> int:
        """Return a role's window: the configured one, or the server's where that is smaller."""
        told = self.upstreams[role].window
        configured = self.family.windows[role]
        return configured if told is None else min(told, configured)

    @property
    def most_characters(self) -> int:
        """Most characters of a request's messages that are worth tokenising."""
        return _CHARACTERS * min(self.window(role) for role in self.continuing)

    def formats(
        self, system_prompt: str | None, turns: Turns = (), options: Mapping[str, Any] = _NOTHING
    ) -> Mapping[str, PromptFormat]:
        """Return the prompt formats of a request, by role; without a system prompt of its own as configured.

        Raises:
            ConfigError: A chat template has no place for it.
        """
        formats = self._own
        if system_prompt is not None:
            formats = {role: self._brought(role, own.special.plain(system_prompt)) for role, own in formats.items()}
        if turns or options:
            formats = {role: prompts.within(turns, options) for role, prompts in formats.items()}
        return formats

    def reward(self, turns: Turns = ()) -> RewardLayout | None:
        """Return the format of the reward model's input for a request, if it is asked."""
        return self._reward.within(turns) if turns and self._reward is not None else self._reward

    def fits(self, task: Task, question: str, steps: Sequence[str]) -> bool:
        """Whether a prefix leaves room for one more token in every role's window (docs/design.md, section 1)."""
        every: dict[str, PromptFormat | RewardLayout] = {**task.formats}
        if task.reward is not None:
            every[SCORER] = task.reward
        return all(has_room(prompts, self.window(role), question, steps) for role, prompts in every.items())

    def prepare(self, task: Task, steps: Sequence[str]) -> None:
        """Tokenise the small model's next prompt while something else is waited for; it is looked up then."""
        task.formats[SMALL].ids(task.question, steps)

    async def step(
        self, role: str, task: Task, steps: tuple[str, ...], used: int, ledger: Ledger, most: int | None = None
    ) -> Step:
        """Return the next step of a model.

        Args:
            role: ``small`` or ``large``.
            task: What is asked for.
            steps: Accepted steps.
            used: Their tokens.
            ledger: Where it is charged.
            most: Most tokens that may be decoded, if fewer than the step limit. With a most, what may have been decoded
                in vain is not asked for once more.

        Raises:
            Unavailable: The model gave no usable answer.
        """
        limits = task.limits
        if most is not None and most < limits.step_tokens:
            limits = Limits(most, limits.solution_tokens, limits.max_steps)
        if role == LARGE and self.chat is not None:
            return await self._by_chat(self.chat, task, Prefix("", task.question, 0, steps, used), limits, ledger, most)
        rules = StepRules(
            role=role,
            prompts=task.formats[role],
            window=self.window(role),
            sampling=task.sampling[role],
            limits=limits,
            fits=partial(self.fits, task),
            likelihood=self.sources.told_by(role),
            splitting=task.splitting,
        )
        draft = Draft(rules, Prefix("", task.question, 0, steps, used))
        while draft.generation is None:
            completion = await self._complete(role, rules.window, draft.request(), ledger, capped=most is not None)
            draft.take(completion)
            if rules.prompts.hidden and completion.token_ids is None and completion.finish != "failed":
                raise Unavailable(role, "malformed", "no token ids, which tell where its thinking block ends")
        step = draft.generation.steps[0]
        if step.stop_reason is StopReason.FAILED:
            raise Unavailable(role, "malformed", draft.generation.reason)
        if rules.likelihood and step.statistics is None and step.tokens:
            raise Unavailable(role, "malformed", "no log-probabilities of what it decoded")
        return step

    async def _by_chat(
        self, chat: StepChat, task: Task, prefix: Prefix, limits: Limits, ledger: Ledger, most: int | None
    ) -> Step:
        spent = ledger.roles[LARGE]

        async def send(payload: Mapping[str, Any], budget: int) -> Said:
            lost = spent.losing(budget, again=most is None)
            with ledger.waiting():
                said = await self.upstreams[LARGE].post(chat.path, payload, read_said, lost, budget, task.question)
            spent.add(said.prompt_tokens, said.tokens)
            spent.reasoning_tokens += said.hidden
            return said

        generation = await chat.step(
            send, prefix, limits, partial(self.fits, task), model=task.chat, turns=task.turns, again=most is None
        )
        if generation.steps[0].stop_reason is StopReason.FAILED:
            raise Unavailable(LARGE, "malformed", generation.reason)
        return generation.steps[0]

    async def _complete(
        self, role: str, window: int, request: CompletionRequest, ledger: Ledger, *, capped: bool
    ) -> Completion:
        spent = ledger.roles[role]
        lost = spent.losing(request.max_tokens, again=not capped)
        send = self._sending(role, request.max_tokens, request.about, lost)
        with ledger.waiting():
            completion = await self.upstreams[role].wire.complete(send, window, request)
        spent.add(len(request.prompt_ids), completion.tokens)
        return completion

    def _sending(self, role: str, most: int, about: str, lost: Callable[[], bool] = lambda: True) -> Send:
        """Return what sends a model's requests; answers that cannot be are none (`_checked`)."""

        def send(path: str, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Awaitable[Any]:
            return self.upstreams[role].post(path, body, partial(_checked, read, most), lost, about=about)

        return send

    async def looked_at(self, task: Task, steps: Sequence[str], ledger: Ledger) -> Told:
        """Return what the large model makes of the last of some steps, as `Sources.signals` takes it.

        Raises:
            Unavailable: It gave no usable answer.
        """
        (last,) = await self.looked_at_each(task, steps, ledger, len(steps) - 1)
        return last

    async def looked_at_each(self, task: Task, steps: Sequence[str], ledger: Ledger, first: int = 0) -> list[Told]:
        """Return what the large model makes of each of some steps from the place `first` on.

        Raises:
            Unavailable: It gave no usable answer.
        """
        ids, positions = task.formats[LARGE].step_spans(task.question, steps)
        spans = list(pairwise(positions))[first:]
        read = [end for _, end in spans if end < self.window(LARGE)]
        begin, end = positions[first], max(read, default=0)
        if end <= begin:
            return [(LARGE, WORTHLESS)] * len(spans)
        request, large = LogprobRequest(ids[:end], begin, entropies=True), self.upstreams[LARGE]
        with ledger.waiting():
            try:
                send = self._sending(LARGE, 0, task.question)
                found = await large.wire.likelihood(send, self.window(LARGE), request)
            except BackendError as error:
                raise Unavailable(LARGE, "malformed", str(error)) from None
        ledger.roles[LARGE].add(end)
        return [(LARGE, found.statistics(start - begin, stop - begin) if stop <= end else WORTHLESS)
                for start, stop in spans]  # fmt: skip

    async def scores(self, task: Task, steps: Sequence[str], ledger: Ledger) -> list[float | None]:
        """Return the scores of some steps; 0 for those beyond the scorer's window, None where no scorer is asked.

        Raises:
            Unavailable: The scorer gave no usable answer.
        """
        judge, reward = self._judge, task.reward
        if judge is not None:
            earlier = "".join(f"{role}: {said}\n\n" for role, said in task.turns)
            judged = partial(self._judged, judge, ledger)
            return await self._one_by_one(earlier + task.question, steps, judged)
        if reward is None:
            return [None] * len(steps)
        request = fitting_input(reward, self.window(SCORER), task.question, steps)
        kept = len(request.positions)
        unread: list[float | None] = [0.0] * (len(steps) - kept)  # as environments have it
        if not kept:
            return unread
        exchanges = score_exchanges(reward.reading, request)
        if reward.reading.verdicts is None:
            return [*await self._exchanged(exchanges[0], ledger), *unread]

        async def one(_: str, some: Sequence[str]) -> float:
            return (await self._exchanged(exchanges[len(some) - 1], ledger))[0]

        return [*await self._one_by_one(reward.text(task.question, ()), steps[:kept], one), *unread]

    async def _exchanged(self, exchange: Exchange, ledger: Ledger) -> list[float]:
        with ledger.waiting():
            scores = await self.upstreams[SCORER].post(exchange.path, exchange.payload, exchange.read)
        ledger.roles[SCORER].add(exchange.tokens)
        return scores

    async def _one_by_one(
        self, question: str, steps: Sequence[str], ask: Callable[[str, Sequence[str]], Awaitable[float]]
    ) -> list[float | None]:
        """Return scores each of which takes a request; those of paths that came before are remembered."""
        keys = [prefix_hash((question, *steps[: end + 1])) for end in range(len(steps))]
        known = {key: self._told[key] for key in keys if key in self._told}
        lacking = [end for end, key in enumerate(keys) if key not in known]
        asked = (ask(question, steps[: end + 1]) for end in lacking)
        found = await asyncio.gather(*asked, return_exceptions=True)
        known |= {keys[end]: each for end, each in zip(lacking, found, strict=True) if isinstance(each, float)}
        self._told |= known
        while len(self._told) > _SCORES:
            self._told.popitem(last=False)
        for each in found:  # what the others told is kept all the same
            if isinstance(each, BaseException):
                raise each
        return [known[key] for key in keys]

    async def _judged(self, judge: _Judge, ledger: Ledger, question: str, steps: Sequence[str]) -> float:
        most = judge.scorer.max_tokens
        spent, payload = ledger.roles[SCORER], judge.payload(question, steps)
        lost = spent.losing(most, again=True)
        with ledger.waiting():
            verdict = await self.upstreams[SCORER].post(judge.path, payload, judge.read, lost, most)
        spent.add(*verdict.spent)
        assert verdict.score is not None  # `read` sees to it
        return verdict.score


def _checked(read: Callable[[Any], Any], most: int, body: Any) -> Any:
    """Return what is read of an answer, if a completion is of a length that can be."""
    found = read(body)
    if isinstance(found, Completion) and not 1 <= found.tokens <= most:
        raise ValueError(f"{found.tokens} tokens, expected 1 to {most}")
    return found


def _generates(likelihood: bool, looks: bool = False) -> Probe:
    """Return what a generating model has to answer; log-probabilities of what it decodes or is given, if asked."""

    def check(wire: Wire, body: Any) -> None:
        if (lacking := wire.lacks(body)) is not None:
            raise BackendError(f"{lacking}.")
        if likelihood and wire.read(body).likelihood is None:
            raise BackendError(f"tells no log-probabilities, which the policy reads. {wire.more_logprobs}.")
        if looks and not wire.looked(body):
            raise BackendError("tells no log-probabilities of prompts, which the policy reads. Serve it with vLLM.")

    return Probe(lambda wire: (wire.path, wire.probe(likelihood=likelihood, looks=looks)), check)


def _chats(chat: StepChat) -> Probe:
    return Probe(lambda _: (chat.path, chat.probe()), lambda _, body: chat.check(read_said(body)), chat.leave_out)


def _scores(reading: Reading) -> Probe:
    exchange = score_exchanges(reading, smallest_input(reading))[0]
    return Probe(lambda _: (exchange.path, exchange.payload), lambda _, body: exchange.read(body))


class _Judge:
    """What a judge is asked, and in which terms its server takes it."""

    path = "chat/completions"

    def __init__(self, scorer: ScorerConfig) -> None:
        self.scorer = scorer
        self.terms = Terms()

    def payload(self, question: str, steps: Sequence[str]) -> dict[str, Any]:
        text = judge_question(self.scorer.prompt or PROMPT, question, steps)
        return judge_payload(text, self.scorer.system_prompt, self.scorer.max_tokens, self.terms)

    def probe(self) -> Probe:
        body = ("What is 1 + 1?", ["1 + 1 = 2."])
        return Probe(lambda _: (self.path, self.payload(*body)), lambda _, answer: read_verdict_of(answer), self._yield)

    def _yield(self, refusal: str, _: Mapping[str, Any]) -> bool:
        terms = self.terms.yielding(refusal)
        self.terms = terms or self.terms
        return terms is not None

    @staticmethod
    def read(body: Any) -> Verdict:
        verdict = read_verdict_of(body)
        if verdict.score is None:
            raise ValueError(verdict.why)
        return verdict
