"""The training loop that all three models share: fixed shapes, compiled, a schedule counted in steps.

The layers' matrices learn by Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). The bundled
weights were made with an own implementation of it, which computed in float32 where torch's computes in bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2ForCausalLM

from rollouts.models.hf.reward_model import ProcessRewardModel
from rollouts.tinymath.training.batches import IGNORE, Batch


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: optimiser steps, rows of 512 tokens in each, peak learning rates.

    ``matrix_rate`` is Muon's, for the matrices of the layers; ``rate`` is AdamW's, for all else.
    Both are times ``inherited_share`` for parameters taken over from another model.
    """

    steps: int
    rows: int
    matrix_rate: float = 0.02
    rate: float = 3e-3
    inherited_share: float = 0.1
    warm_up: int = 100

    def share(self, step: int) -> float:
        """Share of the peak rates at a step: linear warm-up, then a cosine down to a hundredth."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def loss_of(
    model: Qwen2ForCausalLM | ProcessRewardModel,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens, in nats."""
    output = model(input_ids=tokens, attention_mask=mask)
    logits = output if isinstance(model, ProcessRewardModel) else output.logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def _optimisers(model: torch.nn.Module, schedule: Schedule, inherited: frozenset[str]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else; inherited parameters go slower.

    In 400 steps of the small model the loss came to 0.47 so, and to 1.14 with AdamW alone.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        share = schedule.inherited_share if name in inherited else 1.0
        if parameter.dim() == 2 and "layers." in name:
            matrices.append({"params": [parameter], "lr": schedule.matrix_rate * share})
        else:
            others.append({"params": [parameter], "lr": schedule.rate * share})
    return [
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def fit(
    model: Qwen2ForCausalLM | ProcessRewardModel,
    role: str,
    batches: Iterator[Batch],
    schedule: Schedule,
    *,
    inherited: frozenset[str] = frozenset(),
    compiled: bool = True,
) -> None:
    """Train a model in place; the loss is printed now and then.

    Args:
        model: Trained in place, in float32.
        role: Named in what is printed.
        batches: At least as many as the schedule has steps.
        schedule: Steps and learning rates.
        inherited: Names of parameters that already know much, and learn more slowly.
        compiled: Whether to compile; not worth the minute it takes for a few steps.
    """
    model.train()
    optimisers = _optimisers(model, schedule, inherited)
    rates = [LambdaLR(optimiser, schedule.share) for optimiser in optimisers]
    compute = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    started, losses = time.monotonic(), []
    for step in range(1, schedule.steps + 1):
        batch = next(batches)
        loss = compute(model, batch.tokens, batch.targets, batch.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            rate.step()
        losses.append(loss.item())
        if step % 200 == 0 or step in (1, schedule.steps):
            mean, seconds = sum(losses) / len(losses), time.monotonic() - started
            print(f"{role} step {step}/{schedule.steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
            losses = []
    model.eval()
