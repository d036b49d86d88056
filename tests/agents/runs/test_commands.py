"""The command lines as a user meets them: what they print, write and refuse; tracking without an account."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
import yaml
from made_routers import QUICK
from scripted_store import scripted_store

import evaluate as evaluate_command
import train as train_command
from agents import tracking
from agents.evaluation.splits import Validation
from agents.evaluation.suite import SEEN, EvaluateConfig, evaluate, save
from agents.evaluation.walk import run
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers import artefact
from agents.routers.base import Constant, Threshold
from agents.runs.config import TrainConfig, from_plain, resolved
from benchmarks.rungs import PAPER, PAPER_RUNG
from rollouts.config import as_plain
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("commands") / "s", 90).path


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run with two λ."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--rollouts", str(store), "--lam", "0.005", "0.05", "--out", str(out), "--tracking", "none", *QUICK]
    assert train_command.main(arguments) == 0
    return out


def test_training_says_what_to_do_next(store, tmp_path, capsys):
    """In words that a shell takes: folders may have spaces."""
    out = tmp_path / "my run"
    arguments = ["--rollouts", str(store), "--lam", "0.02", "--out", str(out), "--tracking", "none", *QUICK]
    assert train_command.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"python evaluate.py '{out}' --rollouts {store}\n" in printed.out
    assert "λ = 0.02" in printed.err and "of always-large's cost" in " ".join(printed.err.split())
    assert train_command.main(arguments) == 2
    assert re.fullmatch(r"error: .*nothing was overwritten.*\n", capsys.readouterr().err)


def test_a_router_without_a_report_is_replaced_by_that_of_the_report(store, tmp_path):
    """As an interrupt between the two leaves it: live trainings do not come to the same router again."""
    out = tmp_path / "run"
    given = ["--rollouts", str(store), "--agent", "threshold", "--lam", "0.02", "--tracking", "none", "--out", str(out)]
    assert train_command.main(given) == 0
    place = out / "lam-0.02"
    shutil.rmtree(place / "policy")
    artefact.save(Constant(1), place / "policy", {"max_steps": 30})
    (place / "report.json").unlink()
    assert train_command.main(["--resume", str(out)]) == 0
    assert artefact.load(place / "policy").router == Threshold(artefact.load(place / "policy").router.knob.value)
    assert (place / "report.json").is_file()


def test_mistakes_are_one_line_without_a_traceback(store, tmp_path, capsys):
    for arguments, message in [
        (["--agent", "ppo-ag"], "Did you mean 'ppo-agg'"),
        (["--schema", "agg++"], "Did you mean 'agg"),
        (["--rollouts", str(tmp_path)], "no rollout store here"),
        (["--rollouts", "gsmk8"], "bundled one. Did you mean 'gsm8k'? Known: gsm8k, quickstart."),
        (["--resume", str(tmp_path)], "no run to resume"),
        (["--live"], "Name those that made it: --models FILE."),
        (["--lam", "nan"], "--lam is nan, expected a finite number"),
        (["--ppo.num-envs", "0"], "--ppo.num-envs is 0, expected at least 1"),
        (["--agent", "nowhere:Router"], "module nowhere cannot be imported"),
    ]:
        base = [] if "--resume" in arguments else ["--tracking", "none", "--out", str(tmp_path / "x")]
        if "--rollouts" not in arguments and "--resume" not in arguments:
            base += ["--rollouts", str(store)]
        assert train_command.main([*base, *arguments]) == 2
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert printed.startswith("error: ") and message in printed
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit) as ended:
        train_command.main(["--lamb", "1"])
    assert ended.value.code != 0 and "--lam" in capsys.readouterr().err


def test_evaluation_writes_tables_and_pictures(finished, store, capsys):
    assert evaluate_command.main([str(finished), "--rollouts", str(store)]) == 0
    printed = capsys.readouterr().out
    folder = finished / "evaluation-test"
    for name in ("trim-agg", "trim-thr", "random", "oracle", "CPT(80", "ΔIBC"):
        assert name in printed
    found = json.loads((folder / "results.json").read_text())
    assert [method["name"] for method in found["methods"]] == ["trim-agg", "trim-thr", "random"]
    assert found["subject"]["problems"] == 30 and found["subject"]["split"] == "test"
    assert [row["lam"] for row in found["at_lam"]] == [0.005, 0.05]
    assert (folder / "results.csv").read_text().startswith("method,metric,value,low,high")
    assert "| trim-agg |" in (folder / "results.md").read_text()
    assert (folder / "curve.png").stat().st_size > 20_000 and "<svg" in (folder / "curve.svg").read_text()[:400]
    assert found["sentences"][0] in " ".join(printed.split())


def test_evaluation_reads_nothing_but_policies(finished, store, tmp_path):
    for place in finished.glob("lam-*/policy"):
        shutil.copytree(place, tmp_path / "bare" / place.parent.name / "policy")
    whole = evaluate(EvaluateConfig((finished,), str(store)))
    bare = evaluate(EvaluateConfig((tmp_path / "bare",), str(store)))
    assert whole.methods[0].metrics == bare.methods[0].metrics


def test_two_runs_are_compared_on_paired_problems(finished, store, tmp_path):
    trees = compile_store(store)
    about = artefact.load(finished / "lam-0.05" / "policy").about
    artefact.save(Constant(1), tmp_path / "large" / "policy", about)
    found = evaluate(EvaluateConfig((tmp_path / "large", finished), str(store)))
    names = [method.name for method in found.methods]
    assert names[:2] == ["always-large", "trim-agg"] and trees.meta["hash"] == found.subject["hash"]
    assert len(found.sentences) == 4
    bought = [f"{100 * method.metrics['accuracy_at_20'].value:.1f} % by {method.name}" for method in found.methods]
    assert found.sentences[0].startswith(f"Problems solved at 20 % of always-large's cost: {', '.join(bought)};")
    assert all(sentence.endswith(".") for sentence in found.sentences) and not {*SEEN.values()} & {*found.sentences}
    assert SEEN["train"] in evaluate(EvaluateConfig((finished,), str(store), split="train")).sentences
    save(found, tmp_path / "out")


def test_the_same_name_twice_is_told_apart(finished, store, tmp_path):
    about = artefact.load(finished / "lam-0.05" / "policy").about
    for name in ("one", "two"):
        artefact.save(Threshold(0.5), tmp_path / name / "policy", about)
    found = evaluate(EvaluateConfig((tmp_path / "one", tmp_path / "two"), str(store)))
    assert [m.name for m in found.methods[:2]] == ["trim-thr (one)", "trim-thr (two)"]
    assert found.methods[0].metrics == found.methods[1].metrics


def test_wrong_policies_are_refused(finished, store, tmp_path, capsys):
    other = scripted_store(tmp_path / "other", 60).path

    def refused(message, *arguments):
        out = tmp_path / "never"
        assert evaluate_command.main([*map(str, arguments), "--out", str(out)]) == 2
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(message, printed) and printed.startswith("error: ")
        assert not out.exists()

    refused("trained on rollouts 's' with hash", finished, "--rollouts", other)
    refused("no trained policy here", tmp_path, "--rollouts", store)
    refused("named twice", finished, finished, "--rollouts", store)
    refused("No trees in split 'tset'", finished, "--rollouts", store, "--split", "tset")
    about = artefact.load(finished / "lam-0.05" / "policy").about
    artefact.save(replace(Threshold(0.5), schema="agg/9"), tmp_path / "newer" / "policy", about)
    refused("version 9 is asked for", tmp_path / "newer", "--rollouts", store)
    artefact.save(Threshold(0.5), tmp_path / "dear" / "policy", {**about, "cost": "prefill-20"})
    refused("trained for different cost", finished, tmp_path / "dear", "--rollouts", store)
    assert evaluate_command.main([str(finished), "--rollouts", str(other), "--transfer"]) == 0


def test_a_split_that_was_drawn_later_is_evaluated_without_transfer(finished, store, tmp_path, capsys, monkeypatch):
    """It is a store of its own in the store's folder: what is there already keeps its hash."""
    later = shutil.copytree(store, tmp_path / "later")
    before = compile_store(store).meta["hash"]
    scripted_store(later / "test2", 40, splits=("test2",))
    shutil.rmtree(later / ".compiled", ignore_errors=True)
    for place in (later, later / "test2"):  # both are called "." where they are looked at first
        monkeypatch.chdir(place)
        found = compile_store(".").meta["hash"]
        assert (found == before) == (place == later)
    arguments = [str(finished), "--rollouts", str(later), "--split", "test2", "--out", str(tmp_path / "out")]
    assert evaluate_command.main([*arguments, "--report", str(tmp_path / "page")]) == 0
    subject = json.loads((tmp_path / "out" / "results.json").read_text())["subject"]
    assert (subject["problems"], subject["split"], subject["transfer"]) == (40, "test2", False)
    assert subject["hash"] == compile_store(later / "test2").meta["hash"] != before
    assert (tmp_path / "page" / "report.html").stat().st_size > 20_000
    inner = decision_tables(later, "test2")
    assert inner.trees.meta["hash"] == subject["hash"] and len(inner.indices) == 80
    assert decision_tables(later, "test").trees.meta["hash"] == before
    shutil.rmtree(later / "test2")
    scripted_store(later / "test2", 6, max_escalations=1, splits=("test2",))
    capsys.readouterr()
    assert evaluate_command.main(arguments) == 2
    assert "generated by another process than" in capsys.readouterr().err


