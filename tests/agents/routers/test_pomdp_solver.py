"""The solver against simulation, enumeration, bounds on the whole simplex, and cases with a known answer."""

from dataclasses import replace

import numpy as np
import pytest
from made_pomdps import best_value, made_model, play
from scipy.interpolate import LinearNDInterpolator

from agents.learners.pomdp.fit import estimate
from agents.learners.pomdp.solver import routers, solve
from agents.routers.pomdp.backup import after_score, backup
from agents.routers.pomdp.belief import corrected, predicted, scored
from rollouts.trees.compile import compile_store

LAMS = [0.0, 1e-3, 3e-3, 1e-2, 0.1]


@pytest.mark.parametrize(("seed", "steps", "levels"), [(0, 3, 0), (1, 3, 2), (2, 2, 3), (3, 1, 0)])
@pytest.mark.parametrize("lam", [0.0, 3e-3, 1e-2])
def test_values_equal_enumeration(seed, steps, levels, lam):
    model = made_model(seed, steps=steps, bins=3, levels=levels)
    found = solve(model, [lam], points=4001)[0, 0, -1, -1]
    exact = best_value(model, lam)
    assert found == pytest.approx(exact, abs=2e-6)
    assert found >= exact - 1e-12  # interpolation errs upwards


def test_enumeration_tells_wrong_values_apart():
    """The same comparison fails when any part of the model is another one."""
    model = made_model(1, steps=3, bins=3)
    exact = best_value(model, 3e-3)
    for change in (
        {"repair": 0.3},
        {"p_large": model.p_large * 0.9},
        {"large": model.large[:, ::-1]},
        {"tokens": model.tokens * 1.2},
        {"small": model.small[:, :, [0, 2, 1]]},
        {"level": model.level[::-1].copy()},
        {"large_ends": np.where(model.large_ends < 1, 0.5, 1.0)},
    ):
        assert abs(solve(replace(model, **change), [3e-3], 4001)[0, 0, -1, -1] - exact) > 1e-4, change


@pytest.mark.parametrize(("seed", "levels"), [(0, 2), (4, 0), (5, 3)])
def test_values_and_tokens_equal_simulation(seed, levels):
    model = made_model(seed, steps=5, bins=4, levels=levels)
    lams = [1e-3, 4e-3, 1e-2]
    value = solve(model, lams, points=1001)[:, 0, -1, -1]
    around = solve(model, [lam + step for lam in lams for step in (-1e-7, 1e-7)], points=1001)[:, 0, -1, -1]
    tokens = -np.diff(around)[::2] / 2e-7  # dV/dλ = -tokens
    for number, router in enumerate(routers(model, lams, points=1001)):
        correct, paid = play(model, router, 200_000, seed)
        returns = correct - lams[number] * paid
        assert abs(returns.mean() - value[number]) < 3 * returns.std() / np.sqrt(len(returns))
        assert abs(paid.mean() - tokens[number]) < 3 * paid.std() / np.sqrt(len(paid)) + 1e-3


def test_no_other_plan_does_better_in_simulation():
    model = made_model(0, steps=5)
    lams = [1e-3, 4e-3, 1e-2]
    plans = routers(model, lams, points=401)
    drawn = [play(model, router, 100_000, 7) for router in plans]
    means = np.array([[(correct - lam * paid).mean() for correct, paid in drawn] for lam in lams])
    assert (means.argmax(axis=1) == np.arange(3)).all(), means


