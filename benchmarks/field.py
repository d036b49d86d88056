"""The field on one table: step-level routers, cascades and query-level routers on the same trees at the same prices.

    python -m benchmarks.field                                       # on the bundled test split and on harder problems
    python -m benchmarks.field --out results/field                   # field.md and field.png
    python -m benchmarks.field --methods exact "classifier (RouteLLM)" --splits validation

Every method is fitted on training problems, its at most 16 settings are spread over the cost and its hull is chosen on
validation; no choice is made on the splits that figures are of. Needs scikit-learn (the extra ``[baselines]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import tyro

from agents.baselines.encoder import encoder
from agents.baselines.methods import (
    BASELINES,
    CASCADE,
    ENVELOPES,
    GROUPS,
    QUERY,
    REFERENCE,
    STEP,
    Baseline,
    Fitted,
    Fitting,
    Setting,
    fit_all,
)
from agents.evaluation.bootstrap import curve_band, holm, paired_means, resample_weights
from agents.evaluation.curves import Curve, Method, knots, mixture_at
from agents.evaluation.oracle import query_oracle, score_oracle, spread_oracle, step_oracle, tree_oracle
from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.table import TAKES, means_of
from agents.evaluation.walk import alone, run
from benchmarks.methods import RANGE, Data, scaled
from benchmarks.rivals import RIVALS
from benchmarks.robustness import LAMS
from benchmarks.study import CURVE, curve_cells, heading, percent, shown, table, write
from rollouts.errors import StoreError
from rollouts.store.store import locate
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

ANEW, CACHED = "prefixes read anew", "prefixes cached"
PRICES = {
    ANEW: "prices:large_in=3,large_out=15,small_in=0.1,small_out=0.4,scorer_in=0.3",
    CACHED: "prices:large_in=0.3,large_out=15,small_in=0.01,small_out=0.4,scorer_in=0.03",
}
BASELINE, ENVELOPE = "TRIM-Agg", ENVELOPES[QUERY]
AT = 80  # share of the gap, in %, for which is said what it takes
SPENT = np.array([0.2])
MOST = 1.25  # of always-large's dollars, in the picture


NOTES = {
    "SpecReason-like": "pays one large token for the look at each step, and in dollars its prefill",
    "PATS-like": "hysteresis over three modes; PATS itself has one model that draws more or fewer candidates",
}


@cache
def _charged(tables: DecisionTables, cost: str) -> DecisionTables:
    """Return the tables with what a method needs besides decoded tokens, where those are what costs."""
    if cost == tables.cost_model.name or tables.cost_model.name != "decode-only":
        return tables
    return decision_tables(tables.trees, indices=tables.indices, cost=cost)


def of_rival(name: str) -> Baseline:
    """Return a step-level method of `benchmarks.rivals`."""
    rival = RIVALS[name]

    def fit(data: Fitting) -> list[Setting]:
        trees = data.train.trees
        routers = rival.settings(replace(Data.of(trees), range=scaled(RANGE, trees)), data.seed)
        return [Setting(r.knob.value, lambda tables, r=r: run(r, _charged(tables, rival.cost))) for r in routers]

    return Baseline(name, STEP, fit, NOTES.get(name, ""))


STEP_LEVEL = (
    *(BASELINE, "exact", "TRIM-POMDP", "Arbitrage", "one-deviation advantage", "takeover"),
    *("PATS-like", "SpecReason-like", "GlimpRouter"),
)
FIELD = (*map(of_rival, STEP_LEVEL), *BASELINES)
"""The methods; another one is one entry."""


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        splits: What figures are of, a table each.
        methods: Names of methods; default: all.
        rollouts: The store.
        encoder: Folder of a model whose mean hidden state stands for a question; default: character n-grams.
        seed: Of what is drawn in fitting.
        out: Report and picture, without suffix; default: print only.
    """

    splits: tuple[str, ...] = ("test", "ood")
    methods: tuple[str, ...] = ()
    rollouts: str = "quickstart"
    encoder: Path | None = None
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """A method on a split.

    Attributes:
        name: As in tables.
        group: One of `GROUPS`.
        method: Its points and hull.
        priced: The same points in dollars, by what prefixes cost (`PRICES`); empty for references.
        returns: (P,) returns, averaged over the λ; None for references.
    """

    name: str
    group: str
    method: Method
    priced: dict[str, list[Outcomes]]
    returns: Floats | None


