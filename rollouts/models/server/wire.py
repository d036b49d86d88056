"""What vLLM's OpenAI-compatible servers are sent and what they send back; nothing here connects to anything."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rollouts.config import Sampling
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Completion, CompletionRequest, LogprobRequest, PoolingRequest, drawing_fields
from rollouts.text.likelihood import TOP, Likelihood, top_entropy
from rollouts.text.prompts import Reading

Send = Callable[[str, Mapping[str, Any], Callable[[Any], Any]], Awaitable[Any]]
"""Sends a body, to which it adds the model's name, to a path and returns what is made of the answer."""
SMALLEST = CompletionRequest((1, 2, 3), 1, Sampling())
"""The smallest real request: a server that answers it works."""


class Wire:
    """How a generating model is asked. This is vLLM's way; others' are in `rollouts.models.server.dialects`.

    What reads an answer raises ValueError, LookupError or TypeError for one that makes no sense.

    Attributes:
        name: What the server calls itself.
        path: Where completions are asked for: below the base URL, below the root if it begins with a slash.
        more_logprobs: What makes it tell the log-probabilities that are read.
    """

    name = "vLLM"
    path = "completions"
    more_logprobs = f"Serve it with --max-logprobs {TOP}"

    def window(self, card: Mapping[str, Any]) -> int | None:
        """Return the window in tokens that a server's entry of its model tells, if it does."""
        size = card.get("max_model_len")
        return size if isinstance(size, int) and size > 1 else None

    def origin(self, card: Mapping[str, Any]) -> str | None:
        """Return what a server's entry says of where it has the model from, as it may be called anything."""
        return card.get("root")

    def completion(self, window: int, request: CompletionRequest) -> dict[str, Any]:
        """Return the body of a completion, with every field that changes a draw written out.

        It carries no seed: one per request kills the CPU engine of vLLM 0.32, and no server promises a draw for it.

        Args:
            window: Most tokens of prompt and completion together.
            request: What is asked for.
        """
        return {
            "prompt": list(request.prompt_ids),
            "max_tokens": room(window, request),
            **drawing_fields(request),
            "echo": False,
            "stream": False,
            "add_special_tokens": False,
            "return_token_ids": True,
            **({"logprobs": TOP, "return_tokens_as_token_ids": True} if request.likelihood else {}),
        }

    def probe(self, *, likelihood: bool = False, looks: bool = False) -> dict[str, Any]:
        """Return the body of the smallest completion; with log-probabilities of what is decoded, or given, if asked."""
        body = self.completion(4, replace(SMALLEST, likelihood=likelihood))
        return {**body, **({"prompt_logprobs": TOP} if looks else {})}

    def looked(self, body: Any) -> bool:
        """Whether an answer to a probe tells log-probabilities of what was given."""
        return isinstance(body["choices"][0].get("prompt_logprobs"), list)

    def lacks(self, body: Any) -> str | None:
        """Return what an answer to a completion does not tell, and what to do; None if it tells all that is needed."""
        choice, _ = _read_choice(body)
        if "stop_reason" in choice:
            return None
        return (
            "does not tell a stop string from the end of the sequence (no `stop_reason`). Serve the model with vLLM, "
            "SGLang or llama.cpp"
        )

    def read(self, body: Any) -> Completion:
        """Return the completion that an answer holds."""
        choice, tokens = _read_choice(body)
        text, ids = choice["text"], choice.get("token_ids")
        ids = None if ids is None else tuple(ids)
        reason, stop = choice["finish_reason"], choice["stop_reason"]
        told = _read_own(choice.get("logprobs"))
        if reason == "stop" and isinstance(stop, str):  # null or a token's id: the model ended by itself
            return Completion(text if text.endswith(stop) else text + stop, tokens, ids, "stop", likelihood=told)
        if reason in ("stop", "length"):
            return Completion(text, tokens, ids, "eos" if reason == "stop" else "length", likelihood=told)
        return Completion(text, tokens, ids, "failed", f"the server ended the request with {reason!r}")

    async def complete(self, send: Send, window: int, request: CompletionRequest) -> Completion:
        """Ask for a completion; raises what `send` raises."""
        done: Completion = await send(self.path, self.completion(window, request), self.read)
        return done

    async def likelihood(self, send: Send, window: int, request: LogprobRequest) -> Likelihood:
        """Ask what the model makes of ``ids[start:]``; raises what `send` raises."""
        smallest = self.completion(window, CompletionRequest(request.ids, 1, Sampling(1.0)))
        body = {**smallest, "prompt_logprobs": TOP if request.entropies else 0}
        told: Likelihood = await send(self.path, body, partial(_read_likelihood, request=request))
        return told


def room(window: int, request: CompletionRequest) -> int:
    """Return the most tokens to ask for: engines in this process end at the window, servers refuse."""
    return max(1, min(request.max_tokens, window - len(request.prompt_ids)))


