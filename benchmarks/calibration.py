"""Are budgets kept? Calibrated routers on problems that they were not calibrated on, over resamplings.

    python -m benchmarks.calibration --out results/calibration

The problems of validation and test are pooled and drawn anew each time: 200 to choose the setting on, 200 that the
interval is stated from, as `train.py --budget` does, and 1,000 on which the share is realised. Routers are trained
once, on the training split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.budgets import LEVEL, SETTINGS, measure, reached
from agents.evaluation.curves import References
from agents.evaluation.outcomes import Outcomes, mix
from agents.evaluation.splits import thresholds
from agents.evaluation.walk import references, run
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.settings import PPOSettings
from agents.routers.base import AnyRouter, Constant, Mixture, Threshold
from agents.routers.budgets import calibrate
from agents.routers.mlp import ConditionedMLP
from benchmarks.methods import RANGE, Data, heading, write
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

WANTED_ERROR = {0.05: 0.10, 0.10: 0.10, 0.20: 0.06, 0.40: 0.06}


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        budgets: Shares of always-large's cost.
        resamplings: How often problems are drawn.
        rollouts: The store.
        out: Report and picture, without suffix; default: print only.
    """

    budgets: tuple[float, ...] = tuple(WANTED_ERROR)
    resamplings: int = 20
    rollouts: str = "quickstart"
    out: Path | None = None


@dataclass(frozen=True)
class Trial:
    """One calibration: what was realised on new problems, relative to the budget, and whether it was covered."""

    method: str
    budget: float
    realised: float
    covered: bool


def settings_of(trees: Trees, tables: DecisionTables) -> dict[str, list[AnyRouter]]:
    """Return all settings of each method."""
    data = Data.of(trees)
    lams = np.geomspace(1e-5, 0.1, SETTINGS)
    trained = Training(data.tables(), data.validation, RANGE, PPOSettings(), 0).run().router
    assert isinstance(trained, ConditionedMLP)
    return {
        "TRIM-Thr": [Threshold(level) for level in thresholds(tables)],
        "TRIM-Agg, λ range": [trained.at(float(lam)) for lam in np.geomspace(*RANGE, SETTINGS)],
        "TRIM-POMDP": list(estimate(trees, indices=data.train).routers(lams)),
    }


def trial(
    method: str, found: list[tuple[AnyRouter, Outcomes]], both: References, budget: float, order: NDArray[np.int64]
) -> Trial:
    """Calibrate on 200 problems, state the interval from 200 others, realise on the rest."""
    choice, verdict, new = np.split(order, [200, 400])
    by_router = {id(router): outcomes for router, outcomes in found}

    def part(index: NDArray[np.int64]) -> References:
        return References(both.small.take(index), both.large.take(index))

    chosen = calibrate([measure(r, o.take(choice), part(choice)) for r, o in found], budget=budget)
    if isinstance(chosen, Mixture):
        outcomes = mix(by_router[id(chosen.first)], by_router[id(chosen.second)], chosen.share)
    else:
        outcomes = by_router[id(chosen)]
    stated, _ = reached(outcomes.take(verdict), part(verdict))
    realised = float(outcomes.cost[new].sum() / both.large.cost[new].sum())
    return Trial(method, budget, realised, stated.low <= realised <= stated.high)


def trials(settings: Settings) -> list[Trial]:
    """Return all calibrations."""
    trees = compile_store(settings.rollouts)
    indices = np.concatenate([trees.select("validation"), trees.select("test")])
    pool = decision_tables(trees, indices=indices)
    both = references(pool)
    constants: list[AnyRouter] = [Constant(0), Constant(1)]
    result = []
    for method, routers in settings_of(trees, pool).items():
        found = [(router, run(router, pool)) for router in (*constants, *routers)]
        for number in range(settings.resamplings):
            order = np.random.default_rng(number).permutation(len(both.small))
            result += [trial(method, found, both, budget, order) for budget in settings.budgets]
    return result


def report(settings: Settings, found: list[Trial]) -> str:
    """Return the table."""
    lines = heading("Are budgets kept?", "calibration")
    lines += [
        f"{settings.resamplings} resamplings. Covered: how often the stated {100 * LEVEL:.0f} % interval held the "
        "share realised on 1,000 new problems. Error: median of |realised / budget - 1|.",
        "",
        "| method | budget | realised, median (least to greatest) | error | covered |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(each.method for each in found):
        for budget in settings.budgets:
            own = [each for each in found if (each.method, each.budget) == (method, budget)]
            shares = np.array([each.realised for each in own])
            error = np.median(np.abs(shares / budget - 1))
            lines.append(
                f"| {method} | {100 * budget:g} % | {100 * np.median(shares):.1f} % ({100 * shares.min():.1f} to "
                f"{100 * shares.max():.1f}) | {100 * error:.1f} % | {sum(e.covered for e in own)} of {len(own)} |"
            )
    return "\n".join([*lines, ""])


def draw(settings: Settings, found: list[Trial], path: Path) -> None:
    """Draw realised shares against budgets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(each.method for each in found))
    for number, method in enumerate(methods):
        for place, budget in enumerate(settings.budgets):
            own = [e for e in found if (e.method, e.budget) == (method, budget)]
            x = place + 0.22 * (number - 1) + np.linspace(-0.06, 0.06, len(own))
            for covered, mark in ((True, "o"), (False, "x")):
                chosen = np.array([e.covered == covered for e in own])
                heights = np.array([e.realised / budget for e in own])
                axes.plot(x[chosen], heights[chosen], mark, ms=4, color=f"C{number}",
                          label=method if covered and place == 0 else None)  # fmt: skip
    axes.axhline(1, color="grey", ls=":")
    axes.set_xticks(range(len(settings.budgets)), [f"{100 * budget:g} %" for budget in settings.budgets])
    axes.set(xlabel="budget", ylabel="realised share / budget (x: outside its interval)")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    found = trials(settings)
    write(report(settings, found), settings.out and settings.out.with_suffix(".md"))
    if settings.out:
        draw(settings, found, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
