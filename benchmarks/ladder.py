"""What a router reads, and how it decides: every signal and every rule on identical trees at equal prices.

    python -m benchmarks.ladder                                       # on the half of validation that chooses nothing
    python -m benchmarks.ladder --split test --out results/ladder     # ladder.md and ladder.png
    python -m benchmarks.ladder --minutes 7 ...                       # a slice: what is fitted is kept in --fits

Everything is fitted on training trees; thresholds and the hulls of curves are chosen on validation: for figures of
validation on its choice half, for those of other splits on all of it. Every method that is told λ has the same eight
operating points, one for each λ; thresholds have 16. Fits do not depend on the split, so that another one costs no
further training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from agents.evaluation.bootstrap import Estimate, curve_band, estimate, holm, paired_means, resample_weights
from agents.evaluation.curves import Curve
from agents.evaluation.outcomes import Floats
from benchmarks.robustness import LAMS
from benchmarks.rungs import CLASS, DEFAULT, KNOWING, PRM, SIGNALS, Ground, Ladder, Measured, Rung, keep
from benchmarks.study import CURVE, curve_cells, heading, percent, shown, table, write
from rollouts.trees.arrays import CONTINUE_SMALL
from rollouts.trees.compile import compile_store
from rollouts.trees.stats import auc
from trim_env.tables import DecisionTables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPENT = np.array([0.05, 0.1, 0.2, 0.3])
SEEDED = ("exact", "ppo", "paper")
LEARNED = (*SEEDED, "pomdp")


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        split: What figures are of.
        seeds: Independent fits of what is drawn: PPO, and the folds and first parameters of the exact learner.
        rollouts: The store.
        fits: Folder in which fits are kept, and looked up.
        minutes: Begin no further fit after so many.
        processes: Fits side by side.
        out: Report and picture, without suffix; default: print only.
    """

    split: Literal["validation", "test", "test2"] = "validation"
    seeds: int = 3
    rollouts: str = "quickstart"
    fits: Path = Path("runs/ladder")
    minutes: float = float("inf")
    processes: int = 2
    out: Path | None = None


def _table(head: Sequence[str], rows: Mapping[Rung, Sequence[str]]) -> list[str]:
    named = ([f"**{rung.name}**" if rung == DEFAULT else rung.name, rung.reads, *row] for rung, row in rows.items())
    return table(["rule", "reads", *head], named, left=2)


def returns(found: dict[Rung, Measured], baseline: Rung, weights: Floats) -> list[str]:
    """Return the table of mean returns and of their differences from the baseline's."""
    others = [rung for rung in found if rung != baseline]
    over = {rung: paired_means(found[rung].returns, found[baseline].returns, weights) for rung in others}
    corrected = dict(zip(others, holm([over[rung].p_value for rung in others]), strict=True))
    rows = {}
    for rung, own in found.items():
        mean = shown(paired_means(own.returns, 0 * own.returns, weights), ".4f")
        rows[rung] = [mean, *([shown(over[rung]), f"{corrected[rung]:.2g}"] if rung in over else ["", ""])]
    return _table(["mean return", f"minus {baseline.told}", "p (Holm)"], rows)


def curves(ground: Ground, found: dict[Rung, Measured], weights: Floats) -> list[str]:
    """Return the table of what is read off the curves, in %."""
    rows = {}
    for rung, own in found.items():
        *costs, _ = curve_cells(own.method, ground.both, weights)
        rows[rung] = [*costs, *map(percent, curve_band(own.method, ground.both, weights, SPENT))]
    return _table([*CURVE[:-1], *(f"accuracy at {100 * c:g} %" for c in SPENT)], rows)


def by_lam(found: dict[Rung, Measured]) -> list[str]:
    """Return a table of returns by λ, and how far seeds differ."""
    lams = next(iter(found.values())).lams
    rows = {}
    for rung, own in found.items():
        values = [f"{each.returns(lam).mean():.4f}" for each, lam in zip(own.by_lam, lams, strict=True)]
        seeds = f"{min(own.seeds):.4f} to {max(own.seeds):.4f} ({len(own.seeds)})" if rung.kind in SEEDED else ""
        rows[rung] = [*values, seeds]
    return _table([*(f"{lam:g}" for lam in lams), "seeds"], rows)


def way(found: dict[Rung, Measured], rung: Rung, weights: Floats) -> Estimate:
    """Return how much of the way from the default router to one that knows the class of a step a rung goes."""
    low, high, own = (found[each].returns for each in (DEFAULT, KNOWING, rung))

    def share(mean: Floats) -> Floats:
        values: Floats = (mean[..., 2] - mean[..., 0]) / (mean[..., 1] - mean[..., 0])
        return values

    columns = np.stack([low, high, own], axis=-1)
    return estimate(share(columns.mean(axis=0)), share(weights @ columns))


def named(found: dict[Rung, Measured], group: str, kinds: Sequence[str]) -> Rung:
    """Return the rung of a group that validation names."""
    own = [rung for rung in found if rung.group == group and rung.kind in kinds]
    return max(own, key=lambda rung: found[rung].chosen_by)


