"""What a router reads, and how it decides: every signal and every rule on identical trees at equal prices.

    python -m benchmarks.ladder                                       # on the half of validation that chooses nothing
    python -m benchmarks.ladder --split test --out results/ladder     # ladder.md and ladder.png
    python -m benchmarks.ladder --minutes 7 ...                       # a slice: what is fitted is kept in --fits

Everything is fitted on training trees; thresholds and the hulls of curves are chosen on validation: for figures of
validation on its choice half, for those of other splits on all of it. Every method that is told λ has the same eight operating
points, one for each λ; thresholds have 16. Fits do not depend on the split, so another one costs no further training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from agents.evaluation.bootstrap import Estimate, curve_band, curve_estimates, holm, paired_means, resample_weights
from agents.evaluation.curves import Curve, Method, Points
from agents.evaluation.forest import Forest
from agents.evaluation.oracle import tree_oracle
from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.splits import Candidates, Validation, halves, two_numbers
from agents.evaluation.walk import references, run
from agents.learners.exact import fit as fit_exact
from agents.learners.exact import neighbours
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.ppo import PPOAgg
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers.artefact import load, save
from agents.routers.base import AnyRouter
from agents.routers.mlp import at
from benchmarks.methods import heading, write
from benchmarks.robustness import LAMS, average
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.costs import CostModel, TokenPrices, cost_model
from trim_env.tables import DecisionTables, decision_tables

PAPER = PPOSettings(
    hidden=128, learning_rate=1e-4, entropy=0.01, anneal=False, normalize=False, lam_start=1.0, lam_ramp=0.0
)
"""The paper's settings of TRIM-Agg; what it does not tell (batches, epochs, number of decisions) is ours."""
PRICED = TokenPrices("signals charged", large_prefill=0.2, large_cached=0.02, scorer_prefill=0.02)
"""In tokens that the large model decodes: as prices:large_out=15,large_in=3,large_cached=0.3,scorer_in=0.3."""
CLASS = "label.score,least(label.score),tokens,step,terminal,has_answer"
SPENT = np.array([0.05, 0.1, 0.2, 0.3])
CPTS = (50, 80, 95)


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


@dataclass(frozen=True)
class Rung:
    """One way to route.

    Attributes:
        kind: ``threshold``, ``two numbers``, ``exact``, ``ppo``, ``paper``, ``pomdp`` or ``oracle``.
        schema: What it sees.
        rule: Of the exact learner.
    """

    kind: str
    schema: str
    rule: str = ""

    @property
    def name(self) -> str:
        """As in tables."""
        names = {
            "threshold": "TRIM-Thr", "two numbers": "two numbers", "exact": f"{self.rule}, exact gradient", "ppo": "TRIM-Agg (PPO)",
            "paper": "TRIM-Agg (PPO, the paper's settings)", "pomdp": "TRIM-POMDP", "oracle": "tree oracle",
        }  # fmt: skip
        return names[self.kind]

    @property
    def reads(self) -> str:
        """What it sees, in a word."""
        return {CLASS: "exact class", "agg/1": "score"}.get(self.schema, self.schema)

    @property
    def told(self) -> str:
        """Name and what it sees."""
        return f"{self.name} on {self.reads}" if self.schema else self.name


SIGNALS = ("small.min_logprob", "small.mean_logprob", "small.max_entropy", "large.min_logprob", "large.mean_logprob")
DEFAULT, POMDP, PAPER_RUNG = Rung("ppo", "agg+"), Rung("pomdp", "score"), Rung("paper", "agg")
FREE, ALL = Rung("exact", "free", "quadratic"), Rung("exact", "all", "quadratic")
PRM, KNOWING = Rung("exact", "agg+", "quadratic"), Rung("exact", CLASS, "quadratic")
RUNGS = (
    *(Rung("threshold", schema) for schema in ("agg/1", *SIGNALS)),
    Rung("two numbers", "agg/1"),
    PAPER_RUNG,
    POMDP,
    DEFAULT,
    *(Rung("exact", s, rule) for s in ("agg+", "free", "prefill", "all") for rule in ("linear", "quadratic", "mlp")),
    KNOWING,
    Rung("oracle", ""),
)
COSTS: dict[str, CostModel] = {"decode-only": cost_model("decode-only"), "priced": PRICED}
UNPRICED = ("ppo", "paper", "pomdp")  # the POMDP knows large tokens alone; PPO would have to be trained again


def rungs(cost: str) -> list[Rung]:
    """Return those that are measured under a cost model."""
    return [rung for rung in RUNGS if cost == "decode-only" or rung.kind not in UNPRICED]


