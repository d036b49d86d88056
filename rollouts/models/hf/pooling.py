"""Runs process reward models: heads on Qwen2 trunks, and language models that are asked for a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Capabilities, PoolingRequest, Request
from rollouts.models.hf.load import check_prompt, describe, load, window
from rollouts.models.hf.packing import PACKED_TOKENS, most_packed, pack_first, packed_inputs
from rollouts.text.prompts import Reading


class TransformersPooling:
    """Scores at given tokens; inputs that begin alike are read in one pass, each shared token once."""

    def __init__(self, model: Any, head: Any, reading: Reading, window: int, description: dict[str, Any]) -> None:
        """Take over a loaded model; use `pooling` to load one.

        Args:
            model: A trunk; a whole language model if there is no head.
            head: From hidden states to labels, or None.
            reading: How a score is read.
            window: Most tokens of an input.
            description: For the manifest.
        """
        self.capabilities = Capabilities(pooling=True)
        self.window = window
        self.description: Mapping[str, Any] = description
        self.tokens = 0
        self._model = model
        self._head = head
        self._reading = reading
        self._waiting: list[tuple[int, PoolingRequest]] = []

    def add(self, key: int, request: Request) -> None:
        """Queue a `PoolingRequest`."""
        if not isinstance(request, PoolingRequest):
            raise BackendError("a reward model answers PoolingRequests only.")
        check_prompt(request.ids, self.window, self._model.get_input_embeddings().num_embeddings)
        self._waiting.append((key, request))

    def step(self) -> list[tuple[int, Any]]:
        """Score the inputs that fit into one forward pass, those that begin alike together."""
        import torch

        if not self._waiting:
            return []
        self._waiting.sort(key=lambda item: item[1].ids)
        sequences = [request.ids for _, request in self._waiting]
        pack = pack_first(sequences, most_packed(self._model.config, max(map(len, sequences)), PACKED_TOKENS))
        taken, self._waiting = self._waiting[: len(pack.paths)], self._waiting[len(pack.paths) :]
        self.tokens += len(pack.ids)
        read = [path[list(request.positions)] for path, (_, request) in zip(pack.paths, taken, strict=True)]
        with torch.inference_mode():
            keep, place = np.unique(np.concatenate(read), return_inverse=True)
            scores = self._scores(packed_inputs(self._model, pack), torch.as_tensor(keep)).cpu().numpy()[place]
        answers = np.split(scores, np.cumsum([len(places) for places in read])[:-1])
        return [(key, answer.tolist()) for (key, _), answer in zip(taken, answers, strict=True)]

    def _scores(self, inputs: dict[str, Any], keep: Any) -> Any:
        """Return the scores at some tokens of a pass."""
        import torch

        if self._head is None:
            logits = self._model(**inputs, logits_to_keep=keep.to(self._model.device)).logits[0]
            logits = logits[:, list(self._reading.verdicts or ())]
            logits = logits if logits.dtype == torch.float64 else logits.float()
        else:
            hidden = self._model(**inputs).last_hidden_state[0]
            logits = self._head(hidden[keep.to(hidden.device)].to(next(self._head.parameters())))
        return logits[:, 0].sigmoid() if self._reading.labels == 1 else logits.softmax(1)[:, 1]


_EXPECTED = {
    2: "Qwen2ForProcessRewardModel: model.* of Qwen2Model and a head score.0, ReLU, score.2",
    1: "Skywork-o1-Open-PRM: model.* of Qwen2Model and a value head v_head.summary",
}


def pooling(model: ModelConfig, seed: int, reading: Reading) -> TransformersPooling:
    """Load a process reward model; runs in the engine's process.

    Raises:
        ConfigError: The folder holds another kind of model, or weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if reading.labels == 0:
        loaded = load(AutoModelForCausalLM, model)
        limit = window(loaded.config, model.max_length)
        return TransformersPooling(loaded, None, reading, limit, describe(loaded, seed))

    from rollouts.models.hf.reward_model import ProcessRewardModel, ValueRewardModel

    # The configuration is read by name: that of Qwen2.5-Math-PRM-7B points to code of its own.
    config = Qwen2Config.from_pretrained(model.model, revision=model.revision)
    if config.model_type != "qwen2":
        raise ConfigError(
            f"{model.model}: a {config.model_type!r} model; the transformers backend scores with heads on Qwen2 ones."
        )
    kind = ProcessRewardModel if reading.labels == 2 else ValueRewardModel
    loaded = load(kind, model, layout=f"the layout of {_EXPECTED[reading.labels]}")
    trunk = loaded.model
    head = loaded.score.to(torch.float64 if trunk.dtype == torch.float64 else torch.float32)
    return TransformersPooling(trunk, head, reading, window(config, model.max_length), describe(trunk, seed))
