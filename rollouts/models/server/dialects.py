"""Servers that continue token ids in another way than vLLM: llama.cpp's and SGLang's, each by its own interface.

Their OpenAI-compatible completions do not tell all that is needed: llama.cpp's no stop type, SGLang's no token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rollouts.config import Sampling
from rollouts.errors import BackendError
from rollouts.models.base import UNPENALISED, Completion, CompletionRequest, Finish, LogprobRequest
from rollouts.models.server.wire import Send, Wire, room
from rollouts.text.likelihood import TOP, Likelihood, top_entropy

_SAMPLERS = ("temperature", "min_p", "top_k", "top_p")  # in vLLM's order; others are not applied
_FIELDS = ("content", "tokens", "tokens_predicted", "stop_type", "stopping_word", "completion_probabilities")
_STOPS: Mapping[str, Finish] = {"eos": "eos", "limit": "length"}
_FORCED = 1e9  # more than any logit


class LlamaCpp(Wire):
    """llama.cpp's ``llama-server``: ``/completion`` of its README (tools/server/README.md in ggml-org/llama.cpp).

    ``content`` ends before the stop text, which ``stopping_word`` tells; ``tokens`` are all that were decoded. Where
    the window ends with the stop text, ``stop_type`` says "limit" all the same (`process_token` in
    tools/server/server-context.cpp), so the word is read first. Every sampler of the server's command line is
    overruled, its seed too, which would give all requests the same draw.

    It tells no log-probabilities of prompts. What a token would have had is asked for by forcing it with a bias: what
    is told is what the model had before biases and samplers. That is one request for each token, of which its cache
    computes one token.
    """

    name = "llama.cpp"
    path = "/completion"
    more_logprobs = "Update it"

    def window(self, card: Mapping[str, Any]) -> int | None:
        """Return the window of a slot."""
        return super().window({"max_model_len": (card.get("meta") or {}).get("n_ctx")})

    def origin(self, card: Mapping[str, Any]) -> str | None:
        """Return what tells the file from others of its name."""
        meta = card.get("meta") or {}
        return ", ".join(f"{key} {meta[key]}" for key in ("ftype", "n_params", "n_vocab", "size") if key in meta)

    def completion(self, window: int, request: CompletionRequest) -> dict[str, Any]:
        """Return the body of a completion, with every field that changes a draw written out."""
        return {
            "prompt": list(request.prompt_ids),
            "n_predict": room(window, request),
            **asdict(request.sampling),
            "samplers": list(_SAMPLERS),
            "dynatemp_range": 0.0,
            "mirostat": 0,
            "min_keep": 0,
            "logit_bias": [],
            "ignore_eos": False,
            "grammar": "",
            "seed": -1,
            "stop": list(request.stop),
            "n_probs": TOP if request.likelihood else 0,
            "post_sampling_probs": False,
            "return_tokens": True,
            "cache_prompt": True,
            "stream": False,
            "response_fields": list(_FIELDS),
        }

    def probe(self, *, likelihood: bool = False, looks: bool = False) -> dict[str, Any]:
        """Return the body of the smallest completion; what it tells of its tokens it tells of given ones, too."""
        return super().probe(likelihood=likelihood or looks)

    def looked(self, body: Any) -> bool:
        """Whether an answer to a probe tells log-probabilities."""
        return bool(body.get("completion_probabilities"))

    def lacks(self, body: Any) -> str | None:
        """Return what an answer does not tell, as `Wire.lacks`."""
        if "stop_type" in body and body.get("tokens"):
            return None
        return "tells no `stop_type` or no `tokens`: this llama-server is too old. Update it"

    def read(self, body: Any) -> Completion:
        """Return the completion that an answer holds; of its likelihoods those of the first tokens, unless all are."""
        text, ids, stop = body["content"], tuple(map(int, body["tokens"])), body["stopping_word"]
        if not isinstance(text, str) or len(ids) != body["tokens_predicted"]:
            raise ValueError(f"{len(ids)} tokens of {body['tokens_predicted']}")
        told = _leading(ids, body.get("completion_probabilities") or ())
        if stop:
            return Completion(text + stop, len(ids), ids, "stop", likelihood=told)
        finish = _STOPS.get(body["stop_type"], "failed")
        detail = f"the server ended the request with {body['stop_type']!r}" if finish == "failed" else ""
        return Completion(text, len(ids), ids, finish, detail, told)

    async def complete(self, send: Send, window: int, request: CompletionRequest) -> Completion:
        """Ask for a completion; log-probabilities that the server left out, of stop texts, are asked for after it."""
        done = await super().complete(send, window, request)
        if not request.likelihood or done.likelihood is None or done.token_ids is None:
            return replace(done, likelihood=None)
        known = done.likelihood
        known += await self._told(send, request.prompt_ids + done.token_ids, len(request.prompt_ids + known.logprobs))
        return replace(done, likelihood=known)

    async def likelihood(self, send: Send, window: int, request: LogprobRequest) -> Likelihood:
        """Ask what the model makes of ``ids[start:]``, one token after the other."""
        told = await self._told(send, request.ids, request.start)
        return told if request.entropies else replace(told, entropies=())

    async def _told(self, send: Send, ids: tuple[int, ...], start: int) -> Likelihood:
        told = Likelihood(())
        for place in range(start, len(ids)):
            told += await self._one(send, ids[:place], ids[place], ids)
        return told

    async def _one(self, send: Send, before: tuple[int, ...], token: int, others: tuple[int, ...]) -> Likelihood:
        """Return what the model makes of one token.

        Of a token that begins a character but does not end it nothing is told: then another one is forced, and it is
        looked for among all that could have been there.
        """
        most = TOP
        for forced in dict.fromkeys((token, *reversed(others))):
            body = self.completion(len(before) + 1, CompletionRequest(before, 1, Sampling(1.0)))
            body |= {"n_probs": most, "samplers": ["top_k"], "top_k": 1, "logit_bias": [[forced, _FORCED]]}
            told: Likelihood | None = await send(self.path, body, partial(_read_forced, token=token, forced=forced))
            if told is not None:
                return told
            most = 1 << 30
        raise BackendError(f"llama.cpp tells no log-probability of token {token}")


def _leading(ids: tuple[int, ...], rows: Any) -> Likelihood | None:
    """Return the likelihoods of the first tokens, as far as the server tells them one by one; None if it tells none."""
    known = Likelihood(())
    for token, row in zip(ids, rows, strict=False):
        if row["id"] != token:
            break
        known += _row(row)
    return known if rows else None


def _row(row: Mapping[str, Any]) -> Likelihood:
    return Likelihood((float(row["logprob"]),), (top_entropy(float(each["logprob"]) for each in row["top_logprobs"]),))


def _read_forced(body: Any, token: int, forced: int) -> Likelihood | None:
    if tuple(body["tokens"]) != (forced,):
        raise ValueError(f"decoded {body['tokens']}, not {forced}")
    if not body.get("completion_probabilities"):
        return None
    row = body["completion_probabilities"][0]
    if token != forced:
        row = {**row, "logprob": {each["id"]: each["logprob"] for each in row["top_logprobs"]}[token]}
    return _row(row)


class SGLang(Wire):
    """SGLang's own ``/generate``: ``meta_info`` and ``sampling_params`` as its documentation has them.

    See docs.sglang.io, "Sampling Parameters" and "Native APIs". ``finish_reason`` is a table: ``matched`` is the text
    that stopped it, or the id of the token that did, the end of the sequence.
    """

    name = "SGLang"
    path = "/generate"
    more_logprobs = "Update it"

    def completion(self, window: int, request: CompletionRequest) -> dict[str, Any]:
        """Return the body of a completion, with every field that changes a draw written out."""
        sampling = asdict(request.sampling)
        return {
            "input_ids": list(request.prompt_ids),
            "sampling_params": {
                **sampling,
                "top_k": sampling["top_k"] or -1,
                "max_new_tokens": room(window, request),
                "min_new_tokens": 0,
                **UNPENALISED,
                "ignore_eos": False,
                "stop": list(request.stop),
                "no_stop_trim": True,
                "skip_special_tokens": True,
                "spaces_between_special_tokens": False,
            },
            "return_logprob": request.likelihood,
            "logprob_start_len": -1,
            "top_logprobs_num": TOP if request.likelihood else 0,
            "stream": False,
        }

    def probe(self, *, likelihood: bool = False, looks: bool = False) -> dict[str, Any]:
        """Return the body of the smallest completion; with log-probabilities of what is decoded, or given, if asked."""
        body = super().probe(likelihood=likelihood or looks)
        return {**body, "logprob_start_len": 0 if looks else -1}

    def looked(self, body: Any) -> bool:
        """Whether an answer to a probe tells log-probabilities of what was given."""
        return bool(body["meta_info"].get("input_token_logprobs"))

    def lacks(self, body: Any) -> str | None:
        """Return what an answer does not tell, as `Wire.lacks`."""
        return None if "output_ids" in body else "tells no `output_ids`: this SGLang is too old. Update it"

    def read(self, body: Any) -> Completion:
        """Return the completion that an answer holds."""
        text, ids, meta = body["text"], tuple(map(int, body["output_ids"])), body["meta_info"]
        tokens, reason = len(ids), meta["finish_reason"]
        if not isinstance(text, str):
            raise ValueError("text is missing")
        told = _of_sglang(meta, "output", 0, ids) if meta.get("output_top_logprobs") else None
        kind, matched = reason["type"], reason.get("matched")
        if kind == "stop" and isinstance(matched, str):
            return Completion(text if text.endswith(matched) else text + matched, tokens, ids, "stop", likelihood=told)
        if kind in ("stop", "length"):
            return Completion(text, tokens, ids, "eos" if kind == "stop" else "length", likelihood=told)
        return Completion(text, tokens, ids, "failed", f"the server ended the request: {reason.get('message', kind)}")

    async def likelihood(self, send: Send, window: int, request: LogprobRequest) -> Likelihood:
        """Ask what the model makes of ``ids[start:]``."""
        body = self.completion(window, CompletionRequest(request.ids, 1, Sampling(1.0), likelihood=True))
        # What is told of the token at `logprob_start_len` itself is nothing in some versions.
        body |= {"logprob_start_len": request.start - 1, "top_logprobs_num": TOP if request.entropies else 0}
        wanted = request.ids[request.start :]
        told: Likelihood = await send(
            self.path, body, lambda answer: _of_sglang(answer["meta_info"], "input", -len(wanted), wanted)
        )
        return told


def _of_sglang(meta: Mapping[str, Any], kind: str, start: int, ids: Iterable[int]) -> Likelihood:
    """Return likelihoods from rows of [log-probability, token, text]."""
    rows, tops = meta[f"{kind}_token_logprobs"][start:], (meta.get(f"{kind}_top_logprobs") or [])[start:]
    if [row[1] for row in rows] != list(ids):
        raise ValueError(f"log-probabilities of {[row[1] for row in rows]}, expected {list(ids)}")
    entropies = tuple(top_entropy(float(each[0]) for each in top) for top in tops)
    return Likelihood(tuple(float(row[0]) for row in rows), entropies)


_WIRES = {"llamacpp": LlamaCpp(), "sglang": SGLang()}


def wire_of(card: Mapping[str, Any]) -> Wire:
    """Return how to ask the server that has this entry in its list of models."""
    return _WIRES.get(str(card.get("owned_by")), Wire())
