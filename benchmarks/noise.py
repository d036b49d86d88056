"""What do bad scores cost? Routers on the bundled rollouts with degraded scores.

    python -m benchmarks.noise --out results/noise

Four kinds of damage at three levels. *Flips*: a share of the scores r becomes 1 - r. *Shuffling*: a share of the
proposals of a tree exchange their scores among each other. *Miscalibration*: the log-odds are shrunk and shifted, the
same for all, as when a reward model is exchanged for a more lenient one. *Late*: in a share of the trees every score is
read one step too early in the path, so that both proposals at a node have the score of the step before them: errors of
position, as from inputs that were padded wrongly, which hang together along a path. Every method is fitted on the
damaged scores (as one would) and also run on them as fitted on the good ones (a reward model that went bad after
training).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.methods import LAMS, METHODS, Data, Fitted, best_constant, fit, returns
from benchmarks.study import Study, all_kept, heading, table, write
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

DAMAGED = {
    "flips": "share of scores r that become 1 - r",
    "shuffling": "share of proposals that exchange scores",
    "miscalibration": "shrinkage of log-odds towards 3",
    "late": "share of trees read one step early",
}
"""What the levels are, by kind of damage."""
LEVELS: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "flips": (0.05, 0.15, 0.3),
    "shuffling": (0.1, 0.3, 0.6),
    "miscalibration": (0.3, 0.6, 0.8),
    "late": (0.15, 0.3, 0.6),
}


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the study.

    Attributes:
        methods: Which routers.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    kept: Path = Path("runs/noise")


def damaged(trees: Trees, kind: str, level: float, seed: int = 0) -> Trees:
    """Return trees with damaged scores; what features say of earlier steps follows them."""
    rng = np.random.default_rng(seed)
    score = np.array(trees.score, np.float32)
    if kind == "flips":
        score = np.where(rng.random(score.shape) < level, 1 - score, score)
    elif kind == "shuffling":
        score = _shuffled(trees, score, level, rng)
    elif kind == "miscalibration":
        odds = np.log(np.clip(score, 1e-4, 1 - 1e-4) / (1 - np.clip(score, 1e-4, 1 - 1e-4)))
        score = (1 / (1 + np.exp(-((1 - level) * odds + 3 * level)))).astype(np.float32)
    elif kind == "late":
        score = np.where((rng.random(len(trees.root)) < level)[trees.tree, None], _before(trees, score), score)
    same = (trees.child[:, 0] == trees.child[:, 1]) & (trees.child[:, 0] >= 0)
    score[same, ESCALATE_LARGE] = score[same, CONTINUE_SMALL]  # one text, one score
    return replace(trees, score=score)


def _shuffled(trees: Trees, score: NDArray[np.float32], level: float, rng: np.random.Generator) -> NDArray[np.float32]:
    flat, tree = score.reshape(-1).copy(), np.repeat(trees.tree, 2)
    chosen = np.flatnonzero((rng.random(len(flat)) < level) & ~np.isnan(flat))
    target = chosen[np.lexsort((chosen, tree[chosen]))]
    source = chosen[np.lexsort((rng.random(len(chosen)), tree[chosen]))]
    flat[target] = flat[source]
    return flat.reshape(score.shape)


def _before(trees: Trees, score: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N, 1) the score of the step before each node; 1 at the first, which has none."""
    found = np.ones((trees.nodes, 1), np.float32)
    for action in (ESCALATE_LARGE, CONTINUE_SMALL):
        going = trees.child[:, action] >= 0
        found[trees.child[going, action], 0] = score[going, action]
    return found


@dataclass(frozen=True)
class Cell:
    """One method under one damage: mean test returns when fitted on damaged and on good scores."""

    method: str
    kind: str
    level: float
    fitted: float
    surprised: float


Clean = Fitted | str
"""What comes of fitting on good scores."""


def fit_clean(method: str, settings: Settings) -> Clean:
    """Fit one method on good scores."""
    return fit(method, Data.of(compile_store(settings.rollouts)), 0)


def measure(task: tuple[str, str, float, Clean], settings: Settings) -> Cell:
    """Fit one method on one damage of the scores and return what it comes to, beside one fitted on good ones."""
    method, kind, level, clean = task
    trees = damaged(compile_store(settings.rollouts), kind, level)
    own = clean if kind == "none" else fit(method, Data.of(trees), 0)
    test = decision_tables(trees, "test")
    values = [float(returns(each, test).mean()) if isinstance(each, Fitted) else np.nan for each in (own, clean)]
    return Cell(method, kind, level, *values)


def report(settings: Settings, cells: list[Cell]) -> str:
    """Return the table."""
    lines = heading("What bad scores cost", "noise")
    constant = best_constant(decision_tables(settings.rollouts, "test"))
    lines += [
        f"Mean test return over λ = {', '.join(f'{lam:g}' for lam in LAMS)}: fitted on the damaged scores / fitted on "
        f"good ones and run on damaged ones. One training each. The better constant for each λ: {constant:.4f}.",
        "",
    ]
    rows = []
    for kind, levels in LEVELS.items():
        for level in levels:
            row = []
            for method in settings.methods:
                (own,) = [c for c in cells if (c.method, c.kind, c.level) == (method, kind, level)]
                row.append(f"{own.fitted:.4f} / {own.surprised:.4f}" if kind != "none" else f"{own.fitted:.4f}")
            rows.append([kind, f"{level:g}", *row])
    return "\n".join([*lines, *table(["damage", "level", *settings.methods], rows), ""])


def draw(settings: Settings, cells: list[Cell], path: Path) -> None:
    """Draw a panel for each kind of damage."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in LEVELS if kind != "none"]
    figure = Figure(figsize=(13.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    constant = best_constant(decision_tables(settings.rollouts, "test"))
    for axes, kind in zip(panels, kinds, strict=True):
        levels = (0.0, *LEVELS[kind])
        for number, method in enumerate(settings.methods):
            own = {c.level: c for c in cells if c.method == method and c.kind in (kind, "none")}
            colour = f"C{number}"
            axes.plot(levels, [own[x].fitted for x in levels], marker="o", color=colour, label=method)
            axes.plot(levels, [own[x].surprised for x in levels], marker="o", mfc="white", ls="--", color=colour)
        axes.axhline(constant, color="grey", ls=":", label="best constant")
        axes.set(title=kind, xlabel=DAMAGED[kind])
    panels[0].set_ylabel("mean test return over four λ")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle("solid: fitted on the damaged scores; dashed: fitted on good ones", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    clean = all_kept(fit_clean, {method: method for method in settings.methods}, settings)
    tasks = {
        f"{method}-{kind}-{level:g}": (method, kind, level, own)
        for method, own in zip(settings.methods, clean, strict=True)
        for kind, levels in LEVELS.items()
        for level in levels
    }
    cells = all_kept(measure, tasks, settings)
    write(report(settings, cells), settings.out)
    if settings.out:
        draw(settings, cells, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
