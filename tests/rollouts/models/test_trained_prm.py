"""A reward model that was trained on trees is the same model to vLLM as to transformers."""

from __future__ import annotations

import importlib.util

import pytest
from bundled_part import bundled_part
from thread_engine import in_threads

from rollouts.__main__ import main
from rollouts.config import embedded_family
from rollouts.models.base import PoolingRequest
from rollouts.models.open import open_backend
from rollouts.text.prompts import RewardFormat
from rollouts.text.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is missing"),
]


@pytest.mark.parametrize("blocks", [(), ("--added", "1", "--unfreeze", "1")], ids=["head", "blocks"])
def test_vllm_gives_the_scores_of_transformers(tmp_path, blocks):
    folder = tmp_path / "own"
    bundled_part(tmp_path / "trees", scores=False, train=12)
    options = ("--models", "tinymath:transformers", "--epochs", "2", "--no-score")
    assert main(["train-prm", str(tmp_path / "trees"), str(folder), *options, *blocks]) == 0
    style = RewardFormat(load_tokenizer(str(folder)), None, "<extra_0>")
    steps = ["a=70+33=103\n\n", "b=a+49=103+49=151\n\n", "The answer is \\boxed{151}"]
    requests = [PoolingRequest(*style.marked("Let a=70+33, b=a+49. Find b.", steps[:count])) for count in (1, 2, 3)]
    scores = []
    for kind in ("vllm", "transformers"):
        model = embedded_family(kind, "float32").scorer.model.model_copy(update={"model": str(folder)})
        with in_threads(), open_backend("scorer", model, seed=1, reading=style.reading) as backend:
            scores.append([future.result(timeout=300) for future in map(backend.submit, requests)])
    for count, one, other in zip((1, 2, 3), *scores, strict=True):
        assert len(one) == len(other) == count
        assert one == pytest.approx(other, abs=1e-3)
