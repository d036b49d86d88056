"""What settings cost and solve on validation, from which `agents.routers.budgets` chooses: on one half of it.

The other half then tells what the choice comes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import Estimate, resample_weights
from agents.evaluation.curves import References
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Validation
from agents.evaluation.walk import run
from agents.routers import artefact
from agents.routers.base import AnyRouter, Constant, Mixture, Threshold
from agents.routers.budgets import Measured, calibrate
from agents.routers.mlp import ConditionedMLP
from rollouts.errors import ConfigError

SETTINGS = 64  # λ tried of a policy for a range of λ
BUDGETS = 24  # λ whose cost is written into the artefact of such a policy
LEVEL = 0.9
"""Share of new sets of problems that a stated interval is to hold."""


def measure(router: AnyRouter, outcomes: Outcomes, references: References) -> Measured:
    """Return a setting with what its outcomes come to."""
    share = float(outcomes.cost.sum() / references.large.cost.sum())
    return Measured(router, share, float(outcomes.correct.mean()))


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


def lam_costs(router: ConditionedMLP, validation: Validation) -> list[dict[str, float]]:
    """Return what a policy for a range of λ costs at some of them, as a share of always-large's cost (choice half).

    It goes into the artefact, where `agents.routers.budgets.LamCosts` looks up a budget that is named at run time.
    """
    rows = []
    for lam in np.geomspace(router.low, router.high, BUDGETS).tolist():
        setting = router.at(lam)
        found = measure(setting, run(setting, validation.choice), validation.references[0])
        rows.append({"lam": lam, "share": found.share, "accuracy": found.accuracy})
    return rows


def reached(outcomes: Outcomes, references: References, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Return the share of always-large's cost and the accuracy, with 90 % intervals for new problems.

    A new set of as many problems differs from this one as this one does from the truth, so the intervals are those of a
    difference of two such sets: sqrt(2) times as wide as those of the mean.
    """
    weights = resample_weights(len(outcomes), seed=seed)

    def widened(value: float, samples: NDArray[Any]) -> Estimate:
        defined = samples[np.isfinite(samples)]
        ends = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high = (float(value + 2**0.5 * (end - value)) for end in ends)
        return Estimate(value, low, high, 1 - len(defined) / len(samples))

    shares = (weights @ outcomes.cost) / (weights @ references.large.cost)
    share = float(outcomes.cost.sum() / references.large.cost.sum())
    return widened(share, shares), widened(float(outcomes.correct.mean()), weights @ outcomes.correct)


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
    measured = [
        measure(router, run(router, validation.choice), validation.references[0])
        for router in settings(stored, validation)
    ]
    chosen = calibrate(measured, budget=budget, accuracy=accuracy)
    target, value = ("budget", budget) if budget is not None else ("accuracy", accuracy)
    assert value is not None  # calibrate has checked
    outcomes = run(chosen, validation.verdict)
    share, solved = reached(outcomes, validation.references[1])
    place = folder / f"{target}-{value:g}" / "policy"
    found = {"target": target, "value": value, "share": share.value, "accuracy": solved.value}
    if not (place / "policy.json").exists():
        artefact.save(chosen, place, {**origin, "calibration": found})
    of = " of always-large's cost" if target == "budget" else ""
    sentence = (
        f"For {'a' if of else 'an'} {target} of {100 * value:g} %{of}: {_setting(chosen)}. On {len(outcomes)} "
        f"problems that it was not chosen on it spends {_percent(share)} of always-large's cost and solves "
        f"{_percent(solved)} (brackets hold {100 * LEVEL:g} % of new sets of as many problems)."
    )
    (place.parent / "report.txt").write_text(sentence + "\n", encoding="utf-8")
    return sentence


def _setting(router: AnyRouter | Mixture) -> str:
    if isinstance(router, Mixture):
        one, other = _setting(router.first), _setting(router.second)
        return f"{other} for {100 * router.share:.0f} % of the problems, {one} for the others"
    return router.name if isinstance(router, Constant) else f"{router.name} at {router.knob}"


def _percent(each: Estimate) -> str:
    return f"{100 * each.value:.1f} % [{100 * each.low:.1f}, {100 * each.high:.1f}]"
