"""Are budgets and targets met? Calibrated routers on problems that they were not calibrated on, over resamplings.

    python -m benchmarks.calibration --out results/calibration

Routers are trained on one half of the training problems, checkpoints chosen on one half of validation; the other
halves are the pool, and test is not touched. The pool is shuffled and cut into parts of 200 problems: each part is
once the one that the setting is chosen on, the next states the interval, as `train.py --budget` and `--accuracy` do,
and the others are new problems. That every part is chosen on equally often matters: with draws of their own, one lucky
draw of the choosing problems moves all methods and budgets the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.budgets import BUDGETS, LEVEL, SETTINGS, falling_costs, operating_points, reached
from agents.evaluation.curves import References
from agents.evaluation.outcomes import Outcomes, mix
from agents.evaluation.plots import COLOURS
from agents.evaluation.splits import halves, thresholds
from agents.evaluation.walk import references, run
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.settings import PPOSettings
from agents.routers.base import AnyRouter, Constant, Mixture, Threshold
from agents.routers.budgets import LamCosts, calibrate
from agents.routers.mlp import ConditionedMLP
from benchmarks.methods import RANGE, Data
from benchmarks.study import heading, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

PART = 200
Index = NDArray[np.int64]
Found = list[tuple[AnyRouter, Outcomes]]
Choose = Callable[[Index, str, float], Outcomes | None]
"""From the problems that choose, the kind of target and its value to what the choice comes to on the whole pool; None
where the method does not offer it."""


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        budgets: Shares of always-large's cost.
        accuracies: Accuracies.
        shuffles: How often the pool is shuffled and cut.
        rollouts: The store.
        out: Report and picture, without suffix; default: print only.
    """

    budgets: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    accuracies: tuple[float, ...] = (0.6, 0.7, 0.75)
    shuffles: int = 20
    rollouts: str = "quickstart"
    out: Path | None = None


@dataclass(frozen=True)
class Trial:
    """One calibration: what was realised on all new problems, and in how many new parts the interval held it."""

    method: str
    target: str
    value: float
    realised: float
    covered: int
    parts: int


