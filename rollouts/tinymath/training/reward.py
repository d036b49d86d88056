"""What the process reward model learns from: sampled solutions with exact labels, and where it starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from rollouts.models.hf.reward_model import ProcessRewardModel
from rollouts.tinymath.problems import training_programs
from rollouts.tinymath.training.batches import Document, Encoder, corrupted_solution, reward_document
from rollouts.tinymath.training.folders import new_model
from rollouts.tinymath.training.sampling import Solved, sample_solutions


def reward_model_from(large: Qwen2ForCausalLM) -> ProcessRewardModel:
    """The large model's trunk, two more layers that change nothing at first, and a fresh head.

    Knowing what the large model would have written is most of the judgement; the added layers compare it
    with what stands there.
    """
    model = new_model("prm")
    assert isinstance(model, ProcessRewardModel)
    model.model.load_state_dict(large.model.state_dict(), strict=False)
    encoder = Encoder()
    embedding = model.model.embed_tokens.weight.data
    embedding[encoder.tag] = embedding[encoder.delimiter]  # a tag stands where the large model knows a delimiter
    for layer in model.model.layers[large.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def routed_solutions(
    small: Qwen2ForCausalLM,
    large: Qwen2ForCausalLM,
    solved: list[Solved],
    **sampling: Any,
) -> list[Solved]:
    """Solutions as routing makes them, from the small model's own.

    Each is cut at a random step. The large model continues there, which gives one solution; cut again one
    or two steps later and continued by the small model, it gives another. `sampling` is that of `sample_solutions`.
    """
    generator = random.Random(f"tinymath-routed-{sampling['seed']}")
    programs = [program for program, _ in solved]
    cuts = [generator.randrange(len(steps) or 1) for _, steps in solved]
    prefixes = [steps[:cut] for (_, steps), cut in zip(solved, cuts, strict=True)]
    rescued = sample_solutions(large, programs, prefixes, **sampling)
    ends = [cut + generator.choice([1, 1, 2]) for cut in cuts]
    back = [(*pair, end) for pair, end in zip(rescued, ends, strict=True) if len(pair[1]) > end]
    prefixes = [steps[:end] for _, steps, end in back]
    return [*rescued, *sample_solutions(small, [program for program, _, _ in back], prefixes, **sampling)]


def reward_documents(encoder: Encoder, solved: list[Solved], generator: random.Random) -> Iterator[Document]:
    """Endless labelled solutions: the sampled ones in random order, again and again, and corrupted ones."""
    drawn = training_programs(generator)
    while True:
        for program, steps in generator.sample(solved, len(solved)):
            if generator.random() < 0.2:
                other = next(drawn)
                yield reward_document(encoder, other, corrupted_solution(other, generator)[0])
            document = reward_document(encoder, program, steps)
            if len(document.tokens) <= 512:
                yield document
