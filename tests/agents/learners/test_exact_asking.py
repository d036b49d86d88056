"""Rules that ask: gradient, values against enumeration, problems whose answer is known, prices, runs."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from made_trees import telling
from scripted_store import scripted_store

import agents
from agents.evaluation.forest import Forest, Scale
from agents.evaluation.outcomes import mix
from agents.evaluation.splits import halves
from agents.evaluation.walk import references, run, run_trees
from agents.learners.asking import ascend, fit_asking
from agents.learners.exact import RULES
from agents.learners.settings import ExactSettings
from agents.routers import artefact
from agents.routers.asking import HEADS, Asking
from agents.routers.base import Knob, Mixture, Threshold
from agents.runs.config import TrainConfig
from agents.runs.run import train
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.costs import source_of
from trim_env.tables import decision_tables

LAM = 0.003
CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("asking") / "s", 120).path


@pytest.fixture(scope="module")
def trees(store):
    return compile_store(store)


def drawn(tables, seed=0, source="scorer", facts=("score",)) -> Asking:
    """A router with weights at random: it asks at some steps."""
    draw = np.random.default_rng(seed)
    size = tables.schema.size + (tables.max_large_tokens is not None)
    shapes = {"0.weight": (4, size), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}
    weights = {
        f"{head}.{name}": draw.normal(size=shape).astype(np.float32) for head in HEADS for name, shape in shapes.items()
    }
    cap = tables.max_large_tokens
    return Asking("drawn", tables.schema.id, Knob("lam", LAM), source, facts, weights, cap)


def followed(tables, router, row, price, used=0, left=None):
    """Return (correct, cost, asked, serial calls) from a node on, straight from the rules; ``price`` is of a call."""
    trees, cap = tables.trees, tables.max_large_tokens
    left = (cap or 0) if left is None else left
    seen = tables.features[[row]]
    if cap is not None:
        seen = np.append(seen, np.array([[left / cap]], np.float32), axis=1)
    closed = used == tables.max_escalations or (cap is not None and left == 0)
    asked = not closed and bool(router.asks(seen)[0])
    escalate = not closed and bool(router.probability(seen)[0])
    needed = int(trees.tokens[row, 1]) * escalate
    paid = needed if cap is None else min(needed, left)
    accepted = int(escalate and paid == needed)
    own = np.array([0.0, paid + price * asked, asked, 1 + asked + escalate])  # one that is cut off is a call, too
    child = int(trees.child[row, accepted])
    if child < 0:
        return own + [float(trees.correct[row, accepted] == 1), 0, 0, 0]
    return own + followed(tables, router, child, price, used + accepted, left - paid if cap is not None else 0)


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_walker_and_forest_pay_where_it_asks(trees, caps):
    tables = decision_tables(trees, "train", cost="calls:7", **caps)
    for seed in range(4):
        router = drawn(tables, seed)
        wanted = np.array([followed(tables, router, int(row), 7) for row in tables.roots]).T
        found = run_trees(tables, router)
        names = ("correct", "cost", "asked", "serial_calls")
        assert [found[name] for name in names] == [pytest.approx(each) for each in wanted]
        forest = Forest(tables, ask="scorer")
        escalate, asked = router.probability(forest.seen) > 0, router.asks(forest.seen)
        returned = forest.returns(escalate[:, None], LAM, asked[:, None])
        assert returned == pytest.approx([(wanted[0] - LAM * wanted[1]).mean()], abs=1e-5)
    assert 0 < wanted[2].sum()


@pytest.mark.parametrize("source", ["", "scorer", "large"])
def test_calls_are_counted_as_they_are_paid(source):
    """Of who reads every proposal, the scorer and the large model, and of who is asked."""
    bundled = compile_store("quickstart")
    tables = decision_tables(bundled, indices=bundled.select("validation")[:40], schema="all", cost="calls:1")
    facts = tuple(sorted(fact for fact in tables.schema.facts if source_of(fact, bundled.meta["scorer"]) == source))
    router = Threshold(0.3, schema=tables.schema.id)
    if source:
        some = (drawn(tables, seed, source, facts) for seed in range(99))
        router = next(each for each in some if 0.2 < each.asks(tables.features).mean() < 0.8)
    found = run(router, tables)
    assert found.scorer_calls == pytest.approx(found.cost - found.large_tokens)
    asked = found.steps if found.asked is None else found.asked
    assert found.serial_calls == pytest.approx(2 * found.steps + found.escalations + (asked if source else 0))
    if source:
        assert 0 < found.asked.sum() < found.steps.sum()
        assert mix(found, found, 0.5).asked == pytest.approx(found.asked)


def test_what_it_would_buy_is_not_read(trees):
    tables = decision_tables(trees, "train")
    hidden = tables.features.copy()
    hidden[:, :2] = np.nan  # the score and the least score so far
    router = next(each for each in map(partial(drawn, tables), range(99)) if 0.2 < each.asks(hidden).mean() < 0.8)
    asks = router.asks(tables.features)
    assert (router.asks(hidden) == asks).all()
    assert (router.probability(hidden)[~asks] == router.probability(tables.features)[~asks]).all()


@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_that_of_finite_differences(trees, caps, rule, monkeypatch):
    tables = decision_tables(trees, "train", cost="calls:7", **caps)
    forest = Forest(replace(tables, indices=tables.indices[:9]), ask="scorer")
    hidden = np.append(tables.schema.reading(["score"]), [False] * (tables.max_large_tokens is not None)).astype(bool)
    lams = (LAM, 0.01)
    free = forest.seeing(hidden)
    rules = [RULES[rule].make(Scale([each], lams), ExactSettings(hidden=3), 0) for each in (free, free, forest)]
    at = np.random.default_rng(0).normal(0, 0.3, sum(len(each.start) for each in rules))
    caught = []
    monkeypatch.setattr("agents.evaluation.forest.least", lambda loss, start, iterations: caught.append(loss) or start)
    ascend([forest], rules, lams, at, 0.7, 0.05)
    _, gradient = caught[0](at)
    places = np.random.default_rng(1).choice(len(at), min(25, len(at)), replace=False)
    for place in places:
        ends = [caught[0](at + change * np.eye(len(at))[place])[0] for change in (1e-5, -1e-5)]
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)
    assert np.abs(gradient[places]).max() > 1e-4


def fitted(trees, cost, lams=(LAM,), ask="scorer", schema="agg+", **caps):
    choice = decision_tables(trees, indices=halves(trees)[0], cost=cost, schema=schema, **caps)
    train = decision_tables(trees, "train", cost=cost, schema=schema, **caps)
    return fit_asking(train, choice, lams, ask, ExactSettings(), 0)


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_it_asks_what_is_worth_its_price(trees, caps):
    """Of scores that tell what is right, at no price and at one that nothing is worth."""
    clear = telling(trees)
    for price, asks in (("calls:0", True), ("calls:1000", False)):
        tables = decision_tables(clear, "train", cost=price, **caps)
        found = run(fitted(clear, price, **caps).router(LAM), tables)
        assert found.asked is not None and (found.asked.sum() > 0.3 * found.steps.sum()) == asks


def noted(trees, steps=(1,)):
    """Return trees whose scores tell what is right at some steps alone: elsewhere they are all the same."""
    clear = telling(trees)
    score = np.where(np.isin(clear.depth, np.array(steps) - 1)[:, None], clear.score, np.float32(0.5))
    return replace(clear, score=score.astype(np.float32))


def test_it_asks_where_the_answer_can_change_the_decision(trees):
    told = noted(trees)
    lam, plain = 0.01, "score,tokens,step,terminal,has_answer"  # the least score so far would tell later, too
    tables = decision_tables(told, "train", cost="calls:1", schema=plain)
    frontier = fitted(told, "calls:1", (lam,), schema=plain)
    found, held_out = run(frontier.router(lam), tables), frontier.held_out
    assert frontier.kind[lam] == "ask"
    assert held_out["ask"][lam] > max(held_out["never"][lam], held_out["always"][lam]) + 0.005
    assert frontier.router(lam).asks(tables.features[tables.roots]).mean() > 0.9
    assert found.asked is not None and found.asked.mean() < 0.6 * found.steps.mean()


def test_what_is_not_in_the_schema_cannot_be_asked_for(trees):
    with pytest.raises(ConfigError, match="--ask large: schema agg. reads nothing that the large model tells"):
        fitted(trees, "calls:1", ask="large")
    with pytest.raises(ConfigError, match="--ask is 'scorrer'. Did you mean 'scorer'"):
        TrainConfig(agent="exact", ask="scorrer")
    for wrong in ({}, {"agent": "exact", "lam_range": (0.001, 0.01)}):
        with pytest.raises(ConfigError, match="--ask trains rules of --agent exact for one λ each"):
            TrainConfig(ask="scorer", **wrong)


def test_train_py_trains_it_and_says_how_often_it_asks(store, tmp_path):
    config = TrainConfig(
        str(store), agent="exact", lam=(0.0, LAM), cost="calls:1", ask="scorer", tracking="none", out=tmp_path / "run"
    )
    trained = train(config)
    told = json.loads((config.out / "lam-0.003" / "fit.json").read_text())
    assert set(told["held_out"]) == {"never", "always", "ask"} and told["kind"][str(LAM)] in told["held_out"]
    assert "% of the steps; return" in trained.health[LAM].sentence
    assert trained.health[LAM].sentence in (config.out / "report.txt").read_text()
    described = json.loads((config.out / "lam-0.003" / "policy" / "policy.json").read_text())
    assert (described["version"], described["kind"]) == (5, "ask")
    assert described["asks"] == {"source": "scorer", "facts": ["score"]}
    again = artefact.load(config.out / "lam-0.003" / "policy").router
    seen = decision_tables(str(store), "test").features
    assert isinstance(again, Asking) and again.knob.value == LAM
    assert (again.asks(seen) == trained.routers[LAM].asks(seen)).all()
    assert (again.probability(seen) == trained.routers[LAM].probability(seen)).all()


def test_a_budget_is_met_by_rules_that_ask(store, tmp_path):
    """What questions cost is part of it; of two rules that are mixed each asks as it would alone."""
    given = {"cost": "calls:1", "ask": "scorer", "tracking": "none", "lam": (0.0005, LAM, 0.01)}
    found = train(TrainConfig(str(store), agent="exact", budget=0.6, out=tmp_path / "run", **given))
    assert len(found.routers) == 3 and all(isinstance(each, Asking) for each in found.routers.values())
    (folder,) = tmp_path.glob("run/budget-0.6/policy")
    policy = agents.load(folder)
    parts = (policy.router.first, policy.router.second) if isinstance(policy.router, Mixture) else (policy.router,)
    assert any(isinstance(each, Asking) for each in parts) and found.sentence.startswith("For a budget of 60 %")
    tables = decision_tables(str(store), "validation", cost="calls:1")
    choice = replace(tables, indices=halves(tables.trees)[0])
    share = run(policy.router, choice).cost.sum() / references(choice).large.cost.sum()
    assert share == pytest.approx(0.6, abs=1e-6) or not isinstance(policy.router, Mixture)
    assert policy.about["calibration"]["target"] == "budget" and policy.session(seed=0)
    with pytest.raises(ConfigError, match="name several .*, or none for six; for a --budget or an --accuracy two"):
        TrainConfig(agent="exact", ask="scorer", lam_range=(0.001, 0.01), budget=0.2)
