"""Exported routers are the trained ones on every decision; what was tampered with is refused; the command line."""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from made_routers import network

import agents
from agents import __main__ as command
from agents import tracking
from agents.deploy.export import ExportConfig, export
from agents.evaluation.walk import run, run_trees
from agents.learners.settings import PPOSettings
from agents.routers import artefact
from agents.routers.base import Constant, Mixture, RandomRate, StatefulRouter, Threshold
from agents.routers.mlp import ACTIVATIONS, for_lam
from agents.routers.onnx import check_onnx, to_onnx
from agents.runs.config import TrainConfig
from agents.runs.run import train
from rollouts.errors import ArtefactError
from rollouts.files.sealed import digest_of
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables, rollouts_hash

QUICK = PPOSettings(iterations=2, num_envs=64, n_steps=8, hidden=16)
SPAN = (3e-4, 1e-2)


@pytest.fixture(scope="module")
def tables():
    return decision_tables(compile_store("quickstart"), "test")


@dataclass(frozen=True)
class Runs:
    """A folder with a run of every kind, and the routers as training returned them."""

    folder: Path
    trained: dict


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def trained(name, **settings):
        return train(TrainConfig(tracking="none", attempts=1, out=folder / name, **settings))

    span = trained("span", lam_range=SPAN, ppo=QUICK)
    one = trained("one", lam=(3e-3,), ppo=QUICK)
    threshold = trained("threshold", agent="threshold", lam=(1e-3, 3e-3), budget=0.2)
    pomdp = trained("pomdp", agent="pomdp", lam=(3e-3,))
    about = agents.load(folder / "one" / "lam-0.003" / "policy").about
    routers = {
        "mlp-lam": span.routers,
        "mlp": one.routers[3e-3],
        "threshold": threshold.routers[3e-3],
        "pomdp": pomdp.routers[3e-3],
        "constant": Constant(1),
        "random": RandomRate(0.3),
        "mixture": Mixture(one.routers[3e-3], threshold.routers[1e-3], 0.3, threshold_knob(folder)),
    }
    for kind in ("constant", "random", "mixture"):
        artefact.save(routers[kind], folder / kind / "policy", about)
    return Runs(folder, routers)


def threshold_knob(folder):
    return agents.load(folder / "threshold" / "budget-0.2" / "policy").router.knob


PLACES = {"mlp-lam": "span", "mlp": "one", "threshold": "threshold/lam-0.003", "pomdp": "pomdp"}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for kind in runs.trained:
        export(ExportConfig(str(runs.folder / PLACES.get(kind, kind)), folder / kind, onnx=True))
    return folder


def decisions(router, tables):
    """Return the probabilities of escalating at every node of the split's trees, or along every path of a state."""
    if not isinstance(router, StatefulRouter):
        rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
        assert len(rows) > 20_000
        return router.probability(tables.in_schema(router.schema)[rows])
    kept = []

    class Kept:
        name, schema, knob = router.name, router.schema, router.knob
        start, accept = router.start, router.accept

        def decide(self, features, state):
            kept.append(router.decide(features, state))
            return kept[-1]

    run_trees(tables, Kept())
    return np.concatenate([each[0] for each in kept])


def in_onnxruntime(folder, features, lam=None):
    """Return actions and logits of a policy.onnx, which stands alone."""
    session = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
    told = {} if lam is None else {"lam": np.full(len(features), lam)}
    return session.run(["action", "logits"], {"features": features, **told})


@pytest.mark.parametrize("kind", ["mlp", "mlp-lam", "threshold", "constant", "random", "pomdp", "mixture"])
def test_exported_routers_are_the_trained_ones(runs, exported, tables, kind):
    policy, trained = agents.load(exported / kind), runs.trained[kind]
    assert policy.kind == kind
    if kind == "mlp-lam":
        pairs = [(policy.at(lam), router) for lam, router in trained.items()]
        assert len(pairs) == 5
    elif kind == "mixture":
        assert (policy.router.share, policy.router.knob) == (trained.share, trained.knob)
        pairs = [(policy.router.first, trained.first), (policy.router.second, trained.second)]
    else:
        pairs = [(policy.router, trained)]
    for found, wanted in pairs:
        assert (decisions(found, tables) == decisions(wanted, tables)).all()
        assert (found.name, found.schema, found.knob) == (wanted.name, wanted.schema, wanted.knob)


