"""The filter equals the enumeration of everything that can be hidden; n episodes at once are as one by one."""

from itertools import product

import numpy as np
import pytest
from made_pomdps import features_of, made_model, scores_of

from agents.learners.pomdp.solver import routers, solve
from agents.routers.base import Router, StatefulRouter
from agents.routers.pomdp.router import PomdpRouter


def posteriors(model, kinds, bins, actions, large_bins):
    """Return (T, 3) P(S0, S1, S2 of each proposal | all seen so far), summed over all histories of hidden events.

    An event of a step is a pair: is the small model's step right, is the large model's (or the prefix mended).
    """
    found = []
    for last in range(len(kinds)):
        totals = np.zeros(3)
        for history in product(product((True, False), repeat=2), repeat=last + 1):
            weight, right, context = 1.0, True, len(model.small) - 1
            for step, (small, large) in enumerate(history):
                p = model.p_small[step, kinds[step]]
                hidden = (0 if small else 2) if right else 1
                weight *= (p if small else 1 - p) * model.small[context, kinds[step], hidden, bins[step]]
                chance = model.p_large[0 if small else 1, kinds[step]] if right else model.repair
                weight *= chance if large else 1 - chance
                if step < last:
                    right = large if actions[step] else right and small
                    if actions[step]:
                        weight *= model.large[context, 0 if large else 1, large_bins[step]]
                    context = model.level[large_bins[step] if actions[step] else bins[step]]
            totals[hidden] += weight
        found.append(totals / totals.sum())
    return np.array(found)


@pytest.mark.parametrize(("seed", "levels"), [(0, 2), (1, 0), (2, 4)])
def test_beliefs_equal_enumeration(seed, levels):
    model = made_model(seed, steps=4, levels=levels)
    router = routers(model, [1e-3])[0]
    random = np.random.default_rng(seed)
    episodes, steps = 24, model.steps
    kinds = random.integers(0, model.kinds.count, (episodes, steps))
    bins, large_bins = (random.integers(0, len(model.level), (episodes, steps)) for _ in range(2))
    actions = random.integers(0, 2, (episodes, steps))
    state, beliefs = router.start(episodes), []
    for step in range(steps):
        _, state = router.decide(features_of(model, kinds[:, step], bins[:, step]), state)
        beliefs.append(state[:, 5:8])
        accepted = np.where(actions[:, step], large_bins[:, step], bins[:, step])
        state = router.accept(state, actions[:, step], scores_of(model, accepted), np.zeros(episodes, int))
    for episode in range(episodes):
        exact = posteriors(model, kinds[episode], bins[episode], actions[episode], large_bins[episode])
        assert np.stack(beliefs, 1)[episode] == pytest.approx(exact, abs=1e-10)


def test_scores_of_large_steps_count():
    """Two episodes that differ in the score of the large model's step alone differ in belief."""
    model = made_model(0)
    router = routers(model, [1e-3])[0]
    kind = np.zeros(2, int)
    _, state = router.decide(features_of(model, kind, np.array([1, 1])), router.start(2))
    state = router.accept(state, np.array([1, 1]), scores_of(model, np.array([0, 1])), np.zeros(2, int))
    assert state[0, 1] != state[1, 1] and model.level[0] == model.level[1]


def test_episodes_do_not_mix():
    model = made_model(4, steps=3)
    router = routers(model, [2e-3])[0]
    random = np.random.default_rng(0)
    kinds, bins = random.integers(0, model.kinds.count, 50), random.integers(0, len(model.level), 50)
    features, state = features_of(model, kinds, bins), router.start(50)
    state[:, 1] = random.random(50)
    state[:, 0] = random.integers(0, 3, 50)
    state[:, 2] = random.integers(0, 3, 50)
    state.setflags(write=False)
    together, after = router.decide(features, state)
    alone = [router.decide(features[i : i + 1], state[i : i + 1]) for i in range(50)]
    assert together.tolist() == [each[0][0] for each in alone]
    assert (after == np.concatenate([each[1] for each in alone])).all()
    assert 0 < together.sum() < 50


def test_it_is_a_stateful_router_and_no_plain_one():
    model = made_model(0)
    router = routers(model, [1e-3])[0]
    assert isinstance(router, StatefulRouter) and not isinstance(router, Router)
    assert router.knob.name == "lam" and router.knob.value == 1e-3


def test_decisions_are_the_better_action_of_enumeration():
    """At the first step of a short process: the router escalates exactly where enumeration gains by it."""
    from made_pomdps import best_value

    model = made_model(1, steps=2, bins=3)
    for lam in (1e-3, 5e-3, 2e-2):
        router = routers(model, [lam], points=2001)[0]
        for kind, score in product(range(model.kinds.count), range(3)):
            got, _ = router.decide(features_of(model, np.array([kind]), np.array([score])), router.start(1))
            only = _only(model, kind, score)
            p, f = model.p_small[0, kind], model.small[-1, kind, :, score]
            s0, s2 = p * f[0] / only, (1 - p) * f[2] / only
            ends, large_ends = model.ends[0, kind], model.large_ends[0, kind]
            small = ends * (model.end_value[kind] @ [s0, 0, s2])
            if ends < 1:
                small += (1 - ends) * best_value(model, lam, 1, model.level[score], (s0, s2))
            right = model.p_large[0, kind] * s0 + model.p_large[1, kind] * s2
            large = large_ends * (model.large_end_value @ [right, 1 - right]) - lam * model.tokens[0, kind]
            for after in range(3) if large_ends < 1 else ():
                g = model.large[-1, :, after]
                onward = best_value(model, lam, 1, model.level[after], (right * g[0], (1 - right) * g[1]))
                large += (1 - large_ends) * onward
            assert abs(large - small) < 1e-5 or got[0] == (large > small), (lam, kind, score)


def _only(model, kind, score):
    p, f = model.p_small[0, kind], model.small[-1, kind, :, score]
    return p * f[0] + (1 - p) * f[2]


def test_routers_hold_the_values_that_were_solved_for():
    model = made_model(0)
    lams = [1e-3, 1e-2]
    for value, router in zip(solve(model, lams), routers(model, lams), strict=True):
        assert np.abs(router.value - value).max() < 1e-8


def test_values_that_do_not_fit_are_refused():
    model = made_model(0)
    with pytest.raises(ValueError, match="values of shape"):
        PomdpRouter(model, 1e-3, np.zeros((2, 3, 5)))
