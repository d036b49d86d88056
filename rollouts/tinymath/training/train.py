"""Trains the embedded family and measures it: ``python -m rollouts.tinymath.training.train``.

The small and the large language model learn side by side, one core each; the process reward model then
learns from solutions that they sample. ``--quick`` runs all of it in seconds with models that know
nothing; give it ``--output`` another folder::

    python -m rollouts.tinymath.training.train --quick --output /tmp/tinymath
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import Qwen2ForCausalLM

from rollouts.errors import TrimError
from rollouts.tinymath.problems import training_programs
from rollouts.tinymath.training.batches import Encoder, language_documents, pack
from rollouts.tinymath.training.fit import Schedule, fit
from rollouts.tinymath.training.folders import WEIGHTS, load_model, new_model, note_checksums, save_model
from rollouts.tinymath.training.results import measure_family, render_results
from rollouts.tinymath.training.reward import reward_documents, reward_model_from, routed_solutions
from rollouts.tinymath.training.sampling import MAX_NEW_TOKENS, Solved, sample_solutions

_SCHEDULES: Mapping[str, Schedule] = {
    "small": Schedule(steps=2500, rows=4, matrix_rate=0.007, rate=2e-3),
    "large": Schedule(steps=3500, rows=4, matrix_rate=0.006, rate=2e-3),
    "prm": Schedule(steps=600, rows=5, matrix_rate=0.007, rate=2e-3),
}
_QUICK = Schedule(steps=2, rows=1, warm_up=1)
_SOLUTIONS, _ROUTED = 3600, 1200


@dataclass(frozen=True)
class TrainSettings:
    """What to train, and where it goes."""

    output: Path = WEIGHTS
    """Folder that gets one model folder for each role."""
    results: Path | None = None
    """File for the table of results; by default RESULTS.md of this package, for its own weights only."""
    seed: int = 0
    """Seed of weights, training problems and sampling."""
    quick: bool = False
    """A few optimiser steps and a handful of problems: shows that everything runs, in seconds."""
    corrupted_share: float = 0.15
    """Share of training problems with one corrupted step, which is read but not learned."""


def train_language_model(role: str, settings: TrainSettings) -> None:
    """Train the small or the large model on one core and save it."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model = new_model(role)
    encoder = Encoder()
    documents = language_documents(
        encoder, random.Random(f"tinymath-documents-{settings.seed}"), settings.corrupted_share
    )
    schedule = _QUICK if settings.quick else _SCHEDULES[role]
    fit(model, role, pack(documents, schedule.rows, encoder.pad), schedule, compiled=not settings.quick)
    save_model(model, role, settings.output / role)


def train_reward_model(large: Qwen2ForCausalLM, solved: list[Solved], settings: TrainSettings) -> None:
    """Train the process reward model on sampled solutions and save it."""
    torch.manual_seed(settings.seed)
    model = reward_model_from(large)
    encoder = Encoder()
    documents = reward_documents(encoder, solved, random.Random(f"tinymath-rewards-{settings.seed}"))
    schedule = _QUICK if settings.quick else _SCHEDULES["prm"]
    inherited = frozenset(f"model.{name}" for name in large.model.state_dict())
    batches = pack(documents, schedule.rows, encoder.pad)
    fit(model, "prm", batches, schedule, inherited=inherited, compiled=not settings.quick)
    save_model(model, "prm", settings.output / "prm")


def main(settings: TrainSettings) -> None:
    """Train all three, then measure them and write the table of results."""
    started = time.monotonic()
    count, routed = (8, 4) if settings.quick else (_SOLUTIONS, _ROUTED)
    # Models that know nothing never end a solution.
    sampling: dict[str, Any] = {"seed": settings.seed, "max_new_tokens": 16 if settings.quick else MAX_NEW_TOKENS}
    models: dict[str, Any] = {}
    programs = list(islice(training_programs(random.Random(f"tinymath-reward-{settings.seed}")), count))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        training = {role: pool.submit(train_language_model, role, settings) for role in ("small", "large")}
        for role, trained in training.items():
            trained.result()
            models[role] = load_model(role, settings.output / role)
            if role == "small":
                solved = sample_solutions(models["small"], programs, **sampling)
    solved += routed_solutions(models["small"], models["large"], solved[:routed], **sampling)
    print(f"{len(solved)} solutions sampled after {time.monotonic() - started:.0f} s", flush=True)
    train_reward_model(models["large"], solved, settings)
    note_checksums(settings.output)
    minutes = (time.monotonic() - started) / 60
    text = render_results(*measure_family(settings.output, limit=4 if settings.quick else None, **sampling), minutes)
    own = settings.output == WEIGHTS and not settings.quick
    if results := settings.results or (WEIGHTS.parent / "RESULTS.md" if own else None):
        results.write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainSettings, description=__doc__))
    except TrimError as error:
        sys.exit(f"error: {error}")
