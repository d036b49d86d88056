"""Figures of evaluations and of training runs, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.escape import plot
from agents.evaluation.splits import Record
from agents.evaluation.table import MethodSummary
from rollouts.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, tellable apart with colour-blind eyes; black and greys are for references.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GREY, GRID = "#222222", "#767676", "#E3E3E3"
LABELS = {
    "trim-agg": "PPO (trim-agg)",
    "trim-seq": "PPO (trim-seq)",
    "trim-thr": "threshold (trim-thr)",
    "oracle": "oracle, by hindsight",
}
"""What legends call routers whose names tell little."""
SIZE = (12.0, 6.75)  # 16:9 in inches
DPI = 200


def cost_accuracy(
    methods: Sequence[MethodSummary], dataset: str, path: Path, oracle: MethodSummary | None = None
) -> list[Path]:
    """Draw the cost-accuracy curves of methods evaluated on the same problems.

    Args:
        methods: Summaries with the same references; at most six are easy to tell apart.
        dataset: Name for the subtitle.
        path: Where to save, without suffix: ``.png`` and ``.svg`` are added.
        oracle: Summary of a clairvoyant router, drawn apart from the methods.

    Returns:
        The files written.

    Raises:
        DataError: There are no methods, or they were evaluated on different problems.
    """
    drawn = [*methods, oracle] if oracle else list(methods)
    shared = {(m.problems, m.small["accuracy"].value, m.large["accuracy"].value, m.large_cost) for m in drawn}
    if len(shared) != 1:
        raise DataError("A cost-accuracy figure needs methods summarised on the same problems and references.")
    if not methods[0].large_cost > 0:
        raise DataError("A cost-accuracy figure needs a cost of always-large above 0: it is the unit of the x-axis.")
    subtitle = f"{dataset}, {methods[0].problems:,} problems; bands: 95 % bootstrap over problems"
    figure = _figure("Accuracy against large-model tokens", subtitle)
    axes = figure.add_axes((0.075, 0.12, 0.655, 0.71))
    for i, method in enumerate(methods):
        _draw_method(axes, method, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    if oracle:
        _draw_oracle(axes, oracle)
    _limits(axes, drawn)
    _draw_references(axes, methods[0])
    if any(not point.on_curve for method in methods for point in method.points):
        axes.plot([], [], "o", markerfacecolor="white", color=GREY, markersize=5, alpha=0.5, label="not on the hull")
    _style(axes)
    axes.set_xlabel("Large-model tokens, % of always-large", fontsize=15, color=INK)
    axes.set_ylabel("Accuracy, %", fontsize=15, color=INK)
    # always-large is labelled in the same margin, so the legend takes the other end of it
    low, high = axes.get_ylim()
    large_on_top = 100 * methods[0].large["accuracy"].value > (low + high) / 2
    axes.legend(
        loc="lower left" if large_on_top else "upper left",
        bbox_to_anchor=(1.02, -0.02 if large_on_top else 1.02),
        frameon=False,
        fontsize=13 if len(drawn) <= 4 else 11,
        labelcolor=INK,
        handlelength=2.2,
    )
    return _save(figure, path)


def training_curve(records: Sequence[Record], references: Mapping[str, Record], title: str, path: Path) -> list[Path]:
    """Draw validation during training in three panels: return, accuracy, large-token share.

    Args:
        records: What each iteration, ``step``, came to: ``validation/`` and what `splits.Validation.measure` finds.
        references: What it finds of others to compare with, by name: the best constant, the best threshold.
        title: What was trained, on what.
        path: Where to save, without suffix: ``.png`` and ``.svg`` are added.

    Returns:
        The files written.
    """
    figure = _figure(title, "validation during training")
    panels = figure.subplots(3, 1, sharex=True)
    figure.subplots_adjust(left=0.085, right=0.975, bottom=0.1, top=0.8, hspace=0.14)
    rows = (
        ("Return", 1, "return"),
        ("Accuracy, %", 100, "accuracy"),
        ("Large tokens, %", 100, "share"),
    )
    for axes, (label, factor, figure_of) in zip(panels, rows, strict=True):
        styles = cycle(((GREY, "--"), (COLOURS[1], "-."), (COLOURS[2], ":")))
        for (name, level), (colour, dashes) in zip(references.items(), styles, strict=False):
            axes.axhline(factor * level[figure_of], color=colour, linestyle=dashes, linewidth=1.8, label=name)
        iteration, values = ([record[name] for record in records] for name in ("step", f"validation/{figure_of}"))
        axes.plot(iteration, factor * np.array(values), color=COLOURS[0], linewidth=2.2, label="policy")
        axes.margins(y=0.12)
        axes.set_ylabel(label, fontsize=13, color=INK)
        _style(axes)
    panels[-1].set_xlabel("Iteration", fontsize=14, color=INK)
    figure.align_ylabels(panels)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(0.98, 0.8),
        ncols=3,
        frameon=False,
        fontsize=13,
        labelcolor=INK,
    )
    return _save(figure, path)


def _figure(title: str, subtitle: str) -> Figure:
    """Return an empty figure with title and subtitle."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    figure.text(0.02, 0.955, title, fontsize=21, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 0.895, subtitle, fontsize=14, color=GREY, va="center")
    return figure


