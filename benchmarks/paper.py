"""The paper's experiments on rollouts, beside its figures: takeover, interventions, noisy scores, other problems.

    OMP_NUM_THREADS=1 python -m benchmarks.paper --out results/paper
    OMP_NUM_THREADS=1 python -m benchmarks.paper --minutes 3 ...          # a slice: what is fitted is kept in --kept

Every method (`benchmarks.rivals`) is fitted on training trees, its 16 operating points and their hull are chosen on
validation. The paper's figures are those of its tables and text (Kapoor et al., ICLR 2026, arXiv 2601.10245). How long
solutions take is `benchmarks.latency`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from agents.baselines.methods import BASELINES, CASCADE, QUERY, SELF_VERIFIED, Fitting
from agents.baselines.methods import fit as fit_whole
from agents.evaluation.bootstrap import Estimate, paired_curves, resample_weights
from agents.evaluation.curves import Method, Points, References
from agents.evaluation.oracle import score_oracle, step_oracle
from agents.evaluation.outcomes import Floats, Outcomes, Solutions
from agents.evaluation.walk import references, run
from agents.routers.base import Threshold
from benchmarks.methods import Data
from benchmarks.noise import damaged
from benchmarks.rivals import RIVALS, fitted, with_splits
from benchmarks.study import CURVE, Study, all_kept, average, curve_cells, heading, table, write
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

THR, AGG = "TRIM-Thr (RSD)", "TRIM-Agg"
DAMAGE = (("flips", 0.15), ("late", 0.3), ("late", 0.6))
NOISY = (THR, "TRIM-POMDP", AGG, "exact", "Arbitrage", "one-deviation advantage")
WHOLE = {each.name: each for each in BASELINES if each.group in (CASCADE, QUERY) and each.name != SELF_VERIFIED}
ELSEWHERE = (*(name for name in RIVALS if name != "takeover by exact"), *WHOLE)  # trained on the other set
CLEAN, OTHER = "quickstart", "ood"
K = 0.35
"""The threshold at which the paper counts interventions."""

# The paper: CPT(50, 80, 95 %) in % of always-large's tokens and ΔIBC.
TAKEOVER = {
    ("MATH-500", "steps"): (9.45, 15.95, 25.08, 4.75),
    ("MATH-500", "takeover"): (24.78, 33.22, 38.78, 1.10),
    ("AIME", "steps"): (23.47, 36.20, 42.89, 1.81),
    ("AIME", "takeover"): (25.04, 55.50, 67.97, 0.84),
}
NOISE = {THR: (27.63, 66.46, 83.29, 0.38), AGG: (23.14, 38.75, 44.97, 1.16)}  # OlympiadBench, noisy scores
RESCUED = (30, 17, 4, 7)  # by 1, 2, 3 and more escalations: MATH-500, TRIM-Thr
TRANSFER = {"OlympiadBench": 2.57, "Minerva": 3.12}  # ΔIBC of TRIM-Agg trained on AIME


@dataclass(frozen=True)
class Settings(Study):
    """Settings of the study."""

    kept: Path = Path("runs/paper")


@dataclass(frozen=True)
class Task:
    """One fit.

    Attributes:
        method: Of `RIVALS`, or of routers of whole problems (`WHOLE`).
        on: What it is fitted on: ``quickstart``, a kind of damage, or ``ood``.
        level: Of the damage; of ``ood`` which half of its problems, 0 or 1.
    """

    method: str
    on: str = CLEAN
    level: float = 0.0

    @property
    def name(self) -> str:
        """What it is kept as."""
        return f"{self.method}-{self.on}-{self.level:g}"


TASKS = [
    *(Task(method) for method in (*RIVALS, *WHOLE)),
    *(Task(method, *damage) for damage in DAMAGE for method in NOISY),
    *(Task(method, OTHER, half) for half in (0.0, 1.0) for method in ELSEWHERE),
]


@dataclass(frozen=True, eq=False)
class Found:
    """What a fit comes to.

    Attributes:
        validation: Its operating points where they were chosen, and
        choosing: always-small and always-large there.
        points: The same points by split.
        both: Always-small and always-large by split.
        seconds: Processor time.
    """

    validation: Points
    choosing: References
    points: dict[str, Points]
    both: dict[str, References]
    seconds: float

    def method(self, split: str) -> Method:
        """Return the points on a split, on the hull that validation chose."""
        return Method.chosen(self.points[split], self.validation, self.choosing)


def trees_of(task: Task, trees: Trees) -> tuple[Trees, tuple[str, ...]]:
    """Return the trees that a task is about, and the splits that it is measured on."""
    if task.on == CLEAN:
        return trees, ("test", OTHER)
    if task.on != OTHER:
        return damaged(trees, task.on, task.level), ("test",)
    problems = np.flatnonzero(trees.splits == OTHER)
    halves = np.array_split(np.random.default_rng(0).permutation(problems), 2)
    own, held = (halves[which] for which in (int(task.level), 1 - int(task.level)))
    parts = {"train": own[len(own) // 4 :], "validation": own[: len(own) // 4], "held": held}
    masks = {name: np.isin(np.arange(len(trees.splits)), part) for name, part in parts.items()}
    return with_splits(trees, {**masks, "test": trees.splits == "test"}), ("held", "test")


def measure(task: Task, settings: Settings) -> Found:
    """Fit a method and return what it comes to."""
    trees, splits = trees_of(task, compile_store(settings.rollouts))
    both = {split: references(decision_tables(trees, split)) for split in splits}
    if task.method in WHOLE:
        choosing = decision_tables(trees, "validation")
        whole = fit_whole(WHOLE[task.method], Fitting(decision_tables(trees, "train"), choosing))
        validation = [(each.knob, own) for each, own in zip(whole.settings, whole.choosing, strict=True)]
        points = {
            split: [(each.knob, each.run(decision_tables(trees, split))) for each in whole.settings] for split in splits
        }
        return Found(validation, references(choosing), points, both, whole.seconds)
    chosen = fitted(task.method, Data.of(trees))
    validation = [(each.knob.value, own) for each, own in chosen.points]
    points = {split: [*chosen.on(trees, split).points] for split in splits}
    return Found(validation, chosen.choosing, points, both, chosen.seconds)


@dataclass(frozen=True)
class Results:
    """All fits on the problems of a store."""

    rollouts: str
    found: Mapping[Task, Found]

    def __call__(self, method: str, on: str = CLEAN, level: float = 0.0) -> Found:
        """Return one, by the fields of its task."""
        return self.found[Task(method, on, level)]

    def crossed(self, method: str, split: str) -> tuple[Method, References]:
        """Return a method that was trained on each half of the other problems, and its references.

        On ``held`` it is on the half that it was not trained on, one after the other; elsewhere both are averaged.
        """
        parts = [self(method, OTHER, half) for half in (0.0, 1.0)]
        whole = _after if split == "held" else average
        points = _together([each.points[split] for each in parts], whole)
        validation = _together([each.validation for each in parts], _after)
        small, large = (_after([getattr(each.choosing, name) for each in parts]) for name in ("small", "large"))
        both = [each.both[split] for each in parts]
        there = References(*(whole([getattr(each, name) for each in both]) for name in ("small", "large")))
        return Method.chosen(points, validation, References(small, large)), there


def _together(several: Sequence[Points], whole: object) -> Points:
    assert callable(whole)
    return [(own[0][0], whole([outcomes for _, outcomes in own])) for own in zip(*several, strict=False)]


def _after(parts: Sequence[Outcomes]) -> Outcomes:
    ids = tuple(name for part in parts for name in part.problem_ids)
    return Outcomes(ids, *(np.concatenate([getattr(part, column) for part in parts]) for column in Outcomes.columns()))


def _cited(values: Sequence[float]) -> list[str]:
    return [*(f"{value:.1f}" for value in values[:-1]), f"{values[-1]:.2f}"]


def all_methods(results: Results, weights: Floats) -> list[str]:
    """Return all methods on the test split, and points of reference."""
    tables, rows = decision_tables(results.rollouts, "test"), []
    both = references(tables)
    for name, rival in RIVALS.items():
        found = results(name)
        rows.append([name, rival.reads, *curve_cells(found.method("test"), both, weights), f"{found.seconds:.1f}"])
    shown = {
        "oracle of scores (Δ > 0)": score_oracle(tables),
        "small step wrong, large step right": step_oracle(tables),
    }
    points = [
        f"*{name}* solves {100 * each.correct.mean():.1f} % at {100 * each.cost.sum() / both.large.cost.sum():.1f} % "
        "of always-large's tokens"
        for name, each in shown.items()
    ]
    return [
        "## All step-level methods",
        "",
        *table(["method", "reads", *CURVE, "seconds"], rows),
        "",
        f"Reference points: {'; '.join(points)}. The first, Arbitrage's own, is no upper bound: it trusts the scorer. "
        "SpecReason-like has the large model's least log-probability of a step stand for the digit that it would be "
        "asked for, and pays one large token at every step. Accepted steps alone are charged for to Arbitrage, which "
        "predicts what the large model's step would score; the released loop of its paper generates it every time.",
        "",
    ]


def takeover(results: Results, both: References, weights: Floats) -> list[str]:
    """Return the ablation of single steps."""
    rows = [[f"paper, {where}, {how}", *_cited(values)] for (where, how), values in TAKEOVER.items()]
    found = {}
    for name, label in ((THR, "steps"), ("takeover", "takeover"), ("exact", "steps, exact"),
                        ("takeover by exact", "takeover by exact")):  # fmt: skip
        found[name] = results(name).method("test")
        rows.append([f"here, {label}", *curve_cells(found[name], both, weights)])
    dearer = paired_curves(found["takeover"], found[THR], both, weights)["cpt_95_percent"]
    learnt = paired_curves(found["takeover by exact"], found["exact"], both, weights)["cpt_80_percent"]
    return [
        "## Takeover against single steps",
        "",
        "From the first escalation on the large model writes everything, and the small one is not asked any more.",
        "",
        *table(["", *CURVE], rows),
        "",
        f"With thresholds, takeover makes CPT(95 %) {_change(dearer)}; in the paper 55 % (MATH-500) and 58 % (AIME) "
        f"dearer. With a learned trigger it makes CPT(80 %) {_change(learnt)}. That a threshold loses little by taking "
        "over is a property of tinymath: the score of a whole path stays low after a mistake, so that a threshold "
        "goes on escalating anyway.",
        "",
    ]


def _change(percent: Estimate) -> str:
    word = "dearer" if percent.value > 0 else "cheaper"
    low, high = sorted((abs(percent.low), abs(percent.high)))
    if not percent.shown:
        return f"{percent.value:+.0f} % [{percent.low:+.0f}, {percent.high:+.0f}], no difference shown"
    return f"{abs(percent.value):.0f} % [{low:.0f}, {high:.0f}] {word}"


def interventions(results: Results, both: References) -> list[str]:
    """Return by how many escalations problems are rescued."""
    validation = decision_tables(results.rollouts, "validation")
    simple = Threshold(K)
    spent = run(simple, validation).cost.mean()
    found = {f"TRIM-Thr, k = {K:g}": run(simple, decision_tables(results.rollouts, "test"))}
    for name in ("TRIM-POMDP", "exact", "Arbitrage", "one-deviation advantage"):
        own = results(name)
        nearest = int(np.argmin([abs(outcomes.cost.mean() - spent) for _, outcomes in own.validation]))
        found[f"{name}, at its cost"] = own.points["test"][nearest][1]
    total = sum(RESCUED)
    rows = [["paper, MATH-500, TRIM-Thr", str(total), *(f"{100 * each / total:.0f} %" for each in RESCUED), ""]]
    for name, outcomes in found.items():
        rescued = _rescued(outcomes.solutions, both.small.solutions)
        counts = [int((rescued == each).sum()) for each in (1, 2, 3)] + [int((rescued > 3).sum())]
        share = outcomes.cost.sum() / both.large.cost.sum()
        rows.append(
            [name, str(len(rescued)), *(f"{100 * each / len(rescued):.0f} %" for each in counts), f"{100 * share:.1f}"]
        )
    return [
        "## How many escalations rescue a solution",
        "",
        "Solutions that always-small gets wrong and the router right, by their number of escalations; cost in % of "
        f"always-large's. The others are at the operating point whose cost on validation is nearest to that of "
        f"k = {K:g}.",
        "",
        *table(["", "rescued", "1", "2", "3", "more", "cost"], rows),
        "",
    ]


def _rescued(own: Solutions | None, small: Solutions | None) -> Floats:
    assert own is not None and small is not None
    return own.escalations[(own.correct == 1) & (small.correct == 0)]


def noise(results: Results, both: References, weights: Floats) -> list[str]:
    """Return what noisy scores do to curves."""
    rows = [[f"paper, OlympiadBench, {name}", "wrongly padded", *_cited(values)] for name, values in NOISE.items()]
    for kind, level in ((CLEAN, 0.0), *DAMAGE):
        for method in NOISY:
            if Task(method, kind, level) in TASKS:
                row = curve_cells(results(method, kind, level).method("test"), both, weights)
                rows.append([method, "none" if kind == CLEAN else f"{kind} {level:g}", *row])
    return [
        "## Noisy scores",
        "",
        "Fitted on damaged scores, tested on damaged scores. *Flips*: a share of the scores r becomes 1 - r. *Late*: "
        "in a share of the trees all scores are read one step too early in the path, so that errors hang together "
        "along it, as they do where inputs were padded wrongly. The paper's two rows have no clean counterpart on that "
        "set.",
        "",
        *table(["method", "damage", *CURVE], rows),
        "",
    ]


def transfer(results: Results) -> list[str]:
    """Return what methods come to on the other set of problems."""
    there = {split: references(decision_tables(results.rollouts, split)) for split in ("test", OTHER)}
    rows = []
    for method in ELSEWHERE:
        (held, both), (back, _) = (results.crossed(method, split) for split in ("held", "test"))
        away = results(method)
        for trained, tested, found, against in (
            (CLEAN, "test", away.method("test"), there["test"]),
            (OTHER, "test", back, there["test"]),
            (OTHER, OTHER, held, both),
            (CLEAN, OTHER, away.method(OTHER), there[OTHER]),
        ):
            rows.append([method, trained, tested, *curve_cells(found, against, resample_weights(len(against.small)))])
    told = " and ".join(f"{value:.2f} on {name}" for name, value in TRANSFER.items())
    return [
        "## Other problems than in training",
        "",
        "`ood` has 500 problems that are longer. Methods of `ood` were trained, and their points chosen, on half of "
        "them and tested on the other half, both ways; on `test` both are averaged. The paper trains TRIM-Agg "
        f"on AIME and reports a ΔIBC of {told}; query-level routers lose nearly all of theirs there. Vocabulary and "
        "memory of routers of whole problems are of the problems that they were trained on.",
        "",
        *table(["method", "trained on", "tested on", *CURVE], rows),
        "",
    ]


def report(results: Results) -> str:
    """Return the report."""
    both = references(decision_tables(results.rollouts, "test"))
    weights = resample_weights(len(both.small))
    lines = heading("The paper's experiments", "paper")
    lines += [
        f"Test split of `{results.rollouts}`, {len(both.small):,} problems, unless told otherwise; 16 operating "
        "points each that validation chose, one training each. Costs in % of always-large's tokens, 95 % bootstrap "
        "intervals over problems in brackets; † reached only by mixing with always-large; seconds of processor time. "
        "Rows that begin with *paper* are its figures, on other problems, models and scorers.",
        "",
        *all_methods(results, weights),
        *takeover(results, both, weights),
        *interventions(results, both),
        *noise(results, both, weights),
        *transfer(results),
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    compile_store(settings.rollouts)
    found = all_kept(measure, {task.name: task for task in TASKS}, settings)
    write(report(Results(settings.rollouts, dict(zip(TASKS, found, strict=True)))), settings.out)


if __name__ == "__main__":
    main()
