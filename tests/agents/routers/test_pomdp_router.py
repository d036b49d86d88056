"""The router in use: on trees against a walk by hand, from disk, from the command's library, against thresholds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_pomdps import made_trees
from made_routers import Remembering, sealed
from scripted_store import scripted_store

from agents.evaluation.splits import Candidates
from agents.evaluation.walk import run, run_trees
from agents.learners.pomdp.fit import estimate, price_of
from agents.routers import artefact
from agents.routers.base import StatefulRouter
from agents.routers.pomdp.model import as_feature, to_bins
from agents.routers.pomdp.router import PomdpRouter
from agents.runs.config import TrainConfig
from agents.runs.run import resume, train
from rollouts.errors import ArtefactError, ConfigError, DataError
from rollouts.trees.columns import columns_of
from rollouts.trees.compile import compile_store
from trim_env.costs import cost_model
from trim_env.features import schema_named
from trim_env.tables import decision_tables

LAMS = (5e-4, 1.7e-3, 8.5e-3)


@pytest.fixture(scope="module")
def bundled():
    return compile_store("quickstart")


@pytest.fixture(scope="module")
def planned(bundled):
    return estimate(bundled).routers(LAMS)


def walked(router, tables, tree):
    """Follow every branch from a root with its probability, one episode at a time."""
    trees, totals = tables.trees, np.zeros(4)
    features = tables.in_schema(router.schema)
    todo = [(int(trees.root[tree]), 1.0, 0, router.start(1))]
    while todo:
        row, weight, used, state = todo.pop()
        escalate, seen = router.decide(features[[row]], state)
        p = float(escalate[0]) if tables.max_escalations is None or used < tables.max_escalations else 0.0
        for action, share in ((0, 1 - p), (1, p)):
            if share == 0:
                continue
            child, mass = int(trees.child[row, action]), weight * share
            totals += mass * np.array([child < 0 and trees.correct[row, action] == 1, 0, action, 1])
            totals[1] += mass * trees.tokens[row, 1] * action
            if child >= 0:
                scores, tokens = trees.score[[row], action], trees.accepted_tokens[[row], action]
                todo.append((child, mass, used + action, router.accept(seen, np.array([action]), scores, tokens)))
    return totals


@pytest.mark.parametrize("closed", [None, 2])
@pytest.mark.parametrize("deterministic", [True, False])
def test_routers_with_state_are_run_exactly(tmp_path, closed, deterministic):
    store = scripted_store(tmp_path / "s", 60, max_escalations=closed)
    trees = compile_store(store, cache=False)
    accepted = trees.tokens + np.array([0, 9], np.int32)  # other counts than those that are paid for
    tables = decision_tables(replace(trees, accepted_tokens=accepted), "test")
    router = Remembering(deterministic)
    assert isinstance(router, StatefulRouter)
    found = run_trees(tables, router)
    for place, tree in enumerate(tables.indices):
        got = [found[name][place] for name in ("correct", "large_tokens", "escalations", "steps")]
        assert got == pytest.approx(walked(router, tables, tree).tolist(), abs=1e-9)
    assert 0.2 < found["escalations"].sum() / found["steps"].sum() < 0.8
    assert run(router, tables).large_tokens.mean() == pytest.approx(found["large_tokens"].mean())


def test_the_pomdp_is_run_as_it_decides(bundled, planned):
    tables = decision_tables(bundled, "test", schema="agg")  # its own schema is found all the same
    some = replace(tables, indices=tables.indices[::97])
    for router in planned:
        found = run_trees(some, router)
        for place, tree in enumerate(some.indices):
            got = [found[name][place] for name in ("correct", "large_tokens", "escalations", "steps")]
            assert got == walked(router, some, tree).tolist()


def test_it_beats_the_best_threshold_and_the_papers_assumptions(bundled):
    test = decision_tables(bundled, "test")
    candidates = Candidates(decision_tables(bundled, "validation"))
    simple = np.mean([run(candidates.best(lam).threshold, test).returns(lam).mean() for lam in LAMS])
    labels, none = estimate(bundled), estimate(bundled, labels="em")
    means = [
        np.mean(
            [run(router, test).returns(lam).mean() for router, lam in zip(found.routers(LAMS, name), LAMS, strict=True)]
        )
        for found, name in ((labels, "measured"), (none, "measured"), (labels, "paper"))
    ]
    assert min(means[:2]) > max(simple, means[2]) + 0.02  # with exact labels and without any
    assert none.agreement.share > 0.93


def decided(router, tables):
    """Return all decisions, and the states after them, on the paths that the router takes."""
    kept = []

    class Recorder:
        name, schema, knob = router.name, router.schema, router.knob
        start, accept = router.start, router.accept

        def decide(self, features, state):
            kept.append(router.decide(features, state))
            return kept[-1]

    run_trees(tables, Recorder())
    return [np.concatenate([each[part].reshape(len(each[0]), -1) for each in kept]) for part in (0, 1)]


def test_it_is_the_same_after_reloading(bundled, planned, tmp_path):
    tables = decision_tables(bundled, "test")
    for number, router in enumerate(planned):
        folder = artefact.save(router, tmp_path / str(number), {"lam": router.lam})
        loaded = artefact.load(folder).router
        assert (loaded.name, loaded.schema, loaded.knob) == (router.name, router.schema, router.knob)
        before, after = decided(router, tables), decided(loaded, tables)
        assert len(before[0]) > 10_000 and 0.01 < before[0].mean() < 0.99
        assert all((mine == other).all() for mine, other in zip(before, after, strict=True))
        assert (folder / "policy.json").stat().st_size < 1_500_000 and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.pop("value"), "'value' is missing"),
        (lambda p: p.update(value=p["value"][:-1]), "values of shape"),
        (lambda p: p["model"]["kind"].__setitem__(0, [9.0] * 5), "kind is not made of probabilities"),
        (lambda p: p["model"].update(large=[[[0.5, 0.5]]]), "large has shape"),
        (lambda p: p["model"].update(edges=p["model"]["edges"][::-1]), "edges"),
        (lambda p: p["model"].update(level=[99] * len(p["model"]["level"])), "level"),
        (lambda p: p["model"].update(repair=2.0), "repair"),
    ],
)
def test_damaged_plans_are_refused(planned, tmp_path, damage, message):
    folder = artefact.save(planned[0], tmp_path / "p", {})
    described = json.loads((folder / "policy.json").read_text())
    damage(described["pomdp"])
    (folder / "policy.json").write_text(sealed(described))
    with pytest.raises(ArtefactError, match=message):
        artefact.load(folder)


def test_plain_values_are_plain(planned):
    plain = json.loads(json.dumps(planned[1].to_plain()))
    again = PomdpRouter.from_plain(plain)
    assert (again.value == planned[1].value).all() and again.lam == planned[1].lam
    assert again.to_plain() == plain


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A finished store whose scores tell something about the future, so that there is something to plan for."""
    return scripted_store(tmp_path_factory.mktemp("pomdp") / "s", 240)