def _draw_method(axes: Axes, method: MethodSummary, colour: str, marker: str) -> None:
    """Draw the band, the curve (dotted where it is a mixture with always-large) and the operating points."""
    c, low, high = (100 * np.array(each) for each in (method.band.c, method.band.low, method.band.high))
    axes.fill_between(c, low, high, color=colour, alpha=0.14, linewidth=0)
    knots = 100 * np.array([*method.knots, (1.0, method.knots[-1][1])])  # flat after the last
    split = 100 * method.mixing_from
    mixed = ":" if method.knots[-1][0] > method.mixing_from else "-"
    for part, line in ((knots[knots[:, 0] <= split], "-"), (knots[knots[:, 0] >= split], mixed)):
        axes.plot(part[:, 0], part[:, 1], line, color=colour, linewidth=2.4, zorder=3)
    for on_curve in (True, False):
        chosen = [point.metrics for point in method.points if point.on_curve == on_curve]
        x, y = ([100 * metrics[name].value for metrics in chosen] for name in ("c", "accuracy"))
        axes.plot(
            x, y, marker, color=colour, markersize=8 if on_curve else 5, zorder=4, markeredgewidth=1.2,
            markerfacecolor=colour if on_curve else "white", markeredgecolor="white" if on_curve else colour,
            alpha=1 if on_curve else 0.5,
        )  # fmt: skip
    axes.plot([], [], "-", marker=marker, color=colour, linewidth=2.4, markersize=8, label=_label(method))


def _draw_oracle(axes: Axes, oracle: MethodSummary) -> None:
    """Draw a clairvoyant router: a line with some stars."""
    x, y = ([100 * point.metrics[name].value for point in oracle.points] for name in ("c", "accuracy"))
    axes.plot(
        x, y, "--", marker="*", markevery=(len(x) - 1) // 6 + 1, color=GREY, markersize=15, markeredgecolor="white",
        linewidth=1.6, label=_label(oracle),
    )  # fmt: skip


def _label(method: MethodSummary) -> str:
    return LABELS.get(method.name) or plot(method.name)


def _draw_references(axes: Axes, method: MethodSummary) -> None:
    """Draw always-small, always-large and the line of random mixing between them, labelled in place."""
    x, y = (100 * np.array([each[name].value for each in (method.small, method.large)]) for name in ("c", "accuracy"))
    axes.plot(x, y, "--", color=GREY, linewidth=1.5, zorder=2, label="random mixing")
    axes.plot(x, y, "o", color=INK, markersize=9, zorder=5, clip_on=False)
    axes.plot([], [], ":", color=GREY, linewidth=2.4, label="by mixing with\nalways-large")
    bold: dict[str, Any] = {"fontsize": 13, "color": INK, "fontweight": "bold"}
    axes.annotate(
        f"always-small\n{y[0]:.1f} %",
        (x[0], y[0]),
        (12, -6 if y[0] <= y[1] else 6),
        textcoords="offset points",
        va="top" if y[0] <= y[1] else "bottom",
        zorder=6,
        **bold,
    )
    # outside the axes, where points that cost more than always-large cannot run into it
    axes.plot([x[1], axes.get_xlim()[1]], [y[1], y[1]], color=GREY, linewidth=0.8, zorder=2)
    axes.text(1.02, y[1], f"always-large\n{y[1]:.1f} %", transform=axes.get_yaxis_transform(), va="center", **bold)


def _limits(axes: Axes, drawn: Sequence[MethodSummary]) -> None:
    """Leave room below for the label of always-small and to the right for points beyond always-large."""
    references = [each["accuracy"].value for method in drawn for each in (method.small, method.large)]
    points = [point.metrics for method in drawn for point in method.points]
    heights = references + [each["accuracy"].value for each in points]
    heights += [each for method in drawn for each in (*method.band.low, *method.band.high)]
    low, high = 100 * np.nanmin(heights), 100 * np.nanmax(heights)
    span = max(high - low, 1.0)
    axes.set_ylim(low - 0.14 * span, high + 0.08 * span)
    axes.set_xlim(-1.5, 100 * max([1.0, *(each["c"].value for each in points if each["c"].value > 1)]) + 1.5)


def _style(axes: Axes) -> None:
    """Give axes a light grid and no box."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=13, colors=INK, length=0)


def _save(figure: Figure, path: Path) -> list[Path]:
    """Save as PNG and SVG, without dates so that the same data give the same files."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    figure.savefig(files[0], dpi=DPI)
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(files[1], metadata={"Date": None})
    return files
