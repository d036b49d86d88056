"""Trains the embedded family and measures it: ``python -m rollouts.tinymath.training.train``.

The small and the large language model learn side by side, one core each; the process reward model then
learns from solutions that they sample. ``--quick`` runs all of it in seconds with models that know
nothing; give it ``--output`` another folder::

    python -m rollouts.tinymath.training.train --quick --output /tmp/tinymath
"""

from __future__ import annotations

import functools
import multiprocessing
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import Qwen2ForCausalLM

from rollouts.errors import TrimError
from rollouts.tinymath.training.batches import Encoder, language_documents, pack
from rollouts.tinymath.training.fit import Schedule, fit
from rollouts.tinymath.training.folders import load_model, new_model
from rollouts.tinymath.training.results import measure_family, write_results
from rollouts.tinymath.training.reward import (
    Solved,
    draw_programs,
    reward_documents,
    reward_model_from,
    routed_solutions,
    small_solutions,
)
from rollouts.tinymath.training.sampling import MAX_NEW_TOKENS

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

    output: Path = Path(__file__).parents[1] / "weights"
    """Folder that gets one model folder for each role."""
    results: Path | None = None
    """File for the table of results; by default RESULTS.md of this package, for its own weights only."""
    seed: int = 0
    """Seed of weights, training problems and sampling."""
    quick: bool = False
    """A few optimiser steps and a handful of problems: shows that everything runs, in seconds."""
    corrupted_share: float = 0.15
    """Share of training problems with one corrupted step, which is read but not learned."""


_report = functools.partial(print, flush=True)


def train_language_model(role: str, settings: TrainSettings) -> None:
    """Train the small or the large model on one core and save it."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model = new_model(role)
    encoder = Encoder()
    generator = random.Random(settings.seed + 1)
    documents = language_documents(encoder, generator, settings.corrupted_share)
    schedule = _QUICK if settings.quick else _SCHEDULES[role]
    fit(
        model,
        role,
        pack(documents, schedule.rows, encoder.pad),
        schedule,
        settings.output / role,
        compiled=not settings.quick,
        report=_report,
    )


def start_language_models(settings: TrainSettings) -> Mapping[str, multiprocessing.process.BaseProcess]:
    """Begin to train both language models, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    workers = {
        role: context.Process(target=train_language_model, args=(role, settings), daemon=True)
        for role in ("small", "large")
    }
    for worker in workers.values():
        worker.start()
    return workers


def wait_for(role: str, worker: multiprocessing.process.BaseProcess, settings: TrainSettings) -> Qwen2ForCausalLM:
    """The trained model, as soon as its process has ended.

    Raises:
        TrimError: The process failed; its own message stands above.
    """
    worker.join()
    if worker.exitcode:
        raise TrimError(f"training of the {role} model failed; see the messages above")
    model = load_model(role, settings.output / role)
    assert isinstance(model, Qwen2ForCausalLM)
    return model


def train_reward_model(large: Qwen2ForCausalLM, solved: list[Solved], settings: TrainSettings) -> None:
    """Train the process reward model on sampled solutions and save it."""
    torch.manual_seed(settings.seed)
    model = reward_model_from(large)
    encoder = Encoder()
    documents = reward_documents(encoder, solved, random.Random(settings.seed + 2))
    schedule = _QUICK if settings.quick else _SCHEDULES["prm"]
    fit(
        model,
        "prm",
        pack(documents, schedule.rows, encoder.pad),
        schedule,
        settings.output / "prm",
        inherited=frozenset(f"model.{name}" for name in large.model.state_dict()),
        compiled=not settings.quick,
        report=_report,
    )


def main(settings: TrainSettings) -> None:
    """Train all three, then measure them and write the table of results."""
    started = time.monotonic()
    count, routed = (8, 4) if settings.quick else (_SOLUTIONS, _ROUTED)
    # Models that know nothing never end a solution.
    length = 16 if settings.quick else MAX_NEW_TOKENS
    workers = start_language_models(settings)
    small = wait_for("small", workers["small"], settings)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # the large model still trains on the other core
    solved = small_solutions(small, draw_programs(count, settings.seed), settings.seed, length)
    _report(f"small model's solutions sampled after {time.monotonic() - started:.0f} s")
    large = wait_for("large", workers["large"], settings)
    torch.set_num_threads(cores)
    solved += routed_solutions(small, large, solved[:routed], settings.seed, length)
    _report(f"{len(solved)} solutions sampled after {time.monotonic() - started:.0f} s")
    train_reward_model(large, solved, settings)
    minutes = (time.monotonic() - started) / 60
    _report(f"trained in {minutes:.1f} minutes")
    limit = 4 if settings.quick else None
    figures = measure_family(settings.output, limit=limit, seed=settings.seed, max_new_tokens=length)
    results = settings.results
    if results is None and not settings.quick and settings.output == TrainSettings.output:
        results = Path(__file__).parents[1] / "RESULTS.md"
    _report(write_results(figures, results, minutes))


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainSettings, description=__doc__))
    except TrimError as error:
        sys.exit(f"error: {error}")
