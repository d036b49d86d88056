"""What settings cost and solve on validation, from which `agents.routers.budgets` chooses: on one half of it.

The other half then tells what the choice comes to. The more settings there are to choose from, the luckier is the best
of them: so only `OPERATING_POINTS` settings of a router are, and these are spread by what they cost alone. They are
those of its curve in an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.bootstrap import Estimate, estimate, resample_weights
from agents.evaluation.curves import References
from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.splits import Validation, spread
from agents.evaluation.walk import run
from agents.routers import artefact
from agents.routers.base import AnyRouter, Constant, Mixture, Threshold, is_end
from agents.routers.budgets import Measured, calibrate
from agents.routers.mlp import ConditionedMLP
from agents.routers.whole import OneModel, decides_once

SETTINGS = 64  # λ tried of a policy for a range of λ
BUDGETS = 24  # λ whose cost is written into the artefact of such a policy
LEVEL = 0.9
"""Share of new sets of problems that a stated interval is to hold."""


def measure(router: AnyRouter, outcomes: Outcomes, references: References) -> Measured:
    """Return a setting with what its outcomes come to."""
    return Measured(router, references.share(outcomes), float(outcomes.correct.mean()))


def operating_points(found: Sequence[tuple[AnyRouter, Outcomes]], references: References) -> list[Measured]:
    """Return the settings to choose from: spread over the cost by `splits.spread`, and both ends among those given.

    Args:
        found: Settings with their outcomes on the problems that choose, always-small and always-large among them.
        references: The outcomes of these two.
    """
    constants = [(router, outcomes) for router, outcomes in found if is_end(router)]
    return [
        measure(router, outcomes, references) for router, outcomes in [*constants, *spread(found, references.large)]
    ]


def settings(stored: Sequence[artefact.Storable], validation: Validation) -> list[tuple[AnyRouter, Outcomes]]:
    """Return all settings of some routers, always-small and always-large among them, run on the choice half."""
    found: list[Any] = [OneModel(0), OneModel(1)] if any(map(decides_once, stored)) else [Constant(0), Constant(1)]
    found += [each for router in stored for each in settings_of(router)]
    ran = [(router, run(router, validation.choice)) for router in found]
    schemas = sorted({router.schema for router in stored if isinstance(router, Threshold)})
    return [*ran, *(each for schema in schemas for each in validation.thresholds_on(schema).thresholds)]


def settings_of(router: Any) -> list[Any]:
    """Return the settings of a router: itself, or of one for a range of λ those for `SETTINGS` of them."""
    if not isinstance(router, ConditionedMLP):
        return [router]
    return [router.at(lam) for lam in np.geomspace(router.low, router.high, SETTINGS).tolist()]


def lam_costs(router: ConditionedMLP, validation: Validation) -> list[dict[str, float]]:
    """Return what a policy for a range of λ costs at some of them, as a share of always-large's cost (choice half).

    It goes into the artefact, where `agents.routers.budgets.LamCosts` looks up a budget that is named at run time.
    """
    lams = np.geomspace(router.low, router.high, BUDGETS)
    return falling_costs(
        lams, [run(router.at(float(lam)), validation.choice) for lam in lams], validation.references[0]
    )


def falling_costs(lams: Floats, found: Sequence[Outcomes], references: References) -> list[dict[str, float]]:
    """Return λ, share of always-large's cost and accuracy of some ascending λ.

    Shares fall as λ rises: where the measured ones do not, isotonic regression averages them.
    """
    from scipy.optimize import isotonic_regression

    shares = isotonic_regression([references.share(each) for each in found], increasing=False).x
    rows = zip(lams.tolist(), shares.tolist(), (float(each.correct.mean()) for each in found), strict=True)
    return [{"lam": lam, "share": share, "accuracy": accuracy} for lam, share, accuracy in rows]


def reached(outcomes: Outcomes, references: References, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Return the share of always-large's cost and the accuracy, with 90 % intervals for new problems.

    A new set of as many problems differs from this one as this one does from the truth, so the intervals are those of a
    difference of two such sets: sqrt(2) times as wide as those of the mean, and sqrt(n / (n - 1)) times for n problems,
    whose resamples spread that much too little.
    """
    count = len(outcomes)
    weights = resample_weights(count, seed=seed)
    wider = (2 * count / max(count - 1, 1)) ** 0.5

    def widened(value: float, samples: Floats) -> Estimate:
        found = estimate(value, samples, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        low, high = (value + wider * (end - value) for end in (found.low, found.high))
        return replace(found, low=low, high=high)

    shares = (weights @ outcomes.cost) / (weights @ references.large.cost)
    share, solved = references.share(outcomes), float(outcomes.correct.mean())
    return widened(share, shares), widened(solved, weights @ outcomes.correct)


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
    choices = operating_points(settings(stored, validation), validation.references[0])
    chosen = calibrate(choices, budget=budget, accuracy=accuracy)
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
    return router.name if is_end(router) else f"{router.name} at {router.knob}"


def _percent(each: Estimate) -> str:
    return f"{100 * each.value:.1f} % [{100 * each.low:.1f}, {100 * each.high:.1f}]"
