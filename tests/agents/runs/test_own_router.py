"""A router of somebody else's goes everywhere that ours go: train, resume, evaluate, export, session."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from own_router import Linear, Patient
from scripted_store import scripted_store

import agents
import evaluate as evaluate_command
import train as train_command
from agents import __main__ as command
from agents.evaluation.walk import run
from agents.routers import artefact
from rollouts.errors import ArtefactError, ConfigError
from rollouts.files.sealed import write_sealed
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("own") / "s", 90).path


@pytest.fixture(scope="module", params=["Linear", "Patient"])
def finished(request, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--agent", f"own_router:{request.param}", "--rollouts", str(store), "--lam", "0.001", "0.05"]
    assert train_command.main([*arguments, "--out", str(out), "--tracking", "none"]) == 0
    return out


def test_it_is_trained_stored_and_read(finished, store):
    stored = artefact.load(finished / "lam-0.05" / "policy")
    tables = decision_tables(compile_store(store), "train")
    fitted = type(stored.router).fit(tables, 0.05, 0)
    assert isinstance(stored.router, Linear | Patient) and stored.kind == f"own_router:{type(fitted).__name__}"
    assert (finished / "lam-0.05" / "policy" / "policy.safetensors").exists() == isinstance(fitted, Linear)
    first, again = run(fitted, tables), run(stored.router, tables)
    assert (first.correct == again.correct).all() and (first.cost == again.cost).all()
    assert 0 < first.escalations.sum() < first.steps.sum()
    assert [line[:8] for line in (finished / "report.txt").read_text().splitlines()] == ["lam 0.00", "lam 0.05"]


def test_it_is_resumed_evaluated_and_exported(finished, store, tmp_path, capsys):
    (finished / "lam-0.05" / "report.json").unlink()
    assert train_command.main(["--resume", str(finished), "--import", "own_router"]) == 0
    assert (finished / "lam-0.05" / "report.json").exists()
    out = tmp_path / "results"
    arguments = [str(finished), "--rollouts", str(store), "--out", str(out), "--import", "own_router"]
    assert evaluate_command.main(arguments) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["methods"][0]["name"] in ("linear", "patient") and len(found["methods"][0]["points"]) == 2
    exported = ["export", str(finished), "--lam", "0.05", "--out", str(tmp_path / "one"), "--onnx"]
    assert command.main([*exported, "--import", "own_router"]) == 0
    assert "no policy.onnx: a router of kind own_router:" in capsys.readouterr().err
    policy, router = agents.load(tmp_path / "one"), artefact.load(finished / "lam-0.05" / "policy").router
    assert policy.describe()["kind"].startswith("own_router:")
    tables = decision_tables(compile_store(store), "test")
    wanted, escalations = run(router, tables), 0
    for root in tables.roots:
        session, row = policy.session(), int(root)
        while row >= 0:
            score, tokens, child = tables.trees.score[row], tables.trees.tokens[row], tables.trees.child[row]
            facts = {"terminal": child[0] < 0, "has_answer": bool(tables.trees.has_answer[row, 0])}
            action = session.decide(score[0], int(tokens[0]), **facts)
            if action:
                session.accept(score[1], int(tables.trees.accepted_tokens[row, 1]), terminal=child[1] < 0)
            else:
                session.accept()
            row = int(child[action])
        escalations += session.escalations
    assert escalations == pytest.approx(2 * wanted.escalations.sum())  # two replicas of every problem


def test_files_import_nothing(finished, tmp_path):
    """Another process that was not told of the module refuses, and does not look for it."""
    told = [sys.executable, "-c", f"import agents; agents.load({str(finished / 'lam-0.05' / 'policy')!r})"]
    done = subprocess.run(
        told, cwd=ROOT / "tests" / "support", env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "ArtefactError" in done.stderr and "--import own_router" in done.stderr
    told[2] = "import own_router; " + told[2] + ".session()"
    subprocess.run(told, cwd=ROOT / "tests" / "support", env={"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("own_router:Missing", "has no attribute 'Missing'"),
        ("own_nowhere:Router", "module own_nowhere cannot be imported"),
        ("own_router:np", "it has no fit"),
    ],
)
def test_what_is_no_learner_is_refused_before_anything_is_written(store, tmp_path, capsys, agent, message):
    base = ["--rollouts", str(store), "--lam", "0.01", "--tracking", "none", "--out", str(tmp_path / "x")]
    assert train_command.main([*base, "--agent", agent]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "x").exists()


def test_what_is_no_router_is_named(store, tmp_path, capsys):
    base = ["--rollouts", str(store), "--lam", "0.01", "--tracking", "none", "--out", str(tmp_path / "x")]
    assert train_command.main([*base, "--agent", "own_router:Unfit"]) == 2
    assert "own_router:Unfit made a int, which is no router: it has no name, schema" in capsys.readouterr().err


def test_what_could_not_be_read_again_is_not_stored(tmp_path):
    local = type("Local", (Patient,), {"__module__": "__main__"})
    with pytest.raises(ArtefactError, match="define its class in a module of its own"):
        artefact.save(local(0.1, 1), tmp_path / "p", {})
    with pytest.raises(ArtefactError, match=r"weights sum \(float64\) of linear cannot be stored"):
        artefact.save(Linear(0.1, {"sum": np.zeros(7)}), tmp_path / "q", {})
    assert not (tmp_path / "p").exists()


def test_names_in_files_that_are_no_routers_are_refused(tmp_path):
    artefact.save(Patient(0.1, 1), tmp_path, {})
    file = tmp_path / "policy.json"
    for kind, message in (("os:system", "no class with to_plain"), ("json:JSONDecoder", "no class with to_plain"),
                          ("own_router:Nothing", "Nothing"), ("x y", "unknown kind")):  # fmt: skip
        write_sealed(file, {**json.loads(file.read_text()), "kind": kind})
        with pytest.raises(ArtefactError, match=message):
            artefact.load(tmp_path)


def test_a_range_of_lam_is_for_ours(store, tmp_path):
    from agents.runs.config import TrainConfig

    with pytest.raises(ConfigError, match="--lam-range trains one ppo-agg or exact policy"):
        TrainConfig(str(store), agent="own_router:Patient", lam_range=(1e-3, 1e-2))
