"""Exact gradient or sampled actions? Return in training and held out, by problems and replicas.

    python -m benchmarks.tree_gradient --out results/tree_gradient

Only the evaluation splits of the bundled rollouts have four replicas, so the splits change roles here: routers are
trained on problems of the test split, are validated on the validation split, and are held against the 2,000
problems of the training split.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.splits import Validation
from agents.evaluation.walk import run
from agents.learners.loop import Training
from agents.learners.settings import LearnerSettings, PPOSettings, TreeSettings
from agents.routers.mlp import at
from benchmarks.methods import heading, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

LEARNERS: dict[str, LearnerSettings] = {"tree-agg": TreeSettings(), "ppo-agg": PPOSettings()}


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        sizes: Numbers of training problems.
        replicas: Replicas of each.
        lams: Values of λ.
        seeds: Draws of problems, and seeds of the learners.
        processes: Trainings side by side.
        rollouts: The store.
        out: Report, without suffix; default: print only.
    """

    sizes: tuple[int, ...] = (50, 500, 1000)
    replicas: tuple[int, ...] = (1, 2, 4)
    lams: tuple[float, ...] = (1.7e-3, 5.7e-3)
    seeds: int = 2
    processes: int = 2
    rollouts: str = "quickstart"
    out: Path | None = None


@dataclass(frozen=True)
class Cell:
    """One training: mean returns of its router, and processor time."""

    learner: str
    size: int
    replicas: int
    training: float
    held_out: float
    seconds: float


def measure(task: tuple[str, int, int, float, int, str]) -> Cell:
    """Train once."""
    name, size, replicas, lam, seed, rollouts = task
    trees = compile_store(rollouts)
    problems = np.unique(trees.problem[trees.select("test")])
    chosen = np.random.default_rng(seed).choice(problems, size, replace=False)
    indices = np.flatnonzero(np.isin(trees.problem, chosen) & (trees.replica < replicas))
    tables = decision_tables(trees, indices=indices)
    validation = Validation(lambda i: decision_tables(trees, indices=i), trees)
    begin = time.process_time()
    result = Training(tables, validation, lam, LEARNERS[name], seed, attempts=1).run()
    seconds, router = time.process_time() - begin, at(result.router, lam)
    values = [float(run(router, each).returns(lam).mean()) for each in (tables, decision_tables(trees, "train"))]
    return Cell(name, size, replicas, *values, seconds)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the table."""
    lines = heading("The exact tree gradient beside PPO", "tree_gradient")
    lines += [
        f"Mean over λ = {', '.join(f'{lam:g}' for lam in settings.lams)} and {settings.seeds} seeds: return on the "
        "training trees / held out, and processor time of one training. A gap between the two is "
        "what was fitted to frozen draws.",
        "",
        "| problems | replicas | " + " | ".join(f"{name} | seconds" for name in LEARNERS) + " |",
        "|---:|---:|" + "---:|---:|" * len(LEARNERS),
    ]
    for size, replicas in product(settings.sizes, settings.replicas):
        row = []
        for name in LEARNERS:
            own = [c for c in cells if (c.learner, c.size, c.replicas) == (name, size, replicas)]
            means = [np.mean([getattr(c, key) for c in own]) for key in ("training", "held_out")]
            row.append(f"{means[0]:.4f} / {means[1]:.4f} | {np.median([c.seconds for c in own]):.0f}")
        lines.append(f"| {size:,} | {replicas} | " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the study."""
    from rich.progress import track

    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    tasks = list(product(LEARNERS, settings.sizes, settings.replicas, settings.lams, range(settings.seeds)))
    work = [(*task, settings.rollouts) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        cells = list(track(pool.imap_unordered(measure, work), "training", total=len(work)))
    write(report(settings, cells), settings.out and settings.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
