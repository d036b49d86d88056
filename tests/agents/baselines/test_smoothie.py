"""Smoothie recovers planted errors, from three outputs on."""

import numpy as np
import pytest
from made_whole import three_problems

from agents.baselines.smoothie import distances, fit
from agents.routers.text import CharTfidf, smoothie
from rollouts.errors import DataError
from trim_env.tables import decision_tables


def test_planted_errors_are_recovered():
    draw, sigma = np.random.default_rng(0), np.array([0.5, 1.0, 2.0, 3.0])
    truth = draw.normal(size=(4000, 1, 16))
    outputs = truth + sigma[:, None] * draw.normal(size=(4000, 4, 16))
    found = smoothie(distances(outputs).mean(axis=0)[None])[0]
    assert found == pytest.approx((1 / sigma**2) / (1 / sigma**2).sum(), rel=0.05)


def test_distances():
    outputs = np.random.default_rng(0).normal(size=(5, 3, 7))
    wanted = ((outputs[:, :, None] - outputs[:, None]) ** 2).sum(axis=3)
    np.testing.assert_allclose(distances(outputs), wanted, atol=1e-12)


def test_two_outputs_are_too_few(tmp_path):
    tables = decision_tables(three_problems(tmp_path / "s"), "test")
    with pytest.raises(DataError, match="at least three outputs.*have 2"):
        fit(tables, CharTfidf.fit(["Question"]))


def test_outputs_that_the_others_are_near_are_better(tmp_path):
    """Both replicas of a model write the same here, so that each model's outputs vouch for each other alike."""
    trees = three_problems(tmp_path / "s", replicas=2)
    tables = decision_tables(trees, "test")
    router = fit(tables, CharTfidf.fit(trees.questions), count=1)
    assert router.preference(trees.questions) == pytest.approx([0, 0, 0], abs=1e-6)
    assert router.preference.weights["told"].shape == (3, 4, 4)
