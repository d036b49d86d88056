"""Scoring the paths of rollout trees: those that begin alike in one pass, against each path by itself.

    python -m benchmarks.scoring --problems 24 --width 512 --layers 8

Tokens that the reward model computes, and seconds, on the clock and of the processor, on transformers. Trees are of the
validation split of the bundled rollouts; the reward model is the bundled one, or one of another width with random
weights, whose time is more like that of a real one: nearly all of it goes into matrix products.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from rollouts.config import ModelConfig
from rollouts.models.base import PoolingRequest
from rollouts.models.hf import pooling as pooled
from rollouts.models.hf.packing import PACKED_TOKENS
from rollouts.store.store import Store, locate
from rollouts.text.prompts import RewardFormat
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import model_dir
from rollouts.trees.annotate import left, paths

IN_FLIGHT = 512  # as `score` has it
SPLIT = "validation"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        problems: Problems whose trees are scored.
        width: Hidden size of a model with random weights; 0: the bundled reward model.
        layers: Its layers.
        rollouts: The store.
    """

    problems: int = 24
    width: int = 0
    layers: int = 8
    rollouts: str = "quickstart"


def requests_of(store: Store, style: RewardFormat, problems: int) -> Iterator[tuple[PoolingRequest, int]]:
    """Yield what scoring a store asks, path by path, with how many first steps of each are known already."""
    rows = store.score_rows("nothing-there-yet")
    chosen = store.problems(SPLIT)[:problems]
    for tree, edges in paths(rows, left(store, rows, chosen)):
        known = edges[0][0].steps
        steps = [*known, *(node.proposals[role].text for node, role in edges)]
        yield PoolingRequest(*style.marked(tree.problem.question, steps)), len(known)


def model_folder(settings: Settings, folder: Path) -> Path:
    """Return the folder of the reward model."""
    if not settings.width:
        return model_dir("prm")
    from transformers import Qwen2Config

    from rollouts.models.hf.reward_model import ProcessRewardModel

    tokenizer = load_tokenizer(str(model_dir("prm")))
    shape = {"intermediate_size": 4 * settings.width, "num_hidden_layers": settings.layers}
    heads = {"num_attention_heads": settings.width // 64, "num_key_value_heads": settings.width // 64}
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=settings.width, **shape, **heads)
    ProcessRewardModel(config).save_pretrained(folder)
    return folder


def run(
    engine: pooled.TransformersPooling, requests: list[PoolingRequest], most: int
) -> tuple[int, tuple[float, float], list[float]]:
    """Return tokens computed, seconds and scores, with at most so many tokens in a pass, but at least one path."""
    pooled.PACKED_TOKENS = most
    found: dict[int, list[float]] = {}
    before, begin, worked = engine.tokens, time.perf_counter(), time.process_time()
    for start in range(0, len(requests), IN_FLIGHT):
        for key in range(start, min(start + IN_FLIGHT, len(requests))):
            engine.add(key, requests[key])
        while len(found) < min(start + IN_FLIGHT, len(requests)):
            found |= dict(engine.step())
    seconds = time.perf_counter() - begin, time.process_time() - worked
    return engine.tokens - before, seconds, [score for key in range(len(requests)) for score in found[key]]


def main(settings: Settings) -> None:
    """Run the benchmark and print a table."""
    style = RewardFormat(load_tokenizer(str(model_dir("prm"))), None)
    asked = list(requests_of(Store(locate(settings.rollouts)), style, settings.problems))
    whole = [request for request, _ in asked]
    steps = sum(len(request.positions) - known for request, known in asked)
    with tempfile.TemporaryDirectory() as scratch:
        model = ModelConfig(
            backend="transformers", model=str(model_folder(settings, Path(scratch))), dtype="float32", max_length=1024
        )
        engine = pooled.pooling(model, 0, style.reading)
        run(engine, whole[:8], PACKED_TOKENS)
        one_by_one, packed = run(engine, whole, 1), run(engine, whole, PACKED_TOKENS)
    worst = max(abs(one - other) for one, other in zip(one_by_one[2], packed[2], strict=True))
    print(f"{len(whole):,} paths, {steps:,} steps, of {settings.problems} problems")
    print("| | tokens computed | seconds | of the processor |\n|---|---:|---:|---:|")
    for name, (tokens, seconds, _) in (
        ("each path by itself", one_by_one),
        ("in one pass", packed),
    ):
        print(f"| {name} | {tokens:,} | {seconds[0]:.1f} | {seconds[1]:.1f} |")
    print(f"Greatest difference of two scores of a step: {worst:.1e}.")


if __name__ == "__main__":
    main(tyro.cli(Settings))
