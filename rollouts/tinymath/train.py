"""Trains the embedded family and measures it: ``python -m rollouts.tinymath.train``.

The small and the large language model learn side by side, one core each; the process reward model then
learns from solutions that they sample. ``--quick`` runs all of it in seconds with models that know
nothing; give it ``--output`` another folder::

    python -m rollouts.tinymath.train --quick --output /tmp/tinymath
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
from rollouts.tinymath.batches import Encoder, language_documents, pack
from rollouts.tinymath.fit import Schedule, fit
from rollouts.tinymath.folders import load_model, new_model
from rollouts.tinymath.results import measure_family, write_results
from rollouts.tinymath.reward import (
    draw_programs,
    reward_documents,
    reward_model_from,
    routed_solutions,
    small_solutions,
)

_SCHEDULES: Mapping[str, Schedule] = {
    "small": Schedule(steps=1000, rows=5, peak_rate=3e-3),
    "large": Schedule(steps=1700, rows=5, peak_rate=3e-3),
    "prm": Schedule(steps=500, rows=5, peak_rate=1.5e-3),
}
_QUICK = Schedule(steps=2, rows=1, peak_rate=1e-3, warm_up=1)
_SOLUTIONS, _ROUTED = 5000, 1500


@dataclass(frozen=True)
class TrainSettings:
    """What to train, and where it goes."""

    output: Path = Path(__file__).parent / "weights"
    """Folder that gets one model folder for each role."""
    results: Path | None = None
    """File for the table of results; RESULTS.md of this package where only the weights' folder is its own."""
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
    generator = random.Random(f"tinymath-{role}-{settings.seed}")
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


def train_language_models(settings: TrainSettings) -> None:
    """Train both language models at once, each in a process of its own.

    Raises:
        TrimError: One of the processes failed; its own message stands above.
    """
    context = multiprocessing.get_context("spawn")
    workers = {
        r: context.Process(target=train_language_model, args=(r, settings)) for r in ("small", "large")
    }
    for worker in workers.values():
        worker.start()
    for worker in workers.values():
        worker.join()
    failed = [role for role, worker in workers.items() if worker.exitcode]
    if failed:
        raise TrimError(f"training of {' and '.join(failed)} failed; see the messages above")


def load_language_model(role: str, settings: TrainSettings) -> Qwen2ForCausalLM:
    """A language model that was trained before."""
    model = load_model(role, settings.output / role)
    assert isinstance(model, Qwen2ForCausalLM)
    return model


def train_reward_model(settings: TrainSettings) -> None:
    """Train the process reward model on solutions of the two language models and save it."""
    torch.manual_seed(settings.seed)
    small, large = load_language_model("small", settings), load_language_model("large", settings)
    started = time.monotonic()
    programs = draw_programs(8 if settings.quick else _SOLUTIONS, settings.seed)
    solved = small_solutions(small, programs, settings.seed)
    solved += routed_solutions(small, large, solved[:_ROUTED], settings.seed)
    _report(f"prm: {len(solved)} solutions sampled in {time.monotonic() - started:.0f} s")
    model = reward_model_from(large)
    encoder = Encoder()
    documents = reward_documents(encoder, solved, random.Random(f"tinymath-prm-{settings.seed}"))
    schedule = _QUICK if settings.quick else _SCHEDULES["prm"]
    fit(
        model,
        "prm",
        pack(documents, schedule.rows, encoder.pad),
        schedule,
        settings.output / "prm",
        compiled=not settings.quick,
        report=_report,
    )


def main(settings: TrainSettings) -> None:
    """Train all three, then measure them and write the table of results."""
    started = time.monotonic()
    train_language_models(settings)
    train_reward_model(settings)
    minutes = (time.monotonic() - started) / 60
    _report(f"trained in {minutes:.1f} minutes")
    figures = measure_family(settings.output, limit=4 if settings.quick else None, seed=settings.seed)
    results = settings.results
    if results is None and not settings.quick and settings.output == TrainSettings.output:
        results = Path(__file__).parent / "RESULTS.md"
    _report(write_results(figures, results, minutes))


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainSettings, description=__doc__))
    except TrimError as error:
        sys.exit(f"error: {error}")