class Ground:
    """A split, and where choices were made."""

    def __init__(
        self,
        tables: DecisionTables,
        priced: dict[str, DecisionTables],
        choosing: DecisionTables,
        lams: Sequence[float] = LAMS,
    ) -> None:
        """Run the two models alone: what nothing is routed to costs no proposals."""
        self.tables, self.priced, self.lams = tables, priced, lams
        self.both, self.chosen_by = alone(tables), alone(choosing)
        self.dollars = {name: alone(each) for name, each in priced.items()}

    def row(self, fitted: Fitted) -> Row:
        """Return a method on the split."""
        method = fitted.measured(self.tables, self.chosen_by)
        priced = {name: [each.run(tables) for each in fitted.settings] for name, tables in self.priced.items()}
        return Row(fitted.baseline.name, fitted.baseline.group, method, priced, self._returns(fitted, method))

    def _returns(self, fitted: Fitted, method: Method) -> Floats:
        """Return (P,) returns over the λ, at each that of the setting which validation names, constants among them."""
        elsewhere = [self.chosen_by.small, self.chosen_by.large, *fitted.choosing]
        here = [self.both.small, self.both.large, *(outcomes for _, outcomes in method.points)]
        best = [int(np.argmax([each.returns(lam).mean() for each in elsewhere])) for lam in self.lams]
        found: Floats = np.mean([here[i].returns(lam) for i, lam in zip(best, self.lams, strict=True)], axis=0)
        return found

    def references(self) -> list[Row]:
        """Return the oracles."""
        oracles = {
            "query oracle": lambda lam: query_oracle(self.tables, lam),
            "query oracle, per draw": lambda lam: query_oracle(self.tables, lam, per_draw=True),
            "tree oracle": lambda lam: tree_oracle(self.tables, lam),
        }
        return [
            Row(name, REFERENCE, Method.whole(spread_oracle(oracle, self.both)), {}, None)
            for name, oracle in oracles.items()
        ]

    def takes(self, row: Row, price: str | None = None) -> Outcomes | None:
        """Return what a method comes to at `AT` % of the gap, at a price or, by default, in large tokens."""
        if price is None:
            return mixture_at(row.method, self.both, AT)
        ends = self.dollars[price]
        return mixture_at(row.method, self.both, AT, [ends.small, *row.priced[price], ends.large])


def curves(ground: Ground, rows: Sequence[Row], weights: Floats) -> list[str]:
    """Return the table of what is read off the curves, and of returns against the baseline's."""
    own = {row.name: row.returns for row in rows if row.returns is not None}
    others = [name for name in own if name != BASELINE] if BASELINE in own else []
    over = {name: paired_means(own[name], own[BASELINE], weights) for name in others}
    p = dict(zip(others, holm([over[name].p_value for name in others]), strict=True))
    lines = []
    for row in rows:
        cells = curve_cells(row.method, ground.both, weights)
        cells += map(percent, curve_band(row.method, ground.both, weights, SPENT))
        gain = over.get(row.name)
        cells += [shown(gain), f"{p[row.name]:.2g}"] if gain else ["", ""]
        name = f"**{row.name}**" if row.name in (BASELINE, *ENVELOPES.values()) else row.name
        lines.append([row.group, name, *cells])
    names = [*CURVE, "accuracy at 20 %", f"return minus {BASELINE}'s", "p (Holm)"]
    return table(["group", "method", *names], lines, left=2)


