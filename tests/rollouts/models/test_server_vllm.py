"""The server backend against real vLLM servers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from fake_server import (
    ask,
    chat_config,
    config,
)
from vllm_server import VllmServers

from rollouts.config import Limits
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Completion, LogprobRequest, PoolingRequest
from rollouts.models.server.chat import ChatWriter
from rollouts.models.server.completions import ServerBackend
from rollouts.text.prompts import PromptFormat, Reading, RewardFormat
from rollouts.text.steps import Prefix, StopReason
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import STEP_TAG, model_dir

QUESTION = "Let a=70+33, b=a+49, c=b*12. Find c."
STEPS = ["a=70+33=103\n\n", "b=a+49=103+49=152\n\n"]


@pytest.fixture(scope="module")
def small(vllm_servers: VllmServers) -> Iterator[ServerBackend]:
    with ServerBackend("small", config(vllm_servers.small, timeout_s=60)) as backend:
        yield backend


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    return PromptFormat(load_tokenizer(str(model_dir("small"))))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir("small"), dtype="float32").eval()


def logprobs(reference: Any, ids: tuple[int, ...]) -> Any:
    """Row i: log-probabilities of the token after ids[:i + 1]."""
    import torch

    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.vllm
def test_vllm_is_recognised(small: ServerBackend, vllm_servers: VllmServers) -> None:
    assert small.window == 1024
    assert small.capabilities.token_ids and small.capabilities.prompt_logprobs and not small.capabilities.pooling
    described = small.describe()
    assert re.match(r"\d+\.\d+", described["version"]) and described["model"] == "tinymath-small"
    assert described["servers"] == 1 and described["root"].endswith("small")
    with pytest.raises(ConfigError, match="Did you mean 'tinymath-small'"):
        ServerBackend("small", config(vllm_servers.small, model="tinymath-smal"))
    with pytest.raises(ConfigError, match="--runner pooling"):
        ServerBackend("scorer", config(vllm_servers.small), Reading(tag=3))
    with pytest.raises(ConfigError, match="does not continue token ids"):
        ServerBackend("small", config(vllm_servers.prm))


@pytest.mark.vllm
def test_vllm_greedy_text_ids_and_count(small: ServerBackend, prompts: PromptFormat, reference: Any) -> None:
    prompt = prompts.ids(QUESTION, STEPS[:1])
    done = small.submit(ask(*prompt, max_tokens=30, temperature=0.0, stop=())).result(60)
    assert done.token_ids and done.tokens == len(done.token_ids)
    assert done.text == prompts.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    rows = logprobs(reference, prompt + done.token_ids)[len(prompt) - 1 : -1]
    for token, row in zip(done.token_ids, rows, strict=True):
        assert row[token] >= row.max() - 1e-3  # the likeliest token at every place
    # The same as one step: it ends with the stop string, which counts.
    end = done.text[4]
    cut = small.submit(ask(*prompt, max_tokens=30, temperature=0.0, stop=(end,))).result(60)
    length = done.text.index(end) + 1
    assert cut == Completion(done.text[:length], length, done.token_ids[:length], "stop")
    short = small.submit(ask(*prompt, max_tokens=3, temperature=0.0, stop=())).result(60)
    assert short == Completion(done.text[:3], 3, done.token_ids[:3], "length")


@pytest.mark.vllm
def test_vllm_end_of_sequence_is_no_stop_string(small: ServerBackend, prompts: PromptFormat) -> None:
    end = prompts.tokenizer.eos_token_id
    request = ask(*prompts.ids(QUESTION), max_tokens=2000, temperature=1.5, stop=("Q", "Z"))
    results = [future.result(60) for future in [small.submit(request) for _ in range(16)]]
    finishes = Counter(done.finish for done in results)
    assert finishes["eos"] and not finishes["failed"], finishes
    for done in results:
        assert done.token_ids and done.tokens == len(done.token_ids)
        assert (done.finish == "eos") == (done.token_ids[-1] == end)
        assert (done.finish == "stop") == done.text.endswith(("Q", "Z"))
        assert "<|im_end|>" not in done.text
    assert len({done.token_ids for done in results}) > 1


@pytest.mark.vllm
def test_vllm_logprobs_are_the_models(small: ServerBackend, prompts: PromptFormat, reference: Any) -> None:
    ids = prompts.ids(QUESTION, STEPS)
    start = len(prompts.ids(QUESTION))
    rows = logprobs(reference, ids)
    expected = [float(rows[place - 1, ids[place]]) for place in range(start, len(ids))]
    assert small.submit(LogprobRequest(ids, start)).result(60).logprobs == pytest.approx(expected, abs=2e-3)


@pytest.mark.vllm
def test_vllm_refuses_a_prompt_beyond_its_window(small: ServerBackend, prompts: PromptFormat) -> None:
    long = prompts.ids(QUESTION) * 40
    done = small.submit(ask(*long)).result(60)
    assert done.finish == "failed" and "1024" in done.detail and done.tokens == 0
    with pytest.raises(BackendError, match="small: http.*1024"):
        small.submit(LogprobRequest(long, 1)).result(60)
    full = small.submit(ask(*prompts.ids(QUESTION), max_tokens=5000, temperature=0.0, stop=())).result(60)
    assert full.finish in ("eos", "length")


@pytest.mark.vllm
def test_vllm_scores_are_the_reward_models(vllm_servers: VllmServers) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, Qwen2Model

    prompts = RewardFormat(load_tokenizer(str(model_dir("prm"))), None, STEP_TAG)
    request = PoolingRequest(*prompts.marked(QUESTION, [*STEPS, "c=b*12=999\n\n"]))
    ids = request.ids
    weights = {name: value.float() for name, value in load_file(model_dir("prm") / "model.safetensors").items()}
    body = Qwen2Model(AutoConfig.from_pretrained(model_dir("prm"), dtype="float32")).float().eval()
    body.load_state_dict({name.removeprefix("model."): value for name, value in weights.items() if "score" not in name})
    with torch.inference_mode():
        hidden = body(torch.tensor([ids])).last_hidden_state[0]
        hidden = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
        scores = (hidden @ weights["score.2.weight"].T + weights["score.2.bias"]).softmax(-1)[:, 1]
    expected = [float(score) for token, score in zip(ids, scores, strict=True) if token == prompts.step_tag_id]
    with ServerBackend("scorer", config(vllm_servers.prm), prompts.reading) as backend:
        assert backend.capabilities.pooling
        futures = [backend.submit(request) for _ in range(8)]
        for future in futures:
            assert future.result(60) == pytest.approx(expected, abs=2e-3)
        with pytest.raises(BackendError, match="1024"):
            backend.submit(PoolingRequest(ids * 30, request.positions)).result(60)
        last = PoolingRequest(ids, request.positions[-1:])
        assert backend.submit(last).result(60) == pytest.approx(expected[-1:], abs=2e-3)
    with pytest.raises(BackendError, match="rows for 2 step tags"):
        ServerBackend("scorer", config(vllm_servers.prm), Reading(tag=prompts.step_tag_id - 1))


@pytest.mark.vllm
def test_vllm_chat_gives_one_step(vllm_servers: VllmServers) -> None:
    model = chat_config(vllm_servers.small, sampling={"temperature": 1.0})
    with closing(ChatWriter("large", model, Limits(step_tokens=64), lambda *_: True)) as large:
        assert large.describe()["unsent"] == []
        futures = [large.submit(Prefix("p", QUESTION, 0, tuple(STEPS), 40), whole=False) for _ in range(8)]
        steps = [future.result(60).steps[0] for future in futures]
        assert sum(done.stop_reason is not StopReason.FAILED for done in steps) >= 4
        for done in steps:
            assert done.tokens > 0 and (done.stop_reason is StopReason.FAILED or done.text.strip())
            assert "\n\n" not in done.text.removesuffix("\n\n")
            assert done.text.endswith("\n\n") == (not done.terminal)
