"""Stores with more nodes than are worked on at once: the same from part to part, out of files, and no greater part."""

from dataclasses import replace

import numpy as np
import pytest
from made_routers import Remembering, network
from scripted_store import scripted_store

from agents.evaluation.forest import Forest, forests
from agents.evaluation.oracle import query_oracle, tree_oracle
from agents.evaluation.outcomes import OPTIONAL, Outcomes
from agents.evaluation.splits import thresholds
from agents.evaluation.walk import alone, decision_shares, references, run
from agents.learners import asking, exact
from agents.learners.ppo import PPOAgg
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers.asking import HEADS, Asking
from agents.routers.base import Knob, RandomRate, Threshold
from agents.routers.takeover import Takeover
from rollouts.trees import arrays
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

FEW = 50  # nodes of a part here
CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}]
PRICES = "prices:large_out=9,large_in=2,small_out=1,scorer_in=1,call=3"


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("parts") / "s", 40))


@pytest.fixture
def parted(monkeypatch):
    """From arguments of `decision_tables` to tables as they are, and to tables in parts."""

    def both(*given, **options):
        monkeypatch.setattr(arrays, "PART", 1 << 18)
        whole = decision_tables(*given, **options)
        monkeypatch.setattr(arrays, "PART", FEW)
        parts = decision_tables(*given, **options)
        assert len(whole.trees.parted(whole.indices)) == len(parts.parts()) >= 3
        return replace(whole, trees=replace(whole.trees)), parts

    return both


def at_once(monkeypatch, compute):
    """Return what is computed in one part."""
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "PART", 1 << 18)
        return compute()


def same(one, other):
    found = [(getattr(one, name), getattr(other, name)) for name in (*Outcomes.columns(), *OPTIONAL)]
    found += zip(one.solutions, other.solutions, strict=True)
    return one.problem_ids == other.problem_ids and all(np.array_equal(*pair) for pair in found if pair[0] is not None)


def test_parts_are_trees_of_their_own(trees, monkeypatch):
    monkeypatch.setattr(arrays, "PART", FEW)
    parts = trees.parted(np.arange(len(trees.root)))
    assert np.array_equal(np.concatenate(parts), np.arange(len(trees.root)))
    row = 0
    for part in parts:
        own = trees.between(int(part[0]), int(part[-1]) + 1)
        assert own.nodes <= FEW or len(part) == 1
        assert np.array_equal(own.problem, trees.problem[part]) and (own.root == trees.root[part] - row).all()
        for place in range(own.nodes):
            for action in (0, 1):
                assert own.proposal(place, action) == trees.proposal(row + place, action)
                child, whole = int(own.child[place, action]), int(trees.child[row + place, action])
                assert child == (whole - row if whole >= 0 else whole)
                assert own.tree[place] + part[0] == trees.tree[row + place]
        row += own.nodes
    assert row == trees.nodes
    some = np.array([7, 2, 30])
    assert np.array_equal(trees.rows_of(some), np.flatnonzero(np.isin(trees.tree, some)))


@pytest.mark.parametrize("schema", ["agg+", "seq", "agg+,product_score"])
def test_tables_out_of_files_are_the_same(trees, parted, schema):
    whole, parts = parted(trees, None, schema=schema, cost=PRICES)
    for name in ("features", "accepted", "child", "cost", "solved", "large_tokens", "small_tokens"):
        one, other = getattr(whole, name), getattr(parts, name)
        assert one.dtype == other.dtype and np.array_equal(one, other), name
    assert isinstance(parts.features.base, np.memmap) and not isinstance(whole.features.base, np.memmap)
    assert np.array_equal(whole.in_schema("agg"), parts.in_schema("agg"))
    assert np.array_equal(whole.charged(None).cost, parts.charged(None).cost)
    assert isinstance(parts.charged(None).cost.base, np.memmap)