def test_a_capped_evaluation_caps_everyone_but_always_large(finished, store):
    free = evaluate(EvaluateConfig((finished,), str(store)))
    capped = evaluate(EvaluateConfig((finished,), str(store), max_escalations=1))
    assert capped.subject["max_escalations"] == 1 and free.subject["max_escalations"] is None
    assert capped.methods[0].large == free.methods[0].large
    assert max(point.escalations for method in capped.methods for point in method.points) <= 1


def test_wandb_is_offline_without_a_login(store, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert not tracking.logged_in() and tracking.wandb_mode() == "offline"
    out = tmp_path / "run"
    arguments = ["--rollouts", str(store), "--lam", "0.02", "--out", str(out), *QUICK]
    assert train_command.main(arguments) == 0
    place = out / "lam-0.02"
    runs = list((place / "wandb").glob("offline-run-*"))
    identity = (place / "wandb-run.txt").read_text().strip()
    assert len(runs) == 1 and runs[0].name.endswith(identity)
    logged = next(runs[0].glob("*.wandb")).read_bytes()
    for name in (b"validation/return", b"train/approx_kl", b"train/return", b"image-file", b"table-file", b"policy-"):
        assert name in logged, name
    assert list(runs[0].glob("files/media/images/curve*.png"))
    (place / "report.json").unlink()  # as if it had been killed just before its end
    assert train_command.main(["--resume", str(out)]) == 0
    assert (place / "wandb-run.txt").read_text().strip() == identity
    again = list((place / "wandb").glob("offline-run-*"))
    assert len(again) == 2 and all(run.name.endswith(identity) for run in again)


def test_an_interrupt_ends_an_evaluation_in_silence(monkeypatch, tmp_path, capsys):
    def interrupted(config, others):
        raise KeyboardInterrupt

    monkeypatch.setattr("agents.evaluation.suite.evaluate", interrupted)
    assert evaluate_command.main([str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_key_means_online(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode() == "disabled"


def test_the_sweep_file_names_settings_that_exist():
    sweep = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    assert sweep["program"] == "train.py" and sweep["method"] in ("grid", "random", "bayes")
    arguments = []
    for name, setting in sweep["parameters"].items():
        value = setting.get("value", setting.get("values", [setting.get("min")])[0])
        arguments += [f"--{name}", str(value)]
    assert "${args}" in sweep["command"]
    tyro.cli(TrainConfig, args=arguments)


def test_the_papers_settings_are_those_of_the_ladder():
    """The flags that docs/routers.md names."""
    text = (ROOT / "docs" / "routers.md").read_text("utf-8").replace("\\\n", " ")
    (flags,) = re.findall(r"^python train.py (.*--ppo.no-anneal.*?)(?: #.*)?$", text, re.MULTILINE)
    config = tyro.cli(TrainConfig, args=flags.split())
    assert (config.ppo, config.schema, config.attempts) == (PAPER, PAPER_RUNG.schema, 1)
    told = {"hidden": 128, "learning_rate": 1e-4, "entropy": 0.01, "clip_range": 0.2, "gae_lambda": 0.95}
    assert told.items() <= vars(PAPER).items()  # arXiv 2601.10245
    assert not (PAPER.anneal or PAPER.normalize) and PAPER.lam_share(0) == 1
    preset = resolved(tyro.cli(TrainConfig, args=["--agent", "ppo-paper", "--ppo.iterations", "5"]))
    assert preset == replace(config, ppo=replace(PAPER, iterations=5)) and preset.agent == "ppo-agg"
    for wrong in ({"schema": "agg+prod"}, {"attempts": 2}, {"ppo": PPOSettings(hidden=16)}):
        with pytest.raises(ConfigError, match="with --agent ppo-paper it is (agg|1|128). Leave it out"):
            resolved(TrainConfig(agent="ppo-paper", **wrong))


def test_settings_of_earlier_runs_are_read(tmp_path):
    """As config.json had them at commit 30945b0; what is unknown or damaged is named."""
    plain = json.loads((ROOT / "tests" / "agents" / "runs" / "config-of-30945b0.json").read_text())
    config = from_plain(plain, tmp_path)
    assert (config.agent, config.budget, config.out) == ("exact", 0.2, tmp_path)  # what became of tree-agg
    assert config.exact == ExactSettings(rule="mlp")
    assert config.lam_range == (3e-4, 1e-2) and config.lam == () and config.ppo == PPOSettings()
    now = as_plain(config)
    for name, default in (("start", "random"), ("anneal", True), ("normalize", True)):  # later ones
        assert now["ppo"].pop(name) == now["seq"].pop(name) == default
    for name, default in (("ask", None), ("live", False), ("models", None), ("max_generated_large_tokens", None)):
        assert now.pop(name) is default
    changed = {"agent": "tree-agg", "out": plain["out"], "tree": plain["tree"]}
    assert {**{name: value for name, value in now.items() if name != "exact"}, **changed} == plain
    for wrong, message in (
        ({"colour": 1}, "--colour: no such setting"),
        ({"ppo": {"iterations": 0}}, "--ppo.iterations is 0"),
        ({"lam": "much"}, "--lam is 'much', expected a valid tuple"),
    ):
        with pytest.raises(ConfigError, match=f"config.json: {message}"):
            from_plain({**plain, **wrong}, tmp_path)


def test_unusable_rollouts_are_refused_in_one_line(tmp_path, capsys):
    whole = scripted_store(tmp_path / "whole", 30).path

    def refused(damage, message):
        store = tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, store, ignore=shutil.ignore_patterns(".compiled"))
        damage(store)
        out = tmp_path / "never"
        code = train_command.main(["--rollouts", str(store), "--lam", "0.01", "--out", str(out), "--tracking", "none"])
        printed = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and printed[-1].startswith("error: ") and re.search(message, printed[-1]), printed
        assert not out.exists()

    def without_large_steps(store):
        for shard in (store / "steps").glob("*.parquet"):
            table = pq.read_table(shard)
            keep = [role == "small" for role in table["role"].to_pylist()]
            pq.write_table(table.filter(keep), shard)

    def not_a_number(store):
        shard = next((store / "scores" / "scripted").glob("*.parquet"))
        table = pq.read_table(shard)
        values = np.array(table["score"].to_pylist(), np.float32)
        values[3] = np.nan
        field = table.schema.get_field_index("score")
        column = pa.array(values, type=table.schema.field("score").type)
        pq.write_table(table.set_column(field, table.schema.field("score"), column), shard)

    refused(lambda store: shutil.rmtree(store / "scores"), "no scores")
    refused(lambda store: shutil.rmtree(store / "grades"), "no grades")
    refused(without_large_steps, "incomplete")
    refused(not_a_number, "1 scores.*NaN")


def test_a_range_of_lam_is_evaluated_at_points_that_spread_the_cost(store, tmp_path, capsys):
    out = tmp_path / "range"
    arguments = [
        "--rollouts",
        str(store),
        "--lam-range",
        "0.001",
        "0.3",
        "--out",
        str(out),
        "--tracking",
        "none",
        *QUICK,
    ]
    assert train_command.main(arguments) == 0
    found = evaluate(EvaluateConfig((out,), str(store)))
    assert 1 < len(found.methods[0].points) <= 16
    assert all(0.001 <= point.knob <= 0.3 for point in found.methods[0].points)
    assert len(found.at_lam) == 5
    capsys.readouterr()
    refused = [
        "--rollouts",
        str(store),
        "--lam-range",
        "0.3",
        "0.001",
        "--out",
        str(tmp_path / "x"),
        "--tracking",
        "none",
    ]
    assert train_command.main(refused) == 2 and "the lower one first" in capsys.readouterr().err
    refused = ["--rollouts", str(store), "--lam-range", "0.1", "1", "--lam", "1", "--out", str(tmp_path / "x")]
    assert train_command.main(refused) == 2 and "leave out --lam" in capsys.readouterr().err


@pytest.mark.parametrize("agent", ["threshold", "ppo-agg"])
def test_a_budget_becomes_a_router(store, tmp_path, capsys, agent):
    out = tmp_path / "run"
    base = ["--rollouts", str(store), "--tracking", "none", "--agent", agent, *QUICK]
    assert train_command.main([*base, "--budget", "0.3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "For a budget of 30 % of always-large's cost" in printed
    stored = artefact.load(out / "budget-0.3" / "policy")
    assert stored.about["calibration"]["value"] == 0.3
    trees = compile_store(store)
    validation = Validation(lambda indices: decision_tables(trees, indices=indices), trees)
    shares = [
        run(stored.router, tables).cost.sum() / both.large.cost.sum()
        for tables, both in zip((validation.choice, validation.verdict), validation.references, strict=True)
    ]
    assert shares == pytest.approx([0.3, stored.about["calibration"]["share"]])  # where it was chosen, and elsewhere
    found = evaluate(EvaluateConfig((out / "budget-0.3",), str(store)))
    assert len(found.methods[0].points) == 1 and found.methods[0].points[0].knob == 0.3
    for wrong, message in (
        (["--budget", "1.5"], "--budget is 1.5, expected at most 1"),
        (["--budget", "0.1", "--accuracy", "0.9"], "not both"),
    ):
        assert train_command.main([*base, *wrong, "--out", str(tmp_path / "z")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
