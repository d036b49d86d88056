"""Samples solutions, and scores them, in plain transformers: enough to train and to measure the family.

Serving is the business of `rollouts.models`; nothing here decides how rollouts are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Qwen2ForCausalLM

from rollouts.tinymath.problems import STEP_DELIMITER
from rollouts.tinymath.training.batches import Encoder
from rollouts.tinymath.training.folders import ProcessRewardModel, build_tokenizer

# A solution of the longest program has about 330 tokens.
MAX_NEW_TOKENS = 420


def split_steps(solution: str) -> list[str]:
    """The steps of a solution, each but the last with its delimiter."""
    parts = solution.split(STEP_DELIMITER)
    return [part + STEP_DELIMITER for part in parts[:-1]] + [parts[-1]] * bool(parts[-1])


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def sample_solutions(
    model: Qwen2ForCausalLM,
    questions: Sequence[str],
    *,
    prefixes: Sequence[Sequence[str]] | None = None,
    temperature: float = 0.7,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 250,
) -> list[list[str]]:
    """Sample one solution for each question, from its accepted steps on.

    Args:
        model: A language model of the family.
        questions: Problem texts.
        prefixes: Steps already accepted, one list for each question; none where None.
        temperature: Sampling temperature, above 0; neither top-k nor top-p.
        seed: Of torch's global generator; the same call gives the same texts on one machine.
        max_new_tokens: Where a solution that does not end is cut.
        batch_size: Solutions sampled at once; part of what the texts depend on.

    Returns:
        For each question the steps, those of its prefix included.
    """
    encoder, tokenizer = Encoder(), build_tokenizer()
    torch.manual_seed(seed)
    starts = prefixes if prefixes is not None else [[]] * len(questions)
    rows = [
        encoder.prompt(question) + [token for step in steps for token in encoder.text(step)]
        for question, steps in zip(questions, starts, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    solutions: list[list[str]] = [[]] * len(rows)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        tokens, mask = _left_padded([rows[number] for number in chosen], encoder.pad)
        # Generation runs without gradients by itself.
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=encoder.end,
            pad_token_id=encoder.pad,
        )
        texts = tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
        for number, text in zip(chosen, texts, strict=True):
            solutions[number] = [*starts[number], *split_steps(text)]
    return solutions


def score_solutions(
    model: ProcessRewardModel,
    questions: Sequence[str],
    solutions: Sequence[Sequence[str]],
    batch_size: int = 64,
) -> list[list[float]]:
    """For each step of each solution the probability that all steps up to it are right."""
    encoder = Encoder()
    rows, places = [], []
    for question, steps in zip(questions, solutions, strict=True):
        row = encoder.prompt(question)
        tags = []
        for step in steps:
            row += [*encoder.text(step.strip()), encoder.tag]
            tags.append(len(row) - 1)
        rows.append([*row, encoder.end, encoder.pad])
        places.append(tags)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    scores: list[list[float]] = [[]] * len(rows)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = len(rows[chosen[-1]])
        # Padding on the right needs no mask: attention is causal and the tags stand before it.
        tokens = torch.tensor([rows[number] + [encoder.pad] * (width - len(rows[number])) for number in chosen])
        with torch.inference_mode():
            probabilities = model(tokens).float().softmax(-1)[..., 1]
        for row_number, number in enumerate(chosen):
            scores[number] = probabilities[row_number, places[number]].tolist()
    return scores
