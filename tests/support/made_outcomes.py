"""Outcomes made up for tests of evaluation: constants, simulated routers."""

from __future__ import annotations

import numpy as np

from agents.evaluation.curves import Method, References
from agents.evaluation.outcomes import Outcomes


def outcomes(correct, cost, **columns) -> Outcomes:
    """Outcomes on problems p0, p1, ..; large tokens are the cost unless given; other columns are 0."""
    correct = np.asarray(correct, float)
    cost = np.broadcast_to(np.asarray(cost, float), correct.shape)
    values = {name: np.zeros(len(correct)) for name in Outcomes.columns()}
    values |= {"correct": correct, "cost": cost, "large_tokens": cost}
    values |= {name: np.asarray(each, float) for name, each in columns.items()}
    return Outcomes(tuple(f"p{i}" for i in range(len(correct))), **values)


def level(accuracy, cost) -> Outcomes:
    """One problem solved in a share of its replicas: the smallest outcomes with this accuracy and mean cost."""
    return outcomes([accuracy], [cost])


def references(small=0.4, large=0.8, cost=100.0, small_cost=0.0) -> References:
    return References(level(small, small_cost), level(large, cost))


def simulated(problems: int, shares, skill: float, seed: int = 0) -> tuple[Method, References]:
    """Routers that spend a share of the large tokens and gain about ``share ** (1 / skill)`` of the gap.

    Those that are cheaper than always-large are on the hull.
    """
    generator = np.random.default_rng(seed)
    luck = generator.random(problems)
    tokens = generator.gamma(4, 100, problems)
    small_tokens = generator.gamma(4, 90, problems)

    def router(share: float, gain: float) -> Outcomes:
        cost = share * tokens * np.clip(generator.normal(1, 0.3, problems), 0.2, 1.8)
        return outcomes(
            (luck < 0.5 + 0.32 * gain).astype(float) * (generator.random(problems) > 0.02),
            cost,
            small_tokens=small_tokens,
            discarded_tokens=0.8 * cost,
            escalations=generator.poisson(6 * share, problems),
            steps=np.full(problems, 8.0),
        )

    small = outcomes(luck < 0.49, np.zeros(problems), small_tokens=small_tokens, steps=np.full(problems, 9.0))
    large = outcomes(luck < 0.8, tokens, escalations=np.full(problems, 6.0), steps=np.full(problems, 6.0))
    points = [(share, router(share, share ** (1 / skill))) for share in shares]
    hull = tuple(i for i, share in enumerate(shares) if share < 1)
    return Method(points, hull), References(small, large)