def conclusions(found: dict[Rung, Measured], priced: dict[Rung, Measured], weights: Floats) -> list[str]:
    """Return three sentences."""

    def span(group: str) -> str:
        means = [float(own.returns.mean()) for rung, own in found.items() if rung.group == group]
        return " to ".join(f"{value:.3f}" for value in sorted({min(means), max(means)}))

    def gain(group: str) -> str:
        learned, simple = (named(found, group, kinds) for kinds in (LEARNED, ("threshold",)))
        return shown(paired_means(found[learned].returns, found[simple].returns, weights), "+.3f")

    best = named(found, "all", LEARNED)
    share = way(found, best, weights)
    ranked = sorted(
        (named(priced, group, ("exact", "threshold")) for group in ("score", "free", "prefill", "all")),
        key=lambda rung: -priced[rung].returns.mean(),
    )
    charged = ", ".join(f"{rung.told} {priced[rung].returns.mean():.3f}" for rung in ranked)
    return [
        "1. What is read matters most: all that reads the reward model's score alone returns "
        f"{span('score')}, all that reads what the small model makes of its own tokens, which costs nothing, "
        f"{span('free')}, with the large model's look at each proposal, which is not charged for here, "
        f"{span('prefill')}; the exact class of each step gives {span('exact class')}.",
        f"2. How the rule is found matters where what is read is poor: a learned rule gains {gain('score')} over a "
        f"threshold on the score, {gain('free')} over one on the small model's numbers and {gain('prefill')} over "
        "one on the large model's.",
        f"3. All signals together ({best.name}) go {100 * share.value:.0f} % [{100 * share.low:.0f}, "
        f"{100 * share.high:.0f}] of the way from the default router to the exact class; where what is read is charged "
        f"for: {charged}.",
    ]


def tells(tables: DecisionTables) -> str:
    """Say how well each signal tells whether a proposal is right."""
    rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices) & (tables.trees.label[:, CONTINUE_SMALL] >= 0))
    right = tables.trees.label[rows, CONTINUE_SMALL] == 1
    each = {name: auc(tables.in_schema(name)[rows, 0], right) for name in ("score", *SIGNALS)}
    return ", ".join(f"`{name}` {value:.3f}" for name, value in each.items())


def report(settings: Settings, left: int) -> tuple[str, Ground, dict[Rung, Measured]]:
    """Return the report, and what the picture shows."""
    ladder = Ladder(settings.rollouts, settings.fits, settings.seeds)
    ground, priced = (Ground(ladder, settings.split, cost) for cost in ("decode-only", "priced"))
    found, charged = ground.all(), priced.all()
    weights = resample_weights(len(ground.both.small))
    split = f"Run when everything was settled on validation. Split `{settings.split}`"
    if settings.split == "validation":
        split = "The half of `validation` on which nothing was chosen"
    baseline = DEFAULT if DEFAULT in found else PRM
    command = f"ladder --split {settings.split} --seeds {settings.seeds}"
    lines = heading("The ladder: what a router reads, and how it decides", command)
    lines += [
        *(conclusions(found, charged, weights) if DEFAULT in found else []),
        "",
        f"{split} of `{settings.rollouts}`, {len(ground.both.small):,} problems. `linear`, `quadratic` and `mlp` "
        "are rules by the exact gradient; TRIM-Agg is PPO, the default in bold; with the paper's settings it has as "
        "many decisions and one attempt. *exact class*: told whether the proposal, and every accepted step, is right; "
        "the tree oracle knows how all ends. Thresholds, hulls and the rules that the sentences name were chosen on "
        "validation. "
        f"Mean return over λ = {', '.join(f'{lam:g}' for lam in LAMS)}; seeds are averaged problem by problem. "
        "Intervals: 95 %, over problems; p-values: sign flips of paired differences, Holm over the table.",
        "",
        "How far this carries: the embedded models err where an improbable token was drawn, so that probabilities tell "
        "nearly all, and the reward model is tiny; nothing here says that it is so with other models. AUC of whether a "
        f"proposal is right, by exact labels: {tells(ground.measured)}. (The score is of the whole path and stays low "
        "after a mistake.)",
        *(
            ["", f"{left} fits were not made: whose seeds are fewer, the last column of returns by λ says."]
            if left
            else []
        ),
        "",
        "## Tokens that the large model decodes",
        "",
        *returns(found, baseline, weights),
        "",
        "Curves, costs in % of always-large's. Rules that are told λ have the eight λ as operating points, thresholds "
        "16; what lies below the cheapest is a mixture with always-small, † one with always-large.",
        "",
        *curves(ground, found, weights),
        "",
        "Return by λ, and the mean returns of single seeds with their number:",
        "",
        *by_lam(found),
        "",
        "## What is read is charged for",
        "",
        "In tokens that the large model decodes: 0.2 for one that it reads anew, 0.02 for one that it has read before, "
        "0.02 for each that the reward model reads, prefix and proposal at every step (the proportions of "
        "`prices:large_out=15,large_in=3,large_cached=0.3,scorer_in=0.3`). The small model's own numbers cost nothing; "
        "the exact class is charged as a reward model's score. PPO and the POMDP are not fitted for these prices.",
        "",
        *returns(charged, PRM, weights),
        "",
        *curves(priced, charged, weights),
        "",
    ]
    return "\n".join(lines), ground, found


