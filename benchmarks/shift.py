"""Does a router survive harder problems? Trained in distribution, tested out of distribution, on the bundled rollouts.

    python -m benchmarks.shift --out results/shift

Every method is fitted on the training split and chosen on validation; then run on test and on the split of longer
problems (``ood``). Differences to TRIM-Thr are paired on problems, over the mean of four λ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import paired_means, resample_weights
from agents.evaluation.outcomes import Floats
from benchmarks.methods import LAMS, METHODS, Data, Fitted, best_constant, fit, returns
from benchmarks.study import Study, all_kept, heading, shown, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

SPLITS = ("test", "ood")


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the study.

    Attributes:
        seeds: Trainings of each method; outcomes are averaged.
        methods: Which routers.
    """

    seeds: int = 2
    methods: tuple[str, ...] = tuple(METHODS)
    kept: Path = Path("runs/shift")


def measure(task: tuple[str, int], settings: Settings) -> tuple[str, dict[str, Floats]]:
    """Fit one method once; return the returns by problem of both splits."""
    method, seed = task
    trees = compile_store(settings.rollouts)
    found = fit(method, Data.of(trees), seed)
    assert isinstance(found, Fitted)  # the whole training split suffices for every method
    return method, {split: returns(found, decision_tables(trees, split)) for split in SPLITS}


def report(settings: Settings, found: dict[str, dict[str, Floats]]) -> str:
    """Return the table."""
    lines = heading("Harder problems than in training", "shift")
    lines += [
        f"Mean return over λ = {', '.join(f'{lam:g}' for lam in LAMS)}, mean of {settings.seeds} seeds; in brackets "
        "the paired difference to TRIM-Thr with its 95 % interval.",
        "",
    ]
    constants = [best_constant(decision_tables(settings.rollouts, split)) for split in SPLITS]
    rows = [["better constant for each λ", *(f"{value:.4f}" for value in constants)]]
    for method in settings.methods:
        row = [method]
        for split in SPLITS:
            own, simple = found[method][split], found["TRIM-Thr"][split]
            gain = paired_means(own, simple, resample_weights(len(own)))
            row.append(f"{own.mean():.4f}" + (f" ({shown(gain)})" if method != "TRIM-Thr" else ""))
        rows.append(row)
    return "\n".join([*lines, *table(["method", *SPLITS], rows), ""])


def draw(settings: Settings, found: dict[str, dict[str, Floats]], path: Path) -> None:
    """Draw the gains over TRIM-Thr, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    others = [method for method in settings.methods if method != "TRIM-Thr"]
    for number, split in enumerate(SPLITS):
        gains = []
        for method in others:
            own, simple = found[method][split], found["TRIM-Thr"][split]
            gains.append(paired_means(own, simple, resample_weights(len(own))))
        middle = np.array([each.value for each in gains])
        ends = np.abs(np.array([[each.low, each.high] for each in gains]).T - middle)
        axes.errorbar(np.arange(len(others)) + 0.15 * number, middle, ends, fmt="o", capsize=4, label=split)
    axes.axhline(0, color="grey", ls=":")
    axes.set_xticks(np.arange(len(others)) + 0.075, others, fontsize=8.5)
    axes.set_ylabel("return above TRIM-Thr")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    tasks = product(settings.methods, range(settings.seeds))
    parts = all_kept(measure, {f"{method}-{seed}": (method, seed) for method, seed in tasks}, settings)
    found = {
        method: {split: np.mean([each[split] for name, each in parts if name == method], axis=0) for split in SPLITS}
        for method in settings.methods
    }
    write(report(settings, found), settings.out)
    if settings.out:
        draw(settings, found, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
