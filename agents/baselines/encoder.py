"""Features of questions from a model's hidden states: an encoder such as BERT, or the small model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agents.routers.base import Floats
from rollouts.errors import ConfigError

BATCH = 64


def encoder(folder: str | Path) -> Callable[[Sequence[str]], Floats]:
    """Return a function from texts to the means of their tokens' last hidden states, (n, d).

    What is beyond the model's window does not count.

    Args:
        folder: A model and a tokenizer as transformers reads them; nothing is downloaded.

    Raises:
        ConfigError: There is no such model.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    except Exception as error:  # tokenizers and safetensors raise nothing narrower
        raise ConfigError(f"{folder}: no encoder can be loaded ({error}).") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # RoBERTa's positions begin behind that of padding
    first = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    places = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    window = min(tokenizer.model_max_length, places - (0 if first is None else first + 1))

    def embed(texts: Sequence[str]) -> Floats:
        found = []
        for begin in range(0, len(texts), BATCH):
            some = list(texts[begin : begin + BATCH])
            inputs = tokenizer(some, return_tensors="pt", padding=True, truncation=True, max_length=window)
            inside = inputs["attention_mask"][:, :, None]
            with torch.inference_mode():
                hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            means = (hidden.last_hidden_state * inside).sum(dim=1) / inside.sum(dim=1)
            found.append(means.double().numpy())
        return np.concatenate(found)

    return embed
