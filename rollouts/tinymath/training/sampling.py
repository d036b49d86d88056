"""Samples and scores solutions with models at hand, by the engines that rollouts are made with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from rollouts.config import Sampling
from rollouts.models.base import CompletionRequest, PoolingRequest
from rollouts.models.hf.generator import TransformersGenerator
from rollouts.models.hf.load import describe
from rollouts.models.hf.pooling import TransformersPooling
from rollouts.models.hf.reward_model import ProcessRewardModel
from rollouts.text.prompts import PromptFormat, RewardFormat
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import STEP_TAG
from rollouts.tinymath.problems import STEP_DELIMITER, Program
from rollouts.tinymath.training.folders import WEIGHTS

Solved = tuple[Program, list[str]]
"""A program, and the steps of a solution that a model wrote."""
# A solution of the longest program has about 330 tokens.
MAX_NEW_TOKENS = 420
_WINDOW = 1024


def split_steps(solution: str) -> list[str]:
    """The steps of a solution, each but the last with its delimiter."""
    parts = solution.split(STEP_DELIMITER)
    return [part + STEP_DELIMITER for part in parts[:-1]] + [parts[-1]] * bool(parts[-1])


def _answers(engine: Any, requests: Sequence[Any]) -> list[Any]:
    for key, request in enumerate(requests):
        engine.add(key, request)
    answers: dict[int, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations of such models are shorter than waking a second thread
    while len(answers) < len(requests):
        answers.update(engine.step())
    torch.set_num_threads(threads)
    return [answers[key] for key in range(len(requests))]


def sample_solutions(
    model: Qwen2ForCausalLM,
    programs: Sequence[Program],
    prefixes: Sequence[Sequence[str]] | None = None,
    *,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Solved]:
    """Sample one solution of each program at temperature 0.7, from its accepted steps on.

    Args:
        model: A language model of the family.
        programs: The problems.
        prefixes: Steps already accepted, one list for each program; none where None.
        seed: Of the draws.
        max_new_tokens: Where a solution that does not end is cut.

    Returns:
        Each program with its steps, those of its prefix included.
    """
    prompts = PromptFormat(load_tokenizer(str(WEIGHTS / "small")))
    engine = TransformersGenerator(model, prompts.tokenizer, _WINDOW, 256, describe(model, seed))
    started = list(zip(programs, repeat(()) if prefixes is None else prefixes, strict=prefixes is not None))
    sampling = Sampling(temperature=0.7)
    requests = [
        CompletionRequest(prompts.ids(program.question, steps), max_new_tokens, sampling, seed=seed << 32 | number)
        for number, (program, steps) in enumerate(started)
    ]
    completions = _answers(engine, requests)
    return [
        (program, [*steps, *split_steps(written.text)])
        for (program, steps), written in zip(started, completions, strict=True)
    ]


def score_solutions(model: ProcessRewardModel, solved: Sequence[Solved]) -> list[list[float]]:
    """For each step of each solution the probability that all steps up to it are right."""
    prompts = RewardFormat(load_tokenizer(str(WEIGHTS / "prm")), None, STEP_TAG)
    engine = TransformersPooling(model.model, model.score, prompts.reading, _WINDOW, describe(model.model, 0))
    return _answers(engine, [PoolingRequest(*prompts.marked(program.question, steps)) for program, steps in solved])
