"""Runs Hugging Face models inside an engine process; in float64 a draw depends on its request's seed alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollouts.config import ModelConfig, Sampling
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Capabilities, Completion, CompletionRequest, Finish, LogprobRequest, Request
from rollouts.models.hf.load import PADDED_TOKENS, check_prompt, describe, groups, load, pad_right, window
from rollouts.models.hf.packing import PACKED_TOKENS, likelihoods, most_packed, pack_first, told_of
from rollouts.text.likelihood import Likelihood
from rollouts.text.tokenizer import load_tokenizer

_LOGITS = 2**27  # most logits that are in memory at once


@dataclass(eq=False)
class _Row:
    """One completion under way."""

    key: int
    request: CompletionRequest
    limit: int
    uniforms: np.ndarray
    stream: Any
    ids: list[int] = field(default_factory=list)
    told: list[tuple[float, float]] = field(default_factory=list)  # log-probability and entropy of each token
    text: str = ""

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.request.prompt_ids) + len(self.ids)


class _Batch:
    """The rows that are decoded together: a left-padded key-value cache and its mask."""

    def __init__(self, rows: list[_Row], layers: list[tuple[Any, Any]], mask: Any) -> None:
        from rollouts.models.hf.cache import roomy_cache

        self.rows = rows
        self.cache: Any = roomy_cache(layers)
        self.mask = mask

    def _layers(self) -> list[tuple[Any, Any]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def keep(self, places: list[int]) -> _Batch:
        """Return a batch of these rows alone, without the padding that they share."""
        import torch

        index = torch.tensor(places, device=self.mask.device)
        mask = self.mask[index]
        first = int(mask.argmax(1).min())
        layers = [
            (keys[index.to(keys.device), :, first:], values[index.to(values.device), :, first:])
            for keys, values in self._layers()
        ]
        return _Batch([self.rows[place] for place in places], layers, mask[:, first:])

    def join(self, other: _Batch) -> _Batch:
        """Return a batch of the rows of both."""
        import torch
        from torch.nn.functional import pad

        width = max(self.mask.shape[1], other.mask.shape[1])

        def stack(own: Any, new: Any) -> Any:
            return torch.cat([pad(each, (0, 0, width - each.shape[2], 0)) for each in (own, new)])

        layers = [
            (stack(keys, new_keys), stack(values, new_values))
            for (keys, values), (new_keys, new_values) in zip(self._layers(), other._layers(), strict=True)
        ]
        mask = torch.cat([pad(each.mask, (width - each.mask.shape[1], 0)) for each in (self, other)])
        return _Batch(self.rows + other.rows, layers, mask)


class TransformersGenerator:
    """Completions and log-probabilities from an ``AutoModelForCausalLM``, with continuous batching.

    Every request draws from a random stream of its own, seeded by `CompletionRequest.seed`: token i is the
    inverse cumulative distribution at the stream's i-th number. What else is in the batch moves logits only by
    rounding, some 1e-15 in float64, where it practically never changes a token; in shorter formats it
    sometimes does, so only float64 counts as reproducible.
    """

    def __init__(self, model: Any, tokenizer: Any, window: int, max_batch: int, description: dict[str, Any]) -> None:
        """Take over a loaded model; use `generator` to load one."""
        self.capabilities = Capabilities(token_ids=True, logprobs=True, prompt_logprobs=True)
        self.window = window
        self.description: Mapping[str, Any] = description
        self._model = model
        self._tokenizer = tokenizer
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._max_batch = max_batch
        self._ends = _end_ids(model, tokenizer)
        self._waiting: deque[tuple[int, CompletionRequest]] = deque()
        self._scoring: list[tuple[int, LogprobRequest]] = []
        self._finished: list[tuple[int, Any]] = []
        self._batch: _Batch | None = None

    def add(self, key: int, request: Request) -> None:
        """Queue a `CompletionRequest` or a `LogprobRequest`."""
        most = self.window - 1  # as in vLLM, a prompt that fills the window is refused: not one token could follow
        if isinstance(request, CompletionRequest):
            check_prompt(request.prompt_ids, most, self._vocabulary)
            if request.max_tokens < 1:
                raise BackendError(f"max_tokens is {request.max_tokens}, expected at least 1.")
            self._waiting.append((key, request))
        elif isinstance(request, LogprobRequest):
            check_prompt(request.ids, most, self._vocabulary)
            if not 0 < request.start <= len(request.ids):
                raise BackendError(f"log-probabilities from position {request.start} of {len(request.ids)} ids.")
            self._scoring.append((key, request))
        else:
            raise BackendError("a generating model cannot answer a PoolingRequest.")

    def step(self) -> list[tuple[int, Any]]:
        """Score one batch of log-probability requests, admit new rows, decode one token of every row."""
        import torch

        with torch.inference_mode():
            if self._scoring:
                self._score()
            self._admit()
            if self._batch is not None:
                self._decode(self._batch)
        finished, self._finished = self._finished, []
        return finished

    def _admit(self) -> None:
        active = len(self._batch.rows) if self._batch else 0
        free = self._max_batch - active
        # Joining copies the cache: wait until a quarter of the batch is free, or all that wait fit.
        if not self._waiting or free < min(len(self._waiting), max(1, self._max_batch // 4)):
            return
        taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        taken.sort(key=lambda item: len(item[1].prompt_ids))
        rows = [self._row(key, request) for key, request in taken]
        # Logits of a prefill are (rows x distinct lengths): at most rows squared.
        most = max(1, min(self._max_batch, int((_LOGITS / self._vocabulary) ** 0.5)))
        for group in groups([row.length for row in rows], PADDED_TOKENS, most):
            batch = self._prefill(rows[group])
            if batch is not None:
                self._batch = batch if self._batch is None else self._batch.join(batch)

    def _row(self, key: int, request: CompletionRequest) -> _Row:
        from tokenizers.decoders import DecodeStream

        limit = min(request.max_tokens, self.window - len(request.prompt_ids))
        uniforms = np.random.Generator(np.random.Philox(request.seed)).random(limit)
        stream = DecodeStream(ids=list(request.prompt_ids), skip_special_tokens=True)
        return _Row(key, request, limit, uniforms, stream)

    def _prefill(self, rows: list[_Row]) -> _Batch | None:
        """Run the prompts and draw their first tokens; None if all of them end there."""
        import torch
        from transformers import DynamicCache

        # Padding on the right is invisible to causal attention, so no mask is needed; the cache is then
        # shifted so that rows of different length end in the same column.
        ids, lengths = pad_right([row.request.prompt_ids for row in rows], self._model.device)
        last, place = torch.unique(lengths - 1, return_inverse=True)
        cache: Any = DynamicCache()
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last).logits
        logits = logits[torch.arange(len(rows), device=ids.device), place]
        columns = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - lengths)[:, None]

        def shift(values: Any) -> Any:
            index = columns.clamp(min=0).to(values.device)[:, None, :, None]
            return values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))

        layers = [(shift(layer.keys), shift(layer.values)) for layer in cache.layers]
        batch = _Batch(rows, layers, (columns >= 0).long())
        return self._extend(batch, logits)

    def _decode(self, batch: _Batch) -> None:
        import torch

        device = self._model.device
        ids = torch.tensor([[row.ids[-1]] for row in batch.rows], device=device)
        positions = torch.tensor([[row.length - 1] for row in batch.rows], device=device)
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None if bool(batch.mask.all()) else batch.mask,
            past_key_values=batch.cache,
            use_cache=True,
        )
        self._batch = self._extend(batch, output.logits[:, -1])

    def _extend(self, batch: _Batch, logits: Any) -> _Batch | None:
        """Draw a token for every row; rows that end leave the batch."""
        kept = []
        tokens = _draw(batch.rows, logits)
        _tell(batch.rows, logits, tokens)
        for place, (row, token) in enumerate(zip(batch.rows, tokens, strict=True)):
            finish = self._append(row, token)
            if finish is None:
                kept.append(place)
            else:
                ids = tuple(row.ids)
                told = Likelihood(*zip(*row.told, strict=True)) if row.told else None
                self._finished.append((row.key, Completion(row.text, len(ids), ids, finish, likelihood=told)))
        if len(kept) == len(batch.rows):
            return batch
        return batch.keep(kept) if kept else None

    def _append(self, row: _Row, token: int) -> Finish | None:
        from tokenizers.decoders import DecodeStream

        row.ids.append(token)
        try:
            piece = row.stream.step(self._tokenizer.backend_tokenizer, token) or ""
        except Exception:  # bytes that are no text can confuse the stream; vLLM starts a new one as well
            row.stream = DecodeStream(skip_special_tokens=True)
            piece = row.stream.step(self._tokenizer.backend_tokenizer, token) or ""
        row.text += piece
        end = _stop_end(row.text, len(piece), row.request.stop)
        if end is not None:
            row.text = row.text[:end]
            return "stop"
        if token in self._ends:
            return "eos"
        return "length" if len(row.ids) >= row.limit else None

    def _score(self) -> None:
        """Answer the log-probability requests that fit into one forward pass, those that begin alike together."""
        self._scoring.sort(key=lambda item: item[1].ids)
        sequences = [request.ids for _, request in self._scoring]
        pack = pack_first(sequences, self._packed(max(map(len, sequences))))
        taken, self._scoring = self._scoring[: len(pack.paths)], self._scoring[len(pack.paths) :]
        told = any(request.entropies for _, request in taken)
        values = likelihoods(self._model, pack, [request.start for _, request in taken], entropies=told)
        self._finished += [(key, each) for (key, _), each in zip(taken, values, strict=True)]

    def _packed(self, longest: int) -> int:
        """Return how many tokens a pass may have."""
        return most_packed(self._model.config, longest, min(PACKED_TOKENS, _LOGITS // self._vocabulary))


def _stop_end(text: str, new: int, stop: tuple[str, ...]) -> int | None:
    """Return where the stop string ends that the last `new` characters completed first, if they did."""
    found = [(text.find(string, max(0, len(text) - new - len(string) + 1)), len(string)) for string in stop]
    return min((start + length for start, length in found if start >= 0), default=None)


def _draw(rows: list[_Row], logits: Any) -> list[int]:
    """Draw one token per row from its logits, in float64."""
    import torch

    logits = logits.double()
    tokens = [0] * len(rows)
    alike: dict[Sampling, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(row.request.sampling, []).append(place)
    for sampling, places in alike.items():
        chosen = logits if len(alike) == 1 else logits[torch.tensor(places, device=logits.device)]
        if sampling.temperature == 0.0:
            drawn = chosen.argmax(1)
        else:
            uniforms = [float(rows[place].uniforms[len(rows[place].ids)]) for place in places]
            cumulative = _probabilities(chosen, sampling).cumsum(1)
            targets = torch.tensor(uniforms, device=logits.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
            drawn = (cumulative <= targets).sum(1).clamp(max=logits.shape[1] - 1)
        for place, token in zip(places, drawn.tolist(), strict=True):
            tokens[place] = token
    return tokens


def _tell(rows: list[_Row], logits: Any, tokens: list[int]) -> None:
    """Take down what the model makes of the tokens drawn, for rows that want to know."""
    import torch

    wanted = [place for place, row in enumerate(rows) if row.request.likelihood]
    if not wanted:
        return
    index = torch.tensor(wanted, device=logits.device)
    chosen = logits[index]
    drawn = torch.tensor([tokens[place] for place in wanted], device=logits.device)
    norms, entropies = told_of(chosen)
    logprobs = chosen.gather(1, drawn[:, None])[:, 0] - norms
    for place, *told in zip(wanted, logprobs.tolist(), entropies.tolist(), strict=True):
        rows[place].told.append((told[0], told[1]))


def _probabilities(logits: Any, sampling: Sampling) -> Any:
    """Apply temperature, min_p, top_k and top_p, in vLLM's order."""
    import torch
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    no_ids: Any = None
    logits = logits / sampling.temperature
    if sampling.min_p > 0.0:
        floor = logits.max(1, keepdim=True).values + float(np.log(sampling.min_p))
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_k > 0:
        logits = TopKLogitsWarper(sampling.top_k)(no_ids, logits)
    if sampling.top_p < 1.0:
        logits = TopPLogitsWarper(sampling.top_p)(no_ids, logits)
    return logits.softmax(1)


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every id that ends a sequence, wherever it is declared."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


def generator(model: ModelConfig, seed: int) -> TransformersGenerator:
    """Load a language model; runs in the engine's process. `seed` is recorded only: requests bring their own."""
    from transformers import AutoModelForCausalLM

    loaded = load(AutoModelForCausalLM, model)
    kinds = set(getattr(loaded.config.get_text_config(), "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{model.model}: layers of kind {', '.join(sorted(kinds))} need backend 'vllm'.")
    words, limit = load_tokenizer(*model.tokenizer_source), window(loaded.config, model.max_length)
    return TransformersGenerator(loaded, words, limit, model.max_batch, describe(loaded, seed))