def labelled(trees: Trees) -> Trees:
    """Return trees with whether steps are right as one more signal."""
    right = np.where(trees.label < 0, np.float32("nan"), trees.label).astype(np.float32)
    return replace(trees, signals={**trees.signals, "label.score": right})


@cache
def _trees(rollouts: str, split: str | None = None) -> Trees:
    return labelled(compile_store(rollouts, split=split))


@cache
def _train(rollouts: str, schema: str, cost: str) -> DecisionTables:
    return decision_tables(_trees(rollouts), "train", schema=schema or "agg+", cost=COSTS[cost])


@cache
def _validation(rollouts: str, schema: str, cost: str) -> Validation:
    trees, kind = _trees(rollouts), {"schema": schema, "cost": COSTS[cost]}
    return Validation(lambda indices: decision_tables(trees, indices=indices, **kind), trees)


@dataclass(frozen=True)
class Task:
    """A fit that is kept: of one rung, seed and λ; of the exact learner for all λ together."""

    rung: Rung
    cost: str
    seed: int
    lams: tuple[float, ...]

    def place(self, fits: Path, lam: float) -> Path:
        """Return where the router for a λ is kept."""
        rung = self.rung
        kind = "-".join(filter(None, [rung.kind, rung.rule, rung.reads.replace(" ", "-")]))
        return fits / self.cost / kind / f"seed-{self.seed}" / f"lam-{lam:g}"

    def done(self, fits: Path) -> bool:
        """Return whether all its routers are there."""
        return all((self.place(fits, lam) / "policy.json").exists() for lam in self.lams)

    def fit(self, rollouts: str) -> dict[float, AnyRouter]:
        """Return its routers by λ."""
        rung, own = self.rung, (rollouts, self.rung.schema, self.cost)
        key = (self.seed, *(LAMS.index(lam) for lam in self.lams))
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        if rung.kind == "exact":
            choice, found = _validation(*own).choice, dict[float, AnyRouter]()
            for group in neighbours(self.lams):
                frontier = fit_exact(_train(*own), choice, group, ExactSettings(rung.rule), seed)
                found |= {lam: at(frontier.router(lam), lam) for lam in group}
            return found
        (lam,) = self.lams
        if rung.kind == "ppo":
            return {lam: at(Training(_train(*own), _validation(*own), lam, PPOSettings(), seed).run().router, lam)}
        learner = PPOAgg(_train(*own), lam, PAPER, seed)
        while not learner.done:
            learner.iterate()
        return {lam: at(learner.router(), lam)}


def tasks(settings: Settings) -> Iterator[Task]:
    """Yield all fits that are kept, a seed after the other, the quick ones first."""
    for seed in range(settings.seeds):
        for cost in COSTS:
            yield from (Task(rung, cost, seed, LAMS) for rung in rungs(cost) if rung.kind == "exact")
        for lam in LAMS:
            yield from (Task(rung, "decode-only", seed, (lam,)) for rung in (DEFAULT, PAPER_RUNG))


def keep(task: Task, settings: Settings, end: float) -> bool:
    """Fit, unless time is up; return whether it was done."""
    if time.time() > end:
        return False
    begin = time.process_time()
    found = task.fit(settings.rollouts)
    seconds = (time.process_time() - begin) / len(found)
    for lam, router in found.items():
        if not (task.place(settings.fits, lam) / "policy.json").exists():
            save(router, task.place(settings.fits, lam), {"seconds": seconds})
    return True


@dataclass(frozen=True, eq=False)
class Measured:
    """A rung on the split.

    Attributes:
        rung: The rung.
        by_lam: Outcomes for each λ, averaged over seeds.
        method: Its curve.
        seeds: Mean returns of the single seeds.
    """

    rung: Rung
    by_lam: list[Outcomes]
    method: Method
    seeds: list[float]

    @property
    def returns(self) -> Floats:
        """(P,) returns, averaged over the λ."""
        return mean_return(self.by_lam)


def mean_return(by_lam: Sequence[Outcomes]) -> Floats:
    """Return (P,) returns, averaged over the λ."""
    values: Floats = np.mean([one.returns(lam) for one, lam in zip(by_lam, LAMS, strict=True)], axis=0)
    return values


