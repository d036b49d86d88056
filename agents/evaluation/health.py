"""Did the router earn its place? Plain words on how it stands against the best constant and the best threshold."""

from __future__ import annotations

from dataclasses import dataclass

from agents.evaluation.bootstrap import Difference, paired_returns
from agents.evaluation.outcomes import Floats, Outcomes

COLLAPSED, BEATEN, LEVEL, BETTER = "collapsed", "beaten", "level with", "better"
FEWEST = 8  # problems that a verdict needs
ONE_ACTION = 0.99


@dataclass(frozen=True)
class Health:
    """How a router stands at one λ (docs/design.md, section 6).

    Attributes:
        verdict: ``collapsed``: the same action in at least 99 % of the decisions while the best threshold is better;
            ``beaten``: by the best constant or the best threshold; ``better`` than both; else ``level with`` them.
            Better means that the paired 95 % interval of the difference in return is above 0. Below `FEWEST` problems
            always ``level with``: resamples of so few say nothing.
        sentence: The verdict in plain words, with figures.
        over_constant: Return minus that of the best constant.
        over_threshold: Return minus that of the best threshold.
        escalation_rate: Share of the decisions that escalate.
    """

    verdict: str
    sentence: str
    over_constant: Difference
    over_threshold: Difference
    escalation_rate: float

    @property
    def fine(self) -> bool:
        """Whether no remedy is called for."""
        return self.verdict in (LEVEL, BETTER)


def assess(
    router: Outcomes,
    constant: tuple[str, Outcomes],
    threshold: tuple[str, Outcomes],
    large: Outcomes,
    lam: float,
    weights: Floats,
) -> Health:
    """Compare a router with the best constant and the best threshold, paired on problems.

    Args:
        router: Its outcomes.
        constant: The best constant, with its name.
        threshold: The best threshold, likewise.
        large: Outcomes of always-large, for shares.
        lam: λ.
        weights: (R, P) from `agents.evaluation.bootstrap.resample_weights`.
    """
    over_constant = paired_returns(router, constant[1], lam, weights)
    over_threshold = paired_returns(router, threshold[1], lam, weights)
    rate = float(router.escalations.sum() / router.steps.sum())
    one_action = rate >= ONE_ACTION or rate <= 1 - ONE_ACTION
    if len(router) < FEWEST:
        verdict = LEVEL
    elif one_action and over_threshold.high < 0:
        verdict = COLLAPSED
    elif over_constant.high < 0 or over_threshold.high < 0:
        verdict = BEATEN
    elif over_constant.low > 0 and over_threshold.low > 0:
        verdict = BETTER
    else:
        verdict = LEVEL
    share = router.cost.sum() / large.cost.sum() if large.cost.sum() > 0 else 0.0
    sentence = (
        f"{_words(verdict, rate, len(router))} It solves {100 * router.correct.mean():.1f} % of the problems at "
        f"{100 * share:.1f} % of always-large's cost; return {router.returns(lam).mean():.4f}: "
        f"{_against(over_threshold, threshold[0])}, {_against(over_constant, constant[0])}."
    )
    return Health(verdict, sentence, over_constant, over_threshold, rate)


def _words(verdict: str, rate: float, problems: int) -> str:
    if problems < FEWEST:
        return f"No verdict: {problems} problems are too few, expected at least {FEWEST}."
    action = "escalates" if rate > 0.5 else "continues"
    return {
        COLLAPSED: f"COLLAPSED: it {action} whatever it sees, and a simple threshold does better. Do not use it.",
        BEATEN: "BEATEN: a constant or a simple threshold does better. Do not use it.",
        LEVEL: "Level with the best simple rule: no difference could be shown.",
        BETTER: "Better than the best constant and the best threshold.",
    }[verdict]


def _against(difference: Difference, name: str) -> str:
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] against {name}"
