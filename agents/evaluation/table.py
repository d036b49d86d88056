"""Summaries of methods as plain values, and their tables: terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.escape import csv_cell, markdown, terminal
from agents.evaluation.bootstrap import (
    RESAMPLES,
    Estimate,
    curve_band,
    curve_estimates,
    estimates,
    resample_weights,
)
from agents.evaluation.curves import (
    BUDGETS,
    CPT_TARGETS,
    Curve,
    EscalationGain,
    Method,
    References,
    gain_by_escalations,
    point_metrics,
)
from agents.evaluation.outcomes import Outcomes
from rollouts.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

MIXING_MARK = "†"
NOTES = (
    "95 % bootstrap intervals over problems in brackets; costs in % of always escalating.",
    "Between two operating points each problem goes to one of both at random, as for a budget (train.py --budget).",
    f"{MIXING_MARK} reached only by mixing with always-large, beyond the method's last operating point on the curve.",
)


@dataclass(frozen=True)
class PointSummary:
    """One operating point: metrics with intervals, means per problem.

    Attributes:
        knob: λ, threshold or budget.
        on_curve: Whether it is on the hull that validation chose, with 0 < c <= 1; others are reported only.
        metrics: ``accuracy``, ``c``, ``pgr``, ``ibc_gain`` (see `curves.point_metrics`).
        total_tokens: Tokens that both models decoded, discarded ones included.
        discarded_tokens: Tokens of the small model that escalations threw away.
        gain_by_escalations: Accuracy gained over always-small, by a solution's number of escalations; empty where
            a router draws.
    """

    knob: float
    on_curve: bool
    metrics: dict[str, Estimate]
    large_tokens: float
    total_tokens: float
    discarded_tokens: float
    escalations: float
    steps: float
    gain_by_escalations: tuple[EscalationGain, ...]


@dataclass(frozen=True)
class Band:
    """Accuracy of a curve at some costs with its pointwise 95 % band, each (L,)."""

    c: tuple[float, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class MethodSummary:
    """Everything that tables and plots say of one method on one set of problems.

    Attributes:
        large_cost: Mean cost per problem of always escalating, in the unit of the cost model.
        metrics: Metrics of the curve (see `curves.curve_metrics`); for a method with one operating point also
            those of the point.
        by_mixing: The ``cpt_..`` that the method reaches only by mixing with always-large.
        mixing_from: c beyond which the curve is such a mixture.
        knots: (c, accuracy) of the curve's corners; always-large is one of them if it is on the hull.
        band: The curve with its 95 % band.
    """

    name: str
    problems: int
    resamples: int
    seed: int
    small: dict[str, Estimate]
    large: dict[str, Estimate]
    large_cost: float
    metrics: dict[str, Estimate]
    by_mixing: tuple[str, ...]
    mixing_from: float
    knots: tuple[tuple[float, float], ...]
    band: Band
    points: tuple[PointSummary, ...]


@dataclass(frozen=True)
class FieldRow:
    """A method among those of others.

    Attributes:
        group: ``step-level``, ``cascade`` or ``query-level``.
        by_mixing: The ``cpt_..`` that it reaches only by mixing with always-large.
        takes: Means per problem where it recovers 80 % of the gap (`TAKES`); None if it never does.
    """

    name: str
    group: str
    metrics: dict[str, Estimate]
    by_mixing: tuple[str, ...]
    takes: dict[str, float] | None


def means_of(outcomes: Outcomes | None) -> dict[str, float] | None:
    """Return the means of what is spent (`TAKES`), where it is known."""
    if outcomes is None or outcomes.scorer_calls is None:
        return None
    return {name: float(getattr(outcomes, column).mean()) for name, column in TAKES.items()}


TAKES = {
    "large tokens": "large_tokens",
    "small tokens": "small_tokens",
    "discarded": "discarded_tokens",
    "scorer calls": "scorer_calls",
    "serial calls": "serial_calls",
}
"""Fields of `Outcomes` by their heads in tables."""
FIELD_NOTE = (
    "Last columns: what 80 % of the gap takes, per problem. Query-level routers decide before anything is generated; a "
    "cascade pays the small model's solution, whoever reads it and, to start again, the large model's whole solution. "
    "Serial calls wait for each other, a step or a whole solution each. No cap on escalations binds either."
)


def field_rows(rows: Sequence[FieldRow]) -> list[list[str]]:
    """Return the table of the field as text, the first row a header."""
    shown = [row for row in ROWS if row[0] in ("cpt_50", "cpt_80", "cpt_95", "delta_ibc", "accuracy_at_20")]
    table = [["Group", "Method", *(_short(label) for _, label, _ in shown), *TAKES]]
    for row in rows:
        cells = [_metric_cell(row, name, style) for name, _, style in shown]
        spent = [f"{each:,.1f}" for each in row.takes.values()] if row.takes else ["–"] * len(TAKES)
        table.append([row.group, row.name, *cells, *spent])
    return table


def summarise(
    name: str, method: Method, references: References, seed: int = 0, resamples: int = RESAMPLES
) -> MethodSummary:
    """Evaluate a method by its operating points; the same seed pairs the resamples of several methods.

    Raises:
        DataError: There are no points, or they are on other problems than the references.
    """
    points = method.points
    if not points:
        raise DataError(f"{name}: no operating points to summarise.")
    weights = resample_weights(len(references.small), resamples, seed)
    curve = Curve.of(method, references)
    metrics = curve_estimates(method, references, weights)

    def point_estimates(outcomes: Outcomes) -> dict[str, Estimate]:
        return estimates(lambda chosen: point_metrics(outcomes, references, chosen), weights)

    details = [
        _point(knob, outcomes, i in method.hull, point_estimates(outcomes), references.small)
        for i, (knob, outcomes) in enumerate(points)
    ]
    if len(points) == 1:
        metrics = details[0].metrics | metrics
    knots = np.unique(np.stack([curve.cost, curve.accuracy], axis=1), axis=0)
    knots = knots[~(knots[:, 0] > curve.end)]
    c = np.union1d(np.linspace(0, 1, 101), knots[np.isfinite(knots[:, 0]), 0])
    band = curve_band(method, references, weights, c)
    return MethodSummary(
        name=name,
        problems=len(references.small),
        resamples=resamples,
        seed=seed,
        small=point_estimates(references.small),
        large=point_estimates(references.large),
        large_cost=float(curve.large_cost),
        metrics=metrics,
        by_mixing=tuple(f"cpt_{x}" for x in CPT_TARGETS if curve.by_mixing(x)),
        mixing_from=float(curve.mixing_from),
        knots=tuple((float(cost), float(accuracy)) for cost, accuracy in knots),
        band=Band(tuple(c.tolist()), *(tuple(getattr(each, end) for each in band) for end in ("value", "low", "high"))),
        points=tuple(sorted(details, key=lambda point: point.metrics["c"].value)),
    )


def _point(
    knob: float, outcomes: Outcomes, on_hull: bool, metrics: dict[str, Estimate], small: Outcomes
) -> PointSummary:
    return PointSummary(
        knob=float(knob),
        on_curve=on_hull and 0 < metrics["c"].value <= 1,
        metrics=metrics,
        large_tokens=float(outcomes.large_tokens.mean()),
        total_tokens=float((outcomes.large_tokens + outcomes.small_tokens).mean()),
        discarded_tokens=float(outcomes.discarded_tokens.mean()),
        escalations=float(outcomes.escalations.mean()),
        steps=float(outcomes.steps.mean()),
        gain_by_escalations=gain_by_escalations(outcomes, small),
    )


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _ratio(x: float) -> str:
    return f"{round(x, 2) + 0.0:.2f}"  # no -0.00


def _cost(x: float) -> str:
    return f"{x:,.1f}" if abs(x) >= 10 else f"{x:.3g}"


ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy", "Accuracy, %", _percent),
    ("c", "Cost, %", _percent),
    ("pgr", "PGR, %", _percent),
    ("ibc_gain", "IBC, gain over always-large", _ratio),
    *((f"cpt_{x}", f"CPT({x} %), %", _percent) for x in CPT_TARGETS),
    *((f"cpt_{x}_cost", f"CPT({x} %), cost per problem", _cost) for x in CPT_TARGETS),
    ("delta_ibc", "ΔIBC", _ratio),
    *((f"accuracy_at_{b}", f"Accuracy at {b} % cost, %", _percent) for b in BUDGETS),
    *((f"pgr_at_{b}", f"PGR at {b} % cost, %", _percent) for b in BUDGETS),
)
"""(metric, label, format) of the rows of the table of methods."""
HEADLINES = ("cpt_50", "cpt_80", "cpt_95", "delta_ibc", "accuracy_at_10", "accuracy_at_20", "accuracy_at_30")


def _short(label: str) -> str:
    return label.replace("Accuracy at ", "acc @ ").replace(" cost, %", "")


def _cell(each: Estimate | None, style: Callable[[float], str] = _percent, mark: str = "") -> str:
    """Write an estimate: value, interval, marks."""
    if each is None:
        return "–"
    if math.isnan(each.value):
        return "undefined"
    share = f" (undefined in {100 * each.undefined:.1f} % of resamples)" if each.undefined else ""
    return f"{style(each.value)} [{style(each.low)}, {style(each.high)}]{mark}{share}"


def _metric_cell(summary: MethodSummary | FieldRow, metric: str, style: Callable[[float], str]) -> str:
    mark = f" {MIXING_MARK}" if metric in _marked(summary) else ""
    return _cell(summary.metrics.get(metric), style, mark)


def method_rows(summaries: Sequence[MethodSummary]) -> list[list[str]]:
    """Return the table of methods as text: a header, then one row for each metric that some method has."""
    table = [["Metric", *(summary.name for summary in summaries)]]
    for metric, label, style in ROWS:
        if any(metric in summary.metrics for summary in summaries):
            table.append([label, *(_metric_cell(summary, metric, style) for summary in summaries)])
    return table


def headline_rows(summaries: Sequence[MethodSummary]) -> list[list[str]]:
    """Return a table that fits a terminal: a row for each method, the interval below each value."""
    rows = [row for row in ROWS if row[0] in HEADLINES]
    table = [["", *(_short(label) for _, label, _ in rows)]]
    for summary in summaries:
        cells = (_metric_cell(summary, metric, style) for metric, _, style in rows)
        table.append([summary.name, *(cell.replace(" [", "\n[") for cell in cells)])
    return table


def _marked(summary: MethodSummary | FieldRow) -> set[str]:
    """Return the metrics that a method reaches only by mixing."""
    return {name + unit for name in summary.by_mixing for unit in ("", "_cost")}


def point_rows(summary: MethodSummary) -> list[list[str]]:
    """Return the table of a method's operating points as text; tokens, escalations and steps are means per problem."""
    header = ["Knob", "Cost, %", "Accuracy, %", "Large tokens", "Total tokens", "Discarded", "Escalations", "Steps"]
    rows = [header]
    for point in summary.points:
        means = (point.large_tokens, point.total_tokens, point.discarded_tokens, point.escalations, point.steps)
        cost = f"{100 * point.metrics['c'].value:.1f}" + ("" if point.on_curve else " (not on the hull)")
        accuracy = _cell(point.metrics["accuracy"])
        rows.append([f"{point.knob:.4g}", cost, accuracy, *(f"{mean:,.1f}" for mean in means)])
    return rows


