"""Runs process reward models in the ``Qwen2ForProcessRewardModel`` layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Capabilities, PoolingRequest, Request
from rollouts.models.hf.load import PADDED_TOKENS, check_prompt, describe, groups, load, pad_right, window


class TransformersPooling:
    """P(label 1) at every step tag, from a model in the ``Qwen2ForProcessRewardModel`` layout."""

    def __init__(self, model: Any, head: Any, tag: int, window: int, max_batch: int, description: dict[str, Any]):
        """Take over a loaded trunk and head; use `pooling` to load them."""
        self.capabilities = Capabilities(pooling=True)
        self.window = window
        self.description: Mapping[str, Any] = description
        self._model = model
        self._head = head
        self._tag = tag
        self._max_batch = max_batch
        self._waiting: list[tuple[int, PoolingRequest]] = []

    def add(self, key: int, request: Request) -> None:
        """Queue a `PoolingRequest`."""
        if not isinstance(request, PoolingRequest):
            raise BackendError("a reward model answers PoolingRequests only.")
        check_prompt(request.ids, self.window, self._model.get_input_embeddings().num_embeddings)
        self._waiting.append((key, request))

    def step(self) -> list[tuple[int, Any]]:
        """Score one batch of similar length."""
        import torch

        if not self._waiting:
            return []
        self._waiting.sort(key=lambda item: len(item[1].ids))
        group = next(groups([len(request.ids) for _, request in self._waiting], PADDED_TOKENS, self._max_batch))
        taken, self._waiting = self._waiting[group], self._waiting[group.stop :]
        with torch.inference_mode():
            ids, lengths = pad_right([request.ids for _, request in taken], self._model.device)
            hidden = self._model(input_ids=ids, use_cache=False).last_hidden_state
            inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            rows, columns = torch.nonzero((ids == self._tag) & inside, as_tuple=True)
            marked = hidden[rows.to(hidden.device), columns.to(hidden.device)].to(self._head[0].weight)
            scores = self._head(marked).softmax(1)[:, 1].tolist()
        answers: list[list[float]] = [[] for _ in taken]
        for row, score in zip(rows.tolist(), scores, strict=True):
            answers[row].append(score)
        return [(key, answer) for (key, _), answer in zip(taken, answers, strict=True)]


def pooling(model: ModelConfig, seed: int, step_tag_id: int) -> TransformersPooling:
    """Load a process reward model; runs in the engine's process.

    Raises:
        ConfigError: The folder holds another kind of model, or weights are missing.
    """
    import torch
    from transformers import Qwen2Config

    from rollouts.models.hf.reward_model import ProcessRewardModel

    # The configuration is read by name: that of Qwen2.5-Math-PRM-7B points to code of its own.
    config = Qwen2Config.from_pretrained(model.model, revision=model.revision)
    if config.model_type != "qwen2":
        raise ConfigError(
            f"{model.model}: a {config.model_type!r} model; the transformers backend scores with Qwen2 ones."
        )
    loaded, report = load(ProcessRewardModel, model)
    if report["missing_keys"]:
        raise ConfigError(
            f"{model.model}: no weight {', '.join(sorted(report['missing_keys'])[:4])}. Expected the layout of "
            "Qwen2ForProcessRewardModel: model.* of Qwen2Model and a head score.0, ReLU, score.2, in safetensors."
        )
    trunk = loaded.model
    head = loaded.score.to(torch.float64 if trunk.dtype == torch.float64 else torch.float32)
    limit = window(config, model.max_length)
    return TransformersPooling(trunk, head, step_tag_id, limit, model.max_batch, describe(trunk, seed))
