"""Servers that are asked in another way than vLLM: recorded answers of SGLang and llama.cpp, and a real llama-server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, config, fake
from llama_server import LlamaServer, llama_server

from rollouts.config import ModelConfig, Sampling, parse_family
from rollouts.errors import ConfigError
from rollouts.family import Family
from rollouts.models.base import CompletionRequest, LogprobRequest
from rollouts.models.hf.generator import generator
from rollouts.models.server.completions import ServerBackend
from rollouts.models.server.dialects import LlamaCpp, SGLang, wire_of
from rollouts.models.server.wire import Wire
from rollouts.scoring.likelihood import LikelihoodScorer
from rollouts.text.likelihood import Likelihood
from rollouts.text.prompts import load_tokenizer
from rollouts.tinymath import model_dir

__all__ = ["fake"]
RECORDED = Path(__file__).with_name("llama_server.json")
QUESTION = "Let a=70+33, b=a+49. Find b."


def test_who_is_asked_how() -> None:
    owners = {"vllm": Wire, "sglang": SGLang, "llamacpp": LlamaCpp, "organization-owner": Wire, None: Wire}
    assert {owner: type(wire_of({"id": "m", "owned_by": owner})) for owner in owners} == owners


# ---------------------------------------------------------------- SGLang

# Of the executed notebooks of docs.sglang.io ("Structured Outputs", "Native APIs"), shortened.
ENDED: dict[str, Any] = {
    "text": '{"name": "Paris", "population": 2147000}',
    "output_ids": [5018, 609, 794, 330, 60704, 498, 330, 45541, 794, 220, 11584, 7007, 15, 92, 128009],
    "meta_info": {
        "id": "6e25790cd43445af8b1c0dccb395739a",
        "finish_reason": {"type": "stop", "matched": 128009},
        "prompt_tokens": 50,
        "weight_version": "default",
        "completion_tokens": 15,
        "cached_tokens": 1,
        "e2e_latency": 0.23216415755450726,
    },
}
CUT: dict[str, Any] = {
    "text": "uth of France, on the banks of the",
    "output_ids": [12095, 13, 1084, 374, 279],
    "meta_info": {"finish_reason": {"type": "length", "length": 5}, "prompt_tokens": 5, "completion_tokens": 5},
}


def sglang(text: str, reason: Any, **meta: Any) -> dict[str, Any]:
    return {"text": text, "output_ids": [5, 6], "meta_info": {"finish_reason": reason, "completion_tokens": 2, **meta}}


@pytest.mark.parametrize(
    ("body", "finish", "text", "tokens"),
    [
        (ENDED, "eos", ENDED["text"], 15),
        (CUT, "length", CUT["text"], 5),
        (sglang("x\n\n", {"type": "stop", "matched": "\n\n"}), "stop", "x\n\n", 2),
        (sglang("x", {"type": "stop", "matched": "\n\n"}), "stop", "x\n\n", 2),  # trimmed all the same
        (sglang("x", {"type": "stop", "matched": None}), "eos", "x", 2),
        (sglang("", {"type": "abort", "message": "out of memory"}), "failed", "", 2),
    ],
)
def test_what_sglang_answers(body: Any, finish: str, text: str, tokens: int) -> None:
    assert SGLang().lacks(body) is None
    done = SGLang().read(body)
    assert (done.finish, done.text, done.tokens, done.token_ids) == (finish, text, tokens, tuple(body["output_ids"]))
    assert finish != "failed" or "out of memory" in done.detail


def test_sglang_is_asked_by_its_own_interface(fake: FakeServer) -> None:
    fake.card = {"id": "fake", "owned_by": "sglang", "root": "/models/fake", "max_model_len": 100}

    def rows(ids: list[int], first: int) -> dict[str, Any]:
        told = [[None if place == first == 0 else -0.5, token, None] for place, token in enumerate(ids[first:], first)]
        return {"input_token_logprobs": told, "input_top_logprobs": [None, *([[-0.5, 1, None]] for _ in told[1:])]}

    def answer(path: str, body: Any, count: int) -> Any:
        if path != "/generate":
            return None
        told = sglang("x\n\n", {"type": "stop", "matched": "\n\n"})
        if body["return_logprob"]:
            told["meta_info"] |= rows(body["input_ids"], max(body["logprob_start_len"], 0))
            told["meta_info"] |= {"output_token_logprobs": [[-0.1, 5, None], [-0.2, 6, None]]}
            told["meta_info"] |= {"output_top_logprobs": [[[-0.1, 5, None]], [[-0.2, 6, None]]]}
        return 200, {}, told

    fake.fault = answer
    with ServerBackend("large", config(fake)) as backend:
        assert backend.capabilities.token_ids and backend.capabilities.logprobs
        assert backend.capabilities.prompt_logprobs and backend.window == 100
        assert backend.describe()["engine"] == "SGLang" and backend.describe()["root"] == "/models/fake"
        done = backend.submit(CompletionRequest((7, 8), 500, Sampling(0.3, 0.9), ("\n\n",), likelihood=True)).result(10)
        assert (done.text, done.finish, done.token_ids) == ("x\n\n", "stop", (5, 6))
        assert done.likelihood is not None and done.likelihood.logprobs == (-0.1, -0.2)
        wanted = {"temperature": 0.3, "top_p": 0.9, "top_k": -1, "max_new_tokens": 98, "no_stop_trim": True}
        sent = fake.seen[-1][1]["sampling_params"]
        assert {name: sent[name] for name in wanted} == wanted and sent["stop"] == ["\n\n"] and sent["n"] == 1
        assert backend.submit(LogprobRequest((7, 8, 9, 4), 2)).result(10).logprobs == (-0.5, -0.5)
        assert fake.seen[-1][1]["logprob_start_len"] == 1


# ---------------------------------------------------------------- llama.cpp, recorded


def llama(**more: Any) -> dict[str, Any]:
    return {"content": "x", "tokens": [5, 6], "tokens_predicted": 2, "stop_type": "eos", "stopping_word": "", **more}


@pytest.mark.parametrize(
    ("body", "finish", "text"),
    [
        (llama(), "eos", "x"),
        (llama(stop_type="word", stopping_word="\n\n"), "stop", "x\n\n"),
        (llama(stop_type="limit"), "length", "x"),
        (llama(stop_type="limit", stopping_word="\n\n"), "stop", "x\n\n"),  # where the window ends with the stop text
        (llama(stop_type="none"), "failed", "x"),
    ],
)
def test_what_llama_cpp_answers(body: Any, finish: str, text: str) -> None:
    done = LlamaCpp().read(body)
    assert (done.finish, done.text, done.tokens, done.token_ids) == (finish, text, 2, (5, 6))


def test_an_old_llama_server_is_refused_by_name(fake: FakeServer) -> None:
    fake.card = {"id": "fake", "owned_by": "llamacpp", "meta": {"n_ctx": 100}}
    fake.fault = lambda path, *_: (200, {}, {"content": "x", "stopped_word": True}) if path == "/completion" else None
    with pytest.raises(ConfigError, match="this llama-server is too old. Update it, or set chat_only"):
        ServerBackend("large", config(fake))
    fake.card = {"id": "fake", "owned_by": "llamacpp"}
    with pytest.raises(ConfigError, match="max_length"):
        ServerBackend("large", config(fake))
