"""Servers that are asked in another way than vLLM: recorded answers of SGLang and llama.cpp, and a real llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import FakeServer, config, fake
from llama_server import LlamaServer, llama_server
from serve_harness import Router, Upstreams, policy

from agents.routers.base import Threshold
from rollouts.__main__ import main
from rollouts.config import ModelConfig, Sampling
from rollouts.errors import ConfigError
from rollouts.models.base import CompletionRequest, LogprobRequest
from rollouts.models.server.completions import ServerBackend
from rollouts.models.server.dialects import LlamaCpp, SGLang, wire_of
from rollouts.models.server.wire import Wire
from rollouts.store.store import Store
from rollouts.text.prompts import PromptFormat
from rollouts.text.tokenizer import load_tokenizer
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


def forcing(path: str, body: Any, count: int) -> Any:
    """Answer as llama.cpp does, where token t has log-probability -t / 10 and 7 is but the beginning of a character."""
    if path != "/completion":
        return None
    rows = [{"id": token, "logprob": -token / 10} for token in range(min(body["n_probs"], 40))]
    if not body["logit_bias"]:
        told = [{"id": 5, "logprob": -0.5, "top_logprobs": rows}] if rows else []  # without that of the stop text
        return 200, {}, llama(stop_type="word", stopping_word="\n\n", completion_probabilities=told)
    ((forced, _),) = body["logit_bias"]
    told = [{"id": forced, "logprob": -forced / 10, "top_logprobs": rows}] if forced != 7 else []
    return 200, {}, llama(content="", tokens=[forced], tokens_predicted=1, completion_probabilities=told)


def test_tokens_that_llama_cpp_tells_nothing_of_are_forced(fake: FakeServer) -> None:
    fake.card = {"id": "fake", "owned_by": "llamacpp", "meta": {"n_ctx": 100}}
    fake.fault = forcing
    with ServerBackend("large", config(fake)) as backend:
        assert backend.capabilities.logprobs and backend.capabilities.prompt_logprobs and backend.window == 100
        done = backend.submit(CompletionRequest((3, 4), 8, Sampling(0.7), ("\n\n",), likelihood=True)).result(10)
        assert done.text == "x\n\n" and done.likelihood is not None and done.likelihood.logprobs == (-0.5, -0.6)
        body = fake.seen[-1][1]
        assert body["prompt"] == [3, 4, 5] and body["logit_bias"][0][0] == 6 and body["n_predict"] == 1
        fake.seen.clear()
        found = backend.submit(LogprobRequest((3, 7, 30, 8), 1, entropies=True)).result(10)
        assert found.logprobs == (-0.7, -3.0, -0.8) and len(found.entropies) == 3
        assert [body["prompt"] for _, body in fake.seen] == [[3], [3], [3, 7], [3, 7, 30]]  # twice for half a character
        silent = backend.submit(CompletionRequest((3, 4), 8, Sampling(0.7), ("\n\n",))).result(10)
        assert silent.likelihood is None and fake.seen[-1][1]["n_probs"] == 0


def asked() -> dict[str, dict[str, Any]]:
    """The requests whose answers are recorded: `python tests/rollouts/models/test_dialects.py` records them anew."""
    prompts = PromptFormat(load_tokenizer(str(model_dir("small"))), None)
    prompt, wire, greedy = prompts.ids(QUESTION), LlamaCpp(), Sampling(0.0)
    told = CompletionRequest(prompt, 64, greedy, ("\n\n",), likelihood=True)
    return {
        "word": wire.completion(1024, told),
        "eos": wire.completion(1024, CompletionRequest(prompt, 200, greedy, likelihood=True)),
        "limit": wire.completion(1024, CompletionRequest(prompt, 3, greedy)),
        "window": {  # the last token that fits into the window is a stop text
            **wire.completion(1024, CompletionRequest((64,) * 1023, 64, greedy, ("\n\n",))),
            "logit_bias": [[256, 1e9]],
        },
    }


@pytest.mark.parametrize(
    ("kind", "finish"), [("word", "stop"), ("window", "stop"), ("eos", "eos"), ("limit", "length")]
)
def test_recorded_answers_of_a_llama_server(kind: str, finish: str) -> None:
    recorded = json.loads(RECORDED.read_text())
    card, body = recorded["card"], recorded[kind]
    wire = wire_of(card)
    assert type(wire) is LlamaCpp and wire.window(card) == 1024 and "n_params" in str(wire.origin(card))
    assert wire.lacks(body) is None
    done = wire.read(body)
    assert done.finish == finish and done.token_ids == tuple(body["tokens"]) and done.tokens == len(body["tokens"])
    assert done.text.endswith("\n\n") == (finish == "stop")
    assert (body["stop_type"] == "limit") == (kind in ("limit", "window"))
    if kind == "eos":
        assert done.likelihood is not None and len(done.likelihood.logprobs) == done.tokens
        assert "\\boxed" in done.text
    if kind == "word":  # those of the stop text are left out, and asked for afterwards
        assert done.likelihood is not None and len(done.likelihood.logprobs) == done.tokens - 1
    if kind == "limit":
        assert done.tokens == 3 and done.likelihood is None


# ---------------------------------------------------------------- llama.cpp, real


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    with llama_server("small", tmp_path_factory.mktemp("llama")) as running:
        yield running


@pytest.fixture
def real(served: LlamaServer) -> Iterator[ServerBackend]:
    model = ModelConfig(backend="server", model=served.model, url=served.url, tokenizer=str(model_dir("small")))
    with ServerBackend("small", model) as backend:
        yield backend


def logits(ids: tuple[int, ...]) -> Any:
    """Log-probabilities of every next token, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir("small"), dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)