COLOURS = {
    "score": "#0072B2", "free": "#009E73", "prefill": "#E69F00", "all": "#D55E00", "exact class": "#222222",
    "": "#767676",
}  # fmt: skip
WHOSE = {
    "score": "the reward model's score", "free": "the small model's own numbers",
    "prefill": "numbers of both models", "all": "these and the score",
}  # fmt: skip


SHOWN = (Rung("threshold", "agg/1"), DEFAULT, *(Rung("exact", s, "quadratic") for s in ("free", "all", CLASS)))
"""Whose curves are drawn, beside the oracle's."""


def draw(
    ground: Ground,
    found: dict[Rung, Measured],
    split: str,
    path: Path,
    shown: Sequence[Rung] = SHOWN,
    whose: Mapping[str, str] = WHOSE,
) -> None:
    """Draw mean returns as a ladder, and curves of one rule for each thing that can be read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_ladder(left, found, whose)
    _draw_curves(right, ground, found, shown)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3", axis="x" if axes is left else "both")
        axes.set_axisbelow(True)
    name, rollouts = "half of validation" if split == "validation" else split, ground.ladder.rollouts
    title = f"What a router reads, and how it decides ({rollouts}, {name}, {len(ground.both.small):,} problems)"
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=130)


def _draw_ladder(axes: Axes, found: dict[Rung, Measured], whose: Mapping[str, str]) -> None:
    order = sorted(found, key=lambda rung: float(found[rung].returns.mean()))
    weights = resample_weights(len(found[order[0]].returns))
    for height, rung in enumerate(order):
        own, colour = found[rung].returns, COLOURS[rung.group]
        axes.plot(np.quantile(weights @ own, [0.025, 0.975]), [height] * 2, color=colour, lw=5, alpha=0.25)
        axes.plot(own.mean(), height, "o", color=colour, ms=6)
    for group, name in whose.items():
        if any(rung.group == group for rung in found):
            axes.plot([], [], "o", color=COLOURS[group], label=name)
    axes.set_yticks(range(len(order)), [rung.told for rung in order], fontsize=9)
    for label, rung in zip(axes.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if rung == DEFAULT else "normal")
    axes.set(xlabel=f"mean return over {len(found[order[0]].lams)} λ, 95 % interval", ylim=(-0.7, len(order) - 0.3))
    axes.legend(title="reads", frameon=False, fontsize=9, loc="lower right", alignment="left")


def _draw_curves(axes: Axes, ground: Ground, found: dict[Rung, Measured], shown: Sequence[Rung]) -> None:
    cost, price = np.linspace(0, 0.5, 201), ground.both.large.cost.sum()
    used: set[tuple[str, str]] = set()
    for rung in [*shown, Rung("oracle", "")]:
        if rung in found:
            curve, method = Curve.of(found[rung].method, ground.both), found[rung].method
            styles = ("--", ":") if rung.kind in ("threshold", "oracle") else ("-", "-.")
            style = next((each for each in styles if (COLOURS[rung.group], each) not in used), styles[-1])
            used.add((COLOURS[rung.group], style))
            kept = cost >= curve.cost[0]
            axes.plot(
                100 * cost[kept], 100 * curve.accuracy_at(cost[kept]), ls=style, color=COLOURS[rung.group], lw=2,
                label=rung.told,
            )  # fmt: skip
            for _, each in (method.points[i] for i in method.hull):
                axes.plot(
                    100 * each.cost.sum() / price, 100 * each.correct.mean(), "o", color=COLOURS[rung.group], ms=4
                )
    height = 100 * ground.both.large.correct.mean()
    axes.axhline(height, color="#767676", lw=1, zorder=0, label="always-large")
    axes.set(xlabel="large-model tokens, % of always-large's", ylabel="problems solved, %", xlim=(0, 50))
    axes.legend(frameon=False, fontsize=9.5, loc="lower right")


def fit_all(ladder: Ladder, minutes: float, processes: int) -> int:
    """Fit what is not kept yet, begin nothing after some minutes; return how many fits were not made."""
    from rich.progress import track

    compile_store(ladder.rollouts)
    end = time.time() + 60 * minutes
    open_ = [task for task in ladder.tasks() if not task.done]
    left = len(open_)
    if open_:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            fits = [pool.submit(keep, task, end) for task in open_]
            left -= sum(fit.result() for fit in track(fits, "fitting"))
    return left


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    left = fit_all(Ladder(settings.rollouts, settings.fits, settings.seeds), settings.minutes, settings.processes)
    text, ground, found = report(settings, left)
    write(text, settings.out)
    if settings.out:
        draw(ground, found, settings.split, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
