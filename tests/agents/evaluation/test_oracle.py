"""Oracles bound what they say they bound, and are drawn from enough points; gains are counted by solution."""

import numpy as np
import pytest
from scripted_store import scripted_store

from agents.evaluation.curves import Curve, Method, gain_by_escalations
from agents.evaluation.oracle import SPREAD, query_oracle, spread_oracle, tree_oracle
from agents.evaluation.walk import by_problem, references, run
from agents.routers.base import Constant, RandomRate, Threshold
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    trees = compile_store(scripted_store(tmp_path_factory.mktemp("oracle") / "s", 90), cache=False)
    return decision_tables(trees, "train")


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.05, 0.3])
def test_query_oracles_are_the_best_choice_for_a_problem_and_for_a_draw(tables, lam):
    both = references(tables)
    per_problem, per_draw = (query_oracle(tables, lam, per_draw=each) for each in (False, True))
    best = np.maximum(both.small.returns(lam), both.large.returns(lam))
    assert per_problem.returns(lam) == pytest.approx(best)
    small, large = both.small.solutions, both.large.solutions
    assert small is not None and large is not None
    assert (per_draw.returns(lam) >= best - 1e-12).all()
    assert (tree_oracle(tables, lam).returns(lam) >= per_draw.returns(lam) - 1e-12).all()


def test_no_router_that_sees_the_question_alone_beats_the_query_oracle(tables):
    """Whatever goes to the large model, each problem as a whole, here at random."""
    both = references(tables)
    oracle = Curve.of(Method.whole(spread_oracle(lambda lam: query_oracle(tables, lam), both)), both)
    draws = np.random.default_rng(0)
    for _ in range(200):
        sent = draws.random(len(both.small)) < draws.random()
        correct = np.where(sent, both.large.correct, both.small.correct).mean()
        c = np.where(sent, both.large.cost, both.small.cost).sum() / both.large.cost.sum()
        assert correct <= oracle.accuracy_at(np.array([c]))[0] + 1e-2 / SPREAD


@pytest.mark.parametrize("name", ["tree", "query", "per draw"])
def test_points_are_as_close_as_many_lams_would_make_them(tables, name):
    both = references(tables)

    def oracle(lam):
        return tree_oracle(tables, lam) if name == "tree" else query_oracle(tables, lam, per_draw=name == "per draw")

    points = spread_oracle(oracle, both)
    c = np.array([outcomes.cost.sum() for _, outcomes in points]) / both.large.cost.sum()
    assert (np.diff(c) > 0).all() and len(points) < 4 * SPREAD
    many = [(lam, oracle(lam)) for lam in np.geomspace(points[-1][0] / 100, points[0][0] * 100, 400).tolist()]
    c_many = np.array([outcomes.cost.sum() for _, outcomes in many]) / both.large.cost.sum()
    assert (c[0], c[-1]) == pytest.approx((c_many.min(), c_many.max()))
    for low, high in zip(c, c[1:], strict=False):  # where points are far apart, there is none between
        inside = c_many[(c_many > low + 1e-9) & (c_many < high - 1e-9)]
        assert high - low <= (c[-1] - c[0]) / SPREAD + 1e-9 or not len(inside)
    few, all_ = (Curve.of(Method.whole(each), both) for each in (points, many))
    for x in (50, 80, 95):
        assert float(few.cpt(x)) == pytest.approx(float(all_.cpt(x)), abs=2e-3)


def test_gain_of_solutions_without_escalation_is_nothing(tables):
    small = references(tables).small
    for router in (Threshold(0.3), Threshold(0.6), Constant(1)):
        outcomes = run(router, tables)
        groups = gain_by_escalations(outcomes, small)
        assert sum(group.solutions for group in groups) == len(tables.indices)
        assert all(group.gain == 0 for group in groups if group.escalations == 0)
        mean = sum(group.solutions * group.gain for group in groups) / len(tables.indices)
        assert mean == pytest.approx((outcomes.correct - small.correct).mean())
    assert len(gain_by_escalations(run(Threshold(0.6), tables), small)) > 2
    assert gain_by_escalations(run(RandomRate(0.5), tables), small) == ()


def test_problems_keep_their_solutions(tables):
    values = {name: np.arange(len(tables.indices), dtype=float) for name in ("correct", "escalations")}
    columns = {name: values["correct"] for name in type(references(tables).small).columns()}
    found = by_problem(tables, {**columns, **values}).solutions
    assert found is not None and (found.escalations == values["escalations"]).all()