def test_a_real_one_answers_as_recorded(served: LlamaServer) -> None:
    recorded = json.loads(RECORDED.read_text())
    for kind, body in asked().items():
        answer = httpx.post(f"http://127.0.0.1:{served.port}/completion", json=body, timeout=60).json()
        for name, value in recorded[kind].items():
            if name != "completion_probabilities":
                assert answer[name] == value
            else:
                assert [row["id"] for row in answer[name]] == [row["id"] for row in value]


def test_a_real_one_tells_how_steps_end_and_what_it_makes_of_them(real: ServerBackend) -> None:
    assert real.capabilities.token_ids and real.capabilities.logprobs and real.capabilities.prompt_logprobs
    assert real.window == 1024 and real.describe()["engine"] == "llama.cpp"
    prompts = PromptFormat(load_tokenizer(str(model_dir("small"))), None)
    prompt = prompts.ids(QUESTION)
    step = real.submit(CompletionRequest(prompt, 64, Sampling(0.0), ("\n\n",), likelihood=True)).result(60)
    assert step.finish == "stop" and step.text == "a=70+33=103\n\n" and step.token_ids is not None
    assert "".join(prompts.pieces(prompt, step.token_ids)) == step.text
    assert step.likelihood is not None and len(step.likelihood.logprobs) == step.tokens
    ids = prompt + step.token_ids
    known = logits(ids)
    for place, told in enumerate(step.likelihood.logprobs, len(prompt) - 1):
        assert told == pytest.approx(float(known[place, ids[place + 1]]), abs=2e-3)
        assert int(known[place].argmax()) == ids[place + 1]
    whole = real.submit(CompletionRequest(prompt, 200, Sampling(0.0))).result(60)
    assert whole.finish == "eos" and "\\boxed{" in whole.text
    assert whole.token_ids is not None and whole.token_ids[-1] == prompts.tokenizer.eos_token_id
    assert real.submit(CompletionRequest(prompt, 3, Sampling(0.0))).result(60).finish == "length"


def test_a_real_one_scores_any_tokens_halves_of_characters_too(real: ServerBackend) -> None:
    ids = load_tokenizer(str(model_dir("small"))).encode(
        "Let a=1\u00d72\u20ac. Find \U0001f600.", add_special_tokens=False
    )
    found = real.submit(LogprobRequest(tuple(ids), 1, entropies=True)).result(60)
    known = logits(tuple(ids))
    expected = [float(known[place, token]) for place, token in enumerate(ids[1:])]
    assert found.logprobs == pytest.approx(expected, abs=5e-3) and len(found.entropies) == len(ids) - 1
    assert real.submit(LogprobRequest(tuple(ids), 4)).result(60).logprobs == pytest.approx(expected[3:], abs=5e-3)


def test_samplers_and_seed_of_its_command_line_are_overruled(real: ServerBackend) -> None:
    prompt = PromptFormat(load_tokenizer(str(model_dir("small"))), None).ids(QUESTION)
    drawn = [real.submit(CompletionRequest(prompt, 60, Sampling(1.5))).result(60).text for _ in range(6)]
    assert len(set(drawn)) > 1


def test_trees_grow_from_real_ones_and_a_likelihood_scores_them(served: LlamaServer, tmp_path: Path) -> None:
    with llama_server("large", tmp_path) as large:
        lines = []
        for role, server in (("small", served), ("large", large)):
            lines += [f"[{role}]", 'backend = "server"', f'url = "{server.url}"', f'model = "{server.model}"']
            lines += [f'tokenizer = "{model_dir(role)}"', 'system_prompt = ""', "max_length = 1024", "concurrency = 2"]
        lines += ["[scorer]", 'kind = "likelihood"', 'under = "large"', "[limits]", "max_steps = 16"]
        file = tmp_path / "models.toml"
        file.write_text("\n".join(lines))
        asked = ["--problems", "tinymath:test", "--limit", "2", "--models", str(file), "--max-escalations", "1"]
        assert main(["generate", str(tmp_path / "s"), *asked]) == 0
    store = Store(tmp_path / "s")
    rows = [row for table in store.steps.read() for row in table.to_pylist()]
    assert {row["role"] for row in rows} == {"small", "large"} and all(row["stop_reason"] != "failed" for row in rows)
    assert main(["verify", str(store.path)]) == 0 and main(["stats", str(store.path)]) == 0


def test_a_real_one_is_an_upstream(served: LlamaServer, tmp_path: Path) -> None:
    others = Upstreams()
    for each in others.every[1:]:
        each.start()
    for each in others.every[1:]:
        each.wait()
    try:
        urls = {**others.urls(), "small": served.url}
        router = Router(policy(tmp_path, Threshold(-1.0)), urls)
        try:
            answer = router.chat(QUESTION, temperature=0, trace=True).json()
        finally:
            router.stop()
    finally:
        others.stop()
    assert "\\boxed{" in answer["choices"][0]["message"]["content"]
    assert {step["author"] for step in answer["trim"]["trace"]} == {"small"} and not answer["trim"]["fallbacks"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made, llama_server("small", Path(made)) as running:
        base = f"http://127.0.0.1:{running.port}"
        (card,) = httpx.get(f"{base}/v1/models").json()["data"]
        answers = {
            kind: httpx.post(f"{base}/completion", json=body, timeout=60).json() for kind, body in asked().items()
        }
    for answer in answers.values():
        for row in answer.get("completion_probabilities", ()):
            row["top_logprobs"] = row["top_logprobs"][:2]  # enough to see their shape
    lines = [f"{json.dumps(kind)}: {json.dumps(each)}" for kind, each in {"card": card, **answers}.items()]
    RECORDED.write_text("{" + ",\n".join(lines) + "}\n")