def limits(subject: Mapping[str, Any]) -> str:
    """Name the caps that bind all routers but always-large, from ``max_escalations`` and ``max_large_tokens``."""
    units = {"max_escalations": "escalations", "max_large_tokens": "large-model tokens"}
    caps = [f"{subject[name]} {unit}" for name, unit in units.items() if subject.get(name) is not None]
    return f"at most {' and '.join(caps)}" if caps else ""


def caption(summaries: Sequence[MethodSummary], caps: str = "") -> str:
    """Say on how many problems the numbers rest, what the references reach, and what caps there are (`limits`)."""
    first = summaries[0]
    small, large = (_cell(reference["accuracy"]) for reference in (first.small, first.large))
    told = f" Every router but always-large: {caps} per problem." if caps else ""
    return f"{first.problems:,} problems; accuracy of always-small {small} %, of always-large {large} %.{told}"


def rich_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table for the terminal of `method_rows` or `point_rows`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(Text(terminal(name)), justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(Text(terminal(row[0])), *map(Text, row[1:]))
    return table


def to_markdown(summaries: Sequence[MethodSummary], caps: str = "", field: Sequence[FieldRow] = ()) -> str:
    """Return tables of methods, of the field and of each method's operating points; name caps (`limits`)."""
    (metric, *names), *rows = method_rows(summaries)
    parts = [
        caption(summaries, caps),
        _markdown_table([[metric, *map(markdown, names)], *rows]),
        "\n".join(f"{note}\\" for note in NOTES)[:-1],
    ]
    if field:
        header, *rows = field_rows(field)
        named = [[group, markdown(name), *cells] for group, name, *cells in rows]
        parts += ["### The field", _markdown_table([header, *named]), FIELD_NOTE]
    for summary in summaries:
        parts += [f"### {markdown(summary.name)}", _markdown_table(point_rows(summary))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of Markdown, the first of them a header, as a table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def to_csv(summaries: Sequence[MethodSummary]) -> str:
    """Return one row for each method and metric, in the units of `metrics`; undefined values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "metric", "value", "low", "high", "undefined", "by_mixing"])
    for summary in summaries:
        for name, each in summary.metrics.items():
            numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in (each.value, each.low, each.high, each.undefined)]
            writer.writerow([csv_cell(summary.name), name, *numbers, str(name in _marked(summary)).lower()])
    return text.getvalue()
