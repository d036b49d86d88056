"""What the service does with a request: checks it against policy and models, routes it, counts it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from agents.deploy.policy import Policy
from agents.serve.api import ApiError, ChatRequest, bad_request
from agents.serve.config import ServeConfig
from agents.serve.metrics import Metrics
from agents.serve.models import Models, Task
from agents.serve.route import Route, RouteFailed, Written
from rollouts.errors import ConfigError
from rollouts.text.steps import ROLES, SMALL

CLIENT_GONE = 499
"""nginx' status for a client that left."""


class Service:
    """A policy, its models, and what is shared by requests: connections and counters, never state."""

    def __init__(self, policy: Policy, models: Models, metrics: Metrics, config: ServeConfig) -> None:
        """Check that requests without a setting of their own can be served.

        Raises:
            ConfigError: λ or budget of the settings are none that the policy takes.
        """
        self.policy, self.models, self.metrics, self.config = policy, models, metrics, config
        self.name = config.name or policy.name
        self.since = int(time.time())
        if config.lam is not None or config.budget is not None:
            policy.session(config.lam, config.budget)

    def begin(self, ask: ChatRequest) -> Route:
        """Check a request and return its route, of which nothing is done yet.

        Raises:
            ApiError: It cannot be served as it is.
        """
        if ask.model is not None and ask.model != self.name:
            message = f"The model `{ask.model[:200]}` does not exist. Valid: {self.name}."
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
        most = [limit for limit in (limits.solution_tokens, self.config.max_tokens, ask.limit()) if limit]
        task = Task(question, formats, sampling, replace(limits, solution_tokens=min(most)))
        lam, budget = ask.lam, ask.budget
        if lam is None and budget is None:
            lam, budget = self.config.lam, self.config.budget
        try:
            session = self.policy.session(lam, budget, ask.seed)
        except ConfigError as error:
            raise bad_request(str(error), "budget" if budget is not None else "lam") from None
        route = Route(task, session, self.config.when_scorer_fails)
        route.ledger.prompt_tokens = len(formats[SMALL].ids(question))
        return route

    async def steps(self, route: Route, ask: ChatRequest) -> AsyncGenerator[Written, None]:
        """Yield the steps of a route, counted in before the first one and out with the status that its end has.

        Raises:
            ApiError: Too many are under way, or it could not be finished: then the error tells what was spent and
                what there is.
        """
        metrics, ledger = self.metrics, route.ledger
        if metrics.under_way >= self.config.max_concurrent:
            metrics.requests.labels("429").inc()
            raise ApiError(429, "Too many requests are under way; try again.", "RateLimitError")
        metrics.began()
        status, share = CLIENT_GONE, None
        began = now = time.monotonic()
        waited = ledger.waited
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout
        try:
            async with aclosing(route.steps(self.models, deadline)) as steps:
                async for written in steps:
                    overhead = time.monotonic() - now - (ledger.waited - waited)
                    metrics.step(written.author, written.escalated, written.fallback is not None, overhead)
                    yield written
                    now, waited = time.monotonic(), ledger.waited
            status, share = 200, route.large_token_share
        except RouteFailed as error:
            status = error.status
            kind = "GatewayTimeoutError" if status == 504 else "ServiceUnavailableError"
            told: dict[str, Any] = {"usage": route.usage(), "trim": route.summary(trace=ask.trace)}
            raise ApiError(status, str(error), kind, **told) from error
        except Exception:
            status = 500
            raise
        finally:
            metrics.ended(str(status), time.monotonic() - began, route.usage(), share)

    def card(self) -> dict[str, Any]:
        """Return the entry of the model list."""
        return {
            "id": self.name,
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
