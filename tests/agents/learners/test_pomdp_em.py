"""EM: it finds the model that trees were drawn from; its posteriors equal enumeration."""

from dataclasses import replace

import numpy as np
import pytest
from made_pomdps import made_trees

from agents.learners.pomdp import em as em_module
from agents.learners.pomdp.dynamics import ends_right
from agents.learners.pomdp.em import em, first_guess
from agents.learners.pomdp.fit import estimate
from agents.learners.pomdp.latent import labelled
from agents.learners.pomdp.sample import sample
from rollouts.trees.arrays import graph_of


@pytest.fixture(scope="module")
def trees():
    return made_trees()


@pytest.fixture(scope="module")
def silent(trees):
    """The same trees without labels."""
    return replace(trees, label=np.full_like(trees.label, -1))


def test_the_first_guess_is_how_large_continuations_end(silent):
    rows = silent.rows_of(np.arange(100))
    seen = sample(silent, rows)
    guess = first_guess(seen)
    assert guess.weight.sum(axis=(1, 2, 3)) == pytest.approx(1)
    assert (guess.weight[seen.same][:, 0, [0, 1], [1, 0]] == 0).all()  # the same step cannot be right and wrong
    after = ends_right(silent, 1)[rows]
    apart = ~seen.same & (silent.depth[rows] == 0)
    for action in (0, 1):
        right = guess.classes(action)[apart, 0]
        assert right[after[apart, action] == 1].min() > 0.9 and right[after[apart, action] == 0].max() < 0.2


def test_em_recovers_the_model(trees, silent):
    true, found = estimate(trees, None, labels="exact"), estimate(silent, None)
    assert (true.labels, found.labels, found.agreement) == ("exact", "em", None)
    rates = (("small_right", 0.8, 0.02), ("large_right_if_right", 0.99, 0.01), ("large_right_if_wrong", 0.8, 0.08))
    for name, value, tolerance in rates:  # the last one rests on a fifth of the steps
        assert getattr(found.dynamics, name).value == pytest.approx(value, abs=tolerance), name
        assert getattr(true.dynamics, name).value == pytest.approx(value, abs=0.02), name
    assert found.dynamics.end_value[:, 0] == pytest.approx([1, 0.1], abs=0.04)
    assert np.abs(found.observed.pooled - true.observed.pooled).sum(axis=1).max() < 0.25  # twice the total variation
    assert estimate(trees, None, labels="em").agreement.share > 0.93


def test_em_improves_on_its_first_guess(trees, silent):
    rows = trees.rows_of(trees.select(None))
    exact = labelled(trees, rows)
    seen = sample(silent, rows)
    fitted = em(seen)
    first, last = (em_module.agreement(each, exact) for each in (first_guess(seen), fitted.latent))
    assert last.steps == len(rows) and 0.5 < last.always_s0 < 0.8
    assert last.share > first.share + 0.02 and min(last.by_class) > 0.6
    assert fitted.log_likelihood[-1] > fitted.log_likelihood[0] + 0.01


def test_posteriors_equal_enumeration():
    """One tree of two steps: sum over all states of all proposals."""
    trees = made_trees(300, seed=1, depth=2)
    rows = trees.rows_of(np.arange(300))
    seen = sample(trees, rows)
    start = labelled(trees, rows)
    observed, dynamics = em_module.observations(seen, start), em_module.measure(seen, start)
    same = em_module.agreement_rates(seen, start)
    latent, likelihood = em_module.posterior(seen, graph_of(trees, rows), observed, dynamics, same)
    local, ends = em_module._local(seen, dynamics, same), em_module._ends(seen, dynamics)
    total = 0.0
    for tree in range(300):
        root = int(np.searchsorted(rows, trees.root[tree]))
        children = [int(np.searchsorted(rows, child)) for child in trees.child[trees.root[tree]]]
        inner = [leaf(seen, observed, local, ends, child) for child in children]  # (prefix, small, large) each
        joint = local[root, 0] * scores(seen, observed, root)[0]
        below = [each.sum(axis=(1, 2)) for each in inner]
        joint = joint * below[0][:, None] * (below[1][None, :] if children[0] != children[1] else 1.0)
        total += np.log(joint.sum())
        assert latent.weight[root, 0] == pytest.approx(joint / joint.sum(), abs=1e-9)
        shares = (joint / joint.sum()).sum(axis=1)
        wanted = inner[0] * (shares / below[0])[:, None, None]
        assert latent.weight[children[0]] == pytest.approx(wanted, abs=1e-9)
    assert likelihood == pytest.approx(total / len(rows))


def scores(seen, observed, at):
    """Return (prefix, small, large) likelihood of both scores at a node."""
    place = seen.context[at], seen.kind[at]
    small = observed.small[(*place, slice(None), seen.bin[at, 0])]
    own = np.array([[small[0], small[2]], [0.0, small[1]]])[:, :, None] * np.ones(2)
    tells = not seen.same[at] and not seen.ends[at, 1]
    return own * (observed.large[seen.context[at], :, seen.bin[at, 1]] if tells else 1.0)


def leaf(seen, observed, local, ends, at):
    large = ends[at, 1] if not seen.same[at] else np.ones(2)
    return local[at] * scores(seen, observed, at) * ends[at, 0][:, None] * large


@pytest.mark.parametrize("labels", ["exact", "em"])
def test_bounded_trees_serve_as_well(labels):
    """Where proposals of the large model are missing, nothing is made of them."""
    trees = made_trees(800, cap=1)
    assert 0.3 < (trees.child[:, 1] == -2).mean() < 0.9
    found = estimate(trees, None, labels=labels)
    assert found.dynamics.small_right.value == pytest.approx(0.8, abs=0.04)
    assert found.dynamics.large_right_if_right.value == pytest.approx(0.99, abs=0.03)
    present = trees.child[:, 1] != -2
    right = found.dynamics.large_right.count
    assert right == pytest.approx(labelled(trees, np.arange(trees.nodes)).prefix[present, 0].sum(), rel=0.05)
    assert found.observed.counts[1].sum() == pytest.approx((present & (trees.child[:, 1] != -1)).sum())
    assert (found.agreement is None) or found.agreement.share > 0.9
