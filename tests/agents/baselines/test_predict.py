"""Allocations are those of brute force; arms do not know of each other; what was planted is predicted."""

from itertools import product

import numpy as np
import pytest
from made_outcomes import outcomes

from agents.baselines import predict
from rollouts.errors import DataError


@pytest.mark.parametrize("seed", range(6))
def test_allocations_are_the_best_of_all(seed):
    draw = np.random.default_rng(seed)
    right, cost = draw.random((8, 3)), draw.integers(0, 10, (8, 3)).astype(float)
    cost[:, 0] = np.minimum(cost[:, 0], 2)
    budget = float(draw.integers(16, 40))
    rows = np.arange(8)
    best = max(
        right[rows, arms].sum() for arms in product(range(3), repeat=8) if cost[rows, list(arms)].sum() <= budget
    )
    found = predict.allocate(right, cost, budget, units=int(budget))
    assert right[rows, found].sum() == pytest.approx(best) and cost[rows, found].sum() <= budget
    finer = predict.allocate(right, cost, budget, units=int(budget) * 7)
    assert right[rows, finer].sum() == pytest.approx(best)


def test_budgets_that_cannot_be_kept_are_refused():
    cost = np.array([[1.0, 2.0], [1.0, 3.0]])
    with pytest.raises(DataError, match="cost 2 together; the budget is 1.5"):
        predict.allocate(np.ones((2, 2)), cost, 1.5)
    assert predict.allocate(np.array([[0.5, 1.0]] * 2), cost, 4.0).tolist() == [1, 0]
    assert predict.allocate(np.array([[0.5, 1.0]] * 2), 0 * cost, 0.0).tolist() == [1, 1]


def test_the_weight_of_accuracy_chooses_between_arms():
    right, cost = np.array([[0.5, 0.9], [0.5, 0.6]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert predict.best_arm(right, cost, 0.5).tolist() == [0, 0]
    assert predict.best_arm(right, cost, 0.75).tolist() == [1, 0]  # 0.4 * 3 > 1
    assert predict.best_arm(right, cost, 0.95).tolist() == [1, 1]


def features(texts):
    return np.array([[1.0 if "hard" in text else 0.0, 1.0] for text in texts])


@pytest.fixture(scope="module")
def fitted():
    questions = tuple(f"{'hard' if i % 2 else 'easy'} {i}" for i in range(200))
    hard = np.array(["hard" in each for each in questions], float)
    arms = {"small": (1 - hard, 0 * hard), "large": (np.full(200, 0.9), 0.5 + hard)}
    return questions, arms, predict.fit(questions, arms, features, 0)


def test_what_was_planted_is_predicted(fitted):
    _, _, predictor = fitted
    right, cost = predictor(["easy x", "hard x"])
    assert right == pytest.approx(np.array([[1, 0.9], [0, 0.9]]), abs=0.1)
    assert cost == pytest.approx(np.array([[0, 0.5], [0, 1.5]]), abs=0.1)
    gain = predict.gain_over_cost(predictor).preference(["easy x", "hard x"])
    assert gain == pytest.approx((right[:, 1] - right[:, 0]) / (cost[:, 1] - cost[:, 0]))
    assert gain[1] > 0.4 > gain[0]
    refusal = predict.doubt(predictor).preference(["easy x", "hard x"])
    assert refusal == pytest.approx(1 - right[:, 0])


def test_another_arm_leaves_the_others_as_they_were(fitted):
    questions, arms, predictor = fitted
    more = predict.fit(questions, {"other": arms["small"], **arms}, features, 0)
    assert set(more.weights) > set(predictor.weights)
    for name, each in predictor.weights.items():
        assert each.dtype == np.float32 and (more.weights[name] == each).all()
    again = predict.gain_over_cost(more)
    assert again.preference(["hard y"]) == predict.gain_over_cost(predictor).preference(["hard y"])
    assert set(again.preference.weights) == set(predictor.weights)


def test_outcomes_are_those_of_the_chosen_arms():
    arms = [outcomes([0, 0.5, 1], [0, 1, 2], steps=[1, 2, 3]), outcomes([1, 1, 1], [5, 6, 7], steps=[4, 5, 6])]
    found = predict.chosen(arms, np.array([0, 1, 0]))
    assert (
        found.correct.tolist() == [0, 1, 1] and found.cost.tolist() == [0, 6, 2] and found.steps.tolist() == [1, 5, 3]
    )
    assert found.serial_calls is None and found.problem_ids == arms[0].problem_ids