class Ground:
    """Where choices are made and where figures come from, under one cost model."""

    def __init__(self, settings: Settings, cost: str) -> None:
        """Build the tables."""
        self.settings, self.cost = settings, cost
        trees = _trees(settings.rollouts)
        choice, verdict = halves(trees)
        model = COSTS[cost]
        if settings.split == "validation":
            self.choosing = decision_tables(trees, indices=choice, cost=model)
            self.measured = decision_tables(trees, indices=verdict, cost=model)
        else:
            self.choosing = decision_tables(trees, "validation", cost=model)
            self.measured = decision_tables(_trees(settings.rollouts, settings.split), settings.split, cost=model)
        self.both, self.chosen_by = references(self.measured), references(self.choosing)

    def settings_of(self, rung: Rung) -> Iterator[list[AnyRouter]]:
        """Yield for each seed the routers of all λ."""
        rollouts = self.settings.rollouts
        if rung.kind == "threshold":
            candidates = Candidates(self.choosing, schema=rung.schema).thresholds
            yield [max(candidates, key=lambda each, lam=lam: each[1].returns(lam).mean())[0] for lam in LAMS]
        elif rung.kind == "two numbers":
            train = _train(rollouts, rung.schema, self.cost)
            forest = Forest(train)
            yield [two_numbers(train, forest, lam) for lam in LAMS]
        elif rung.kind == "pomdp":
            yield list(estimate(_trees(rollouts)).routers(LAMS))
        else:
            for seed in range(self.settings.seeds):
                task = Task(rung, self.cost, seed, LAMS)
                if task.done(self.settings.fits):
                    routers = [load(task.place(self.settings.fits, lam)).router for lam in LAMS]
                    yield [at(router, lam) for router, lam in zip(routers, LAMS, strict=True)]

    def outcomes(self, rung: Rung, tables: DecisionTables) -> list[list[Outcomes]]:
        """Return, for each seed, the outcomes for all λ."""
        if rung.kind == "oracle":
            return [[tree_oracle(tables, lam) for lam in LAMS]]
        return [[run(router, tables) for router in routers] for routers in self.settings_of(rung)]

    def measure(self, rung: Rung) -> Measured | None:
        """Return a rung on the split; None if nothing of it is fitted."""
        each = self.outcomes(rung, self.measured)
        if not each:
            return None

        def points(seeds: list[list[Outcomes]]) -> Points:
            return [(lam, average(list(own))) for lam, own in zip(LAMS, zip(*seeds, strict=True), strict=True)]

        own = points(each)
        if rung.kind == "threshold":
            sweep = Candidates(self.choosing, schema=rung.schema).spread_over(self.chosen_by.large)
            chosen_on: Points = [(knob, outcomes) for knob, _, outcomes in sweep]
            curve: Points = [(knob, run(router, self.measured)) for knob, router, _ in sweep]
        else:
            curve, chosen_on = own, points(self.outcomes(rung, self.choosing))
        method = Method.chosen(curve, chosen_on, self.chosen_by)
        seeds = [float(mean_return(outcomes).mean()) for outcomes in each]
        return Measured(rung, [outcomes for _, outcomes in own], method, seeds)

    def all(self) -> dict[Rung, Measured]:
        """Return all rungs of which something is fitted."""
        found = {rung: self.measure(rung) for rung in rungs(self.cost)}
        return {rung: measured for rung, measured in found.items() if measured}


def _interval(each: Estimate, form: str = "{:+.4f}") -> str:
    return "{0} [{1}, {2}]".format(*(form.format(value) for value in (each.value, each.low, each.high)))


def table(ground: Ground, found: dict[Rung, Measured], baseline: Rung) -> list[str]:
    """Return the table of one cost model."""
    weights = resample_weights(len(ground.both.small))
    others = [rung for rung in found if rung != baseline]
    over = {rung: paired_means(found[rung].returns, found[baseline].returns, weights) for rung in others}
    corrected = dict(zip(others, holm([over[rung].p_value for rung in others]), strict=True))
    lines = [
        "| rule | reads | mean return | over the default | p (Holm) | "
        + " | ".join(f"CPT({x} %)" for x in CPTS) + " | " + " | ".join(f"at {100 * c:g} %" for c in SPENT) + " |",
        "|---|---|" + "---:|" * (3 + len(CPTS) + len(SPENT)),
    ]  # fmt: skip
    for rung, own in found.items():
        curve = Curve.of(own.method, ground.both)
        metrics = curve_estimates(own.method, ground.both, weights)
        at_costs = curve_band(own.method, ground.both, weights, SPENT)
        cells = [f"{own.returns.mean():.4f}"]
        cells += [_interval(over[rung]), f"{corrected[rung]:.2g}"] if rung in over else ["", ""]
        for x in CPTS:
            each = metrics[f"cpt_{x}"]
            mark = " †" if curve.by_mixing(x) else ""
            cells.append(f"{100 * each.value:.1f}{mark} [{100 * each.low:.1f}, {100 * each.high:.1f}]")
        cells += [f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]" for e in at_costs]
        name = f"**{rung.name}** (default)" if rung == DEFAULT else rung.name
        lines.append(f"| {name} | {rung.reads} | {' | '.join(cells)} |")
    return lines


