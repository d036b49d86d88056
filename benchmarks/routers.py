"""All routers side by side, each with 16 operating points that validation chose: curves, low budgets, training time.

    python -m benchmarks.routers --out results/routers

Learned routers are one policy for a range of λ; outcomes are averaged over the seeds, problem by problem. Differences
are paired on the test problems. The best router is named by validation, not by the test. How much another training
seed changes is said as well.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.bootstrap import estimate as interval
from agents.evaluation.bootstrap import paired_curves, resample_weights
from agents.evaluation.curves import CPT_TARGETS, Curve, Method, Points, References
from agents.evaluation.splits import spread
from agents.evaluation.walk import references, run
from benchmarks.methods import Data
from benchmarks.rivals import RIVALS
from benchmarks.study import CURVE, Study, all_kept, average, heading, shown, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

LOW = np.array([0.025, 0.05, 0.075, 0.1])
LEARNED = ("ppo-agg", "exact")
METHODS = {"threshold": "TRIM-Thr (RSD)", "pomdp": "TRIM-POMDP", "ppo-agg": "TRIM-Agg", "exact": "exact"}
"""As `train.py --agent` has them, and in `RIVALS`."""


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the benchmark.

    Attributes:
        seeds: Trainings of each learned router.
    """

    seeds: int = 5
    kept: Path = Path("runs/routers")


@dataclass(frozen=True)
class Cell:
    """One router: operating points on validation and on test, and the processor time to get it."""

    method: str
    validation: Points
    test: Points
    seconds: float


def measure(task: tuple[str, int], settings: Settings) -> Cell:
    """Fit one router and run it where validation puts its operating points."""
    method, seed = task
    trees = compile_store(settings.rollouts)
    data = Data.of(trees)
    begin = time.process_time()
    routers = RIVALS[METHODS[method]].settings(data, seed)
    seconds = time.process_time() - begin
    validation, test = (decision_tables(trees, split) for split in ("validation", "test"))
    chosen = spread([(each, run(each, validation)) for each in routers], references(validation).large)
    on_validation, on_test = [[(each.knob.value, own) for each, own in chosen],
                              [(each.knob.value, run(each, test)) for each, _ in chosen]]  # fmt: skip
    return Cell(method, on_validation, on_test, seconds)


def combined(cells: list[Cell], choosing: References, which: str = "test") -> Method:
    """Return the points of several seeds, the i-th of each averaged, on the hull that validation chooses."""

    def mean(several: list[Points]) -> Points:
        return [(own[0][0], average([outcomes for _, outcomes in own])) for own in zip(*several, strict=False)]

    validation = mean([cell.validation for cell in cells])
    return Method.chosen(mean([getattr(cell, which) for cell in cells]), validation, choosing)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the tables."""
    tables: dict[str, DecisionTables] = {s: decision_tables(settings.rollouts, s) for s in ("validation", "test")}
    both, choosing = references(tables["test"]), references(tables["validation"])
    weights = resample_weights(len(both.small))
    by_method = {method: [cell for cell in cells if cell.method == method] for method in METHODS}
    points = {method: combined(own, choosing) for method, own in by_method.items()}
    lines = heading("All routers side by side", "routers")
    lines += [
        f"Test split of `{settings.rollouts}`; learned routers: {settings.seeds} seeds. Costs in % of always-large's "
        "tokens; seconds of processor time (one thread) for all operating points together.",
        "",
    ]
    rows = []
    for method, own in by_method.items():
        curve = Curve.of(points[method], both)
        row = [f"`{method}`", *(f"{100 * float(curve.cpt(x)):.1f}" for x in CPT_TARGETS)]
        row += [f"{float(curve.delta_ibc()):.2f}", *(f"{100 * float(a):.1f}" for a in curve.accuracy_at(LOW))]
        rows.append([*row, f"{np.median([cell.seconds for cell in own]):.1f}"])
    lines += table(["router", *CURVE, *(f"accuracy at {100 * c:g} %" for c in LOW), "seconds"], rows)
    lines += ["", *_over_seeds(by_method, both, choosing)]
    best = _best_on_validation(by_method, choosing)
    lines += ["", f"Named best on validation, by CPT(80 %): `{best}`. Paired differences of CPT in %, 95 %:", ""]
    for method in METHODS:
        if method != best:
            found = paired_curves(points[best], points[method], both, weights)
            cpts = (f"CPT({x} %) {shown(found[f'cpt_{x}_percent'], '+.1f')}" for x in CPT_TARGETS)
            lines.append(f"- `{best}` against `{method}`: {'; '.join(cpts)}")
    lines += ["", "Accuracy of `pomdp` minus that of the others at low budgets, points, 95 %, paired:", ""]
    for method in METHODS:
        if method != "pomdp":
            lines.append(f"- `{method}`: {_low(points['pomdp'], points[method], both, weights)}")
    return "\n".join([*lines, ""])


def _over_seeds(by_method: dict[str, list[Cell]], both: References, choosing: References) -> list[str]:
    """Return a table of what single trainings come to."""
    lines = ["One training each: mean and standard deviation over the seeds, least to greatest.", ""]
    rows = []
    for method in LEARNED:
        curves = [Curve.of(combined([cell], choosing), both) for cell in by_method[method]]
        values = 100 * np.array([[float(curve.cpt(80)), float(curve.accuracy_at(LOW)[-1])] for curve in curves]).T
        cells = [
            f"{each.mean():.1f} ± {each.std(ddof=1):.1f} ({each.min():.1f} to {each.max():.1f})" for each in values
        ]
        rows.append([f"`{method}`", *cells])
    return [*lines, *table(["router", "CPT(80 %), one training", "accuracy at 10 %, one training"], rows)]


def _best_on_validation(by_method: dict[str, list[Cell]], both: References) -> str:
    cost = {m: float(Curve.of(combined(own, both, "validation"), both).cpt(80)) for m, own in by_method.items()}
    return min(cost, key=cost.__getitem__)


def _low(own: Method, other: Method, both: References, weights: NDArray[np.float64]) -> str:
    def gain(chosen: NDArray[np.float64] | None) -> NDArray[np.float64]:
        one, two = (Curve.of(method, both, chosen).accuracy_at(LOW) for method in (own, other))
        change: NDArray[np.float64] = 100 * (one - two)
        return change

    value, samples = gain(None), gain(weights)
    found = [interval(value[i], samples[:, i]) for i in range(len(LOW))]
    return "; ".join(f"at {100 * c:g} %: {shown(each, '+.1f')}" for c, each in zip(LOW, found, strict=True))


def main() -> None:
    """Run the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what is spawned: more threads only wait for each other
    compile_store(settings.rollouts)
    tasks = [(method, seed) for method in METHODS for seed in range(settings.seeds if method in LEARNED else 1)]
    cells = all_kept(measure, {f"{method}-{seed}": (method, seed) for method, seed in tasks}, settings)
    write(report(settings, cells), settings.out)


if __name__ == "__main__":
    main()
