"""The study of the field: both panels of its picture show one curve, and λ are as dear on other rollouts."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_outcomes import outcomes, references

from agents.evaluation.curves import Curve, Method
from agents.evaluation.walk import references as of_tables
from benchmarks.field import CACHED, MOST, Row, in_dollars
from benchmarks.methods import RANGE, TOKENS, scaled
from benchmarks.robustness import LAMS
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("hull", [(1, 0), (0,), ()])
def test_both_panels_show_one_curve(hull, large):
    """Where a dollar is a token, the panel in dollars is the one in tokens, also where the hull ends early."""
    both = references(small=0.4, large=0.8, cost=100)
    points = [(0.1, outcomes([0.7], [60])), (0.2, outcomes([0.6], [20])), (0.3, outcomes([0.5], [40]))]
    method = Method(points, hull, large)
    ground = SimpleNamespace(both=both, dollars={CACHED: both})
    x, y = in_dollars(ground, Row("m", "step-level", method, {CACHED: [each for _, each in points]}, None))
    cost = np.linspace(0, 1, 41)
    np.testing.assert_allclose(np.interp(cost, x, y), Curve.of(method, both).accuracy_at(cost))
    assert x[-1] == (1 if large else MOST) and (large or y[-1] == y[-2])


def test_lams_are_as_dear_on_other_rollouts():
    trees = compile_store("quickstart")
    assert scaled(LAMS, trees) == LAMS and scaled(RANGE, trees) == RANGE
    real = compile_store("gsm8k")
    mean = of_tables(decision_tables(real, "train")).large.large_tokens.mean()
    assert mean > 2 * TOKENS
    assert np.array(scaled(LAMS, real)) * mean == pytest.approx(np.array(LAMS) * TOKENS, rel=0.05)
