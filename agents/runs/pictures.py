"""The pictures of a run: how a training went, and where its routers stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from agents.evaluation.splits import Validation
from agents.evaluation.table import limits, summarise
from agents.evaluation.walk import Settings, measured, run
from agents.learners.loop import Result
from agents.routers.base import AnyRouter, Threshold


def draw_training(result: Result, validation: Validation, title: str, place: Path) -> Path:
    """Draw a training and return the PNG."""
    from agents.evaluation.plots import training_curve

    levels = {}
    for name in ("constant", "threshold", "best"):
        found = [
            validation.measure(run(getattr(simple, name), validation.choice), lam)
            for lam, simple in result.baselines.items()
        ]
        levels["best simple rule" if name == "best" else f"best {name}"] = {
            key: float(np.mean([each[key] for each in found])) for key in found[0]
        }
    return training_curve(result.records, levels, title, place / "training")[0]


def draw_curve(routers: Mapping[float, AnyRouter], validation: Validation, rollouts: str, folder: Path) -> None:
    """Draw the routers on the verdict half of validation, beside thresholds that the choice half chose."""
    from agents.evaluation.plots import cost_accuracy

    choosing, both = validation.references
    found = [(router, run(router, validation.choice)) for router in routers.values()]
    settings: dict[str, Settings] = {found[0][0].name: found}
    if not all(isinstance(router, Threshold) for router in routers.values()):
        settings["trim-thr"] = validation.candidates.spread_over(choosing.large)
    summaries = [summarise(name, measured(each, choosing, validation.verdict), both) for name, each in settings.items()]
    caps = limits(vars(validation.verdict))
    name = f"{Path(rollouts).name}, verdict half of validation" + (f", {caps}" if caps else "")
    cost_accuracy(summaries, name, folder / "curve")
