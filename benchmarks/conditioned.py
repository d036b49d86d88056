"""One policy for every λ, or one for each? Areas under the curves, and training times, on the bundled rollouts.

    python -m benchmarks.conditioned --out results/conditioned

For each seed: one TRIM-Agg for a range of λ, and eight trained separately. Both have operating points at the same eight
λ; of the first also 16 that were spread over the cost on validation. The area is that under the cost-accuracy curve on
test between c = 0 and 0.6 (divided by 0.6: a mean accuracy).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import Estimate, estimate, paired_means, resample_weights
from agents.evaluation.budgets import SETTINGS
from agents.evaluation.curves import Curve, Method, Points, References
from agents.evaluation.outcomes import Floats
from agents.evaluation.splits import spread
from agents.evaluation.walk import references, run
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings
from agents.routers.base import AnyRouter
from agents.routers.mlp import ConditionedMLP, at
from benchmarks.methods import RANGE, Data, heading, write
from benchmarks.robustness import LAMS, average
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

MOST = 0.6
GRID = np.linspace(0, MOST, 121)


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        seeds: Number of seeds.
        lams: λ of the separate trainings.
        rollouts: The store.
        processes: Seeds side by side.
        out: Report, without suffix; default: print only.
    """

    seeds: int = 5
    lams: tuple[float, ...] = LAMS
    rollouts: str = "quickstart"
    processes: int = 2
    out: Path | None = None


Both = tuple[Points, Points]
"""Operating points on validation and on test."""


@dataclass(frozen=True)
class Cell:
    """One seed: points of the three curves, and processor times of both trainings."""

    separate: Both
    same: Both
    spread: Both
    separate_seconds: float
    one_seconds: float


def measure(task: tuple[int, tuple[float, ...], str]) -> Cell:
    """Train both for one seed."""
    seed, lams, rollouts = task
    trees = compile_store(rollouts)
    data, test, validation = Data.of(trees), decision_tables(trees, "test"), decision_tables(trees, "validation")
    begin = time.process_time()
    policy = Training(data.tables(), data.validation, RANGE, PPOSettings(), seed).run().router
    one_seconds = time.process_time() - begin
    assert isinstance(policy, ConditionedMLP)
    begin = time.process_time()
    separate = [
        at(Training(data.tables(), data.validation, lam, PPOSettings(), seed).run().router, lam) for lam in lams
    ]
    separate_seconds = time.process_time() - begin
    candidates = [(lam, run(policy.at(lam), validation)) for lam in np.geomspace(*RANGE, SETTINGS).tolist()]
    chosen = [knob for knob, _ in spread(candidates, references(validation).large)]

    def both(routers: Sequence[AnyRouter]) -> Both:
        first, second = ([(each.knob.value, run(each, split)) for each in routers] for split in (validation, test))
        return first, second

    same, spread_out = ([policy.at(lam) for lam in each] for each in (lams, chosen))
    return Cell(both(separate), both(same), both(spread_out), separate_seconds, one_seconds)


def area(method: Method, both: References, weights: Floats | None = None) -> Floats:
    """Return the mean accuracy of the curve between c = 0 and 0.6, for each resample."""
    heights = Curve.of(method, both, weights).accuracy_at(GRID)
    result: Floats = np.trapezoid(heights, GRID, axis=-1) / MOST
    return result


def _mean(cells: list[Cell], name: str, choosing: References) -> Method:
    """Average the outcomes of the seeds at each λ."""
    validation, test = (
        [
            (lam, average([getattr(cell, name)[split][i][1] for cell in cells]))
            for i, (lam, _) in enumerate(getattr(cells[0], name)[split])
        ]
        for split in (0, 1)
    )
    return Method.chosen(test, validation, choosing)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the tables."""
    choosing, both = (references(decision_tables(settings.rollouts, split)) for split in ("validation", "test"))
    weights = resample_weights(len(both.small))
    separate, same = (_mean(cells, name, choosing) for name in ("separate", "same"))
    gain = estimate(area(same, both) - area(separate, both), area(same, both, weights) - area(separate, both, weights))
    lines = heading("One policy for every λ", "conditioned")
    lines += [
        f"λ = {', '.join(f'{lam:g}' for lam in settings.lams)}; range {RANGE[0]:g} to {RANGE[1]:g}; "
        f"{settings.seeds} seeds.",
        "",
        "| seed | eight separate | one, same λ | one, 16 spread points | seconds: separate | seconds: one |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for seed, cell in enumerate(cells):
        methods = [_mean([cell], name, choosing) for name in ("separate", "same", "spread")]
        areas = [f"{float(area(method, both)):.4f}" for method in methods]
        lines.append(f"| {seed} | {' | '.join(areas)} | {cell.separate_seconds:.0f} | {cell.one_seconds:.0f} |")
    share = sum(cell.one_seconds for cell in cells) / sum(cell.separate_seconds for cell in cells)
    per_lam = [
        f"{lam:g}: {_text(paired_means(own.returns(lam), other.returns(lam), weights))}"
        for (lam, own), (_, other) in zip(same.points, separate.points, strict=True)
    ]
    lines += [
        "",
        f"Area of one policy minus that of eight, outcomes averaged over the seeds, same λ: {_text(gain)} (95 %, "
        f"paired). Processor time of the one: {100 * share:.0f} % of that of the eight.",
        "",
        "Differences in test return at each λ: " + "; ".join(per_lam) + ".",
        "",
    ]
    return "\n".join(lines)


def _text(each: Estimate) -> str:
    return f"{each.value:+.4f} [{each.low:+.4f}, {each.high:+.4f}]"


def main() -> None:
    """Run the study."""
    from rich.progress import track

    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    tasks = [(seed, settings.lams, settings.rollouts) for seed in range(settings.seeds)]
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        cells = list(track(pool.imap(measure, tasks), "training", total=len(tasks)))
    write(report(settings, cells), settings.out and settings.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
