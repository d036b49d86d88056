"""Fitting reward models: what is a target with which weight, and that the loss is that of the model in use."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rollouts.cli.train_prm import scorer_of
from rollouts.config import GeneratorConfig, ModelConfig
from rollouts.errors import ConfigError
from rollouts.models.base import PoolingRequest
from rollouts.models.hf import fit
from rollouts.models.hf.fit import _HELD_OUT, Fit, ValuedPath, _targets, make
from rollouts.models.hf.packing import pack_first
from rollouts.models.hf.pooling import pooling
from rollouts.models.hf.recipe import Recipe
from rollouts.text.prompts import RewardFormat
from rollouts.text.tokenizer import transformers_tokenizer
from rollouts.tinymath import STEP_TAG, generate_problems, model_dir, solution_steps

SMALL = ModelConfig(backend="transformers", model=str(model_dir("small")), dtype="float32", max_length=1024)


def test_steps_that_paths_share_count_once_and_tokens_by_what_follows():
    tag, end = 9, 0
    one = ValuedPath((1, 5, 6, tag, 7, 7, tag, end), 1, (3, 6), (0.5, 0.0), (4.0, 2.0))
    two = ValuedPath((1, 5, 6, tag, 7, 8, tag, end), 1, (3, 6), (0.5, 1.0), (4.0, 6.0))
    pack = pack_first([one.ids, two.ids], 100)
    assert pack.ids.tolist() == [1, 5, 6, tag, 7, 7, tag, end, 8, tag, end]
    places, values, weights = _targets(pack, [(one, 0), (two, 5)], 0.0)
    assert (places.tolist(), values.tolist(), weights.tolist()) == ([3, 6, 9], [0.5, 0.0, 1.0], [4.0, 2.0, 6.0])
    places, values, weights = _targets(pack, [(one, 0), (two, 5)], 0.5)
    assert places.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert values.tolist() == [0.5, 0.5, 0.5, 0.75, 0.0, 0.0, 1.0, 1.0]  # a 7 is followed by either
    assert weights.tolist() == [2.0, 2.0, 4.0, 4.0, 1.0, 2.0, 3.0, 6.0]


@pytest.fixture(scope="module")
def style():
    return RewardFormat(transformers_tokenizer(str(model_dir("small"))), None, STEP_TAG)


@pytest.fixture(scope="module")
def problems(style):
    """Right solutions and ones that go wrong at a step, with values of that kind."""
    found = []
    for problem in generate_problems("train", 24):
        right = solution_steps(problem.question)
        paths = []
        for wrong in range(1, len(right) + 1):
            steps = [*right[: wrong - 1], *(step.replace("=", "=1") for step in right[wrong - 1 :])]
            ids = style.ids(problem.question, steps)
            tags = tuple(place for place, token in enumerate(ids) if token == style.step_tag_id)
            values = tuple(float(number < wrong - 1) for number in range(len(steps)))
            paths.append(
                ValuedPath(ids, tags[0] - len(style.encode(steps[0].strip())), tags, values, (1.0,) * len(tags))
            )
        found.append(paths)
    return found


@pytest.mark.parametrize(
    "recipe", [Recipe(epochs=12, layers=1), Recipe(epochs=2, added=1, unfreeze=1, batch_tokens=200)]
)
def test_the_loss_is_that_of_the_model_in_use(style, problems, tmp_path, recipe):
    fitted = make(SMALL, style, problems, recipe, tmp_path / "made", lambda *_: None)
    shuffled = random.Random(recipe.seed).sample(problems, len(problems))
    held_out = shuffled[: round(_HELD_OUT * len(problems))]
    engine = pooling(SMALL.model_copy(update={"model": str(tmp_path / "made")}), 0, style.reading)
    known = {}
    for path in (path for paths in held_out for path in paths):
        engine.add(0, PoolingRequest(path.ids, path.tags))
        [(_, scores)] = engine.step()
        for tag, score, value in zip(path.tags, scores, path.values, strict=True):
            known[path.ids[: tag + 1]] = (score, value)
    scores, values = np.array(list(known.values())).T
    loss = -np.mean(values * np.log(scores) + (1 - values) * np.log(1 - scores))
    assert fitted.loss == pytest.approx(loss, abs=2e-3)
    assert fitted.loss <= fitted.frozen and fitted.layers == (recipe.layers or 2)
    assert fitted.loss < fitted.constant


def test_another_kind_of_model_is_refused(style, problems, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=300, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "llama")
    other = SMALL.model_copy(update={"model": str(tmp_path / "llama")})
    with pytest.raises(ConfigError, match=r"a 'llama' model.*needs a 'qwen2' one"):
        make(other, style, problems, Recipe(), tmp_path / "made", lambda *_: None)


def test_a_processor_reads_in_bfloat16_where_the_trunk_is_said_to_be_in_it(style, problems, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(fit, "fit", lambda model, *_: read.append(str(model.dtype)) or Fit(2, 0.1, 0.1, 0.1))
    monkeypatch.setattr(fit, "save", lambda *_: None)
    for dtype, recipe in (("auto", Recipe()), ("bfloat16", Recipe()), ("bfloat16", Recipe(unfreeze=1))):
        make(SMALL.model_copy(update={"dtype": dtype}), style, problems, recipe, tmp_path / "made", lambda *_: None)
    assert read == ["torch.float32", "torch.bfloat16", "torch.float32"]  # blocks learn in single precision
    formats = {dtype: scorer_of(trunk(dtype=dtype), tmp_path).model.dtype for dtype in ("auto", "bfloat16")}
    assert formats == {"auto": "float32", "bfloat16": "bfloat16"}
    assert scorer_of(trunk(dtype="bfloat16", devices=(0,)), tmp_path).model.dtype == "auto"  # as its folder says


def trunk(**changes):
    return GeneratorConfig(backend="transformers", model=str(model_dir("small")), **changes)
