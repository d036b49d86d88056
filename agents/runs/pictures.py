"""The pictures of a run: how a training went, and where its routers stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from agents.evaluation.splits import Validation
from agents.evaluation.walk import run
from agents.learners.loop import Result
from agents.routers.base import AnyRouter, Threshold


def draw_training(result: Result, validation: Validation, title: str, place: Path) -> Path:
    """Draw a training and return the PNG."""
    from agents.evaluation.plots import training_curve

    levels = {}
    for name in ("best constant", "best threshold"):
        found = [
            validation.measure(run(getattr(simple, name.removeprefix("best ")), validation.choice), lam)
            for lam, simple in result.baselines.items()
        ]
        levels[name] = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
    return training_curve(result.records, levels, title, place / "training")[0]


def draw_curve(routers: Mapping[float, AnyRouter], validation: Validation, rollouts: str, folder: Path) -> None:
    """Draw the routers on the verdict half of validation, beside thresholds that the choice half chose."""
    from agents.evaluation.plots import cost_accuracy
    from agents.evaluation.table import limits, summarise

    both = validation.references[1]
    points = [(lam, run(router, validation.verdict)) for lam, router in routers.items()]
    chosen = validation.candidates.spread_over(validation.references[0].large)
    simple = [(knob, run(Threshold(knob), validation.verdict)) for knob in chosen]
    summaries = [summarise(next(iter(routers.values())).name, points, both)]
    if not all(isinstance(router, Threshold) for router in routers.values()):
        summaries.append(summarise("trim-thr", simple, both))
    caps = limits(vars(validation.verdict))
    name = f"{Path(rollouts).name}, verdict half of validation" + (f", {caps}" if caps else "")
    cost_accuracy(summaries, name, folder / "curve")