def by_lam(found: dict[Rung, Measured]) -> list[str]:
    """Return a table of returns by λ, and how far seeds differ."""
    lines = [
        "| rule | reads | " + " | ".join(f"{lam:g}" for lam in LAMS) + " | seeds |",
        "|---|---|" + "---:|" * (len(LAMS) + 1),
    ]
    for rung, own in found.items():
        values = [f"{each.returns(lam).mean():.4f}" for each, lam in zip(own.by_lam, LAMS, strict=True)]
        seeds = f"{min(own.seeds):.4f} to {max(own.seeds):.4f} ({len(own.seeds)})" if len(own.seeds) > 1 else ""
        lines.append(f"| {rung.name} | {rung.reads} | {' | '.join(values)} | {seeds} |")
    return lines


def way(found: dict[Rung, Measured], rung: Rung, weights: Floats) -> Estimate:
    """Return how much of the way from the default router to one that knows the class of a step a rung goes."""
    low, high, own = (found[each].returns for each in (DEFAULT, KNOWING, rung))

    def share(mean: Floats) -> Floats:
        values: Floats = (mean[..., 2] - mean[..., 0]) / (mean[..., 1] - mean[..., 0])
        return values

    columns = np.stack([low, high, own], axis=-1)
    samples = share(weights @ columns)
    return Estimate(float(share(columns.mean(axis=0))), *map(float, np.quantile(samples, [0.025, 0.975])), 0.0)


def conclusions(found: dict[Rung, Measured], priced: dict[Rung, Measured], weights: Floats) -> list[str]:
    """Return three sentences."""
    mean = {rung: float(own.returns.mean()) for rung, own in found.items()}
    rules = [mean[rung] for rung in found if rung.schema == "agg+"]
    signals = {s: mean[Rung("exact", s, "quadratic")] for s in ("free", "prefill", "all")}
    free, whole = paired_means(found[FREE].returns, found[DEFAULT].returns, weights), way(found, ALL, weights)
    best = max((rung for rung in found if rung.kind == "threshold"), key=mean.__getitem__)
    charged = {rung: float(own.returns.mean()) for rung, own in priced.items()}
    charged_best = max((rung for rung in priced if rung.kind == "exact" and rung != KNOWING), key=charged.__getitem__)
    return [
        f"1. What is read decides, not how the rule is learned: on the same features linear, quadratic, MLP and PPO lie between {min(rules):.3f} and "
        f"{max(rules):.3f}, while a quadratic rule goes to {signals['free']:.3f} (`free`), {signals['prefill']:.3f} (`prefill`) and {signals['all']:.3f} (`all`).",
        f"2. No reward model is needed: what the small model makes of its own tokens (`free`, which costs nothing) returns {_interval(free)} over "
        f"the default router, which reads a reward model; all signals together go {100 * whole.value:.0f} % [{100 * whole.low:.0f}, {100 * whole.high:.0f}] of the way from that to a router that "
        "knows whether each step is right.",
        f"3. A single threshold is not enough on any signal (best: {best.reads}, {mean[best]:.3f}), and where signals are charged for, the best is {charged_best.told} "
        f"({charged[charged_best]:.3f}; `agg+` {charged[PRM]:.3f}, `free` {charged[FREE]:.3f}, `all` {charged[ALL]:.3f}).",
    ]  # fmt: skip


def report(settings: Settings, left: int) -> tuple[str, Ground, dict[Rung, Measured]]:
    """Return the report, and what the picture shows."""
    ground, priced = Ground(settings, "decode-only"), Ground(settings, "priced")
    found, charged = ground.all(), priced.all()
    weights = resample_weights(len(ground.both.small))
    half = {"validation": "The half of `validation` on which nothing was chosen"}
    lines = heading("The ladder: what a router reads, and how it decides", "ladder")
    lines += [
        *(conclusions(found, charged, weights) if DEFAULT in found else []),
        "",
        f"{half.get(settings.split, f'Split `{settings.split}`')} of `{settings.rollouts}`, {len(weights[0]):,} problems. Mean return over λ = "
        f"{', '.join(f'{lam:g}' for lam in LAMS)}; seeds of PPO and of the exact learner are averaged problem by problem, their numbers are in the "
        "second table. Differences are paired with the default router, p-values by sign flips, Holm over the table. Costs in % of "
        "always-large's; † reached only by mixing with always-large. Curves: "
        f"the eight λ, thresholds 16 settings; hulls chosen on validation. *exact class*: the rule is told whether the proposal, and every "
        "accepted step, is right; the tree oracle knows how all ends.",
        *([f"Not fitted yet: {left}."] if left else []),
        "",
        "## Tokens that the large model decodes",
        "",
        *table(ground, found, DEFAULT if DEFAULT in found else PRM),
        "",
        "Return by λ:",
        "",
        *by_lam(found),
        "",
        "## Signals charged for",
        "",
        "In tokens that the large model decodes: 0.2 for a token that it reads anew, 0.02 for one that it has read before, 0.02 for each token that the reward model "
        "reads at every step, prefix and proposal (as `prices:large_out=15,large_in=3,large_cached=0.3,scorer_in=0.3`). What the small model makes of its "
        "own tokens costs nothing. Differences from the quadratic rule on `agg+`; PPO and the POMDP are not fitted for these prices.",
        "",
        *table(priced, charged, PRM),
        "",
    ]  # fmt: skip
    return "\n".join(lines), ground, found


