"""``--agent query-level``: from training over evaluation, page and export to sessions that decide as `sends` does."""

import json

import numpy as np
import pytest
from made_reports import hostile_store

import agents
import evaluate as evaluate_command
import train as train_command
from agents import __main__ as command
from agents.baselines import methods, query_level
from agents.baselines.methods import Fitting, at_thresholds
from agents.evaluation.splits import halves
from agents.evaluation.walk import run
from agents.routers import artefact
from agents.routers.base import Knob, Mixture
from agents.routers.text import Preference, TextRouter
from agents.routers.whole import OneModel
from agents.runs.config import TrainConfig
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return hostile_store(tmp_path_factory.mktemp("query-level") / "s", problems=240)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = ["--agent", "query-level", "--rollouts", str(store.path), "--tracking", "none", "--out", str(out)]
    assert train_command.main([*arguments, "--lam", "1e-6", "0.02", "--budget", "0.4"]) == 0
    return out


def questions(store, split="test"):
    tables = decision_tables(compile_store(store), split)
    return [tables.trees.questions[each] for each in np.unique(tables.trees.problem[tables.indices])]


def test_runs_have_a_router_for_each_lam_and_for_a_budget(finished, store):
    told = json.loads((finished / "lam-0.02" / "fit.json").read_text())
    assert "classifier (RouteLLM)" in told["methods"] and told["lacking"] == []
    found = {place: artefact.load(finished / place / "policy").router for place in ("lam-1e-06", "lam-0.02")}
    assert all(isinstance(each, TextRouter) and each.name == "query-level" for each in found.values())
    sent = {place: each.sends(questions(store)).mean() for place, each in found.items()}
    assert sent["lam-1e-06"] > sent["lam-0.02"]
    about = artefact.load(finished / "lam-0.02" / "policy").about
    assert "decisions" not in about["held_out"][0]
    mixed = artefact.load(finished / "budget-0.4" / "policy").router
    assert isinstance(mixed, Mixture) and not {type(mixed.first), type(mixed.second)} - {TextRouter, OneModel}


def test_evaluations_put_them_among_their_like(finished, store, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "BASELINES", methods.BASELINES[:1])
    arguments = [str(finished), "--rollouts", str(store.path), "--baselines", "--out", str(tmp_path / "e")]
    assert evaluate_command.main([*arguments, "--report", str(tmp_path / "page")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "e" / "results.json").read_text())["field"]}
    assert rows["query-level"]["group"] == "query-level" and rows["trim-thr"]["group"] == "step-level"
    assert "query-level" in (tmp_path / "page" / "report.html").read_text()


def test_exports_are_asked_once(finished, store, tmp_path, capsys):
    assert command.main(["export", str(finished), "--lam", "0.02", "--out", str(tmp_path / "router")]) == 0
    assert "session().decide(question=...)" in capsys.readouterr().out
    policy, router = agents.load(tmp_path / "router"), artefact.load(finished / "lam-0.02" / "policy").router
    asked = questions(store)
    assert [policy.session().decide(question=each) for each in asked] == router.sends(asked).tolist()
    assert command.main(["export", str(finished), "--budget", "0.4", "--out", str(tmp_path / "mixed")]) == 0
    sessions = [agents.load(tmp_path / "mixed").session(seed=seed) for seed in range(20)]
    assert all(session.decides_once for session in sessions)  # whichever part was drawn


def test_the_setting_that_returns_most_is_chosen(store):
    trees = compile_store(store)
    choice = decision_tables(trees, indices=halves(trees)[0])
    found = query_level.fit(decision_tables(trees, "train"), choice, 0)
    for lam in (1e-6, 0.003, 0.02):
        best = max(run(router, choice).returns(lam).mean() for _, router, _ in found.settings)
        assert run(found.router(lam), choice).returns(lam).mean() == pytest.approx(best)
        assert all(best >= run(OneModel(action), choice).returns(lam).mean() - 1e-9 for action in (0, 1))


def test_thresholds_lie_between_what_questions_are_worth(store):
    """So that no question whose worth is rounded otherwise, alone or among others, is sent elsewhere."""
    trees = compile_store(store)
    data = Fitting(decision_tables(trees, "train"), decision_tables(trees, "validation"))
    worth = dict(zip(questions(store, "validation"), np.resize([0.1, 0.1 + 1e-15, 0.4, 0.7], 999), strict=False))
    features = lambda texts: np.array([[worth[text]] for text in texts])  # noqa: E731
    router = TextRouter("planted", Knob("threshold", 0.0), Preference("linear", features, {"0.weight": np.eye(1)}))
    levels = [each.knob.value for each in at_thresholds(router, data)]
    assert levels == pytest.approx([-0.9, 0.25, 0.55, 1.7])


def test_what_it_does_not_read_and_cannot_keep_is_refused(store, tmp_path, capsys):
    base = ["--agent", "query-level", "--rollouts", str(store.path), "--out", str(tmp_path / "x")]
    for wrong, words in (
        (["--schema", "free"], "--schema: query-level reads the question alone"),
        (["--max-large-tokens", "30"], "--max-large-tokens: query-level"),
        (["--lam-range", "1e-3", "1e-2"], "--lam-range trains one ppo-agg or exact"),
    ):
        assert train_command.main([*base, *wrong]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="query-level learns from complete trees"):
        TrainConfig(agent="query-level", live=True)
    assert not (tmp_path / "x").exists()
