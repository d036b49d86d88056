"""All routers side by side, each with 16 operating points that validation chose: curves, low budgets, training time.

    python -m benchmarks.routers --out results/routers

Learned routers are one policy for a range of λ; outcomes are averaged over the seeds, problem by problem. Differences
are paired on the test problems. The best router is named by validation, not by the test. How much another training
seed changes is said as well.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.bootstrap import estimate as interval
from agents.evaluation.bootstrap import paired_curves, resample_weights
from agents.evaluation.budgets import SETTINGS
from agents.evaluation.curves import Curve, Method, Points, References
from agents.evaluation.splits import spread, thresholds
from agents.evaluation.walk import references, run
from agents.learners.exact import fit as fit_exact
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers.base import AnyRouter, Threshold
from agents.routers.mlp import ConditionedMLP
from benchmarks.methods import RANGE, Data, heading, write
from benchmarks.robustness import average
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

LOW = np.array([0.025, 0.05, 0.075, 0.1])
CPTS = (50, 80, 95)
LEARNED = ("ppo-agg", "exact")
METHODS = ("threshold", "pomdp", *LEARNED)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        seeds: Trainings of each learned router.
        rollouts: The store.
        processes: Trainings side by side.
        out: Report, without suffix; default: print only.
    """

    seeds: int = 5
    rollouts: str = "quickstart"
    processes: int = 2
    out: Path | None = None


@dataclass(frozen=True)
class Cell:
    """One router: operating points on validation and on test, and the processor time to get it."""

    method: str
    validation: Points
    test: Points
    seconds: float


def fit(method: str, data: Data, seed: int) -> dict[float, AnyRouter]:
    """Return all settings of a router, by knob."""
    if method == "threshold":
        return {level: Threshold(level) for level in thresholds(decision_tables(data.trees, "validation"))}
    if method == "pomdp":
        lams = np.geomspace(1e-5, 0.1, SETTINGS).tolist()
        return dict(zip(lams, estimate(data.trees, indices=data.train).routers(lams), strict=True))
    if method == "exact":
        lams = np.geomspace(*RANGE, 5).tolist()
        policy = fit_exact(data.tables(), data.validation.choice, lams, ExactSettings(), seed).router(RANGE)
    else:
        policy = Training(data.tables(), data.validation, RANGE, PPOSettings(), seed).run().router
    assert isinstance(policy, ConditionedMLP)
    return {lam: policy.at(lam) for lam in np.geomspace(*RANGE, SETTINGS).tolist()}


def measure(task: tuple[str, int, str]) -> Cell:
    """Fit one router and run it where validation puts its operating points."""
    method, seed, rollouts = task
    trees = compile_store(rollouts)
    data = Data.of(trees)
    begin = time.process_time()
    settings = fit(method, data, seed)
    seconds = time.process_time() - begin
    validation, test = (decision_tables(trees, split) for split in ("validation", "test"))
    candidates = [(knob, run(router, validation)) for knob, router in settings.items()]
    chosen = spread(candidates, references(validation).large)
    return Cell(method, chosen, [(knob, run(settings[knob], test)) for knob, _ in chosen], seconds)


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
        "| router | " + " | ".join(f"CPT({x} %)" for x in CPTS) + " | ΔIBC | "
        + " | ".join(f"accuracy at {100 * c:g} %" for c in LOW) + " | seconds |",
        "|---|" + "---:|" * (len(CPTS) + len(LOW) + 2),
    ]  # fmt: skip
    for method, own in by_method.items():
        curve = Curve.of(points[method], both)
        row = [f"{100 * float(curve.cpt(x)):.1f}" for x in CPTS]
        row += [f"{float(curve.delta_ibc()):.2f}", *(f"{100 * float(a):.1f}" for a in curve.accuracy_at(LOW))]
        lines.append(f"| `{method}` | {' | '.join(row)} | {np.median([cell.seconds for cell in own]):.1f} |")
    lines += ["", *_over_seeds(by_method, both, choosing)]
    best = _best_on_validation(by_method, choosing)
    lines += ["", f"Named best on validation, by CPT(80 %): `{best}`. Paired differences of CPT in %, 95 %:", ""]
    for method in METHODS:
        if method != best:
            found = paired_curves(points[best], points[method], both, weights)
            cpts = [(x, found[f"cpt_{x}_percent"]) for x in CPTS]
            cells_ = [f"CPT({x} %) {d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]" for x, d in cpts]
            lines.append(f"- `{best}` against `{method}`: {'; '.join(cells_)}")
    lines += ["", "Accuracy of `pomdp` minus that of the others at low budgets, points, 95 %, paired:", ""]
    for method in METHODS:
        if method != "pomdp":
            lines.append(f"- `{method}`: {_low(points['pomdp'], points[method], both, weights)}")
    return "\n".join([*lines, ""])


def _over_seeds(by_method: dict[str, list[Cell]], both: References, choosing: References) -> list[str]:
    """Return a table of what single trainings come to."""
    lines = ["One training each: mean and standard deviation over the seeds, least to greatest.", ""]
    lines += ["| router | CPT(80 %), one training | accuracy at 10 %, one training |", "|---|---:|---:|"]
    for method in LEARNED:
        curves = [Curve.of(combined([cell], choosing), both) for cell in by_method[method]]
        values = 100 * np.array([[float(curve.cpt(80)), float(curve.accuracy_at(LOW)[-1])] for curve in curves]).T
        cells = [
            f"{each.mean():.1f} ± {each.std(ddof=1):.1f} ({each.min():.1f} to {each.max():.1f})" for each in values
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


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
    return "; ".join(
        f"at {100 * c:g} %: {d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]" for c, d in zip(LOW, found, strict=True)
    )


def main() -> None:
    """Run the benchmark."""
    from rich.progress import track

    settings = tyro.cli(Settings, description=__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what is spawned: more threads only wait for each other
    compile_store(settings.rollouts)
    tasks = [(m, seed, settings.rollouts) for m in METHODS for seed in range(settings.seeds if m in LEARNED else 1)]
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        cells = list(track(pool.imap(measure, tasks), "fitting", total=len(tasks)))
    write(report(settings, cells), settings.out and settings.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