def _read_choice(body: Any) -> tuple[dict[str, Any], int]:
    """Return the choice and the number of decoded tokens, the end-of-sequence token included."""
    choice = body["choices"][0]
    ids = choice.get("token_ids")
    tokens = len(ids) if ids is not None else body["usage"]["completion_tokens"]
    if not isinstance(choice["text"], str) or not isinstance(tokens, int):
        raise ValueError("text or completion_tokens is missing")
    return choice, tokens


def _read_own(logprobs: Any) -> Likelihood | None:
    """Return what the model made of what it decoded; None if the server does not tell."""
    if not logprobs or not logprobs.get("top_logprobs"):
        return None
    entropies = tuple(top_entropy(map(float, top.values())) for top in logprobs["top_logprobs"])
    return Likelihood(tuple(map(float, logprobs["token_logprobs"])), entropies)


def _read_likelihood(body: Any, request: LogprobRequest) -> Likelihood:
    rows = body["choices"][0]["prompt_logprobs"][request.start :]
    told = zip(request.ids[request.start :], rows, strict=True)
    entropies = (top_entropy(each["logprob"] for each in row.values()) for row in rows) if request.entropies else ()
    return Likelihood(tuple(float(row[str(token)]["logprob"]) for token, row in told), tuple(entropies))


def read_scores(body: Any, ids: Sequence[int], step_tag_id: int) -> list[float]:
    """Return P(label 1) at every step tag of `ids`.

    Raises:
        BackendError: Not two probabilities for each step tag: the server does not serve a process reward model so.
    """
    rows = body["data"][0]["data"]
    expected = list(ids).count(step_tag_id)
    if len(rows) != expected:
        raise BackendError(f"{len(rows)} rows for {expected} step tags. {serve_prm(step_tag_id)}")
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or min(row) < 0 or not abs(sum(row) - 1) <= 0.02:
            raise BackendError(f"{row}, not two probabilities per step tag. {serve_prm(step_tag_id)}")
    return [min(float(row[1]), 1.0) for row in rows]  # half precision rounds


def read_verdict(body: Any, verdicts: tuple[int, int]) -> list[float]:
    """Return P(second | one of two tokens), as a list of one.

    Raises:
        BackendError: The server tells others than these two.
    """
    told = body["choices"][0]["logprobs"]["top_logprobs"][0]
    names = [f"token_id:{token}" for token in verdicts]
    if not all(name in told for name in names):
        raise BackendError(f"tells {', '.join(told)}, not {', '.join(names)}: serve the model with vLLM 0.32 or newer.")
    wrong, right = (float(told[name]) for name in names)
    if math.isnan(apart := wrong - right):
        raise ValueError(f"log-probabilities {wrong} and {right}")
    return [1 / (1 + math.exp(min(apart, 700.0)))]


@dataclass(frozen=True)
class Exchange:
    """One request for scores.

    Attributes:
        path: Below the base URL; below the root if it begins with a slash.
        payload: The body, but for the model's name.
        read: From the answer to the scores; raises as `read_scores` and `read_verdict` do.
        tokens: Tokens of the prompt.
    """

    path: str
    payload: dict[str, Any]
    read: Callable[[Any], list[float]]
    tokens: int


def score_exchanges(reading: Reading, request: PoolingRequest) -> list[Exchange]:
    """Return the requests whose answers, one after the other, are the scores of an input.

    Raises:
        ConfigError: No server that we know reads such a model.
    """
    ids, verdicts, tag = request.ids, reading.verdicts, reading.tag
    if verdicts is not None:
        read_one = partial(read_verdict, verdicts=verdicts)
        told = {"logprobs": 2, "logprob_token_ids": [*verdicts], "return_tokens_as_token_ids": True}
        asked = [CompletionRequest(ids[: place + 1], 1, Sampling(0.0)) for place in request.positions]
        bodies = [(len(each.prompt_ids), Wire().completion(len(each.prompt_ids) + 1, each)) for each in asked]
        return [Exchange(Wire.path, {**body, **told}, read_one, tokens) for tokens, body in bodies]
    if tag is None:
        raise ConfigError("scorer: a reward model with a value head is read by backend 'vllm' or 'transformers' alone.")
    tags = [place for place, token in enumerate(ids) if token == tag]

    def read(body: Any) -> list[float]:
        known = dict(zip(tags, read_scores(body, ids, tag), strict=True))
        return [known[place] for place in request.positions]

    how = {"task": "token_classify", "use_activation": True, "add_special_tokens": False, "encoding_format": "float"}
    return [Exchange("/pooling", {"input": list(ids), **how}, read, len(ids))]


def smallest_input(reading: Reading) -> PoolingRequest:
    """Return an input for trying out whether a server can read such a model."""
    if reading.tag is None:
        return PoolingRequest((1, 2, 3), (2,))
    return PoolingRequest((1, reading.tag, 2, reading.tag), (1, 3))


def serve_prm(step_tag_id: int) -> str:
    """Return how a process reward model is served."""
    return (
        "Serve it with: vllm serve MODEL --runner pooling "
        f'--pooler-config \'{{"step_tag_id": {step_tag_id}, "returned_token_ids": [0, 1]}}\''
    )