def taken(ground: Ground, rows: Sequence[Row]) -> list[str]:
    """Return the table of what recovering `AT` % of the gap takes, per problem."""
    names = list(TAKES)
    names += [f"US$ per 1,000 problems, {name} (% of always-large's)" for name in PRICES]
    lines = []
    found = [
        (row.group, row.name, ground.takes(row), [ground.takes(row, price) for price in PRICES])
        for row in rows
        if row.group != REFERENCE
    ]
    for name in ("small", "large"):
        dollars = [getattr(ground.dollars[price], name) for price in PRICES]
        found.append((REFERENCE, f"always-{name}", getattr(ground.both, name), dollars))
    for group, name, outcomes, dollars in found:
        cells = ["–"] * len(names)
        if means := means_of(outcomes):
            cells = [f"{each:.1f}" for each in means.values()]
            for price, paid in zip(PRICES, dollars, strict=True):
                share = 100 * paid.cost.mean() / ground.dollars[price].large.cost.mean()
                cells.append(f"{1000 * paid.cost.mean():.3f} ({share:.0f})")
        lines.append([group, name, *cells])
    return table(["group", "method", *names], lines, left=2)


def _knowing(ground: Ground) -> str:
    """Say what two points reach that know a step ahead; nothing where the scores or labels for them are missing."""
    said = ""
    for words, oracle in (
        ("Escalating where the large step scores higher (Arbitrage's oracle)", score_oracle),
        ("Where the small step is wrong and the large one right, by labels", step_oracle),
    ):
        with suppress(StoreError):
            outcomes = oracle(ground.tables)
            share = 100 * outcomes.cost.sum() / ground.both.large.cost.sum()
            said += f" {words}: {100 * outcomes.correct.mean():.1f} % at {share:.1f} % of the cost."
    return said


def report(settings: Settings) -> tuple[str, dict[str, tuple[Ground, list[Row]]]]:
    """Return the report, and what the picture shows."""
    trees = compile_store(settings.rollouts)
    train, choosing = decision_tables(trees, "train"), decision_tables(trees, "validation")
    lams = scaled(LAMS, trees)
    wanted = [method for method in FIELD if not settings.methods or method.name in settings.methods]
    fitted, lacking = fit_all(
        wanted, Fitting(train, choosing, settings.encoder and encoder(settings.encoder), settings.seed)
    )
    lines = heading("The field", f"field --rollouts {settings.rollouts} --splits {' '.join(settings.splits)}")
    lines += [
        f"Fitted on the training split of `{settings.rollouts}`; settings, hulls and the members of the envelope were "
        f"chosen on validation. Costs in % of always-large's tokens. Intervals: 95 %, over problems. Return: mean over "
        f"eight λ ({', '.join(f'{lam:g}' for lam in lams)}), at each the setting that validation names; p: sign flips "
        "of paired differences, Holm over the table. † reached only by mixing with always-large.",
        "",
        "**What is charged.** A question that is sent to the large model costs its solution and no proposals. A "
        "cascade pays the small model's solution, whoever reads it, and with a retry the large model's whole solution: "
        "the large tokens do not show that, the second table of each split does. Serial calls wait for each other: a "
        "step, or a whole solution, of either model, a scoring; those of query-level routers and cascades are long "
        f"ones. US$ at assumed prices per million tokens (`{PRICES[ANEW]}`), and with a tenth for what is read, as "
        "where prefixes are cached: what is written alone reads its prompt once, an escalation reads its whole prefix. "
        "Query-level routers cannot be capped by escalations or tokens; cascades cannot stream.",
        "",
    ]
    shown = dict[str, tuple[Ground, list[Row]]]()
    for split in settings.splits:
        part = trees if split in trees.splits else compile_store(settings.rollouts, split=split)
        priced = {name: decision_tables(part, split, cost=prices) for name, prices in PRICES.items()}
        ground = Ground(decision_tables(part, split), priced, choosing, lams)
        rows = [*map(ground.row, fitted), *ground.references()]
        weights = resample_weights(len(ground.both.small))
        small, large = (100 * each.correct.mean() for each in (ground.both.small, ground.both.large))
        lines += [
            f"## `{split}`: {len(weights[0]):,} problems",
            "",
            f"Always-small solves {small:.1f} %, always-large {large:.1f} %.{_knowing(ground)}",
            "",
            *curves(ground, rows, weights),
            "",
            f"What {AT} % of the gap takes, per problem:",
            "",
            *taken(ground, rows),
            "",
        ]
        shown[split] = ground, rows
    lines += [
        "## Notes",
        "",
        *(f"- {each.name}: {each.note}." for each in (one.baseline for one in fitted) if each.note),
    ]
    place = str(locate(settings.rollouts))  # of this machine
    lines += [f"- {each.replace(place, settings.rollouts)}" for each in lacking]
    seconds = {each.baseline.name: each.seconds for each in fitted}
    parts = [f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.5]
    lines += [
        f"- Fitting and laying out all settings took {sum(seconds.values()):.0f} s of processor time, one thread: "
        f"{', '.join([*parts, 'what is not named less than half a second each'])}. The networks that predict accuracy "
        "and cost are fitted once, with the first method that needs them.",
        "",
    ]
    return "\n".join(lines), shown