def test_only_networks_have_an_onnx_form(exported):
    files = {str(file.relative_to(exported)) for file in exported.rglob("policy.onnx")}
    assert files == {"mlp/policy.onnx", "mlp-lam/policy.onnx", "mixture/first/policy.onnx"}


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("lam", [3e-3, SPAN])
def test_onnx_decides_as_numpy_whatever_the_units_compute(tables, tmp_path, activation, lam):
    features = tables.in_schema("agg+")[:5000]
    weights = network(6 + isinstance(lam, tuple)).weights
    router = for_lam("x", "agg+/1", lam, weights, activation=activation)
    leaning = np.median(np.diff((router.at(1e-3) if isinstance(lam, tuple) else router).logits(features), axis=1))
    bias = weights["2.bias"] - np.array([0, leaning], np.float32)  # so that it escalates about half the time
    router = replace(router, weights={**weights, "2.bias": bias})
    artefact.save(router, tmp_path / "p", {"max_steps": 16}, onnx=True)
    loaded = agents.load(tmp_path / "p").at(1e-3 if isinstance(lam, tuple) else None)
    action, logits = in_onnxruntime(tmp_path / "p", features, 1e-3 if isinstance(lam, tuple) else None)
    assert logits == pytest.approx(loaded.logits(features), abs=1e-5 if activation == "gelu" else 1e-10)
    assert (action == loaded.probability(features)).all() and 0 < action.mean() < 1


@pytest.mark.parametrize("lam", [SPAN[0], 1.7e-3, SPAN[1]])
def test_onnx_files_stand_alone(exported, tables, lam):
    rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
    features = tables.in_schema("agg+")[rows]
    action, logits = in_onnxruntime(exported / "mlp-lam", features, lam)
    router = agents.load(exported / "mlp-lam").at(lam)
    assert action.dtype == np.int64 and (action == router.probability(features)).all()
    assert logits == pytest.approx(router.logits(features), abs=1e-12)
    mixed = np.where(np.arange(len(rows)) % 2, SPAN[0], lam)  # every row has its own
    action, logits = in_onnxruntime(exported / "mlp-lam", features, mixed)
    assert logits[::2] == pytest.approx(router.logits(features[::2]), abs=1e-12)
    other = agents.load(exported / "mlp-lam").at(SPAN[0])
    assert logits[1::2] == pytest.approx(other.logits(features[1::2]), abs=1e-12)


def other_graph(change):
    """Return a function that changes the graph of a policy.onnx."""

    def changed(data):
        model = onnx.load_model_from_string(data)
        change(model.graph)
        return model.SerializeToString()

    return changed


def least(graph):
    graph.node[-1].op_type = "ArgMin"


def outside(graph):
    onnx.external_data_helper.set_external_data(graph.initializer[0], "/etc/hostname")
    graph.initializer[0].ClearField("raw_data")


def shifted(graph):
    values = onnx.numpy_helper.to_array(graph.initializer[-1])
    graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(values + [[0.5, 0.0]], graph.initializer[-1].name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_graph(least), "decides otherwise"),
        (other_graph(shifted), "decides otherwise"),
        (other_graph(outside), "keeps data in other files"),
        (other_graph(lambda graph: graph.node.pop()), "does not run"),
        (lambda data: data[:-40], "is no ONNX graph|does not run"),
    ],
)
@pytest.mark.parametrize("lam", [3e-3, SPAN])
def test_a_graph_that_decides_otherwise_is_not_written(tmp_path, monkeypatch, lam, change, message):
    router = for_lam("x", "agg+/1", lam, network(6 + isinstance(lam, tuple)).weights)
    check_onnx(to_onnx(router), router)
    with pytest.raises(ArtefactError, match=message):
        check_onnx(change(to_onnx(router)), router)
    make_model = onnx.helper.make_model

    def broken(graph, **options):
        graph.node[-1].op_type = "ArgMin"
        return make_model(graph, **options)

    monkeypatch.setattr(onnx.helper, "make_model", broken)
    with pytest.raises(ArtefactError, match="decides otherwise"):
        artefact.save(router, tmp_path / "p", {"max_steps": 16}, onnx=True)
    assert not (tmp_path / "p" / "policy.json").exists()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # where it is missing nothing is compared
    artefact.save(router, tmp_path / "p", {"max_steps": 16}, onnx=True)


