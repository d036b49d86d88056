"""Routers that read score tables by name: from training to evaluation, on a store of scripted trees."""

from __future__ import annotations

import shutil

import pytest
from handmade import Statistician
from scripted_store import scripted_store

import agents
import evaluate as command
from agents.evaluation.budgets import settings
from agents.evaluation.splits import Validation
from agents.evaluation.suite import EvaluateConfig, evaluate, load_methods
from agents.routers.base import Threshold
from agents.runs.run import TrainConfig, resume, train
from rollouts.errors import ArtefactError, StoreError
from rollouts.store.store import Store
from rollouts.text.steps import ROLES
from rollouts.trees.annotate import score_store
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = scripted_store(tmp_path_factory.mktemp("signals") / "s", 90)
    for role in ROLES:
        score_store(made, Statistician(role))
    return made


def trained(store, out, **asked):
    return train(TrainConfig(rollouts=str(store.path), tracking="none", attempts=1, lam=(0.01,), out=out, **asked))


@pytest.mark.parametrize(
    ("settings", "schema"),
    [
        ({"agent": "threshold", "schema": "small.min_logprob"}, "small.min_logprob/1"),
        ({"agent": "threshold"}, "agg/1"),
        ({"agent": "threshold", "scorer": "small"}, "agg/1"),
        ({"agent": "exact", "schema": "prefill,least(large.min_logprob)"}, "prefill/1,least(large.min_logprob)/1"),
    ],
)
def test_what_is_trained_on_signals_is_evaluated_on_them(store, tmp_path, settings, schema):
    run = trained(store, tmp_path / "run", **settings)
    router = run.routers[0.01]
    assert router.schema == schema and isinstance(router, Threshold) == (settings["agent"] == "threshold")
    where = {"rollouts": str(store.path), "scorer": settings.get("scorer", "scripted")}
    found = evaluate(EvaluateConfig((run.folder,), split="test", **where))
    assert found.methods[0].name.startswith(router.name)
    policy = agents.load(run.folder / "lam-0.01" / "policy")
    assert policy.schema == schema and policy.about["scorer"] == where["scorer"]
    if "small.min_logprob" in schema or "prefill" in schema:
        other = Statistician("small")
        other.of = lambda question, steps: tuple(2 * each for each in Statistician("small").of(question, steps))
        moved = scripted_store(tmp_path / "other", 90)
        for scorer in (other, Statistician("large")):
            score_store(moved, scorer)
        with pytest.raises(ArtefactError, match=r"trained on rollouts .* with hash .*\+"):
            evaluate(EvaluateConfig((run.folder,), split="test", rollouts=str(moved.path), scorer="scripted"))


def test_a_run_on_signals_that_are_not_there_is_refused_before_it_begins(tmp_path):
    bare = scripted_store(tmp_path / "bare", 90)
    with pytest.raises(StoreError, match=r"free reads small\..*score .*bare --scorer small"):
        trained(bare, tmp_path / "run", agent="exact", schema="free")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_other_columns(store, tmp_path):
    own = scripted_store(tmp_path / "own", 90)
    score_store(own, Statistician("small"))
    run = trained(own, tmp_path / "run", agent="threshold", schema="small.min_logprob")
    assert resume(run.folder).routers.keys() == {0.01}
    shutil.rmtree(own.path / "scores" / "small")
    other = Statistician("small")
    other.of = lambda question, steps: tuple(2 * each for each in Statistician("small").of(question, steps))
    score_store(Store(own.path), other)
    with pytest.raises(StoreError, match="the run was begun on"):
        resume(run.folder)


def test_a_budget_on_the_small_models_numbers_needs_no_score(store, tmp_path):
    run = trained(store, tmp_path / "run", agent="exact", schema="free", budget=0.3)
    policy = agents.load(run.folder / "budget-0.3" / "policy")
    told = {"small.min_logprob": -0.3, "small.mean_logprob": -0.1, "small.max_entropy": 0.2}
    for seed in range(12):
        session = policy.session(seed=seed)
        assert session.decide(tokens=12, text="x", **told) in (0, 1)


def test_a_budget_of_thresholds_is_met_by_thresholds_on_what_was_asked_for(store):
    trees = compile_store(store, "scripted")
    whole = decision_tables(trees, None, schema="small.min_logprob")
    validation = Validation(whole.on, trees)
    own = Threshold(-0.5, schema=whole.schema.id)
    for stored, schemas in (([own], {own.schema}), ([own, Threshold(0.5)], {own.schema, Threshold.schema})):
        found = [router for router, _ in settings(stored, validation) if isinstance(router, Threshold)]
        assert {each.schema for each in found} == schemas and len(found) > 20 * len(schemas)


def test_every_folder_that_is_named_is_a_method(store, tmp_path, capsys):
    runs = [trained(store, tmp_path / name / "run", agent="threshold").folder for name in ("a", "b")]
    assert list(load_methods(runs)) == ["trim-thr (a/run)", "trim-thr (b/run)"]
    policies = [run / "lam-0.01" / "policy" for run in runs]
    assert len(load_methods(policies)) == 2
    (tmp_path / "file").write_text("mine")
    said = ["--rollouts", str(store.path), "--scorer", "scripted", "--out"]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command.main([str(runs[0]), *said, str(out)]) == 2 and "error: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