COLOURS = {STEP: "#0072B2", CASCADE: "#E69F00", QUERY: "#D55E00", REFERENCE: "#767676"}
STYLES = ("-", "--", ":", "-.")


def drawn(ground: Ground, rows: Sequence[Row]) -> list[Row]:
    """Return what the picture shows: of query-level routers the envelope alone."""
    names = (BASELINE, "exact", "TRIM-Thr (RSD)", "AutoMix-PRM (last)", "vote (SATER)", ENVELOPE)
    kept = [row for name in names for row in rows if row.name == name]
    return [*kept, *(row for row in rows if row.name in ("query oracle", "tree oracle"))]


def in_dollars(ground: Ground, row: Row) -> tuple[Floats, Floats]:
    """Return the curve in large tokens at its price: dollars as a share of always-large's, and accuracy, at its knots.

    Where validation puts always-large not on the hull, more money buys nothing after the last point, as on the curve.
    """
    ends = ground.dollars[CACHED]
    paid = [ends.small, *row.priced[CACHED], ends.large]
    reached = [ground.both.small, *(outcomes for _, outcomes in row.method.points), ground.both.large]
    places = knots(row.method, ground.both)
    x = [float(paid[i].cost.mean() / ends.large.cost.mean()) for i in places]
    y = [float(reached[i].correct.mean()) for i in places]
    if not row.method.large:
        x[-1], y[-1] = max(x[-2], MOST), y[-2]
    return np.array(x), np.array(y)


def draw(shown: dict[str, tuple[Ground, list[Row]]], path: Path) -> None:
    """Draw accuracy over large tokens and over dollars, for the first split."""
    from matplotlib.figure import Figure

    split, (ground, rows) = next(iter(shown.items()))
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    used = dict.fromkeys(GROUPS, 0)
    cost = np.linspace(0, 1, 201)
    for row in drawn(ground, rows):
        style = {"color": COLOURS[row.group], "ls": STYLES[used[row.group] % len(STYLES)], "lw": 2}
        used[row.group] += 1
        curve = Curve.of(row.method, ground.both)
        left.plot(100 * cost, 100 * curve.accuracy_at(cost), label=row.name, **style)
        if row.priced:
            x, y = in_dollars(ground, row)
            right.plot(100 * x, 100 * y, marker="o", ms=3, **style)
    for axes, what in (
        (left, "large-model tokens, % of always-large's"),
        (right, f"US$ ({CACHED}), % of always-large's"),
    ):
        axes.set(xlabel=what)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3")
        axes.set_axisbelow(True)
    left.set(ylabel="problems solved, %", xlim=(0, 100))
    right.set(xlim=(0, 100 * MOST))
    left.legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(f"The field ({split}, {len(ground.both.small):,} problems)")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    text, shown = report(settings)
    write(text, settings.out)
    if settings.out:
        draw(shown, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
