"""How many problems does a router need? Learning curves on the bundled rollouts.

    python -m benchmarks.little_data --out results/little_data
    python -m benchmarks.little_data --minutes 4 ...       # a slice: what is fitted is kept in --kept

For each size, some training problems are drawn and a fifth as many validation problems (20 at least), for choosing
thresholds and restarts; every method is fitted on them as `train.py` would, and evaluated on the test split, or with
``--split validation`` on all validation problems on which nothing was chosen. The figure of merit is the mean return
over four λ; the first method's is compared with the others', paired on problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from agents.evaluation.bootstrap import estimate, resample_weights
from benchmarks.methods import LAMS, METHODS, Data, Fitted, best_constant, fit, returns
from benchmarks.study import Study, all_kept, heading, shown, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

_OTHERS = (
    "More training problems come with more that choose, so that each size is judged on other problems: compare methods "
    "at one size, not sizes."
)


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the study.

    Attributes:
        sizes: Numbers of training problems.
        seeds: Draws of each size.
        methods: Which routers.
        split: What they are evaluated on.
    """

    sizes: tuple[int, ...] = (50, 150, 500, 2000)
    seeds: int = 3
    methods: tuple[str, ...] = tuple(METHODS)
    split: Literal["test", "validation"] = "test"
    kept: Path = Path("runs/little_data")


@dataclass(frozen=True)
class Cell:
    """One fit: mean return over the λ of each problem, processor time for all of them, or why there is none."""

    method: str
    size: int
    returns: dict[str, float]
    seconds: float
    refused: str = ""

    @property
    def value(self) -> float:
        """The mean over problems."""
        return float(np.mean(list(self.returns.values()))) if self.returns else float("nan")


def measure(task: tuple[str, int, int, str], settings: Settings) -> Cell:
    """Fit one method on one draw."""
    method, size, seed, split = task
    trees = compile_store(settings.rollouts)
    data = Data.of(trees, size, seed)
    found = fit(method, data, seed)
    if not isinstance(found, Fitted):
        return Cell(method, size, {}, 0.0, found)
    left = np.setdiff1d(trees.select(split), data.validation.choice.indices)
    ids = [trees.problem_ids[problem] for problem in np.unique(trees.problem[left])]
    values = returns(found, decision_tables(trees, indices=left))
    return Cell(method, size, dict(zip(ids, values.tolist(), strict=True)), found.seconds)


def paired(ours: list[Cell], others: list[Cell]) -> str:
    """Return the difference of mean returns with its interval: problems are resampled, draws are averaged."""
    differences: dict[str, list[float]] = {}
    for one, other in zip(ours, others, strict=True):
        for problem in one.returns.keys() & other.returns.keys():
            differences.setdefault(problem, []).append(one.returns[problem] - other.returns[problem])
    each = np.array([np.mean(differences[problem]) for problem in sorted(differences)])
    return shown(estimate(each.mean(), resample_weights(len(each)) @ each))


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the tables."""
    tables = decision_tables(settings.rollouts, settings.split)
    lines = heading("How many training problems?", "little_data")
    lines += [
        f"Mean return on {settings.split} problems over λ = {', '.join(f'{lam:g}' for lam in LAMS)}; mean and "
        f"range of {settings.seeds} draws of problems (with all problems: of seeds). Validation problems: a fifth as "
        "many, 20 at least. The better "
        f"constant for each λ: {best_constant(tables):.4f}.",
        *(["", _OTHERS] if settings.split == "validation" else []),
        "",
    ]
    rows = []
    for size in settings.sizes:
        row = [f"{size:,}"]
        for method in settings.methods:
            own = [cell for cell in cells if (cell.method, cell.size) == (method, size)]
            good = [cell.value for cell in own if not cell.refused]
            text = f"{np.mean(good):.4f} ({min(good):.4f} to {max(good):.4f})" if good else "-"
            row.append(text + (f", {len(own) - len(good)} of {len(own)} refused" if len(good) < len(own) else ""))
        rows.append(row)
    lines += table(["training problems", *settings.methods], rows, left=0)
    first, *others = settings.methods
    lines += ["", f"`{first}` minus another, paired on problems, 95 % (of problems, not of draws):", ""]
    for size, method in product(settings.sizes, others):
        both = [[cell for cell in cells if (cell.method, cell.size) == (name, size)] for name in (first, method)]
        lines.append(f"- {size:,} problems, {method}: {paired(*both)}")
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
    axes.axhline(
        best_constant(decision_tables(settings.rollouts, settings.split)), color="grey", ls=":", label="best constant"
    )
    axes.set(xscale="log", xlabel="training problems", ylabel=f"mean {settings.split} return over four λ")
    axes.set_xticks(settings.sizes, [f"{size:,}" for size in settings.sizes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    tasks = [
        (method, size, seed, settings.split)
        for size, seed, method in product(settings.sizes, range(settings.seeds), settings.methods)
    ]
    cells = all_kept(measure, {"-".join(map(str, task)): task for task in tasks}, settings)
    write(report(settings, cells), settings.out)
    if settings.out:
        draw(settings, cells, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
