"""What the service does with a request: checks it against policy and models, routes it, counts it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from agents.routers.base import is_blind
from agents.serve import tracing
from agents.serve.api import ApiError, ChatRequest, bad_request
from agents.serve.config import ServeConfig
from agents.serve.drift import Drift
from agents.serve.metrics import Metrics
from agents.serve.models import Models, Task
from agents.serve.policies import Policies
from agents.serve.route import ENDING, Route, RouteFailed, UnderWay, Written
from agents.serve.shadow import Shadow
from agents.serve.sources import Sources
from agents.serve.stops import StopText
from rollouts.config import GeneratorConfig, Sampling
from rollouts.errors import ConfigError
from rollouts.text.steps import LARGE, ROLES, SMALL

if TYPE_CHECKING:
    from agents.serve.recording import Recorder

_log = logging.getLogger("trim.serve")
_SHORT = 2000  # characters that are tokenised in a few milliseconds
CLIENT_GONE = 499
"""nginx' status for a client that left."""


class Service:
    """Policies, their models, and what is shared by requests: connections and counters, never state.

    Attributes:
        draining: Whether it is about to end, and load balancers should send nothing more.
        over: Whether time is up: nothing is begun any more.
        cut: Requests that were ended before they were answered.
    """

    def __init__(
        self,
        policies: Policies,
        models: Models,
        metrics: Metrics,
        config: ServeConfig,
        recorder: Recorder | None = None,
    ) -> None:
        """Begin with nothing under way."""
        self.models, self.metrics, self.config = models, metrics, config
        self.use(policies)
        self._recorder, self._prices = recorder, config.price_of
        self.name = next(iter(policies.each))
        self.since = int(time.time())
        self.draining, self.over, self.cut = False, False, 0
        self._under_way: set[UnderWay] = set()
        metrics.in_flight.set_function(lambda: len(self._under_way))
        self._shadows: set[asyncio.Task[None]] = set()

    def use(self, policies: Policies) -> None:
        """Decide by these from now on."""
        self._drifts = {name: Drift(name, policy.about, self.metrics) for name, policy in policies.each.items()}
        self.policies = policies

    async def begin(self, ask: ChatRequest) -> Route:
        """Check a request and return its route, of which nothing is done yet; what is refused costs next to nothing.

        Raises:
            ApiError: It cannot be served as it is.
        """
        policies = self.policies
        named, asked = policies.named(ask.model)
        if ask.only is not None and not self.config.playground:
            raise bad_request("`only` is for services that were started with --playground.", "only")
        question, system_prompt, turns = ask.problem()
        name = named or policies.drawn("\x00".join([system_prompt or "", *(text for _, text in turns), question]))
        lam, budget = ask.lam, ask.budget
        if asked and (lam, budget) != (None, None):
            raise bad_request("Give `lam` or `budget` either in the model's name or beside it, not both.", "model")
        lam, budget = asked.get("lam", lam), asked.get("budget", budget)
        if lam is None and budget is None:
            lam, budget = policies.usual[name]
        try:
            session = policies.each[name].session(lam, budget, ask.seed)
        except ConfigError as error:
            raise bad_request(str(error), "budget" if budget is not None else "lam") from None
        self._check_open()
        own, limits, splitting = self.models.family.config, self.models.limits, self.models.family.splitting
        if ask.thinks not in (None, splitting.thinks):
            does = "thinks" if splitting.thinks else "does not think"
            raise bad_request(
                f"`enable_thinking` is not supported here: this service {does} before it answers, as in the rollouts "
                "of its policy.",
                "chat_template_kwargs",
            )
        sampling = {role: ask.sampling(own.generator(role).sampling) for role in ROLES}
        most = [limit for limit in (limits.solution_tokens, self.config.max_tokens, ask.limit()) if limit]
        limits, chat = replace(limits, solution_tokens=min(most)), self._by_chat(sampling[LARGE], system_prompt)
        length = len(question) + len(system_prompt or "") + sum(len(content) for _, content in turns)
        rendered = None
        if length <= self.models.most_characters:
            task = Task(question, {}, sampling, limits, None, chat, turns, splitting)
            render = partial(self._render, task, system_prompt, ask.chat_template_kwargs or {})
            # Others would have to wait while a long text is tokenised.
            rendered = await asyncio.to_thread(render) if length > _SHORT else render()
        if rendered is None:
            windows = ", ".join(str(self.models.window(role)) for role in self.models.continuing)
            raise bad_request(
                f"The problem is too long ({length} characters): the models' windows of {windows} tokens leave no room "
                "for an answer.",
                "messages",
            )
        task, prompt_tokens = rendered
        fallbacks = self.config.when_scorer_fails, self.config.when_small_fails
        sources = (
            Sources(scorer=False) if is_blind(session.router) else policies.sources[name]
        )  # a mixture may draw one
        author = None
        if session.decides_once:
            decide = partial(session.decide, question=question)
            author = ROLES[await asyncio.to_thread(decide) if length > _SHORT else decide()]
        made: dict[str, Any] = {"policy": name, "author": author}
        only = ask.only or self.config.shadow
        route = Route(task, session, *fallbacks, sources, only, **made, stops=StopText(ask.stop or ()))
        route.ledger.prompt_tokens = prompt_tokens
        if self.config.shadow and not ask.only and random.random() < self.config.shadow_share:
            made |= {"served": route, "traced": bool(ask.trace), "stops": StopText(ask.stop or ())}
            route.shadow = Shadow(task, session, *fallbacks, sources, **made)
        return route

    def _by_chat(self, sampling: Sampling, system_prompt: str | None) -> GeneratorConfig | None:
        """Return the large model's settings for a request, where it is asked by chat.

        Raises:
            ApiError: Its API takes no such sampling parameters.
        """
        if self.models.chat is None:
            return None
        if unable := self.models.chat.unable(sampling):
            raise bad_request(f"The large model's API takes no {' and no '.join(unable)}: leave it out.", unable[0])
        prompt = {} if system_prompt is None else {"system_prompt": system_prompt}
        return self.models.chat.model.model_copy(update={"sampling": sampling, **prompt})

    def _render(self, task: Task, system_prompt: str | None, options: Mapping[str, Any]) -> tuple[Task, int] | None:
        """Return a task with the formats of its request and the tokens of its prompt; None if that leaves no room.

        Raises:
            ApiError: A chat template has no place for it.
        """
        try:
            formats = self.models.formats(system_prompt, task.turns, options)
            task = replace(task, formats=formats, reward=self.models.reward(task.turns))
            if not self.models.fits(task, task.question, ()):
                return None
            return task, len(formats[SMALL].ids(task.question))
        except ConfigError as error:
            raise bad_request(str(error), "messages") from None

    def _check_open(self) -> None:
        if self.over:
            raise ApiError(503, ENDING, "ServiceUnavailableError")
        if len(self._under_way) >= self.config.max_concurrent:
            raise ApiError(429, "Too many requests are under way; try again.", "RateLimitError")

    def enter(self, one: UnderWay) -> None:
        """Count in what begins now, or its refusal.

        Raises:
            ApiError: Too many are under way.
        """
        try:
            self._check_open()
        except ApiError as error:
            self.metrics.requests.labels(str(error.status)).inc()
            raise
        self._under_way.add(one)

    async def steps(self, route: Route, ask: ChatRequest) -> AsyncGenerator[Written, None]:
        """Yield the steps of a route, counted in before the first one and out with the status that its end has.

        Raises:
            ApiError: Too many are under way, or it could not be finished: then the error tells what was spent and
                what there is.
        """
        metrics, ledger = self.metrics, route.ledger
        self.enter(route)
        status, share = CLIENT_GONE, None
        began = now = time.monotonic()
        waited = ledger.waited
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout
        shadowing = self._beside(ask, route, deadline)
        try:
            async with aclosing(route.steps(self.models, deadline)) as steps:
                async for written in steps:
                    overhead = time.monotonic() - now - (ledger.waited - waited)
                    metrics.step(written.author, written.escalated, written.fallback is not None, overhead)
                    if shadowing:
                        shadowing[0].news.set()
                    self._saw(route, written)
                    yield written
                    now, waited = time.monotonic(), ledger.waited
            if shadowing:
                shadowing[0].news.set()
                if ask.trace:  # whoever asks what was decided waits for it
                    await asyncio.wait({shadowing[1]})
            status, share = 200, route.large_token_share
        except RouteFailed as error:
            status = error.status
            kind = "GatewayTimeoutError" if status == 504 else "ServiceUnavailableError"
            told: dict[str, Any] = {"usage": route.usage(), "trim": route.summary(trace=bool(ask.trace))}
            raise ApiError(status, str(error), kind, **told) from error
        except Exception:
            status = 500
            raise
        finally:
            self._under_way.discard(route)
            if shadowing and status != 200:
                shadowing[1].cancel()
            if not shadowing:
                self._record(ask, route)
            if route.source is not None:
                metrics.asked(route.source, route.questions.requests, route.questions.prompt_tokens)
            usage = route.usage()
            metrics.ended(str(status), time.monotonic() - began, usage, share)
            if self._prices and status == 200:
                metrics.paid(self._prices, usage)
            if route.author and route.only is None:
                metrics.problems.labels(route.author).inc()
            if len(self.policies.each) > 1:
                metrics.decided(route.policy, str(status), ledger.roles)
            tracing.current().told |= {
                "policy": route.policy,
                route.session.knob.name: route.session.knob.value,
                "status": status,
                "steps": len(route.written),
                "large_token_share": route.large_token_share,
                "ended": route.ended,
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": ask.model,
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
            }

    def _beside(self, ask: ChatRequest, route: Route, deadline: float) -> tuple[Shadow, asyncio.Task[None]] | None:
        """Begin the shadow of a route, if it has one and there are not too many."""
        if (shadow := route.shadow) is None:
            return None
        if len(self._shadows) >= self.config.max_concurrent:
            self.metrics.shadows.labels("dropped").inc()
            route.shadow = None
            return None
        task = asyncio.create_task(self._watch(shadow, deadline))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)
        task.add_done_callback(lambda _: self._record(ask, shadow, route))
        return shadow, task

    async def _watch(self, shadow: Shadow, deadline: float) -> None:
        """Let a shadow decide, and count it."""
        try:
            await shadow.run(self.models, deadline)
            self.metrics.shadowed(shadow.same_answer, shadow.decided())
            for written in () if self.config.shadow == SMALL else shadow.written:  # only those on the policy's own path
                self._saw(shadow, written)
        except Exception:
            _log.exception("a shadow failed")
            self.metrics.shadows.labels("failed").inc()
        finally:
            self.metrics.spent({role: asdict(spent) for role, spent in shadow.ledger.roles.items()}, kept=False)
            if shadow.source is not None:
                self.metrics.asked(shadow.source, shadow.questions.requests, shadow.questions.prompt_tokens)

    def _saw(self, route: Route, written: Written) -> None:
        if written.action is not None:
            self._drifts[route.policy].saw(route.session.knob, written.score, written.action)

    def _record(self, ask: ChatRequest, *routes: Route) -> None:
        """Hand what was drawn for a request to the recorder, if there is one, and if it is of the rollouts' process."""
        if self._recorder is None or not any(route.drawn for route in routes):
            return
        task, own, limits = routes[0].task, self.models.family.config, self.models.limits
        usual = all(task.sampling[role] == own.generator(role).sampling for role in ROLES) and task.limits == limits
        if not usual or task.turns or ask.chat_template_kwargs or ask.problem()[1] is not None:
            self.metrics.recorded.labels("other").inc()
            return
        told = (ask.model_extra or {}).get("metadata")
        answer = told.get("answer") if isinstance(told, dict) else None
        self._recorder.take(routes, answer if isinstance(answer, str) else "")

    async def close(self) -> None:
        """End what goes on beside requests, and write what is recorded."""
        for task in (shadows := tuple(self._shadows)):
            task.cancel()
        await asyncio.gather(*shadows, return_exceptions=True)
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)

    def passed(self, one: UnderWay, role: str, status: int) -> None:
        """Count a request out that was passed on to one model."""
        self._under_way.discard(one)
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.passed_on.labels(role).inc()
        tracing.current().told |= {"passed_to": role, "status": status}

    def card(self, name: str) -> dict[str, Any]:
        """Return the entry of a name in the model list.

        Raises:
            ApiError: There is no such model, or the policy takes no such setting.
        """
        own, asked = self.policies.named(name)
        policy = self.policies.each[own or self.name]
        try:
            if asked:
                policy.at(**asked)
        except ConfigError as error:
            raise ApiError(404, str(error), "NotFoundError", "model") from None
        return {
            "id": name,
            "object": "model",
            "created": self.since,
            "owned_by": "trim-routing",
            "root": policy.name,
            "parent": None,
            "max_model_len": min(self.models.window(role) for role in self.models.continuing),
            "permission": [],
            "trim": policy.describe(),
        }

    def cut_off(self) -> None:
        """End what is under way, each with an error that says so."""
        self.over = True
        self.cut += len(self._under_way)
        for each in self._under_way:
            each.cut()
        for task in self._shadows:
            task.cancel()

    def health(self) -> dict[str, Any]:
        """Return which upstreams answer, as far as is known; nobody is asked."""
        found = self.models.upstreams
        up = {role: upstreams.up for role, upstreams in found.items()}
        all_up = all(each.trouble is None for upstreams in found.values() for each in upstreams.each)
        status = "ok" if all_up else "degraded" if any(up[role] for role in ROLES) else "unavailable"
        return {"status": status, "upstreams": {role: upstreams.health() for role, upstreams in found.items()}}
