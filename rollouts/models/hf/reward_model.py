"""Classes of reward models that transformers lacks: a Qwen2 trunk, and a head at every token.

Imports torch and transformers: import it only where models run.
"""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel


class ProcessRewardModel(Qwen2PreTrainedModel):
    """A Qwen2 trunk ``model`` and a head ``score``: a linear layer, ReLU, a linear layer with two labels."""

    _keep_in_fp32_modules_strict = ["score"]  # as in vLLM, whatever the trunk's format is

    def __init__(self, config: Qwen2Config) -> None:
        """Make a model with fresh weights."""
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = torch.nn.Sequential(
            torch.nn.Linear(config.hidden_size, config.hidden_size),
            torch.nn.ReLU(),
            torch.nn.Linear(config.hidden_size, 2),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of shape (batch, length, 2); label 1 is "every step so far is right"."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.score(hidden)


class ValueRewardModel(Qwen2PreTrainedModel):
    """A Qwen2 trunk ``model`` and a value head ``v_head.summary``, as Skywork-o1-Open-PRM (``Qwen2ForPrmModel``)."""

    _keep_in_fp32_modules_strict = ["v_head"]

    def __init__(self, config: Qwen2Config) -> None:
        """Make a model with fresh weights."""
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.v_head = torch.nn.ModuleDict({"summary": torch.nn.Linear(config.hidden_size, 1)})
        self.post_init()

    @property
    def score(self) -> torch.nn.Module:
        """The head."""
        return self.v_head["summary"]
