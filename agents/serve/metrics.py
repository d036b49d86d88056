"""What the service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from agents.serve.ledger import Spent
from rollouts.text.steps import LARGE, SMALL

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1)
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """Counters of one service and of its upstreams."""

    def __init__(self) -> None:
        """Begin at zero, in a registry of its own."""
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("trim_requests", "Requests by HTTP status; 499: the client left.", ["status"])
        self.in_flight = gauge("trim_requests_in_flight", "Requests under way.")
        self.seconds = histogram("trim_request_seconds", "Duration of routed requests.", buckets=_SECONDS)
        self.passed_on = counter("trim_passed_on", "Requests that were not routed but passed on.", ["model"])
        self.steps = counter("trim_steps", "Accepted steps by author.", ["author"])
        words = "Requests whose policy decided once, for the whole problem, by whom it chose."
        self.problems = counter("trim_problems", words, ["author"])
        self.escalations = counter("trim_escalations", "Escalations that the policy decided.")
        self.fallbacks = counter("trim_fallbacks", "Steps that went another way because an upstream failed.")
        words = (
            "Tokens that upstreams read (prompt) and decoded (completion), decoded ones that no answer has (discarded)"
        )
        more = "and the most that were decoded for requests whose answer was lost or not waited for (aborted)."
        self.tokens = counter("trim_tokens", f"{words}, {more}", ["model", "kind"])
        words = "Questions of policies that buy what they read (train.py --ask), by who answered."
        self.questions = counter("trim_questions", words, ["model"])
        words = "Tokens that were read for these answers; trim_tokens counts them, too."
        self.question_tokens = counter("trim_question_tokens", words, ["model"])
        words = "Requests that one model answered alone, by whether the policy's answer would be the same (--shadow)."
        self.shadows = counter("trim_shadows", words, ["answer"])
        words = "Steps of these by who would have written them, and whether that is exact or an estimate."
        self.shadow_steps = counter("trim_shadow_steps", words, ["author", "known"])
        self.shadow_tokens = counter("trim_shadow_tokens", "Tokens of these steps, likewise.", ["author", "known"])
        words = "Requests by policy, where there are several (--also), and HTTP status."
        self.policies = counter("trim_policy_requests", words, ["policy", "status"])
        words = "Tokens of these, as trim_tokens has them."
        self.policy_tokens = counter("trim_policy_tokens", words, ["policy", "model", "kind"])
        self.cost = counter("trim_cost", "Money that answers have cost (--price).", ["model"])
        words = (
            "What answers would have cost if the large model had written their tokens in one request, less trim_cost."
        )
        self.cost_saved = gauge("trim_cost_saved", words)
        words = (
            "How far the last decisions are from those on held-out problems: distance of scores, share of escalations."
        )
        self.drift = gauge("trim_drift", words, ["policy", "lam", "what"])
        self.reloads = counter("trim_reloads", "Times that policies were read again, or kept as they were.", ["result"])
        words = (
            "Requests by what became of their record (--record): kept, of another process than the rollouts' (other), "
        )
        self.recorded = counter("trim_recorded", words + "left out by --redact (redacted), dropped, failed.", ["what"])
        words = "Share of an answer's tokens that the large model wrote."
        self.share = histogram("trim_large_token_share", words, buckets=_SHARES)
        words = "Time of a step that was not waiting for upstreams."
        self.overhead = histogram("trim_router_seconds", words, buckets=_SHORT)
        words = "Duration of answered upstream requests."
        by_server = ["model", "server"]  # its place among the URLs of the model, from 1
        self.upstream_seconds = histogram("trim_upstream_seconds", words, by_server, buckets=_SECONDS)
        self.upstream_errors = counter("trim_upstream_errors", "Failed upstream requests.", [*by_server, "kind"])
        self.upstream_up = gauge("trim_upstream_up", "Whether an upstream answers.", by_server)
        self._steps = {author: self.steps.labels(author) for author in (SMALL, LARGE)}

    def step(self, author: str, escalated: bool, fallback: bool, overhead: float) -> None:
        """Count an accepted step; `overhead` in seconds."""
        self._steps[author].inc()
        self.escalations.inc(escalated)
        self.fallbacks.inc(fallback)
        self.overhead.observe(max(overhead, 0.0))

    def ended(self, status: str, seconds: float, usage: dict[str, Any], share: float | None) -> None:
        """Count a routed request out, however it ended; it has a large-token share if there is a whole answer."""
        self.requests.labels(status).inc()
        self.seconds.observe(seconds)
        self.spent(usage["models"])
        if share is not None:
            self.share.observe(share)

    def decided(self, policy: str, status: str, roles: Mapping[str, Spent]) -> None:
        """Count a request of one of several policies, and what it has spent."""
        self.policies.labels(policy, status).inc()
        for model, spent in roles.items():
            self.policy_tokens.labels(policy, model, "prompt").inc(spent.prompt_tokens)
            self.policy_tokens.labels(policy, model, "completion").inc(spent.completion_tokens)

    def paid(self, prices: Mapping[str, tuple[float, float]], usage: Mapping[str, Any]) -> None:
        """Count the money for an answer, from the prices of a token read and of one decoded by role."""
        for model, spent in usage["models"].items():
            read, decoded = prices.get(model, (0.0, 0.0))
            cost = read * spent["prompt_tokens"] + decoded * spent.get("completion_tokens", 0)
            self.cost.labels(model).inc(cost)
            self.cost_saved.dec(cost)
        read, decoded = prices.get(LARGE, (0.0, 0.0))
        alone = read * usage["prompt_tokens"] + decoded * usage["completion_tokens_details"]["accepted_tokens"]
        self.cost_saved.inc(alone)

    def spent(self, models: Mapping[str, Mapping[str, int]], *, kept: bool = True) -> None:
        """Count tokens by model; those of a shadow are in no answer (not `kept`)."""
        for model, spent in models.items():
            told = {**spent, "discarded_tokens": spent.get("discarded_tokens" if kept else "completion_tokens", 0)}
            for kind in ("prompt", "completion", "discarded", "aborted"):
                self.tokens.labels(model, kind).inc(told.get(f"{kind}_tokens", 0))

    def shadowed(self, same_answer: bool | None, decided: Iterable[tuple[str, int, str, str]]) -> None:
        """Count what the policy would have done, as `agents.serve.shadow.Shadow.decided` tells it."""
        self.shadows.labels({True: "same", False: "other", None: "unknown"}[same_answer]).inc()
        for author, tokens, step_known, tokens_known in decided:
            self.shadow_steps.labels(author, step_known).inc()
            self.shadow_tokens.labels(author, tokens_known).inc(tokens)

    def asked(self, model: str, questions: int, tokens: int) -> None:
        """Count what a route has asked, and the tokens that were read for its answers."""
        self.questions.labels(model).inc(questions)
        self.question_tokens.labels(model).inc(tokens)
