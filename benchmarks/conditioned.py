"""One policy for every λ, or one for each? Areas under the curves, and training times, on the bundled rollouts.

    python -m benchmarks.conditioned --out results/conditioned

For each seed: one TRIM-Agg for a range of λ, and eight trained separately. Both have operating points at the same eight
λ; of the first also 16 that were spread over the cost on validation. The area is that under the cost-accuracy curve on
test between c = 0 and 0.6 (divided by 0.6: a mean accuracy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import estimate, paired_means, resample_weights
from agents.evaluation.budgets import SETTINGS
from agents.evaluation.curves import Curve, Method, Points, References
from agents.evaluation.outcomes import Floats
from agents.evaluation.splits import spread
from agents.evaluation.walk import references, run
from agents.routers.base import AnyRouter
from benchmarks.methods import METHODS, RANGE, Data
from benchmarks.robustness import LAMS
from benchmarks.study import Study, all_kept, average, heading, shown, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

MOST = 0.6
GRID = np.linspace(0, MOST, 121)


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the study.

    Attributes:
        seeds: Number of seeds.
        lams: λ of the separate trainings.
    """

    seeds: int = 5
    lams: tuple[float, ...] = LAMS
    kept: Path = Path("runs/conditioned")


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


def measure(task: tuple[int, tuple[float, ...]], settings: Settings) -> Cell:
    """Train both for one seed."""
    seed, lams = task
    trees = compile_store(settings.rollouts)
    data, test, validation = Data.of(trees), decision_tables(trees, "test"), decision_tables(trees, "validation")
    tried = np.geomspace(*RANGE, SETTINGS).tolist()
    one, separate = METHODS["TRIM-Agg, λ range"](data, seed, [*lams, *tried]), METHODS["TRIM-Agg"](data, seed, lams)
    candidates = [(lam, run(one.routers[lam], validation)) for lam in tried]
    chosen = [lam for lam, _ in spread(candidates, references(validation).large)]

    def both(routers: Sequence[AnyRouter]) -> Both:
        first, second = ([(each.knob.value, run(each, split)) for each in routers] for split in (validation, test))
        return first, second

    same, spread_out = ([one.routers[lam] for lam in each] for each in (lams, chosen))
    return Cell(both([*separate.routers.values()]), both(same), both(spread_out), separate.seconds, one.seconds)


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
    ]
    rows = []
    for seed, cell in enumerate(cells):
        methods = [_mean([cell], name, choosing) for name in ("separate", "same", "spread")]
        areas = [f"{float(area(method, both)):.4f}" for method in methods]
        rows.append([f"{seed}", *areas, f"{cell.separate_seconds:.0f}", f"{cell.one_seconds:.0f}"])
    curves = ["eight separate", "one, same λ", "one, 16 spread points"]
    share = sum(cell.one_seconds for cell in cells) / sum(cell.separate_seconds for cell in cells)
    per_lam = [
        f"{lam:g}: {shown(paired_means(own.returns(lam), other.returns(lam), weights))}"
        for (lam, own), (_, other) in zip(same.points, separate.points, strict=True)
    ]
    lines += [
        *table(["seed", *curves, "seconds: separate", "seconds: one"], rows, left=0),
        "",
        f"Area of one policy minus that of eight, outcomes averaged over the seeds, same λ: {shown(gain)} (95 %, "
        f"paired). Processor time of the one: {100 * share:.0f} % of that of the eight.",
        "",
        "Differences in test return at each λ: " + "; ".join(per_lam) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    lams = "-".join(f"{lam:g}" for lam in settings.lams)
    cells = all_kept(measure, {f"{seed}-{lams}": (seed, settings.lams) for seed in range(settings.seeds)}, settings)
    write(report(settings, cells), settings.out)


if __name__ == "__main__":
    main()
