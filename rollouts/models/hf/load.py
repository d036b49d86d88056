"""Loads models with transformers and prepares their inputs: what its generator and its reward model share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError
from rollouts.text.tokenizer import model_settings

PADDED_TOKENS = 16384  # most tokens, padding included, of one forward pass over prompts
_WINDOWS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "model_max_length",
    "n_ctx",
    "max_target_positions",
)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # of models that do not only write
_TEXTS = re.compile("text|llm|language|decoder|thinker")
_SENSES = re.compile("vision|visual|image|audio|video|speech|encoder|talker|vocoder|code2wav|projector")


def check_prompt(ids: tuple[int, ...], most: int, vocabulary: int) -> None:
    """Raise BackendError for a prompt that cannot be served."""
    if not ids:
        raise BackendError("the prompt is empty.")
    if len(ids) > most:
        raise BackendError(f"the prompt has {len(ids)} tokens; at most {most} fit into the window.")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise BackendError(f"the prompt has a token id outside 0..{vocabulary - 1}.")


def groups(lengths: list[int], tokens: int, rows: int) -> Iterator[slice]:
    """Cut ascending lengths into slices of at most `rows` items and `tokens` padded tokens (or one item)."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or end - start >= rows or lengths[end] * (end - start + 1) > tokens:
            yield slice(start, end)
            start = end


def pad_right(prompts: list[tuple[int, ...]], device: Any) -> tuple[Any, Any]:
    """Return ids (rows x longest) and lengths as tensors."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    return ids.to(device), torch.tensor([len(prompt) for prompt in prompts], device=device)


def cpu_threads(model: str, revision: str | None) -> int:
    """Return how many threads pay off: a narrow model's operations are shorter than waking a second thread."""
    import torch
    from transformers import AutoConfig

    width = int(getattr(AutoConfig.from_pretrained(model, revision=revision), "hidden_size", 4096))
    return 1 if width < 512 else torch.get_num_threads()


def load(kind: Any, model: ModelConfig, *, fresh: str = "", layout: str = "a whole language model") -> Any:
    """Load a model in inference mode onto its GPUs, or the CPU if it names none.

    Args:
        kind: Its class.
        model: Where it is.
        fresh: What the names of weights that are made anew begin with; by default all must be there.
        layout: What is expected, for messages.

    Raises:
        ConfigError: There is no such model, weights are missing, for which transformers would draw random ones, or
            there is no such GPU.
    """
    import torch
    from transformers.utils import logging

    if not os.environ.get("TRIM_VERBOSE"):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    gpus = len(model.devices)
    if not gpus:
        torch.set_num_threads(model.threads or cpu_threads(model.model, model.revision))
    elif torch.cuda.device_count() < gpus:
        raise ConfigError(f"`devices` names {gpus} GPU(s), torch sees {torch.cuda.device_count()}.")
    placement = {"device_map": "balanced"} if gpus > 1 else {}
    try:
        loaded, report = kind.from_pretrained(
            model.model, revision=model.revision, dtype=model.dtype, output_loading_info=True, **placement
        )
    except Exception as error:  # safetensors raises nothing narrower
        raise ConfigError(f"{model.model}: the model cannot be loaded ({error}).") from error
    if missing := sorted(name for name in report["missing_keys"] if not fresh or not name.startswith(fresh)):
        raise ConfigError(f"{model.model}: no weight {', '.join(missing[:4])}. Expected {layout}, in safetensors.")
    if gpus == 1:
        loaded.to("cuda:0")
    return loaded.eval()


def native_window(name: str, revision: str | None = None) -> int | None:
    """Return the window that a model's configuration names, in tokens, or None."""
    config = model_settings(name, revision)
    plain = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), Mapping)), config)
    if own := _named_window({_WINDOWS[0]: plain.get(_WINDOWS[0])}):
        return own
    try:  # what its class has where its configuration says nothing
        from transformers import AutoConfig

        return _window_of(AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False))
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return _named_window(config)


def _window_of(config: Any) -> int | None:
    with suppress(ValueError):  # more than one text model
        config = config.get_text_config(decoder=True)
    own = {"max_position_embeddings": getattr(config, "max_position_embeddings", None)}  # perhaps another name's
    return _named_window(own) or _named_window(config.to_dict())


def _named_window(config: Mapping[str, Any]) -> int | None:
    """Return the window that a configuration names: its own, that of the text model in it, or of another model."""
    nested = {key: value for key, value in config.items() if isinstance(value, Mapping) and not _SENSES.search(key)}
    texts_first = sorted(nested, key=lambda key: not _TEXTS.search(key))
    every = (*(config.get(name) for name in _WINDOWS), *(_named_window(nested[key]) for key in texts_first))
    return next((size for size in every if isinstance(size, int) and not isinstance(size, bool) and size > 0), None)


def window(config: Any, max_length: int | None) -> int:
    """Return the window in tokens.

    Raises:
        ConfigError: `max_length` is larger than what the model was made for, or neither is known.
    """
    native = _window_of(config)
    if max_length is None:
        if native is None:
            raise ConfigError("the model's configuration names no window; set max_length.")
        return native
    if native is not None and max_length > native:
        raise ConfigError(f"max_length is {max_length}, but the model's window is {native} tokens.")
    return max_length


def describe(model: Any, seed: int) -> dict[str, Any]:
    """Return what the manifest records about an engine."""
    import torch
    import transformers

    on_gpu = model.device.type == "cuda"
    return {
        "engine": "transformers",
        "version": transformers.__version__,
        "torch": torch.__version__,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
    }
