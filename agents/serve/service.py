"""What the service does with a request: checks it against policy and models, routes it, counts it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from agents.deploy.policy import Policy
from agents.serve.api import ApiError, ChatRequest, bad_request
from agents.serve.metrics import Metrics
from agents.serve.models import Models, Task
from agents.serve.route import Fallback, Route, RouteFailed, Written
from rollouts.errors import ConfigError
from rollouts.text.steps import ROLES, SMALL


@dataclass(frozen=True)
class Settings:
    """How the service behaves.

    Attributes:
        name: Name that it serves the policy under.
        when_scorer_fails: Who writes a step whose proposal cannot be scored; ``error`` ends the request.
        request_timeout_s: Longest time of one request, seconds; what was accepted until then is the answer.
        max_tokens: Most tokens of an answer, where that is less than the rollouts' limit.
        max_concurrent: Most requests under way at once.
        lam: λ of requests that name neither λ nor budget.
        budget: Budget of requests that name neither.
    """

    name: str
    when_scorer_fails: Fallback = "small"
    request_timeout_s: float = 300.0
    max_tokens: int | None = None
    max_concurrent: int = 256
    lam: float | None = None
    budget: float | None = None


class Service:
    """A policy, its models, and what is shared by requests: connections and counters, never state."""

    def __init__(self, policy: Policy, models: Models, metrics: Metrics, settings: Settings) -> None:
        """Check that requests without a setting of their own can be served.

        Raises:
            ConfigError: λ or budget of the settings are none that the policy takes.
        """
        self.policy, self.models, self.metrics, self.settings = policy, models, metrics, settings
        self.since = int(time.time())
        if settings.lam is not None or settings.budget is not None:
            policy.session(settings.lam, settings.budget)

    def begin(self, ask: ChatRequest) -> Run:
        """Check a request.

        Raises:
            ApiError: It cannot be served as it is.
        """
        if ask.model is not None and ask.model != self.settings.name:
            message = f"The model `{ask.model[:200]}` does not exist. Valid: {self.settings.name}."
            raise ApiError(404, message, "NotFoundError", "model")
        question, system_prompt = ask.problem()
        try:
            formats = self.models.formats(system_prompt)
        except ConfigError as error:
            raise bad_request(str(error), "messages") from None
        if not self.models.fits(formats, question, ()):
            raise bad_request(
                f"The problem is too long ({len(question)} characters): the models' windows of "
                f"{', '.join(str(self.models.window(role)) for role in ROLES)} tokens leave no room for an answer.",
                "messages",
            )
        own = self.models.family.config
        sampling = {role: ask.sampling(own.generator(role).sampling) for role in ROLES}
        limits = self.models.limits
        most = [limit for limit in (limits.solution_tokens, self.settings.max_tokens, ask.limit()) if limit]
        task = Task(question, formats, sampling, replace(limits, solution_tokens=min(most)))
        lam, budget = ask.lam, ask.budget
        if lam is None and budget is None:
            lam, budget = self.settings.lam, self.settings.budget
        try:
            session = self.policy.session(lam, budget, ask.seed)
        except ConfigError as error:
            raise bad_request(str(error), "budget" if budget is not None else "lam") from None
        route = Route(task, session, self.settings.when_scorer_fails)
        route.ledger.prompt_tokens = len(formats[SMALL].ids(question))
        return Run(self, route, ask)

    def card(self) -> dict[str, Any]:
        """Return the entry of the model list."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.since,
            "owned_by": "trim-routing",
            "root": self.policy.name,
            "parent": None,
            "max_model_len": min(self.models.window(role) for role in ROLES),
            "permission": [],
            "trim": self.policy.describe(),
        }

    async def health(self) -> dict[str, Any]:
        """Return which upstreams answer now."""
        upstreams = self.models.upstreams
        await asyncio.gather(*(upstream.check() for upstream in upstreams.values()))
        up = {role: upstream.up for role, upstream in upstreams.items()}
        status = "ok" if all(up.values()) else "degraded" if any(up[role] for role in ROLES) else "unavailable"
        return {"status": status, "upstreams": {role: {"up": answers} for role, answers in up.items()}}


class Run:
    """One request under way and what is counted of it."""

    def __init__(self, service: Service, route: Route, ask: ChatRequest) -> None:
        """Count it in.

        Raises:
            ApiError: There are too many.
        """
        self._metrics, self._models = service.metrics, service.models
        self._timeout = service.settings.request_timeout_s
        self.route, self.ask = route, ask
        if self._metrics.under_way >= service.settings.max_concurrent:
            raise ApiError(429, "Too many requests are under way; try again.", "RateLimitError")
        self._began = time.monotonic()
        self._open = True
        self._metrics.began()

    async def steps(self) -> AsyncGenerator[Written, None]:
        """Yield the steps of the route.

        Raises:
            ApiError: It could not be finished; the error tells what was spent and what there is.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        ledger = self.route.ledger
        async with aclosing(self.route.steps(self._models, deadline)) as steps:
            began, waited = time.monotonic(), ledger.waited
            try:
                async for written in steps:
                    overhead = time.monotonic() - began - (ledger.waited - waited)
                    self._metrics.step(written.author, written.escalated, written.fallback is not None, overhead)
                    yield written
                    began, waited = time.monotonic(), ledger.waited
            except RouteFailed as error:
                trim = self.route.summary(trace=self.ask.trace)
                kind = "GatewayTimeoutError" if error.status == 504 else "ServiceUnavailableError"
                raise ApiError(error.status, str(error), kind, usage=self.route.usage(), trim=trim) from error

    def close(self, status: str) -> None:
        """Count it out; the first status counts."""
        if self._open:
            self._open = False
            usage = self.route.usage()
            share = self.route.large_token_share if status == "200" else None
            self._metrics.ended(status, time.monotonic() - self._began, usage, share)
