"""Reward models of other layouts with tiny random weights: their scores by hand, on each engine; paths in one pass."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
import pytest
from thread_engine import in_threads
from tiny_rewards import QUESTION, STEPS, make_reward_folder, scorer_config

from rollouts import tinymath
from rollouts.config import LAYOUTS, ModelConfig, ScorerConfig
from rollouts.errors import ConfigError
from rollouts.models.base import PoolingRequest
from rollouts.models.hf import packing
from rollouts.models.hf.pooling import TransformersPooling, pooling
from rollouts.models.open import open_backend
from rollouts.scoring.base import score_paths
from rollouts.scoring.prm import RewardScorer
from rollouts.text.layouts import reward_layout
from rollouts.text.prompts import RewardLayout
from rollouts.text.tokenizer import transformers_tokenizer
from rollouts.tinymath import model_dir

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
NEW = [name for name in LAYOUTS if name != "qwen2.5-math-prm"]
TREE = [
    ("Let a=70+33, b=a+49. Find b.", STEPS),
    ("Let a=70+33, b=a+49. Find b.", [*STEPS[:2], "b is \\boxed{152}"]),
    ("Let a=70+33, b=a+49. Find b.", [STEPS[0], "b=a+49=103+49=142\n\n", "The answer is \\boxed{142}"]),
    ("Let a=70+33, b=a+49. Find b.", ["a=70+33=104\n\n", "b=104+49=153\n\n", "So \\boxed{153}"]),
    ("Let c=2. Find c.", ["c=2\n\n", "\\boxed{2}"]),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The section [scorer] of a tiny model in a layout, and what reads paths for it."""

    @cache
    def one(name: str, backend: str = "transformers") -> tuple[ScorerConfig, RewardLayout]:
        if name in NEW:
            config = scorer_config(name, folder(name), backend)
        else:
            config = scorer_config(name, model_dir("prm"), backend, system_prompt="")
        assert config.model is not None
        return config, reward_layout(config, transformers_tokenizer(config.model.model))

    @cache
    def folder(name: str) -> Any:
        return make_reward_folder(name, tmp_path_factory.mktemp(name))

    return one


@cache
def engine_of(config: ModelConfig, reading: Any) -> TransformersPooling:
    return pooling(config, seed=0, reading=reading)


def answers(engine: TransformersPooling, requests: list[PoolingRequest]) -> list[list[float]]:
    found: dict[int, list[float]] = {}
    for key, request in enumerate(requests):
        engine.add(key, request)
    while len(found) < len(requests):
        found |= dict(engine.step())
    return [found[key] for key in range(len(requests))]


