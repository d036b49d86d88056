"""The routers whose decisions the page shows: trained ones, thresholds and both constants, at some operating points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.evaluation.suite import TRIM_THR
from agents.evaluation.table import MethodSummary
from agents.routers.artefact import Artefact
from agents.routers.base import AnyRouter, Constant, Mixture, Threshold
from agents.routers.mlp import ConditionedMLP

SETTINGS = 6
"""Operating points of a method that are shown step by step, at most."""


@dataclass(frozen=True)
class Shown:
    """A router that is followed step by step.

    Attributes:
        method: Name of its method, as in the tables.
        knob: The value of the operating point that it belongs to; None for a constant.
        label: What tells it from the method's other settings.
        router: The router.
    """

    method: str
    knob: float | None
    label: str
    router: AnyRouter


def shown_routers(
    methods: Mapping[str, Sequence[Artefact]], summaries: Sequence[MethodSummary], most: int = SETTINGS
) -> list[Shown]:
    """Return the routers to follow: of each method at most `most` operating points, spread over its cost.

    A method that draws its actions (random) has no one path and is left out. Of a mixture both settings are shown.

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
            found += [Shown(summary.name, knob, f"threshold={knob:.3g}", Threshold(knob)) for knob in knobs]
    return [*found, *(Shown(each.name, None, "every step", each) for each in (Constant(0), Constant(1)))]


def spread_out(knobs: Sequence[float], most: int) -> list[float]:
    """Return at most `most` of some knobs, equally spaced in their order, first and last included."""
    if len(knobs) <= most:
        return list(knobs)
    return [knobs[i] for i in np.linspace(0, len(knobs) - 1, most).round().astype(int)]


def _trained(method: str, items: Sequence[Artefact], knob: float) -> list[Shown]:
    """Return the router of an operating point; two for a mixture."""
    for item in items:
        router = item.router
        if isinstance(router, ConditionedMLP):
            if router.low * (1 - 1e-9) <= knob <= router.high * (1 + 1e-9):
                return [Shown(method, knob, f"λ={knob:.3g}", router.at(knob))]
        elif float(router.knob.value) == knob:
            if not isinstance(router, Mixture):
                return [Shown(method, knob, _label(router), router)]
            parts = ((router.first, 1 - router.share), (router.second, router.share))
            mixed = str(router.knob)
            return [
                Shown(method, knob, f"{mixed}: {_label(part)}, for {100 * share:.0f} % of problems", part)
                for part, share in parts
            ]
    return []


def _label(router: AnyRouter) -> str:
    name = "λ" if router.knob.name == "lam" else router.knob.name
    return f"{name}={router.knob.value:.3g}"
