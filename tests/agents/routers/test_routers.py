"""Routers over trees: exact expectations, oracles and caps against brute force over all paths."""

from dataclasses import replace

import numpy as np
import pytest
from reference_walk import walk
from scripted_store import scripted_store

from agents.evaluation.oracle import query_oracle, tree_oracle
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Candidates, TwoNumbers, halves, thresholds
from agents.evaluation.walk import by_problem, references, run, run_trees
from agents.routers.base import Constant, RandomRate, Router, Threshold
from rollouts.errors import ConfigError, StoreError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module", params=[None, 1, 2])
def tables(request, tmp_path_factory):
    store = scripted_store(tmp_path_factory.mktemp("routers") / "s", max_escalations=request.param)
    return decision_tables(compile_store(store, cache=False), "test")


def paths(tables, root, used=0):
    """Yield every path from a node as a list of (row, action), within the cap."""
    for action in (0, 1):
        if action and tables.max_escalations is not None and used >= tables.max_escalations:
            continue
        child = int(tables.trees.child[root, action])
        if child < 0:
            yield [(root, action)]
        else:
            for rest in paths(tables, child, used + action):
                yield [(root, action), *rest]


def outcome(tables, path):
    trees = tables.trees
    correct = float(trees.correct[path[-1]] == 1)
    large = sum(int(trees.tokens[row, 1]) for row, action in path if action)
    discarded = sum(int(trees.tokens[row, 0]) for row, action in path if action)
    small = sum(int(trees.tokens[row, 0]) for row, _ in path)
    return correct, large, large, small, discarded, sum(action for _, action in path), len(path)


def expected(tables, probability):
    """Average over all paths of all replicas of each problem, by brute force."""
    totals = {}
    for tree in tables.indices:
        value = np.zeros(7)
        for path in paths(tables, int(tables.trees.root[tree])):
            weight, used = 1.0, 0
            for row, action in path:
                open_ = tables.max_escalations is None or used < tables.max_escalations
                p = probability(row) if open_ else 0.0
                weight *= p if action else 1 - p
                used += action
            value += weight * np.array(outcome(tables, path))
        totals.setdefault(int(tables.trees.problem[tree]), []).append(value)
    return {tables.trees.problem_ids[key]: np.mean(values, axis=0) for key, values in totals.items()}


def assert_equal(found: Outcomes, wanted):
    assert set(found.problem_ids) == set(wanted)
    for place, name in enumerate(found.problem_ids):
        got = [getattr(found, column)[place] for column in Outcomes.columns()]
        assert got == pytest.approx(wanted[name].tolist(), abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_random_routers_are_evaluated_exactly(tables, rate):
    assert_equal(run(RandomRate(rate), tables), expected(tables, lambda row: rate))


def test_thresholds_escalate_below_them(tables):
    score = tables.trees.score[:, 0]
    level = float(np.nanmedian(score))
    assert_equal(run(Threshold(level), tables), expected(tables, lambda row: float(score[row] < level)))


def test_deterministic_routers_agree_with_walking(tables):
    free = replace(tables, max_escalations=None)
    if tables.max_escalations is not None:
        with pytest.raises(StoreError, match="not generated"):
            run(Threshold(0.9), free)
        return
    trees = tables.trees
    walked = walk(trees, tables.indices, lambda rows: (trees.score[rows, 0] < 0.6).astype(int))
    found = run_trees(tables, lambda rows, _: (trees.score[rows, 0] < 0.6).astype(float))
    assert found["correct"].tolist() == walked.correct.tolist()
    assert found["large_tokens"].tolist() == walked.large_tokens.tolist()
    assert found["small_tokens"].tolist() == walked.small_tokens.tolist()
    assert found["steps"].tolist() == walked.steps.tolist()


def test_the_cap_does_not_bind_always_large(tables):
    both = references(tables)
    assert (both.large.escalations == both.large.steps).all()
    assert (both.small.large_tokens == 0).all()
    capped = run(Constant(1), tables)
    if tables.max_escalations is not None:
        assert capped.escalations.max() <= tables.max_escalations


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.2])
def test_tree_oracle_is_the_best_path(tables, lam):
    found = tree_oracle(tables, lam).returns(lam)
    best = {}
    for tree in tables.indices:
        values = [outcome(tables, path) for path in paths(tables, int(tables.trees.root[tree]))]
        best.setdefault(int(tables.trees.problem[tree]), []).append(max(v[0] - lam * v[1] for v in values))
    assert found.tolist() == pytest.approx([np.mean(best[key]) for key in sorted(best)])


