"""The comparison of step-level methods: all are listed in one place, damage is coherent, times are those of calls."""

from dataclasses import replace

import numpy as np
import pytest
from scripted_store import scripted_store

from agents.evaluation.walk import references
from agents.routers.base import Threshold
from agents.routers.first_token import FirstToken
from agents.routers.takeover import Takeover
from benchmarks import latency
from benchmarks.methods import Data
from benchmarks.noise import damaged
from benchmarks.paper import _after, _together
from benchmarks.rivals import RIVALS, fitted, with_splits
from rollouts.trees.columns import columns_of
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("rivals") / "s", 60), cache=False)


def test_every_method_has_operating_points_that_validation_chose():
    trees = compile_store("quickstart")
    data = Data.of(trees, 120)
    tables = decision_tables(data.trees, "validation")
    large = references(tables).large.cost.sum()
    for name in RIVALS:
        if name in ("TRIM-Agg", "TRIM-POMDP"):  # that take long, or need more problems
            continue
        chosen = fitted(name, data)
        assert 3 <= len(chosen.points) <= 16, name
        assert all(0 < own.cost.sum() < large for _, own in chosen.points), name
        assert len({each.knob.value for each, _ in chosen.points}) == len(chosen.points), name
        method = chosen.on(data.trees, "validation")
        same = zip(method.points, chosen.points, strict=True)
        assert all((one[1].cost == other[1].cost).all() for one, other in same), name
    paid, free = (fitted(name, data).points for name in ("SpecReason-like", "TRIM-Thr (RSD)"))
    assert all((own.cost >= own.large_tokens + own.steps - 1e-9).all() for _, own in paid)
    assert all((own.cost == own.large_tokens).all() for _, own in free)


def test_late_scores_are_those_of_the_step_before(trees):
    late = damaged(trees, "late", 1.0)
    assert (late.score[trees.root] == 1).all()
    rows, actions, least = *np.nonzero(trees.child >= 0), columns_of(late)["min_score"]
    for row, action in zip(rows[:500].tolist(), actions[:500].tolist(), strict=True):
        child = int(trees.child[row, action])
        assert (late.score[child] == trees.score[row, action]).all()
        assert least[child] == min(least[row], late.score[row, action])
    some = damaged(trees, "late", 0.5)
    hit = (some.score != trees.score).any(axis=1)
    whole = [hit[trees.tree == tree] for tree in range(len(trees.root))]
    assert {bool(each[0]) for each in whole} == {False, True}  # roots: scores are never exactly 1
    assert all(not each.any() for each in whole if not each[0])


def test_parts_of_a_set_are_put_together_problem_by_problem(trees):
    names = np.array(trees.problem_ids)
    halves = [with_splits(trees, {"held": np.isin(names, part)}) for part in (names[:20], names[20:])]
    both = [references(decision_tables(each, "held")) for each in halves]
    whole = _after([each.large for each in both])
    assert whole.problem_ids == (*both[0].large.problem_ids, *both[1].large.problem_ids) and len(whole) == len(names)
    assert whole.cost.sum() == sum(each.large.cost.sum() for each in both)
    points = _together([[(0.1, each.small), (0.2, each.large)] for each in both], _after)
    assert [knob for knob, _ in points] == [0.1, 0.2] and (points[1][1].cost == whole.cost).all()


def test_times_of_calls_are_recovered():
    draw = np.random.default_rng(0)
    steps = draw.integers(2, 9, 400)
    calls = np.stack([np.ones(400), steps, draw.binomial(steps, 0.4)], axis=1)
    seconds = calls @ [0.02, 0.08, 0.15] * (1 + 0.02 * draw.normal(size=400))
    assert latency.fit(latency.Requests(calls, seconds)) == pytest.approx([0.02, 0.08, 0.15], abs=0.01)


SETTINGS = latency.Settings(small=4.0, large=20.0, scorer=25.0, call=5.0)


@pytest.mark.parametrize("kind", ["single steps", "takeover", "first token"])
def test_seconds_are_those_of_calls_one_after_the_other(trees, kind):
    entropy = np.random.default_rng(0).uniform(0, 2, (trees.nodes, 2)).astype(np.float32)
    told = replace(trees, signals={"small.first_entropy": entropy})
    tables = decision_tables(told, "test")
    router = {"single steps": Threshold(0.4), "takeover": Takeover(Threshold(0.4)), "first token": FirstToken(1.0)}
    reads, total = kind != "first token", 0.0
    for row in tables.roots.tolist():
        taken = False
        while row >= 0:
            small, large = trees.tokens[row].tolist()
            if kind == "first token":
                undrafted = entropy[row, 0] >= 1
                escalates = undrafted or trees.child[row, 0] < 0
            else:
                undrafted = taken
                escalates = taken or trees.score[row, 0] < 0.4
            glimpse = 9 if kind == "first token" else 0  # a call of one token
            total += glimpse if undrafted else 5 + 4 * small + reads * 30
            total += (5 * (not taken) + 20 * large) * escalates  # taken over, it goes on in one request
            taken = kind == "takeover" and escalates
            row = int(trees.child[row, int(escalates)])
    found = latency.solution_seconds(router[kind], tables, SETTINGS, reads_scorer=reads)
    assert found == pytest.approx(total / 1000 / len(tables.roots))
