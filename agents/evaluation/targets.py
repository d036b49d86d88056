"""From trained routers to one that meets a budget or an accuracy, chosen on one half of validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.bootstrap import Estimate
from agents.evaluation.budgets import LEVEL, calibrate, reached
from agents.evaluation.splits import Validation
from agents.evaluation.walk import run
from agents.routers import artefact
from agents.routers.base import AnyRouter, Constant, Mixture, Threshold
from agents.routers.mlp import ConditionedMLP
from rollouts.errors import ConfigError

SETTINGS = 64  # λ tried of a policy for a range of λ
BUDGETS = 24  # λ whose cost is written into the artefact of such a policy


def settings(stored: Sequence[artefact.Storable], validation: Validation) -> list[AnyRouter]:
    """Return all settings of some routers, always-small and always-large among them."""
    found: list[AnyRouter] = [Constant(0), Constant(1)]
    for router in stored:
        if isinstance(router, ConditionedMLP):
            found += [router.at(float(lam)) for lam in np.geomspace(router.low, router.high, SETTINGS)]
        elif isinstance(router, Mixture):
            raise ConfigError("A mixture is calibrated already.")
        else:
            found.append(router)
    if any(isinstance(router, Threshold) for router in stored):
        found += [router for router, _ in validation.candidates.thresholds]
    return found


def budgets(router: ConditionedMLP, validation: Validation) -> list[dict[str, float]]:
    """Return what a policy for a range of λ costs at some of them, as a share of always-large's cost (choice half).

    It goes into the artefact, where a budget that is named at run time is looked up (`agents.deploy.policy.Policy.at`).
    """
    large = float(validation.references[0].large.cost.sum())
    lams = [float(lam) for lam in np.geomspace(router.low, router.high, BUDGETS)]
    found = [run(router.at(lam), validation.choice) for lam in lams]
    return [
        {"lam": lam, "share": float(each.cost.sum()) / large, "accuracy": float(each.correct.mean())}
        for lam, each in zip(lams, found, strict=True)
    ]


def meet_target(
    stored: Sequence[artefact.Storable],
    validation: Validation,
    folder: Path,
    origin: dict[str, Any],
    budget: float | None,
    accuracy: float | None,
) -> str:
    """Choose the setting, or the mixture of two, that meets a target; store it; say what it comes to.

    Args:
        stored: Trained routers.
        validation: Its choice half chooses, its verdict half tells.
        folder: The run's folder; the router goes into ``budget-0.2/policy`` or the like.
        origin: What its artefact says of where it comes from.
        budget: Share of always-large's cost, or
        accuracy: accuracy at the least cost.

    Raises:
        ConfigError: No setting meets the target.
    """
    candidates = [(router, run(router, validation.choice)) for router in settings(stored, validation)]
    chosen = calibrate(candidates, validation.references[0], budget=budget, accuracy=accuracy)
    outcomes = run(chosen.router, validation.verdict)
    share, solved = reached(outcomes, validation.references[1])
    place = folder / f"{chosen.target}-{chosen.value:g}" / "policy"
    found = {"target": chosen.target, "value": chosen.value, "share": share.value, "accuracy": solved.value}
    if not (place / "policy.json").exists():
        artefact.save(chosen.router, place, {**origin, "calibration": found})
    sentence = (
        f"For {_target(chosen.target, chosen.value)}: {_setting(chosen.router)}. On {len(outcomes)} problems that it "
        f"was not chosen on it spends {_percent(share)} of always-large's cost and solves {_percent(solved)} (brackets "
        f"hold {100 * LEVEL:g} % of new sets of as many problems)."
    )
    (place.parent / "report.txt").write_text(sentence + "\n", encoding="utf-8")
    return sentence


def _target(name: str, value: float) -> str:
    if name == "budget":
        return f"a budget of {100 * value:g} % of always-large's cost"
    return f"an accuracy of {100 * value:g} %"


def _setting(router: AnyRouter | Mixture) -> str:
    if isinstance(router, Mixture):
        one, other = _setting(router.first), _setting(router.second)
        return f"{other} for {100 * router.share:.0f} % of the problems, {one} for the others"
    return router.name if isinstance(router, Constant) else f"{router.name} at {router.knob}"


def _percent(each: Estimate) -> str:
    return f"{100 * each.value:.1f} % [{100 * each.low:.1f}, {100 * each.high:.1f}]"
