"""Opens the backend that a model's configuration names.

To add a backend: write what answers requests, either a `rollouts.models.base.Backend` of its own (as
`rollouts.models.server.completions`), or an engine that runs in a process (`rollouts.models.process.Engine`, as
`rollouts.models.vllm_engine` and `rollouts.models.hf`); then an opener here with a row in `OPENERS`, and its name in
`rollouts.config.BackendKind`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping

from rollouts.config import BackendKind, ModelConfig
from rollouts.errors import ConfigError, require
from rollouts.models.base import Backend
from rollouts.text.prompts import Reading


def open_backend(role: str, model: ModelConfig, *, seed: int, reading: Reading | None = None) -> Backend:
    """Start a model and wait until it answers.

    Args:
        role: ``small``, ``large`` or ``scorer``; errors name it.
        model: What to run and where.
        seed: Seed of this start; engines that take 32 bits get the lower ones.
        reading: For a process reward model, how it is read; None for a generating model.

    Raises:
        ConfigError: A package is missing, or the configuration asks for what the backend cannot do.
        BackendError: The model could not be loaded; the message has the engine's words.
    """
    return OPENERS[model.backend](role, model, seed, reading)


def _open_server(role: str, model: ModelConfig, seed: int, reading: Reading | None) -> Backend:
    from rollouts.models.server.completions import ServerBackend

    return ServerBackend(role, model, reading)


def _open_vllm(role: str, model: ModelConfig, seed: int, reading: Reading | None) -> Backend:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{role}: backend 'vllm' needs vLLM, which is not installed: pip install 'trim-routing[vllm]' (on a "
            "machine without a GPU the CPU build, see the README), or use backend 'transformers' or 'server'."
        )
    from rollouts.models import vllm_engine
    from rollouts.models.process import EngineProcess

    environment = {**_environment(model), **vllm_engine.environment(model)}
    return EngineProcess(role, vllm_engine.engine, environment, model=model, seed=seed, reading=reading)


def _open_transformers(role: str, model: ModelConfig, seed: int, reading: Reading | None) -> Backend:
    require("rollouts", "torch", "transformers")
    from rollouts.models.hf.generator import generator
    from rollouts.models.hf.pooling import pooling
    from rollouts.models.process import EngineProcess

    if reading is None:
        return EngineProcess(role, generator, _environment(model), model=model, seed=seed)
    return EngineProcess(role, pooling, _environment(model), model=model, seed=seed, reading=reading)


#: Every backend: what is called with (role, model, seed, reading) and returns it, ready for requests.
OPENERS: Mapping[BackendKind, Callable[[str, ModelConfig, int, Reading | None], Backend]] = {
    "vllm": _open_vllm,
    "transformers": _open_transformers,
    "server": _open_server,
}


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
