"""Is TRIM-Agg good, and does it stay good? Seeds x λ on the bundled rollouts against the best threshold.

    python -m benchmarks.robustness --out results/robustness.md            # 10 seeds x 8 λ, two processes
    python -m benchmarks.robustness --seeds 1 --lams 3e-3 --iterations 5   # a quick look

Trains every (seed, λ) with the defaults of `train.py` and evaluates on test, which nothing was chosen on. The best
threshold for a λ is chosen on all of validation. Intervals are bootstraps over problems of means over seeds.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import Estimate, holm, paired_curves, paired_means, resample_weights
from agents.evaluation.compare import difference
from agents.evaluation.curves import Curve, Method, References
from agents.evaluation.oracle import tree_oracle
from agents.evaluation.outcomes import Outcomes, combined
from agents.evaluation.splits import Candidates, Validation
from agents.evaluation.walk import measured, references, run
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings
from agents.routers.mlp import at
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

LAMS = (5e-4, 7.5e-4, 1.1e-3, 1.7e-3, 2.5e-3, 3.8e-3, 5.7e-3, 8.5e-3)
CPTS = ("cpt_50", "cpt_80", "cpt_95")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        seeds: Number of seeds.
        lams: Values of λ.
        schema: Feature schema.
        rollouts: The store.
        iterations: Of each training; default: those of `PPOSettings`.
        processes: Trainings side by side.
        out: Where to write the report; default: print only.
    """

    seeds: int = 10
    lams: tuple[float, ...] = LAMS
    schema: str = "agg+"
    rollouts: str = "quickstart"
    iterations: int | None = None
    processes: int = 2
    out: Path | None = None


@dataclass(frozen=True)
class Cell:
    """One training: what became of it on test and on validation."""

    lam: float
    seed: int
    outcomes: Outcomes
    chosen_on: Outcomes
    verdict: str
    attempts: int
    seconds: float


_STATE: dict[str, object] = {}


def _tables(trees: Trees, schema: str, split: str) -> DecisionTables:
    return decision_tables(trees, split, schema=schema)


def _prepare(settings: Settings) -> None:
    trees = compile_store(settings.rollouts)
    _STATE["settings"] = settings
    for name, split in (("train", "train"), ("test", "test"), ("whole", "validation")):
        _STATE[name] = _tables(trees, settings.schema, split)
    _STATE["validation"] = Validation(lambda i: decision_tables(trees, schema=settings.schema, indices=i), trees)


def train_cell(task: tuple[float, int]) -> Cell:
    """Train one router."""
    lam, seed = task
    settings, train, test, whole = (_STATE[key] for key in ("settings", "train", "test", "whole"))
    validation = _STATE["validation"]
    assert isinstance(settings, Settings) and isinstance(validation, Validation)
    assert isinstance(train, DecisionTables) and isinstance(test, DecisionTables) and isinstance(whole, DecisionTables)
    ppo = PPOSettings() if settings.iterations is None else replace(PPOSettings(), iterations=settings.iterations)
    begin = time.perf_counter()
    result = Training(train, validation, lam, ppo, seed).run()
    seconds = time.perf_counter() - begin
    router = at(result.router, lam)
    verdict = result.health[lam].verdict
    return Cell(lam, seed, run(router, test), run(router, whole), verdict, result.attempts, seconds)


def average(outcomes: list[Outcomes]) -> Outcomes:
    """Average the outcomes of several routers problem by problem."""
    return combined(outcomes, lambda *columns: np.mean(columns, axis=0))


def report(settings: Settings, cells: list[Cell]) -> str:
    """Write the tables."""
    trees = compile_store(settings.rollouts)
    test, validation = (_tables(trees, settings.schema, split) for split in ("test", "validation"))
    both, candidates = references(test), Candidates(validation)
    weights = resample_weights(len(both.small))
    rows, paired = [], []
    for lam in settings.lams:
        own = [cell for cell in cells if cell.lam == lam]
        threshold = candidates.best(lam).threshold
        simple, mean = run(threshold, test), average([cell.outcomes for cell in own])
        gains = mean.returns(lam) - simple.returns(lam)
        each = paired_means(mean.returns(lam), simple.returns(lam), weights)
        paired.append((gains, each))
        seeds = [float((cell.outcomes.returns(lam) - simple.returns(lam)).mean()) for cell in own]
        verdicts = Counter(cell.verdict for cell in own)
        rows.append(
            f"| {lam:g} | {threshold.threshold:.3f} | {_point(simple, both)} | {_point(mean, both)} | "
            f"{_interval(each)} | {min(seeds):+.4f} to {max(seeds):+.4f} | HOLM | {_counts(verdicts)} | "
            f"{sum(cell.attempts > 1 for cell in own)} | {_oracle(test, both, lam)} |"
        )
    corrected = holm([each.p_value for _, each in paired])
    rows = [row.replace("HOLM", f"{p:.3g}") for row, p in zip(rows, corrected, strict=True)]
    overall = np.mean([gains for gains, _ in paired], axis=0)
    total = paired_means(overall, np.zeros(len(overall)), weights)
    seconds = [cell.seconds for cell in cells]
    return "\n".join([
        "# Robustness of TRIM-Agg",
        "",
        _header(settings, seconds),
        "",
        "| λ | threshold | TRIM-Thr: accuracy, cost | TRIM-Agg: accuracy, cost |"
        " return difference [95 %] | over seeds | p (Holm) | verdicts | needed remedies | oracle: accuracy, cost |",
        "|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
        *rows,
        "",
        f"Mean over the λ of the return difference: **{_interval(total)}**.",
        "",
        *_curves(settings, cells, both, candidates, test, validation, weights),
        "",
    ])  # fmt: skip