class Pool:
    """The problems that routers were not fitted on, with the outcomes of all of their settings."""

    def __init__(self, rollouts: str) -> None:
        """Fit the routers and run them."""
        trees = compile_store(rollouts)
        data = Data.of(trees)
        problems = np.random.default_rng(0).permutation(np.unique(trees.problem[data.train]))
        fitted = np.isin(trees.problem[data.train], problems[: len(problems) // 2])
        train = data.train[fitted]
        indices = np.concatenate([data.train[~fitted], halves(trees)[1]])
        self.tables: DecisionTables = decision_tables(trees, indices=indices)
        self.references = references(self.tables)
        trained = Training(decision_tables(trees, indices=train), data.validation, RANGE, PPOSettings(), 0).run().router
        assert isinstance(trained, ConditionedMLP)
        self.policy = trained
        plans = estimate(trees, indices=train).routers(np.geomspace(1e-5, 0.1, SETTINGS))
        self.methods: dict[str, Choose] = {
            "TRIM-Thr": self._mixing([Threshold(level) for level in thresholds(self.tables)]),
            "TRIM-POMDP": self._mixing(plans),
            "TRIM-Agg": self._mixing([trained.at(float(lam)) for lam in np.geomspace(*RANGE, SETTINGS)]),
            "TRIM-Agg, λ looked up": self._looked_up(np.geomspace(*RANGE, BUDGETS)),
        }

    def part(self, index: Index) -> References:
        """Return the references on some problems."""
        return References(self.references.small.take(index), self.references.large.take(index))

    def _mixing(self, routers: list[AnyRouter]) -> Choose:
        """Choose a setting or a mixture of two, as `train.py` does."""
        found: Found = [(each, run(each, self.tables)) for each in (Constant(0), Constant(1), *routers)]
        by_router = {id(router): outcomes for router, outcomes in found}

        def choose(index: Index, target: str, value: float) -> Outcomes:
            choices = operating_points([(each, outcomes.take(index)) for each, outcomes in found], self.part(index))
            chosen = calibrate(choices, **{target: value})
            if isinstance(chosen, Mixture):
                return mix(by_router[id(chosen.first)], by_router[id(chosen.second)], chosen.share)
            return by_router[id(chosen)]

        return choose

    def _looked_up(self, lams: NDArray[np.float64]) -> Choose:
        """Look λ up in what the policy's artefact says of its costs, as a deployed policy does."""
        found = [run(self.policy.at(float(lam)), self.tables) for lam in lams]

        def choose(index: Index, target: str, value: float) -> Outcomes | None:
            costs = LamCosts(falling_costs(lams, [each.take(index) for each in found], self.part(index)))
            if target != "budget" or value < costs.shares[0]:
                return None
            return run(self.policy.at(costs.lam(value, "the policy")), self.tables)

        return choose


def trials(settings: Settings) -> list[Trial]:
    """Return all calibrations."""
    pool = Pool(settings.rollouts)
    wanted = [("budget", value) for value in settings.budgets] + [("accuracy", value) for value in settings.accuracies]
    result = []
    for shuffle in range(settings.shuffles):
        order = np.random.default_rng(shuffle).permutation(len(pool.references.small))
        parts = np.split(order[: len(order) // PART * PART], len(order) // PART)
        for number, choice in enumerate(parts):
            verdict, *new = [*parts[number + 1 :], *parts[:number]]
            for method, choose in pool.methods.items():
                for target, value in wanted:
                    if outcomes := choose(choice, target, value):
                        result.append(_trial(pool, (method, target, value), outcomes, verdict, new))
    counts = Counter((each.method, each.target, each.value) for each in result)
    most = max(counts.values())  # a budget that is below the range of some calibrations is left out
    return [each for each in result if counts[each.method, each.target, each.value] == most]


def _trial(pool: Pool, named: tuple[str, str, float], outcomes: Outcomes, verdict: Index, new: list[Index]) -> Trial:
    stated = reached(outcomes.take(verdict), pool.part(verdict))[named[1] == "accuracy"]

    def realised(index: Index) -> float:
        if named[1] == "accuracy":
            return float(outcomes.correct[index].mean())
        return float(outcomes.cost[index].sum() / pool.references.large.cost[index].sum())

    covered = sum(stated.low <= realised(part) <= stated.high for part in new)
    return Trial(*named, realised(np.concatenate(new)), covered, len(new))


def report(settings: Settings, found: list[Trial]) -> str:
    """Return the table."""
    lines = heading("Are budgets and targets met?", "calibration")
    count = settings.shuffles * (found[0].parts + 2)
    new = found[0].parts * PART
    lines += [
        f"{count} calibrations of each method, each on {PART} problems that it was not fitted on, every one equally "
        f"often. Realised: on {new:,} new problems. Median error: of realised / target - 1, with its sign. Typical "
        f"error: the median without the sign. Covered: how often the stated interval of {100 * LEVEL:.0f} %, from "
        f"{PART} other problems, held what was realised on a set of {PART} new ones ({found[0].parts} sets for each). "
        "Rows share their draws of problems, so that their errors and coverages go up and down together.",
        "",
    ]
    rows = []
    for method, target, value in dict.fromkeys((each.method, each.target, each.value) for each in found):
        own = [each for each in found if (each.method, each.target, each.value) == (method, target, value)]
        realised = np.array([each.realised for each in own])
        error = 100 * (realised / value - 1)
        covered = sum(each.covered for each in own) / sum(each.parts for each in own)
        span = f"{100 * np.median(realised):.1f} % ({100 * realised.min():.1f} to {100 * realised.max():.1f})"
        errors = [f"{np.median(error):+.1f} %", f"{np.median(np.abs(error)):.1f} %"]
        rows.append([method, f"{target} {100 * value:g} %", span, *errors, f"{100 * covered:.0f} %"])
    head = ["method", "target", "realised, median (least to greatest)", "median error", "typical error", "covered"]
    return "\n".join([*lines, *table(head, rows), ""])


def draw(settings: Settings, found: list[Trial], path: Path) -> None:
    """Draw what was realised, relative to the targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    wanted = [("budget", value) for value in settings.budgets] + [("accuracy", value) for value in settings.accuracies]
    axes = figure.subplots()
    methods = list(dict.fromkeys(each.method for each in found))
    drawn: set[str] = set()
    for number, method in enumerate(methods):
        for place, (target, value) in enumerate(wanted):
            own = [each.realised for each in found if (each.method, each.target, each.value) == (method, target, value)]
            if own:
                x = place + 0.2 * (number - (len(methods) - 1) / 2)
                label = f"_{method}" if method in drawn else method
                drawn.add(method)
                heights = np.array(own) / value
                axes.plot(
                    x + np.linspace(-0.07, 0.07, len(own)), heights, ".", ms=3, color=COLOURS[number], label=label
                )
                axes.plot([x - 0.09, x + 0.09], [np.median(heights)] * 2, lw=2.5, color="black", zorder=3)
    axes.axhline(1, color="grey", lw=1, zorder=0)
    axes.set_xticks(range(len(wanted)), [f"{target}\n{100 * value:g} %" for target, value in wanted])
    axes.set_ylabel("realised / target (black: medians)")
    axes.legend(markerscale=3)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    found = trials(settings)
    write(report(settings, found), settings.out)
    if settings.out:
        draw(settings, found, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