COLOURS = {
    "score": "#0072B2", "agg+": "#0072B2", "agg": "#0072B2", "free": "#009E73", "prefill": "#E69F00", "all": "#D55E00",
    "exact class": "#222222", "": "#767676",
}  # fmt: skip


def draw(ground: Ground, found: dict[Rung, Measured], settings: Settings, path: Path) -> None:
    """Draw mean returns as a ladder, and curves of one rule for each thing that can be read."""
    from matplotlib.figure import Figure

    weights = resample_weights(len(ground.both.small))
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    order = sorted(found, key=lambda rung: float(found[rung].returns.mean()))
    for height, rung in enumerate(order):
        own = found[rung].returns
        low, high = np.quantile(weights @ own, [0.025, 0.975])
        colour = COLOURS.get(rung.reads, COLOURS[{"small": "free", "large": "prefill"}.get(rung.reads[:5], "")])
        left.plot([low, high], [height, height], color=colour, lw=5, alpha=0.25, solid_capstyle="round")
        left.plot(own.mean(), height, "o", color=colour, ms=6)
    left.set_yticks(range(len(order)), [rung.told for rung in order], fontsize=8.5)
    for label, rung in zip(left.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if rung == DEFAULT else "normal")
    left.set(xlabel="mean return over eight λ, 95 % interval", ylim=(-0.7, len(order) - 0.3))
    left.grid(axis="x", color="#E3E3E3")
    left.set_axisbelow(True)
    shown = [Rung("threshold", "agg/1"), DEFAULT, FREE, ALL, KNOWING, Rung("oracle", "")]
    cost = np.linspace(0, 0.5, 201)
    for rung in (rung for rung in shown if rung in found):
        curve = Curve.of(found[rung].method, ground.both)
        colour, style = COLOURS[rung.reads], ":" if rung.kind in ("threshold", "oracle") else "-"
        right.plot(100 * cost, 100 * curve.accuracy_at(cost), style, color=colour, lw=2, label=rung.told)
        points = [found[rung].method.points[i][1] for i in found[rung].method.hull]
        spent = np.array([each.cost.sum() / ground.both.large.cost.sum() for each in points])
        right.plot(100 * spent, [100 * each.correct.mean() for each in points], ".", color=colour, ms=8)
    right.axhline(100 * ground.both.large.correct.mean(), color="#767676", lw=1)
    right.text(
        50,
        100 * ground.both.large.correct.mean(),
        "always-large ",
        ha="right",
        va="bottom",
        color="#767676",
        fontsize=9,
    )
    right.set(xlabel="large-model tokens, % of always-large", ylabel="problems solved, %", xlim=(0, 50))
    right.grid(color="#E3E3E3")
    right.legend(frameon=False, fontsize=9, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    name = "half of validation" if settings.split == "validation" else settings.split
    figure.suptitle(
        f"What a router reads matters more than how it is learned ({settings.rollouts}, {name})", fontsize=12
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the study."""
    from rich.progress import track

    settings = tyro.cli(Settings, description=__doc__)
    _trees(settings.rollouts)
    end = time.time() + 60 * settings.minutes
    open_ = [task for task in tasks(settings) if not task.done(settings.fits)]
    left = len(open_)
    if open_:
        with ProcessPoolExecutor(settings.processes, get_context("spawn")) as pool:
            fits = [pool.submit(keep, task, settings, end) for task in open_]
            left -= sum(fit.result() for fit in track(fits, "fitting"))
    text, ground, found = report(settings, left)
    write(text, settings.out and settings.out.with_suffix(".md"))
    if settings.out:
        draw(ground, found, settings, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