def test_oracles_bound_everything_else(tables):
    for lam in (0.001, 0.05):
        top = tree_oracle(tables, lam).returns(lam)
        for router in (Threshold(0.5), RandomRate(0.4), Constant(0)):
            assert (top >= run(router, tables).returns(lam) - 1e-12).all()
        both, query = references(tables), query_oracle(tables, lam)
        assert (query.returns(lam) >= both.small.returns(lam) - 1e-12).all()
        assert (query.returns(lam) >= both.large.returns(lam) - 1e-12).all()


def test_replicas_of_a_problem_are_averaged(tables):
    totals = run_trees(tables, lambda rows, _: np.zeros(len(rows)))
    found = by_problem(tables, totals)
    first = tables.trees.problem[tables.indices] == tables.trees.problem[tables.indices][0]
    assert found.correct[0] == totals["correct"][first].mean() and first.sum() == 2


def test_halves_part_the_problems_and_stay_when_problems_are_added(tmp_path):
    few = compile_store(scripted_store(tmp_path / "few", 60), cache=False)
    many = compile_store(scripted_store(tmp_path / "many", 120), cache=False)
    names = []
    for trees in (few, many):
        choice, verdict = halves(trees)
        assert not set(choice) & set(verdict)
        assert set(choice) | set(verdict) == set(trees.select("validation"))
        names.append([{trees.problem_ids[trees.problem[i]] for i in half} for half in (choice, verdict)])
    assert names[0][0] < names[1][0] and names[0][1] < names[1][1]


def test_one_problem_cannot_be_split(tmp_path):
    trees = compile_store(scripted_store(tmp_path / "s", 3), cache=False)
    with pytest.raises(StoreError, match="too few to be split"):
        halves(trees)


def test_candidates_include_both_ends_and_the_best_is_the_best(tables):
    levels = thresholds(tables)
    assert run(Threshold(levels[0]), tables).escalations.sum() == 0
    if tables.max_escalations is None:
        assert (run(Threshold(levels[-1]), tables).escalations == run(Constant(1), tables).escalations).all()
    best = Candidates(tables).best(0.01)
    top = max(run(Threshold(level), tables).returns(0.01).mean() for level in levels)
    assert run(best.threshold, tables).returns(0.01).mean() == top
    assert all(isinstance(router, Router) for router in (best.constant, best.threshold))
    assert best.best in (best.constant, best.threshold)  # nothing was named to fit others on


def test_rules_that_were_fitted_on_training_trees_are_candidates_too(tmp_path):
    trees = compile_store(scripted_store(tmp_path / "s", 120), cache=False)
    lam, caps = 0.002, {"max_large_tokens": 30}
    train, choice = decision_tables(trees, "train", **caps), decision_tables(trees, "validation", **caps)
    candidates = Candidates(choice, lambda: train)
    two, linear = candidates._fitted(lam)
    assert two.name == "two numbers" and linear.schema == "agg+/1" and linear.max_large_tokens == 30
    top = max(run(Threshold(level), train).returns(lam).mean() for level in thresholds(train, 40))
    assert run(two, train).returns(lam).mean() > top - 0.01  # a threshold is a two-number rule, of another grid
    found = candidates.best(lam)
    reached = {rule: run(rule, choice).returns(lam).mean() for rule in (two, linear, found.constant, found.threshold)}
    assert run(found.best, choice).returns(lam).mean() == max(reached.values())
    assert next(iter(found.named.values())) is found.best


def test_a_two_number_rule_is_what_it_says():
    rule = TwoNumbers(0.5, 0.25, lam=0.01)
    seen = np.array([[0.4, 0.3, 0, 0], [0.5, 0.3, 0, 0], [0.4, 0.25, 0, 0], [0.4, 0.2, 0, 0]], np.float32)
    assert rule.probability(seen).tolist() == [1, 0, 1, 0]


def test_a_rate_is_a_probability():
    with pytest.raises(ConfigError, match="expected a probability"):
        RandomRate(1.5)
