"""The routers whose decisions the page shows: trained ones, thresholds and both constants, at some operating points."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.evaluation.suite import TRIM_THR
from agents.evaluation.table import MethodSummary
from agents.routers.artefact import Artefact
from agents.routers.base import Constant, Mixture, Threshold, schemas_of
from agents.routers.mlp import ConditionedMLP
from agents.routers.whole import decides_once
from trim_env.costs import sources_of
from trim_env.features import schema_named

SETTINGS = 6
"""Operating points of a method that are shown step by step, at most."""


@dataclass(frozen=True)
class Shown:
    """A router that is followed step by step.

    Attributes:
        method: Name of its method, as in the tables.
        knob: The value of the operating point that it belongs to; None for a constant.
        label: What tells it from the method's other settings.
    """

    method: str
    knob: float | None
    label: str
    router: Any


def shown_routers(
    methods: Mapping[str, Sequence[Artefact]], summaries: Sequence[MethodSummary], most: int = SETTINGS
) -> list[Shown]:
    """Return the routers to follow: of each method at most `most` operating points, spread over its cost.

    A method that draws its actions (random) has no one path and is left out, and so is one of whole problems, which
    decides at no step. Of a mixture both settings are shown.

    Args:
        methods: Trained routers, by the name of the method.
        summaries: Of the trained methods and of thresholds.
        most: Operating points of a method.
    """
    found: list[Shown] = []
    for summary in summaries:
        knobs = spread_out([point.knob for point in summary.points], most)
        if summary.name in methods:
            found += [each for knob in knobs for each in _trained(summary.name, methods[summary.name], knob)]
        elif summary.name.startswith(TRIM_THR):
            found += [Shown(summary.name, knob, _label("threshold", knob), Threshold(knob)) for knob in knobs]
    return [*found, *(Shown(each.name, None, "every step", each) for each in (Constant(0), Constant(1)))]


def spread_out(knobs: Sequence[float], most: int) -> list[float]:
    """Return at most `most` of some knobs, equally spaced in their order, first and last included."""
    if len(knobs) <= most:
        return list(knobs)
    return [knobs[i] for i in np.linspace(0, len(knobs) - 1, most).round().astype(int)]


def setting(items: Sequence[Artefact], knob: float, scorer: str) -> dict[str, str | None]:
    """Return how an operating point is called, and the command that serves it; None where no router is stored.

    Args:
        items: The stored routers of the method; none of thresholds that an evaluation swept.
        knob: Of the operating point.
        scorer: Score table, or column of one, that scores come from.
    """
    if (item := _stored(items, knob)) is None:
        return {"label": _label("threshold", knob), "serve": None}
    flags = ["--policy", item.place]
    if isinstance(item.router, ConditionedMLP):
        name = "lam"
        short = f"{knob:.6g}"
        flags += ["--lam", short if item.router.holds(float(short)) else repr(knob)]
    else:
        name = item.router.knob.name
    if not str(item.about.get("small", "")).startswith("tinymath-"):
        flags += ["--models", "models.toml"]
    urls = {"small": 8001, "large": 8002}
    read = () if decides_once(item.router) else schemas_of(item.router)
    if any("scorer" in sources_of(schema_named(schema), scorer) for schema in read):
        urls["prm"] = 8003
    flags += [word for role, port in urls.items() for word in (f"--{role}", f"http://localhost:{port}/v1")]
    return {"label": _label(name, knob), "serve": shlex.join(["python", "-m", "agents", "serve", *flags])}


def _stored(items: Sequence[Artefact], knob: float) -> Artefact | None:
    """Return the stored router of an operating point."""

    def fits(router: Any) -> bool:
        return router.holds(knob) if isinstance(router, ConditionedMLP) else float(router.knob.value) == knob

    return next((item for item in items if fits(item.router)), None)


def _trained(method: str, items: Sequence[Artefact], knob: float) -> list[Shown]:
    """Return the router of an operating point; two for a mixture."""
    if (item := _stored(items, knob)) is None or decides_once(item.router):
        return []
    router = item.router
    if isinstance(router, ConditionedMLP):
        return [Shown(method, knob, _label("lam", knob), router.at(knob))]
    if not isinstance(router, Mixture):
        return [Shown(method, knob, _label(router.knob.name, router.knob.value), router)]
    return [
        Shown(
            method,
            knob,
            f"{router.knob}: {_label(part.knob.name, part.knob.value)}, for {100 * share:.0f} % of problems",
            part,
        )
        for part, share in ((router.first, 1 - router.share), (router.second, router.share))
    ]


def _label(name: str, value: float) -> str:
    return f"{'λ' if name == 'lam' else name}={value:.3g}"