def test_an_artefact_says_where_it_comes_from(runs, exported, tables):
    for kind in runs.trained:
        described = json.loads((exported / kind / "policy.json").read_text())
        about = described["about"]
        assert about["rollouts"]["hash"] == tables.trees.meta["hash"] and about["package"]
        assert about["small"] and about["large"] and about["scorer"] and about["max_steps"] == 16
        assert about["features"][0].keys() == {"name", "low", "high"}
        assert set(described["files"]) == {each.name for each in (exported / kind).iterdir() if each.is_file()} - {
            "policy.json"
        }
    described = json.loads((exported / "mlp" / "policy.json").read_text())
    assert set(described["files"]) == {"policy.safetensors", "policy.onnx"}
    assert described["about"]["held_out"][0]["lam"] == 3e-3


def test_a_range_says_what_each_lam_costs(exported):
    rows = agents.load(exported / "mlp-lam").about["budgets"]
    assert len(rows) == 24 and rows[0]["lam"] == pytest.approx(SPAN[0]) and rows[-1]["lam"] == pytest.approx(SPAN[1])
    assert all(0 <= row["share"] <= 1.2 and 0 < row["accuracy"] < 1 for row in rows)


def put(folder, name, change):
    data = bytearray((folder / name).read_bytes())
    change(data)
    (folder / name).write_bytes(bytes(data))


def flip(data):
    data[len(data) // 2] ^= 1


def edit(folder, change):
    described = json.loads((folder / "policy.json").read_text())
    change(described)
    (folder / "policy.json").write_text(json.dumps(described))


def sealed(folder, change):
    """Change policy.json and its digest with it, as somebody who knows the format can."""

    def both(described):
        change(described)
        described["digest"] = digest_of(described)

    edit(folder, both)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("mlp", lambda p: put(p, "policy.onnx", flip), r"policy.onnx: its contents are not those"),
        ("mlp", lambda p: put(p, "policy.safetensors", flip), r"policy.safetensors: its contents are not those"),
        ("mlp", lambda p: put(p, "policy.onnx", lambda d: d.pop()), r"policy.onnx: its contents are not those"),
        ("mlp", lambda p: (p / "policy.onnx").unlink(), r"policy.onnx is missing"),
        ("mlp", lambda p: edit(p, lambda d: d["knob"].update(value=1.0)), r"policy.json: .*digest"),
        ("mlp", lambda p: edit(p, lambda d: d["about"].update(max_steps=30)), r"policy.json: .*digest"),
        ("threshold", lambda p: edit(p, lambda d: d["knob"].update(value=0.9)), r"policy.json: .*digest"),
        ("threshold", lambda p: edit(p, lambda d: d.pop("digest")), r"policy.json: .*'digest'"),
        (
            "threshold",
            lambda p: sealed(p, lambda d: d.update(version=artefact.VERSION + 1)),
            rf"written in version {artefact.VERSION + 1} of the format",
        ),
        ("threshold", lambda p: sealed(p, lambda d: d.update(kind="mlp")), "policy.json: .*policy.safetensors"),
        ("random", lambda p: sealed(p, lambda d: d["knob"].update(value=3.0)), "policy.json: .*expected a probability"),
        ("mlp", lambda p: sealed(p, lambda d: d["files"].update({"../x": "0"})), "names a file '../x'"),
        ("mlp", lambda p: sealed(p, lambda d: d["files"].update({"/etc/passwd": "0"})), "names a file '/etc/passwd'"),
        ("mixture", lambda p: put(p / "first", "policy.safetensors", flip), r"first/policy.safetensors: its contents"),
        ("mixture", lambda p: edit(p / "second", lambda d: d["knob"].update(value=1)), "second: .* the mixture names"),
        ("mixture", lambda p: shutil.rmtree(p / "second"), "no policy here"),
        ("pomdp", lambda p: edit(p, lambda d: d["pomdp"].update(price=2.0)), "policy.json: .*digest"),
    ],
)
def test_tampering_is_named(exported, tmp_path, kind, damage, message):
    folder = shutil.copytree(exported / kind, tmp_path / "p")
    agents.load(folder)
    damage(folder)
    with pytest.raises(ArtefactError, match=message):
        agents.load(folder)