def by_hand(name: str, folder: str) -> list[float]:
    """Return the scores of `STEPS` as the authors of a layout get them, from plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Model

    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    with torch.inference_mode():
        if name == "skywork-o1":
            from safetensors.torch import load_file

            weights = load_file(f"{folder}/model.safetensors")
            trunk = Qwen2Model(Qwen2Config.from_pretrained(folder)).eval()
            trunk.load_state_dict({key[6:]: value for key, value in weights.items() if key.startswith("model.")})
            ids = tokenizer(f"{tokenizer.bos_token}{QUESTION}\n", add_special_tokens=False).input_ids
            for step in STEPS:
                for line in step.strip().split("\n"):
                    ids = ids + tokenizer(line, add_special_tokens=False).input_ids + tokenizer("\n").input_ids
                last = trunk(torch.tensor([ids])).last_hidden_state[0, -1]
                value = weights["v_head.summary.weight"] @ last + weights["v_head.summary.bias"]
                found.append(float(1 / (1 + torch.exp(-value))))
            return found
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if name == "math-shepherd":
            steps = "\n".join(f"Step {at}: {step.strip()} \u043a\u0438" for at, step in enumerate(STEPS, 1))
            ids = torch.tensor(tokenizer.encode(f"{QUESTION} {steps}"))
            pair = tokenizer.encode("+ -")[1:]
            scores = model(ids[None]).logits[0][:, pair].softmax(-1)[:, 0]
            return scores[ids == tokenizer.encode("a \u043a\u0438")[-1]].tolist()
        said: list[dict[str, str]] = []
        for step in STEPS:
            said += [{"role": "user", "content": step.strip() if said else f"{QUESTION} {step.strip()}"}]
            said += [{"role": "assistant", "content": "+"}]
            ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True).input_ids
            pair = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
            place = -4 if tokenizer.decode(ids[0, -1]).isspace() else -3
            found.append(float(model(ids).logits[0, place, pair].softmax(-1)[0]))
    return found


@pytest.mark.parametrize("name", NEW)
def test_scores_are_those_of_the_authors_recipes(made: Any, name: str) -> None:
    config, layout = made(name)
    expected = by_hand(name, config.model.model)
    assert max(expected) - min(expected) > 1e-2  # random as it is, the model tells steps apart
    [found] = answers(engine_of(config.model, layout.reading), [PoolingRequest(*layout.marked(QUESTION, STEPS))])
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_folder_without_a_value_head_is_refused(made: Any) -> None:
    config, layout = made("skywork-o1")
    other = config.model.model_copy(update={"model": str(model_dir("small"))})
    with pytest.raises(ConfigError, match=r"no weight v_head\.summary.*Skywork"):
        pooling(other, seed=0, reading=layout.reading)


@pytest.mark.parametrize("name", LAYOUTS)
def test_paths_in_one_pass_have_the_scores_of_each_by_itself(
    made: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound that is promised, for trees of all layouts, with packs that are full, cut, and of single paths."""
    config, layout = made(name)
    engine = engine_of(config.model, layout.reading)
    requests = [PoolingRequest(*layout.marked(*path)) for path in TREE]
    requests += [PoolingRequest(each.ids, each.positions[-1:]) for each in requests]  # what is new alone
    alone = [answers(engine, [request])[0] for request in requests]
    tokens = []
    for most in (packing.PACKED_TOKENS, max(len(request.ids) for request in requests) + 20, 1):
        monkeypatch.setattr("rollouts.models.hf.pooling.PACKED_TOKENS", most)
        before = engine.tokens
        for one, other in zip(alone, answers(engine, requests), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        tokens.append(engine.tokens - before)
    distinct = {request.ids[:end] for request in requests for end in range(1, len(request.ids) + 1)}
    assert tokens[0] == len(distinct) < tokens[1] < tokens[2]


def test_random_trees_of_the_bundled_reward_model(made: Any) -> None:
    """Many solutions of a few problems, cut and continued at random; float32."""
    config, layout = made("qwen2.5-math-prm")
    generator = np.random.default_rng(3)
    requests = []
    for problem in tinymath.generate_problems("train", 4):
        right = tinymath.solution_steps(problem.question)
        for _ in range(12):
            cut = int(generator.integers(1, len(right) + 1))
            steps = [*right[:cut], *(f"{step.strip()}{generator.integers(10)}\n\n" for step in right[cut:])]
            requests.append(PoolingRequest(*layout.marked(problem.question, steps)))
    engine = engine_of(config.model, layout.reading)
    alone = [answers(engine, [request])[0] for request in requests]
    worst = max(
        abs(left - right)
        for one, other in zip(alone, answers(engine, requests), strict=True)
        for left, right in zip(one, other, strict=True)
    )
    assert worst < 1e-5


def test_where_attention_has_a_window_that_is_passed_paths_go_alone(made: Any) -> None:
    from transformers import MistralConfig

    old = MistralConfig(sliding_window=10)  # as that of Math-Shepherd, which lists no kinds of layers
    assert packing.most_packed(old, 10) > 1 and packing.most_packed(old, 11) == 1
    assert packing.most_packed(MistralConfig(sliding_window=None), 999) > 1


@pytest.mark.vllm
@pytest.mark.skipif(not HAVE_VLLM, reason="vllm is missing")
class TestVllm:
    """Each way of reading once: a head of two labels, a value head, a language model."""

    @pytest.mark.parametrize("name", ["qwen2.5-math-prm", "skywork-o1", "math-shepherd"])
    def test_it_gives_the_scores_of_transformers_and_computes_no_prefix_twice(self, made: Any, name: str) -> None:
        config, layout = made(name, "vllm")
        asked = [PoolingRequest(*layout.marked(*path)) for path in TREE]
        exact = answers(engine_of(made(name)[0].model, layout.reading), asked)
        model = config.model.model_copy(update={"max_length": 512, "max_batch": 8})
        with in_threads(), open_backend("scorer", model, seed=1, reading=layout.reading) as backend:
            scorer = RewardScorer("prm", backend, layout, "m")
            for path, expected in zip(TREE, exact, strict=True):
                assert scorer.submit(*path).result(300) == pytest.approx(expected, abs=1e-3)
            engine = backend._engine
            # What is known already is in the cache; so is this whole path, the positions that are asked for included.
            before = engine.computed
            [again] = score_paths(scorer, TREE[:1])
            assert again == pytest.approx(exact[0], abs=1e-3)
            question = TREE[0][0]
            steps = [*STEPS[:2], "b is one more than 150, that is to say \\boxed{151}, which is what was to be found"]
            before = engine.computed
            new = scorer.submit(question, steps, 2).result(300)
            ids, places = layout.marked(question, steps)
            assert new[:2] == [None, None] and engine.computed - before <= len(ids) - places[1] + 32
            [whole] = answers(engine_of(made(name)[0].model, layout.reading), [PoolingRequest(ids, places)])
            assert new[2] == pytest.approx(whole[2], abs=1e-3)
