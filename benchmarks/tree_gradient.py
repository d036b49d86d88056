"""Exact gradient or sampled actions? Return in training and held out, by problems and replicas.

    python -m benchmarks.tree_gradient --store runs/four-replicas --out results/tree_gradient

Both learners get the same training trees and choose their checkpoint on the validation split of the bundled rollouts;
held out is its test split. The training trees come from a store of 2,000 problems in four replicas, which the first run
generates (vLLM, the embedded family).
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.run import run
from agents.policy import at
from agents.ppo import PPOSettings
from agents.trainer import Settings as LearnerSettings
from agents.trainer import Training, Validation
from agents.tree_gradient import TreeSettings
from benchmarks.methods import heading, write
from rollouts.compiling import compile_store
from trim_env.tables import decision_tables

LEARNERS: dict[str, LearnerSettings] = {"tree-agg": TreeSettings(), "ppo-agg": PPOSettings()}


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        store: Where the training trees are, or are generated.
        sizes: Numbers of training problems.
        replicas: Replicas of each.
        lams: Values of λ.
        seeds: Draws of problems, and seeds of the learners.
        processes: Trainings side by side.
        out: Report, without suffix; default: print only.
    """

    store: Path = Path("runs/four-replicas")
    sizes: tuple[int, ...] = (50, 500, 2000)
    replicas: tuple[int, ...] = (1, 2, 4)
    lams: tuple[float, ...] = (1.7e-3, 5.7e-3)
    seeds: int = 2
    processes: int = 2
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


def measure(task: tuple[str, int, int, float, int, Path]) -> Cell:
    """Train once."""
    name, size, replicas, lam, seed, store = task
    bundled, trees = compile_store("quickstart"), compile_store(store)
    problems = np.unique(trees.problem[trees.select("train")])
    chosen = np.random.default_rng(seed).choice(problems, size, replace=False)
    indices = np.flatnonzero(np.isin(trees.problem, chosen) & (trees.replica < replicas))
    tables = decision_tables(trees, indices=indices)
    validation = Validation(lambda i: decision_tables(bundled, indices=i), bundled)
    begin = time.process_time()
    result = Training(tables, validation, lam, replace(LEARNERS[name]), seed, attempts=1).run()
    seconds, router = time.process_time() - begin, at(result.router, lam)
    held_out = run(router, decision_tables(bundled, "test"))
    values = [float(each.returns(lam).mean()) for each in (run(router, tables), held_out)]
    return Cell(name, size, replicas, *values, seconds)


def generate(store: Path) -> None:
    """Generate the training trees, or go on with that."""
    command = [sys.executable, "-m", "rollouts", "generate", str(store), "--problems", "tinymath:train"]
    subprocess.run([*command, "--models", "tinymath", "--limit", "2000", "--replicas", "train=4"], check=True)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the table."""
    lines = heading("The exact tree gradient beside PPO", "tree_gradient")
    lines += [
        f"Mean over λ = {', '.join(f'{lam:g}' for lam in settings.lams)} and {settings.seeds} seeds: return on the "
        "training trees / on test (held out), and processor time of one training. A gap between the two is "
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
    generate(settings.store)
    compile_store(settings.store)
    tasks = list(product(LEARNERS, settings.sizes, settings.replicas, settings.lams, range(settings.seeds)))
    work = [(*task, settings.store) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        cells = list(track(pool.imap_unordered(measure, work), "training", total=len(work)))
    write(report(settings, cells), settings.out and settings.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