def test_no_cut_and_no_changed_letter_goes_unnoticed(exported, tmp_path):
    folder = shutil.copytree(exported / "threshold", tmp_path / "p")
    whole = (folder / "policy.json").read_bytes()
    for length in range(0, len(whole) - 2, 37):
        (folder / "policy.json").write_bytes(whole[:length])
        with pytest.raises(ArtefactError, match="policy.json"):
            agents.load(folder)
    refused = 0
    for place in range(0, len(whole), 11):
        changed = bytearray(whole)
        changed[place] ^= 4
        (folder / "policy.json").write_bytes(bytes(changed))
        try:
            agents.load(folder)
        except ArtefactError as error:
            refused += "policy.json" in str(error) or "policy here" in str(error)
        else:
            pytest.fail(f"byte {place} may be changed")
    assert refused == len(range(0, len(whole), 11))


def test_artefacts_of_version_1_are_read_when_asked(exported, tmp_path):
    folder = shutil.copytree(exported / "mlp", tmp_path / "p")

    def older(described):
        described.update(version=1, weights=described.pop("files")["policy.safetensors"])
        described.pop("digest")

    edit(folder, older)
    with pytest.raises(ArtefactError, match="version 1 of the format"):
        agents.load(folder)
    assert agents.load(folder, allow_old=True).session().decide(0.5, 10, text="") in (0, 1)
    put(folder, "policy.safetensors", flip)
    with pytest.raises(ArtefactError, match="not those that policy.json names"):
        agents.load(folder, allow_old=True)