def test_prices_of_large_tokens_are_planned_for(bundled):
    estimates = estimate(bundled)
    test = decision_tables(bundled, "test", cost="prefill-20")
    plain, dearer = estimates.routers([2e-3])[0], estimates.routers([2e-3], price=1.2)[0]
    same = estimates.routers([2.4e-3])[0]
    assert dearer.knob.value == 2e-3 and price_of(cost_model("prefill-20")) == 1.2
    spent = [run(router, test).large_tokens.mean() for router in (plain, dearer, same)]
    assert spent[1] == pytest.approx(spent[2]) and spent[1] < spent[0] - 1
    with pytest.raises(ConfigError, match="prefill-full:0.1' prices others"):
        price_of(cost_model("prefill-full:0.1"))


def test_a_run_of_the_agent_has_everything(tmp_path, bundled):
    """The command's library fits, plans, assesses and stores; what it stored is what `estimate` gives."""
    config = TrainConfig(agent="pomdp", lam=(1.7e-3, 8.5e-3), out=tmp_path / "run", tracking="none")
    trained = train(config)
    test = decision_tables(bundled, "test")
    for lam, router in trained.routers.items():
        place = trained.folder / f"lam-{lam:g}"
        stored = artefact.load(place / "policy")
        assert isinstance(stored.router, PomdpRouter) and stored.about["rollouts"]["hash"] == bundled.meta["hash"]
        assert (stored.router.value == estimate(bundled).routers([lam])[0].value).all()
        assert run(stored.router, test).returns(lam).tolist() == run(router, test).returns(lam).tolist()
        report = json.loads((place / "estimates.json").read_text())
        assert report["labels"] == "exact" and report["small_right"]["count"] > 10_000
        health = trained.health[lam]
        assert health.fine  # the linear rule is about as good
        assert next(each for rule, each in health.over.items() if "threshold" in rule).low > 0
        assert trained.health[lam].sentence in (trained.folder / "report.txt").read_text()
    assert (trained.folder / "curve.png").exists()
    assert resume(trained.folder).health == trained.health


def test_what_the_agent_cannot_do_is_refused_before_anything_is_written(tmp_path, store):
    out = tmp_path / "run"
    config = TrainConfig(agent="pomdp", lam=(0.01,), out=out, tracking="none")
    with pytest.raises(ConfigError, match="prices others as well"):
        train(replace(config, cost="prefill-full:0.1"))
    with pytest.raises(ConfigError, match="Did you mean 'pomdp'"):
        train(replace(config, agent="pomd"))
    assert not out.exists()
    flat = made_trees(12)
    with pytest.raises(DataError, match="Too few steps with known class"):
        estimate(replace(flat, label=np.full_like(flat.label, -1)))


def test_proposals_are_seen_as_the_schema_shows_them(bundled, planned):
    """The bin of a score is the same whether it comes as a feature or, once accepted, as a score."""
    model = planned[0].model
    features = schema_named(planned[0].schema)(columns_of(bundled))
    known = ~np.isnan(bundled.score[:, 0])
    by_feature = to_bins(model.edges, features[known, 0])
    by_score = to_bins(model.edges, as_feature(bundled.score[known, 0]))
    assert (by_feature == by_score).all()
    ends = bundled.child[:, 0] == -1
    assert (model.kinds.terminal[model.kinds.of(features)] == ends).all()