def simplex_bounds(model, lam, parts=18):
    """Solve over the whole simplex of (S0, S1, S2): upper bounds by interpolation, lower ones by alpha vectors.

    For models without levels. Knows nothing of g: classes are the states, and both actions are transitions to
    (kind, score, class) of the next proposal.
    """
    grid = np.array([(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]) / parts
    kinds, bins = range(model.kinds.count), range(len(model.level))
    upper = {}
    vectors = {}
    for step in reversed(range(model.steps)):

        def leading(action, kind, step=step):
            """Return (3,) value of ending and (3, 2) P(prefix right, wrong | class, going on), by class."""
            if action == 0:
                ends, right = model.ends[step, kind], np.array([1.0, 0.0, 0.0])
                return ends * model.end_value[kind], (1 - ends) * np.stack([right, 1 - right], 1)
            right = np.array([model.p_large[0, kind], model.repair, model.p_large[1, kind]])
            both, ends = np.stack([right, 1 - right], 1), model.large_ends[step, kind]
            return ends * both @ model.large_end_value - lam * model.tokens[step, kind], (1 - ends) * both

        def following(action, on, step=step):
            """Yield what may be seen next: its kind and (3, 3) joint weights (class now, class next)."""
            for seen in bins if action else [0]:
                after = on * (model.large[0, :, seen] if action else 1.0)
                for kind in kinds:
                    p, share = model.p_small[step + 1, kind], model.kind[step + 1, kind]
                    turn = share * np.array([[p, 0, 1 - p], [0, 1, 0]])
                    for score in bins:
                        yield kind, (after @ turn) * model.small[0, kind, :, score]

        for kind in kinds:
            high, low = [], []
            for action in (0, 1):
                end, on = leading(action, kind)
                value, alpha = grid @ end, np.tile(end, (len(grid), 1))
                if on.any():
                    for nxt, joint in following(action, on):
                        ahead = grid @ joint
                        mass = ahead.sum(1)
                        value += mass * upper[nxt](ahead / mass[:, None])
                        best = (ahead @ vectors[nxt].T).argmax(1)
                        alpha += vectors[nxt][best] @ joint.T
                high.append(value)
                low.append(alpha)
            values = np.maximum(*high)
            pick = (grid * low[1]).sum(1) > (grid * low[0]).sum(1)
            yield step, kind, values, np.where(pick[:, None], low[1], low[0]), grid
            upper[(step, kind)], vectors[(step, kind)] = values, np.where(pick[:, None], low[1], low[0])
        for kind in kinds:
            interpolate = LinearNDInterpolator(grid[:, :2], upper[(step, kind)])
            upper[kind] = lambda b, f=interpolate: f(np.clip(b[:, :2], 1e-12, 1) / (1 + 3e-12))
            vectors[kind] = np.unique(vectors[(step, kind)], axis=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_values_lie_between_bounds_on_the_simplex(seed):
    lam, points = 3e-3, 2001
    model = made_model(seed, steps=4, bins=3, levels=0, token_bins=1)
    value = solve(model, [lam], points)
    random = np.random.default_rng(seed)
    gaps = []
    for step, kind, upper, vectors, grid in simplex_bounds(model, lam):
        beliefs = np.concatenate([grid, random.dirichlet(np.ones(3), 200)])
        later = value[:, step + 1]
        leads = backup(model, step, kind, 0, np.zeros(len(beliefs), int), beliefs, points)
        small, large = leads.worth(later, after_score(model, later, [0]))
        found = np.maximum(small, large - lam * model.tokens[step, kind])[0]
        low = (beliefs @ vectors.T).max(1)
        high = LinearNDInterpolator(grid[:, :2], upper)(np.clip(beliefs[:, :2], 1e-12, 1) / (1 + 3e-12))
        assert (found >= low - 1e-5).all() and (found <= high + 1e-5).all(), (step, kind)
        gaps.append((high - low).max())
    assert max(gaps) < 0.02  # the bounds say something


@pytest.fixture(scope="module")
def bundled():
    return estimate(compile_store("quickstart"))


def test_a_higher_price_never_buys_more(bundled):
    models = [made_model(seed, steps=5) for seed in range(3)] + [bundled.model("measured"), bundled.model("paper")]
    for model in models:
        lams = np.geomspace(1e-4, 0.1, 25)
        value = solve(model, lams)[:, 0, -1, -1]
        tokens = -np.diff(value) / np.diff(lams)  # dV/dλ = -tokens
        assert (np.diff(value) <= 1e-9).all() and (np.diff(tokens) <= 1e-6).all() and tokens.min() >= -1e-6
        assert value[0] > value[-1] + 0.01 and tokens[0] > tokens[-1] + 1


def test_all_prices_at_once_are_as_one_by_one():
    model = made_model(2)
    both = solve(model, LAMS)
    for number, lam in enumerate(LAMS):
        assert (solve(model, [lam])[0] == both[number]).all()


@pytest.mark.parametrize("lam", LAMS)
def test_perfect_scores_make_it_an_observed_process(lam):
    small, large = np.zeros((1, 4, 3, 3)), np.zeros((1, 2, 3))
    small[:] = np.eye(3)
    large[:, 0, 0] = large[:, 1, 1] = 1.0
    model = made_model(3, steps=4, bins=3, levels=0, small=small, large=large)
    right = wrong = 0.0  # values of a right and of a wrong prefix
    for step in reversed(range(model.steps)):
        now = np.zeros(2)
        for kind in range(4):
            values = []
            for hidden in range(3):
                ends, large_ends = model.ends[step, kind], model.large_ends[step, kind]
                onward = right if hidden == 0 else wrong
                stay = ends * model.end_value[kind, hidden] + (1 - ends) * onward
                p = (model.p_large[0, kind], model.repair, model.p_large[1, kind])[hidden]
                end = p * model.large_end_value[0] + (1 - p) * model.large_end_value[1]
                move = large_ends * end + (1 - large_ends) * (p * right + (1 - p) * wrong)
                values.append(max(stay, move - lam * model.tokens[step, kind]))
            p = model.p_small[step, kind]
            now += model.kind[step, kind] * np.array([p * values[0] + (1 - p) * values[2], values[1]])
        right, wrong = now
    found = solve(model, [lam], points=11)[0, 0, 0]
    assert found[[-1, 0]] == pytest.approx([right, wrong], abs=1e-12)


def test_bayes_by_hand():
    classes, chance = corrected(predicted(np.array([0.8]), np.array([0.75])), np.array([[0.5, 0.1, 0.2]]))
    assert chance == pytest.approx([0.6 * 0.5 + 0.2 * 0.1 + 0.2 * 0.2])
    assert classes[0] == pytest.approx(np.array([0.3, 0.02, 0.04]) / 0.36)
    assert scored(np.array([0.5]), np.array([[0.9, 0.3]])) == pytest.approx([0.75])
    assert scored(np.array([0.5]), np.array([[0.0, 0.0]])) == [0.5]  # impossible: tells nothing