def _header(settings: Settings, seconds: list[float]) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    options = f" --seeds {settings.seeds}" if settings.seeds != Settings.seeds else ""
    options += f" --schema {settings.schema}" if settings.schema != Settings.schema else ""
    return (
        f"`python -m benchmarks.robustness{options}`, {datetime.date.today()}, commit {commit.stdout.strip()}, "
        f"{os.cpu_count()} shared cores without a GPU. {len(seconds)} trainings ({settings.seeds} seeds, "
        f"{len(settings.lams)} λ, schema {settings.schema}), {np.median(seconds):.1f} s each in the median with "
        f"{settings.processes} side by side. Test split of `{settings.rollouts}`; costs in % of always-large's tokens. "
        "Thresholds are chosen on all of validation; the verdicts are those that the trainings gave themselves on "
        "their half of validation."
    )


def _point(outcomes: Outcomes, both: References) -> str:
    return f"{100 * outcomes.correct.mean():.1f} %, {100 * outcomes.cost.sum() / both.large.cost.sum():.1f} %"


def _oracle(test: DecisionTables, both: References, lam: float) -> str:
    return _point(tree_oracle(test, lam), both)


def _interval(each: Estimate) -> str:
    return f"{each.value:+.4f} [{each.low:+.4f}, {each.high:+.4f}]"


def _counts(verdicts: Counter[str]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())


def _curves(
    settings: Settings,
    cells: list[Cell],
    both: References,
    candidates: Candidates,
    test: DecisionTables,
    validation: DecisionTables,
    weights: np.ndarray,
) -> list[str]:
    """Compare the curve of the routers, averaged over seeds, with that of 16 thresholds chosen on validation."""
    choosing = references(validation)
    by_lam = {lam: [cell for cell in cells if cell.lam == lam] for lam in settings.lams}
    points, chosen_on = (
        [(lam, average([getattr(cell, name) for cell in own])) for lam, own in by_lam.items()]
        for name in ("outcomes", "chosen_on")
    )
    agg = Method.chosen(points, chosen_on, choosing)
    thr = measured(candidates.spread_over(choosing.large), choosing, test)
    compared = paired_curves(agg, thr, both, weights)
    own, other = Curve.of(agg, both), Curve.of(thr, both)
    lines = [
        f"Curves: TRIM-Agg with {len(agg.points)} operating points (outcomes averaged over seeds), TRIM-Thr with "
        f"{len(thr.points)}; hulls chosen on validation.",
        "",
        "| | TRIM-Agg | TRIM-Thr | difference, % of TRIM-Thr's [95 %] |",
        "|---|---:|---:|---:|",
    ]
    for name in CPTS:
        percent = compared[f"{name}_percent"]
        target = int(name.removeprefix("cpt_"))
        mark = " (by mixing with always-large)" if own.by_mixing(target) else ""
        lines.append(
            f"| CPT({target} %) | {100 * float(own.cpt(target)):.1f} %{mark} | "
            f"{100 * float(other.cpt(target)):.1f} % | {percent.value:+.1f} [{percent.low:+.1f}, {percent.high:+.1f}] |"
        )
    each = compared["delta_ibc"]
    lines.append(
        f"| ΔIBC | {float(own.delta_ibc()):.2f} | {float(other.delta_ibc()):.2f} | {_interval(each)} (absolute) |"
    )
    return [*lines, "", difference(("TRIM-Agg", "TRIM-Thr"), agg, thr, both, weights)]


def main() -> None:
    """Run the benchmark."""
    from rich.progress import track

    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    tasks = [(lam, seed) for seed in range(settings.seeds) for lam in settings.lams]
    with multiprocessing.get_context("spawn").Pool(settings.processes, _prepare, (settings,)) as pool:
        cells = list(track(pool.imap_unordered(train_cell, tasks), "training", total=len(tasks)))
    text = report(settings, sorted(cells, key=lambda cell: (cell.lam, cell.seed)))
    print(text)
    if settings.out:
        settings.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