def test_packages_that_lack_are_named(runs, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    arguments = ["export", str(runs.folder / "one"), "--out", str(tmp_path / "x"), "--onnx"]
    assert command.main(arguments) == 2 and "pip install 'trim-routing[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert agents.load(exported / "mlp").session().decide(0.5, 10, text="") in (0, 1)  # deciding needs neither


def test_the_command_exports_all_routers_or_the_one_that_is_meant(runs, tmp_path, capsys):
    run_, out = str(runs.folder / "threshold"), tmp_path / "all"
    assert command.main(["export", run_, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {each.name for each in out.iterdir()} == {"lam-0.001", "lam-0.003", "budget-0.2"}
    assert all(f"{out}/{name}: " in printed for name in ("lam-0.001", "lam-0.003", "budget-0.2"))
    assert command.main(["export", run_, "--lam", "1e-3", "--out", str(tmp_path / "one")]) == 0
    assert agents.load(tmp_path / "one").router == agents.load(out / "lam-0.001").router
    assert command.main(["export", run_, "--budget", "0.2", "--out", str(tmp_path / "two")]) == 0
    assert agents.load(tmp_path / "two").about["calibration"]["value"] == 0.2
    again = ["export", str(out / "lam-0.001"), "--out", str(tmp_path / "again"), "--onnx"]
    assert command.main(again) == 0 and "no policy.onnx" in capsys.readouterr().err
    span = ["export", str(runs.folder / "span"), "--lam", "2e-3", "--out", str(tmp_path / "span")]
    assert command.main(span) == 0 and "lam=0.0003..0.01" in capsys.readouterr().out
    assert agents.load(tmp_path / "span").session().knob.value == 2e-3


def test_routers_that_training_advises_against_say_so(runs, tmp_path, capsys):
    found = agents.load(runs.folder / "one" / "lam-0.003" / "policy")
    for verdict, warned in (("beaten", True), ("better", False)):
        about = {**found.about, "held_out": [{"lam": 3e-3, "verdict": verdict, "sentence": "It is so."}]}
        artefact.save(found.router, tmp_path / verdict, about)
        assert command.main(["export", str(tmp_path / verdict), "--out", str(tmp_path / f"out-{verdict}")]) == 0
        assert ("advised against at λ = 0.003. It is so." in capsys.readouterr().err) == warned


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    run_, out = str(runs.folder / "threshold"), str(tmp_path / "never")
    for arguments, message in (
        (["exprt"], "Unknown command 'exprt'. Did you mean 'export'"),
        (["export", str(tmp_path), "--out", out], "no router here"),
        (["export", run_, "--out", str(tmp_path / "full")], "nothing was overwritten"),
        (
            ["export", run_, "--out", out, "--lam", "5"],
            "no routers are for lam 5, expected one; the run has budget-0.2",
        ),
        (["export", run_, "--out", out, "--budget", "0.3"], "no routers are for budget 0.3"),
        (["export", run_, "--out", out, "--lam", "1e-3", "--budget", "0.2"], "either --lam or --budget"),
        (["export", "wandb:policy", "--out", out], "expected wandb:ENTITY/PROJECT/ARTIFACT:VERSION"),
    ):
        assert command.main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not Path(out).exists()
    assert command.main([]) == 0 and "export" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command.main(["export", run_])
    assert ended.value.code != 0 and "--out" in capsys.readouterr().err


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """No login for Weights & Biases."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_offline_artifacts_wait_for_a_sync(runs, tmp_path, nobody):
    export(ExportConfig(str(runs.folder / "mixture"), tmp_path / "mine", onnx=True, to_wandb=True))
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    wanted = (b"trim-agg-mine", b"first/policy.onnx", b"second/policy.json")
    for _ in range(200):  # the library's own process writes the file, a moment after the run has ended
        logged = next(offline.glob("*.wandb")).read_bytes()
        if all(name in logged for name in wanted):
            break
        time.sleep(0.1)
    for name in wanted:
        assert name in logged, name
    assert {each.name for each in (tmp_path / "mine").iterdir()} == {"policy.json", "first", "second"}


def test_an_artifact_holds_a_whole_artefact(exported, tmp_path):
    policy = agents.load(exported / "mixture")
    artifact = tracking.artifact_of(exported / "mixture", policy.name, policy.describe())
    assert (artifact.type, artifact.metadata["kind"]) == ("policy", "mixture")
    for path, entry in artifact.manifest.entries.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(entry.local_path, tmp_path / path)
    assert agents.load(tmp_path).describe() == policy.describe()


def test_fetching_needs_a_login(tmp_path, nobody, capsys):
    assert command.main(["export", "wandb:team/trim-routing/policy-1:v0", "--out", str(tmp_path / "x")]) == 2
    assert "fetching needs a login. Say `wandb login`" in capsys.readouterr().err


def test_what_is_fetched_is_exported(exported, tmp_path, monkeypatch, capsys):
    import wandb

    def artifact(name, type):
        if name.endswith(":v9"):
            raise wandb.errors.CommError("not found")
        assert (name, type) == ("team/trim-routing/policy-1:v0", "policy")
        return SimpleNamespace(download=lambda root: shutil.copytree(exported / "mlp", root))

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(artifact=artifact))
    export(ExportConfig("wandb:team/trim-routing/policy-1:v0", tmp_path / "mine"))
    assert agents.load(tmp_path / "mine").router.knob == agents.load(exported / "mlp").router.knob
    assert command.main(["export", "wandb:team/trim-routing/policy-1:v9", "--out", str(tmp_path / "x")]) == 2
    assert "cannot be fetched (not found)" in capsys.readouterr().err


def test_outcomes_of_an_exported_mixture_are_those_of_the_trained_one(runs, exported, tables):
    found, wanted = run(agents.load(exported / "mixture").router, tables), run(runs.trained["mixture"], tables)
    assert (found.correct == wanted.correct).all() and (found.cost == wanted.cost).all()
    assert isinstance(runs.trained["threshold"], Threshold)


def test_a_router_that_reads_signals_decides_alike_in_every_face(tables, tmp_path):
    schema = "all,least(large.min_logprob)"
    trained = train(
        TrainConfig(tracking="none", attempts=1, out=tmp_path / "run", lam=(3e-3,), ppo=QUICK, schema=schema)
    ).routers[3e-3]
    export(ExportConfig(str(tmp_path / "run"), tmp_path / "out", onnx=True))
    policy = agents.load(tmp_path / "out")
    assert policy.schema == trained.schema == "all/1,least(large.min_logprob)/1"
    rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
    features = tables.in_schema(policy.schema)[rows]
    action, _ = in_onnxruntime(tmp_path / "out", features)
    wanted = decisions(trained, tables)
    assert (decisions(policy.router, tables) == wanted).all() and (action == wanted).all()
    assert policy.about["rollouts"]["hash"] == rollouts_hash(tables.trees, schema) != tables.trees.meta["hash"]
    changed = {name: values * (1 + (name == "large.min_logprob")) for name, values in tables.trees.signals.items()}
    other = replace(tables.trees, signals=changed)
    assert rollouts_hash(other, schema) != rollouts_hash(tables.trees, schema)
    assert rollouts_hash(other, "free") == rollouts_hash(tables.trees, "free")
