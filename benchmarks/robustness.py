"""Is TRIM-Agg good, and does it stay good? Seeds x λ on the bundled rollouts against the best threshold.

    python -m benchmarks.robustness --out results/robustness               # 10 seeds x 8 λ, two processes
    python -m benchmarks.robustness --seeds 1 --lams 3e-3 --iterations 5   # a quick look

Trains every (seed, λ) with the defaults of `train.py` and evaluates on test, which nothing was chosen on. The best
threshold for a λ is chosen on all of validation. Intervals are bootstraps over problems of means over seeds.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import holm, paired_curves, paired_means, resample_weights
from agents.evaluation.compare import difference
from agents.evaluation.curves import CPT_TARGETS, Curve, Method, References
from agents.evaluation.oracle import tree_oracle
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Candidates, Validation
from agents.evaluation.walk import measured, references, run
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings
from agents.routers.mlp import at
from benchmarks.study import Study, all_kept, average, heading, shown, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

LAMS = (5e-4, 7.5e-4, 1.1e-3, 1.7e-3, 2.5e-3, 3.8e-3, 5.7e-3, 8.5e-3)


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the benchmark.

    Attributes:
        seeds: Number of seeds.
        lams: Values of λ.
        schema: Feature schema.
        iterations: Of each training; default: those of `PPOSettings`.
    """

    seeds: int = 10
    lams: tuple[float, ...] = LAMS
    schema: str = "agg+"
    iterations: int | None = None
    kept: Path = Path("runs/robustness")


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


@cache
def _tables(settings: Settings, split: str) -> DecisionTables:
    return decision_tables(compile_store(settings.rollouts), split, schema=settings.schema)


@cache
def _validation(settings: Settings) -> Validation:
    trees = compile_store(settings.rollouts)
    return Validation(lambda i: decision_tables(trees, schema=settings.schema, indices=i), trees)


def train_cell(task: tuple[float, int], settings: Settings) -> Cell:
    """Train one router."""
    lam, seed = task
    train, test, whole = (_tables(settings, split) for split in ("train", "test", "validation"))
    ppo = PPOSettings() if settings.iterations is None else replace(PPOSettings(), iterations=settings.iterations)
    begin = time.perf_counter()
    result = Training(train, _validation(settings), lam, ppo, seed).run()
    seconds = time.perf_counter() - begin
    router = at(result.router, lam)
    verdict = result.health[lam].verdict
    return Cell(lam, seed, run(router, test), run(router, whole), verdict, result.attempts, seconds)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the tables."""
    test, validation = (_tables(settings, split) for split in ("test", "validation"))
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
            f"{shown(each)} | {min(seeds):+.4f} to {max(seeds):+.4f} | HOLM | {_counts(verdicts)} | "
            f"{sum(cell.attempts > 1 for cell in own)} | {_oracle(test, both, lam)} |"
        )
    corrected = holm([each.p_value for _, each in paired])
    rows = [row.replace("HOLM", f"{p:.3g}") for row, p in zip(rows, corrected, strict=True)]
    overall = np.mean([gains for gains, _ in paired], axis=0)
    total = paired_means(overall, np.zeros(len(overall)), weights)
    options = f" --seeds {settings.seeds}" if settings.seeds != Settings.seeds else ""
    options += f" --schema {settings.schema}" if settings.schema != Settings.schema else ""
    seconds = [cell.seconds for cell in cells]
    return "\n".join([
        *heading("Robustness of TRIM-Agg", f"robustness{options}"),
        f"{len(seconds)} trainings ({settings.seeds} seeds, {len(settings.lams)} λ, schema {settings.schema}), "
        f"{np.median(seconds):.1f} s each in the median with {settings.processes} side by side. Test split of "
        f"`{settings.rollouts}`; costs in % of always-large's tokens. Thresholds are chosen on all of validation; the "
        "verdicts are those that the trainings gave themselves on their half of validation.",
        "",
        "| λ | threshold | TRIM-Thr: accuracy, cost | TRIM-Agg: accuracy, cost |"
        " return difference [95 %] | over seeds | p (Holm) | verdicts | needed remedies | oracle: accuracy, cost |",
        "|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
        *rows,
        "",
        f"Mean over the λ of the return difference: **{shown(total)}**.",
        "",
        *_curves(settings, cells, both, candidates, test, validation, weights),
        "",
    ])  # fmt: skip


def _point(outcomes: Outcomes, both: References) -> str:
    return f"{100 * outcomes.correct.mean():.1f} %, {100 * outcomes.cost.sum() / both.large.cost.sum():.1f} %"


def _oracle(test: DecisionTables, both: References, lam: float) -> str:
    return _point(tree_oracle(test, lam), both)


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
    ]
    rows = []
    for target in CPT_TARGETS:
        mark = " (by mixing with always-large)" if own.by_mixing(target) else ""
        mine, simple = (f"{100 * float(curve.cpt(target)):.1f} %" for curve in (own, other))
        change = shown(compared[f"cpt_{target}_percent"], "+.1f")
        rows.append([f"CPT({target} %)", f"{mine}{mark}", simple, change])
    ibc = [f"{float(curve.delta_ibc()):.2f}" for curve in (own, other)]
    rows.append(["ΔIBC", *ibc, f"{shown(compared['delta_ibc'])} (absolute)"])
    head = ["", "TRIM-Agg", "TRIM-Thr", "difference, % of TRIM-Thr's [95 %]"]
    said = difference(("TRIM-Agg", "TRIM-Thr"), agg, thr, both, weights)
    return [*lines, *table(head, rows), "", said]


def main() -> None:
    """Run the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    kind = f"{settings.schema}-{settings.iterations or 'default'}"
    tasks = {f"{kind}-{lam:g}-{seed}": (lam, seed) for seed, lam in product(range(settings.seeds), settings.lams)}
    cells = all_kept(train_cell, tasks, settings)
    write(report(settings, sorted(cells, key=lambda cell: (cell.lam, cell.seed))), settings.out)


if __name__ == "__main__":
    main()