def asks(cap):
    draw, size = np.random.default_rng(5), 6 + (cap is not None)
    shapes = {"0.weight": (4, size), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}
    weights = {f"{head}.{name}": draw.normal(size=each) for head in HEADS for name, each in shapes.items()}
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    return Asking("asks", "agg+/1", Knob("lam", 0.01), "scorer", ("score",), weights, cap)


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_walks_come_to_the_same(trees, parted, caps, monkeypatch):
    whole, parts = parted(trees, None, cost=PRICES, **caps)
    cap = caps.get("max_large_tokens")
    routers = [Threshold(0.5), RandomRate(0.4), network(), Remembering(True), Remembering(False), asks(cap)]
    routers += [] if cap else [Takeover(Threshold(0.4))]
    for router in routers:
        assert same(at_once(monkeypatch, lambda router=router: run(router, whole)), run(router, parts)), router.name
    for each in (references, alone):
        one, other = at_once(monkeypatch, lambda each=each: each(whole)), each(parts)
        assert same(one.small, other.small) and same(one.large, other.large)
    for oracle in (tree_oracle, query_oracle):
        assert same(at_once(monkeypatch, lambda oracle=oracle: oracle(whole, 0.01)), oracle(parts, 0.01))
    assert thresholds(whole) == thresholds(parts)
    shares = [at_once(monkeypatch, lambda: decision_shares(network(), whole)), decision_shares(network(), parts)]
    assert shares[0]["scores"] == pytest.approx(shares[1]["scores"], abs=2e-6)


@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize("rule", exact.RULES)
@pytest.mark.parametrize("ask", ["", "scorer"])
def test_gradients_are_summed_over_parts(trees, parted, caps, rule, ask, monkeypatch):
    whole, parts = parted(trees, None, cost="calls:3", **caps)
    lams, caught = [0.003, 0.02], []
    monkeypatch.setattr("agents.evaluation.forest.least", lambda loss, start, iterations: caught.append(loss) or start)
    one = at_once(monkeypatch, lambda: forests(whole, ask=ask))
    for made in (one, forests(parts, ask=ask)):
        form = exact.RULES[rule].make(exact.Scale(made, lams), ExactSettings(hidden=3), 0)
        at = np.random.default_rng(0).normal(0, 0.3, len(form.start) * (3 if ask else 1))
        if ask:
            asking.ascend(made, [form] * 3, lams, at, 0.7, 0.05)
        else:
            exact.ascend(made, form, lams, at, 0.05)
    (value, slope), (in_parts, slope_in_parts) = (loss(at) for loss in caught)
    assert len(one) == 1 and in_parts == pytest.approx(value, rel=1e-12)
    assert slope_in_parts == pytest.approx(slope, rel=1e-9, abs=1e-13) and np.abs(slope).max() > 1e-4


def test_a_fit_in_parts_is_that_of_all(trees, parted, monkeypatch):
    """With a large choice half there are no folds; what is fitted then is told by nothing but rounding."""
    whole, parts = parted(trees, "train")
    choice = decision_tables(trees, "validation")
    monkeypatch.setattr(exact, "_HELD_OUT", 5)
    sizes = []
    plain = Forest.__init__
    monkeypatch.setattr(
        Forest, "__init__", lambda self, tables, *more: (plain(self, tables, *more), sizes.append(len(self.seen)))[0]
    )
    found = exact.fit(parts, choice, [0.01], ExactSettings(rule="linear"), 0)
    assert max(sizes) <= FEW and len(sizes) == len(parts.parts()) + len(choice.parts())
    monkeypatch.setattr(exact, "folds", lambda *_: [])
    wanted = at_once(monkeypatch, lambda: exact.fit(whole, choice, [0.01], ExactSettings(rule="linear"), 0))
    assert found.held_out["linear"] == pytest.approx(wanted.held_out["linear"], abs=0.02)
    assert same(run(found.router(0.01), choice), run(wanted.router(0.01), choice))


def test_samples_are_whole_problems_at_random_and_bounded(trees):
    tables = decision_tables(trees, None)
    assert tables.sample(trees.nodes) is tables
    some, others = (tables.sample(200, seed) for seed in (0, 1))
    assert 150 < trees.sizes[some.indices].sum() <= 200 and (np.diff(some.indices) > 0).all()
    assert set(some.indices.tolist()) != set(others.indices.tolist())
    problem = trees.problem[some.indices]
    cut = [each for each in np.unique(problem) if (problem == each).sum() < (trees.problem == each).sum()]
    assert len(cut) <= 1  # the last that fits in part


def test_episodes_out_of_files_are_the_same(trees, parted):
    found = []
    for tables in parted(trees, "train", cost=PRICES):
        env = TrimVectorEnv(tables, num_envs=32, lam=0.01)
        seen, _ = env.reset(seed=3)
        draws = np.random.default_rng(0).integers(0, 2, (20, 32))
        found.append([seen, *(each for actions in draws for each in env.step(actions)[:3])])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))
    learner = PPOAgg(tables, 0.01, PPOSettings(num_envs=16, n_steps=4, iterations=1, hidden=8), 0)
    learner.imitate(Threshold(0.5), updates=2)
    assert learner.iterate()["iteration"] == 1
