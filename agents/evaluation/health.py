"""Did the router earn its place? Plain words on how it stands against the best of simple rules."""

from __future__ import annotations

from collections.abc import Mapping
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
        verdict: ``collapsed``: the same action in at least 99 % of the decisions while a simple rule is better;
            ``beaten``: by a simple rule; ``better`` than all of them; else ``level with`` them. Better means that the
            paired 95 % interval of the difference in return is above 0. Below `FEWEST` problems always ``level with``:
            resamples of so few say nothing.
        sentence: The verdict in plain words, with figures.
        over: Return minus that of each simple rule, by what the rule is called.
    """

    verdict: str
    sentence: str
    over: dict[str, Difference]
    escalation_rate: float

    @property
    def fine(self) -> bool:
        """Whether no remedy is called for."""
        return self.verdict in (LEVEL, BETTER)


def assess(router: Outcomes, rules: Mapping[str, Outcomes], large: Outcomes, lam: float, weights: Floats) -> Health:
    """Compare a router with simple rules, the best one first, on resamples (R, P) of the problems."""
    over = {name: paired_returns(router, outcomes, lam, weights) for name, outcomes in rules.items()}
    rate = float(router.escalations.sum() / router.steps.sum())
    ahead = [name for name, difference in over.items() if difference.high < 0]
    if len(router) < FEWEST:
        verdict = LEVEL
    elif ahead:
        verdict = COLLAPSED if rate >= ONE_ACTION or rate <= 1 - ONE_ACTION else BEATEN
    else:
        verdict = BETTER if all(difference.low > 0 for difference in over.values()) else LEVEL
    share = router.cost.sum() / large.cost.sum() if large.cost.sum() > 0 else 0.0
    told = {
        COLLAPSED: f"COLLAPSED: it {'escalates' if rate > 0.5 else 'continues'} whatever it sees",
        BEATEN: "BEATEN",
        LEVEL: "Level with the best simple rule: no difference could be shown.",
        BETTER: "Better than the best simple rule.",
    }[verdict]
    if verdict in (COLLAPSED, BEATEN):
        told += f"; {ahead[0]} has a return of {rules[ahead[0]].returns(lam).mean():.4f}. Do not use it."
    if len(router) < FEWEST:
        told = f"No verdict: {len(router)} problems are too few, expected at least {FEWEST}."
    asks = (
        ""
        if router.asked is None
        else f" and asks at {100 * router.asked.sum() / router.steps.sum():.1f} % of the steps"
    )
    against = ", ".join(
        f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] against {name}"
        for name, difference in over.items()
    )
    sentence = (
        f"{told} It solves {100 * router.correct.mean():.1f} % of the problems at {100 * share:.1f} % of "
        f"always-large's cost{asks}; return {router.returns(lam).mean():.4f}: {against}."
    )
    return Health(verdict, sentence, over, rate)
