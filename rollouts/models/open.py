"""Opens the backend that a model's configuration names."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from rollouts.config import ModelConfig
from rollouts.errors import ConfigError
from rollouts.models.base import Backend


def open_backend(role: str, model: ModelConfig, *, seed: int, pooling_tag: int | None = None) -> Backend:
    """Start a model and wait until it answers.

    Args:
        role: ``small``, ``large`` or ``scorer``; errors name it.
        model: What to run and where.
        seed: Seed of this start; engines that take 32 bits get the lower ones.
        pooling_tag: For a process reward model, the id of its step tag; None for a generating model.

    Raises:
        ConfigError: A package is missing, or the configuration asks for what the backend cannot do.
        BackendError: The model could not be loaded; the message has the engine's words.
    """
    if model.backend == "server":
        from rollouts.models.server.completions import open_server

        return open_server(role, model, pooling=pooling_tag is not None, step_tag_id=pooling_tag)
    if model.backend == "vllm":
        return _open_vllm(role, model, seed, pooling_tag)
    return _open_transformers(role, model, seed, pooling_tag)


def _open_vllm(role: str, model: ModelConfig, seed: int, pooling_tag: int | None) -> Backend:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{role}: backend 'vllm' needs vLLM, which is not installed: pip install 'trim-routing[vllm]' (on a "
            "machine without a GPU the CPU build, see the README), or use backend 'transformers' or 'server'."
        )
    from rollouts.models import vllm_engine
    from rollouts.models.process import EngineProcess

    settings: dict[str, Any] = {
        "model": model.model,
        "revision": model.revision,
        "tokenizer": model.tokenizer or model.model,
        "tokenizer_revision": model.revision if model.tokenizer is None else None,
        "tensor_parallel_size": model.tensor_parallel,
        "max_model_len": model.max_length,
        "dtype": model.dtype,
        "max_num_seqs": model.max_batch,
    }
    if model.devices:
        settings["gpu_memory_utilization"] = model.memory_share
    environment = {**_environment(model), **vllm_engine.environment()}
    if not model.devices:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(model.cpu_cache_gib)
    common = {"seed": seed & 0xFFFFFFFF, "on_gpu": bool(model.devices), "threads": model.threads}
    if pooling_tag is None:
        return EngineProcess(role, vllm_engine.generator, environment, settings=settings, **common)
    return EngineProcess(role, vllm_engine.pooling, environment, settings=settings, step_tag_id=pooling_tag, **common)


def _open_transformers(role: str, model: ModelConfig, seed: int, pooling_tag: int | None) -> Backend:
    from rollouts.models.hf import generator as transformers_engine
    from rollouts.models.hf import pooling as transformers_pooling
    from rollouts.models.process import EngineProcess

    if model.tensor_parallel > 1:
        raise ConfigError(f"{role}: tensor_parallel is for backend 'vllm'; transformers spreads over `devices`.")
    common: dict[str, Any] = {
        "model": model.model,
        "revision": model.revision,
        "dtype": model.dtype,
        "max_length": model.max_length,
        "max_batch": model.max_batch,
        "gpus": len(model.devices),
        "threads": model.threads,
        "seed": seed,
    }
    environment = _environment(model)
    if pooling_tag is not None:
        return EngineProcess(role, transformers_pooling.pooling, environment, step_tag_id=pooling_tag, **common)
    tokenizer = model.tokenizer or model.model
    return EngineProcess(role, transformers_engine.generator, environment, tokenizer=tokenizer, **common)


def _environment(model: ModelConfig) -> dict[str, str]:
    """Return the variables that decide devices and threads; they must be set before torch is imported."""
    environment = {
        "CUDA_VISIBLE_DEVICES": ",".join(_visible(model.devices)),
        # Threads that wait must sleep: spinning ones take the cores from the other engines (measured on two
        # busy cores: 40 instead of 300 requests a second).
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if model.threads:
        environment["OMP_NUM_THREADS"] = str(model.threads)
    return environment


def _visible(devices: tuple[int, ...]) -> list[str]:
    """Return the GPUs by the names that this process knows them under: it may itself see only some."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    if ours is None:
        return [str(index) for index in devices]
    names = [name for name in ours.split(",") if name]
    missing = [index for index in devices if index >= len(names)]
    if missing:
        raise ConfigError(f"`devices` has {missing[0]}, but CUDA_VISIBLE_DEVICES shows {len(names)} GPU(s) ({ours!r}).")
    return [names[index] for index in devices]
