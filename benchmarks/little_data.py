"""How many problems does a router need? Learning curves on the bundled rollouts.

    python -m benchmarks.little_data --out results/little_data

For each size, some training problems are drawn and a fifth as many validation problems (20 at least), for choosing
thresholds and restarts; every method is fitted on them as `train.py` would, and evaluated on the test split. The
figure of merit is the mean return over four λ.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from benchmarks.methods import LAMS, METHODS, Data, Fitted, best_constant, fit, heading, returns, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        sizes: Numbers of training problems.
        seeds: Draws of each size.
        methods: Which routers.
        rollouts: The store.
        processes: Fits side by side.
        out: Folder for report and picture; default: print only.
    """

    sizes: tuple[int, ...] = (50, 150, 500, 2000)
    seeds: int = 3
    methods: tuple[str, ...] = tuple(METHODS)
    rollouts: str = "quickstart"
    processes: int = 2
    out: Path | None = None


@dataclass(frozen=True)
class Cell:
    """One fit: mean test return over the λ, processor time for all of them, or why there is none."""

    method: str
    size: int
    value: float
    seconds: float
    refused: str = ""


def measure(task: tuple[str, int, int, str]) -> Cell:
    """Fit one method on one draw."""
    method, size, seed, rollouts = task
    trees = compile_store(rollouts)
    found = fit(method, Data.of(trees, size, seed), seed)
    if not isinstance(found, Fitted):
        return Cell(method, size, float("nan"), 0.0, found)
    return Cell(method, size, float(returns(found, decision_tables(trees, "test")).mean()), found.seconds)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the tables."""
    test = decision_tables(settings.rollouts, "test")
    lines = heading("How many training problems?", "little_data")
    lines += [
        f"Mean test return over λ = {', '.join(f'{lam:g}' for lam in LAMS)}; mean and range of {settings.seeds} draws "
        "of problems (with all problems: of seeds). Validation problems: a fifth as many, 20 at least. The better "
        f"constant for each λ: {best_constant(test):.4f}.",
        "",
        "| training problems | " + " | ".join(settings.methods) + " |",
        "|---:|" + "---:|" * len(settings.methods),
    ]
    for size in settings.sizes:
        row = []
        for method in settings.methods:
            own = [cell for cell in cells if (cell.method, cell.size) == (method, size)]
            good = [cell.value for cell in own if not cell.refused]
            text = f"{np.mean(good):.4f} ({min(good):.4f} to {max(good):.4f})" if good else "-"
            row.append(text + (f", {len(own) - len(good)} of {len(own)} refused" if len(good) < len(own) else ""))
        lines.append(f"| {size:,} | " + " | ".join(row) + " |")
    lines += ["", "Processor time of fitting all four λ, seconds:", ""]
    for method in settings.methods:
        taken = [cell.seconds for cell in cells if cell.method == method and not cell.refused]
        lines.append(f"- {method}: {np.median(taken):.1f}" if taken else f"- {method}: never fitted")
    lines += [f"- refused: {message}" for message in sorted({cell.refused for cell in cells if cell.refused})]
    return "\n".join([*lines, ""])


def draw(settings: Settings, cells: list[Cell], path: Path) -> None:
    """Draw the learning curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in settings.methods:
        groups = [[c.value for c in cells if (c.method, c.size) == (method, size)] for size in settings.sizes]
        middle = [float(np.nanmean(group)) for group in groups]  # of those that were not refused
        (line,) = axes.plot(settings.sizes, middle, marker="o", label=method)
        lows, highs = [np.nanmin(group) for group in groups], [np.nanmax(group) for group in groups]
        axes.fill_between(settings.sizes, lows, highs, alpha=0.15, color=line.get_color())
    axes.axhline(best_constant(decision_tables(settings.rollouts, "test")), color="grey", ls=":", label="best constant")
    axes.set(xscale="log", xlabel="training problems", ylabel="mean test return over four λ")
    axes.set_xticks(settings.sizes, [f"{size:,}" for size in settings.sizes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    from rich.progress import track

    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    tasks = [
        (method, size, seed, settings.rollouts)
        for size, seed, method in product(settings.sizes, range(settings.seeds), settings.methods)
    ]
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        cells = list(track(pool.imap_unordered(measure, tasks), "fitting", total=len(tasks)))
    write(report(settings, cells), settings.out and settings.out.with_suffix(".md"))
    if settings.out:
        draw(settings, cells, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
