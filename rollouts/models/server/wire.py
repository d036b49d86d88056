"""What OpenAI-compatible servers of vLLM are sent and what they send back; nothing here connects to anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollouts.config import Sampling
from rollouts.errors import BackendError
from rollouts.models.base import Completion, CompletionRequest, LogprobRequest, drawing_fields
from rollouts.text.likelihood import TOP, Likelihood, top_entropy


def completion_payload(model: str, window: int, request: CompletionRequest) -> dict[str, Any]:
    """Return the body of a completion, with every field that changes a draw written out.

    It carries no seed: one per request kills the CPU engine of vLLM 0.32, and no server promises a draw for it.

    Args:
        model: Name that the server uses.
        window: Most tokens of prompt and completion together.
        request: What is asked for.
    """
    room = window - len(request.prompt_ids)  # engines in this process end at the window, servers refuse
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": max(1, min(request.max_tokens, room)),
        **drawing_fields(request),
        "echo": False,
        "stream": False,
        "add_special_tokens": False,
        "return_token_ids": True,
        **({"logprobs": TOP, "return_tokens_as_token_ids": True} if request.likelihood else {}),
    }


def pooling_payload(model: str, ids: Sequence[int]) -> dict[str, Any]:
    """Return the body of a request for P(label 1) at every step tag of `ids`."""
    return {
        "model": model,
        "input": list(ids),
        "task": "token_classify",
        "use_activation": True,
        "add_special_tokens": False,
        "encoding_format": "float",
    }


def read_choice(body: Any) -> tuple[dict[str, Any], int]:
    """Return the choice and the number of decoded tokens, the end-of-sequence token included.

    Raises:
        ValueError: Text or token count is missing; so do LookupError and TypeError say.
    """
    choice = body["choices"][0]
    ids = choice.get("token_ids")
    tokens = len(ids) if ids is not None else body["usage"]["completion_tokens"]
    if not isinstance(choice["text"], str) or not isinstance(tokens, int):
        raise ValueError("text or completion_tokens is missing")
    return choice, tokens


def read_completion(body: Any) -> Completion:
    """Return the completion that a server's answer holds; raises as `read_choice` does."""
    choice, tokens = read_choice(body)
    text, ids = choice["text"], choice.get("token_ids")
    ids = None if ids is None else tuple(ids)
    reason, stop = choice["finish_reason"], choice["stop_reason"]
    told = _read_own(choice.get("logprobs"))
    if reason == "stop" and isinstance(stop, str):  # null or a token's id: the model ended by itself
        return Completion(text if text.endswith(stop) else text + stop, tokens, ids, "stop", likelihood=told)
    if reason in ("stop", "length"):
        return Completion(text, tokens, ids, "eos" if reason == "stop" else "length", likelihood=told)
    return Completion(text, tokens, ids, "failed", f"the server ended the request with {reason!r}")


def _read_own(logprobs: Any) -> Likelihood | None:
    """Return what the model made of what it decoded; None if the server does not tell."""
    if not logprobs or not logprobs.get("top_logprobs"):
        return None
    entropies = tuple(top_entropy(map(float, top.values())) for top in logprobs["top_logprobs"])
    return Likelihood(tuple(map(float, logprobs["token_logprobs"])), entropies)


def likelihood_payload(model: str, window: int, request: LogprobRequest) -> dict[str, Any]:
    """Return the body of a request for what the model makes of given tokens."""
    smallest = completion_payload(model, window, CompletionRequest(request.ids, 1, Sampling(1.0)))
    return {**smallest, "prompt_logprobs": TOP if request.entropies else 0}


def read_likelihood(body: Any, request: LogprobRequest) -> Likelihood:
    """Return what the model makes of ``ids[start:]``."""
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


def serve_prm(step_tag_id: int) -> str:
    """Return how a process reward model is served."""
    return (
        "Serve it with: vllm serve MODEL --runner pooling "
        f'--pooler-config \'{{"step_tag_id": {step_tag_id}, "returned_token_ids": [0, 1]}}\''
    )
