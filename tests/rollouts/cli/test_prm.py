"""A reward model from one's own trees, as a user would type it: labels, training, scoring, the models file."""

from __future__ import annotations

import json
import shutil
import tomllib
from datetime import date
from pathlib import Path

import pytest
import torch
from bundled_part import bundled_part

from rollouts.__main__ import main
from rollouts.cli.train_prm import evaluate
from rollouts.config import ModelConfig, ScorerConfig, load_family
from rollouts.errors import ConfigError
from rollouts.files.sealed import write_sealed
from rollouts.models.hf import fit
from rollouts.models.identity import identity
from rollouts.store.store import Store
from rollouts.text.prompts import RewardFormat
from rollouts.text.tokenizer import load_tokenizer, transformers_tokenizer
from rollouts.tinymath import model_dir

pytestmark = pytest.mark.usefixtures("engines_in_threads")
EMBEDDED = ["--models", "tinymath:transformers"]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Trees without scores."""
    path = tmp_path_factory.mktemp("prm") / "trees"
    bundled_part(path, scores=False, train=24, validation=6)
    return path


@pytest.fixture(scope="module")
def trained(engines_in_threads, trees):
    folder = trees.parent / "own-prm"
    assert main(["train-prm", str(trees), str(folder), *EMBEDDED, "--epochs", "2"]) == 0
    return folder


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_labels_for_trl(trees, tmp_path):
    assert main(["labels", str(trees), str(tmp_path / "new" / "data.jsonl")]) == 0
    rows = lines(tmp_path / "new" / "data.jsonl")
    assert {row["split"] for row in rows} == {"train"} and len({row["problem"] for row in rows}) == 24
    for row in rows:
        assert row["prompt"].startswith("Let ") and len(row["completions"]) == len(row["labels"]) == len(row["values"])
        assert [value > 0 for value in row["values"]] == row["labels"]
        assert not any(step.endswith("\n") for step in row["completions"])
    assert len({(row["problem"], *row["completions"]) for row in rows}) == len(rows)
    assert any(all(row["labels"]) for row in rows) and any(not any(row["labels"]) for row in rows)


def test_labels_for_prm800k_of_another_split(trees, tmp_path):
    arguments = ["--layout", "prm800k", "--split", "validation", "--threshold", "0.5"]
    assert main(["labels", str(trees), str(tmp_path / "data.jsonl"), *arguments]) == 0
    rows = lines(tmp_path / "data.jsonl")
    assert {row["split"] for row in rows} == {"validation"}
    steps = [each for row in rows for step in row["label"]["steps"] for each in step["completions"]]
    assert {each["rating"] for each in steps} == {-1, 1}
    assert all((each["rating"] == 1) == (each["value"] > 0.5) for each in steps)
    assert max(each["count"] for each in steps) == 4  # replicas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tran"], "no problem in split 'tran'. Did you mean 'train'?"),
        (["--grader", "exakt"], "no grades table 'exakt'. Did you mean 'exact'?"),
        (["--threshold", "1"], "--threshold is 1.0, expected less than 1"),
    ],
)
def test_wrong_labels_are_refused(trees, tmp_path, capsys, arguments, message):
    assert main(["labels", str(trees), str(tmp_path / "data.jsonl"), *arguments]) == 2
    assert message.replace("expected less than", "below").split(",")[0] in capsys.readouterr().err
    assert not (tmp_path / "data.jsonl").exists()


def test_a_store_without_grades_says_what_to_do(tmp_path, capsys):
    store = bundled_part(tmp_path / "trees", scores=False, train=2)
    for shard in store.grades("exact").shards():
        shard.unlink()
    assert main(["labels", str(tmp_path / "trees"), str(tmp_path / "data.jsonl")]) == 2
    assert "has a solution without a grade by 'exact'. Run `python -m rollouts grade" in capsys.readouterr().err


def test_training_scores_the_store_and_says_how_good_it_is(trees, trained, tmp_path, capsys):
    store = Store(trees)
    assert store.names("scores") == ["own-prm"]
    steps = sum(table.num_rows for table in store.steps.read())
    assert sum(table.num_rows for table in store.scores("own-prm").read()) == steps
    again = tmp_path / "other-prm"
    capsys.readouterr()
    assert main(["train-prm", str(trees), str(again), *EMBEDDED, "--epochs", "2", "--no-score"]) == 0
    printed = capsys.readouterr()
    assert "Cross-entropy on held-out problems" in printed.err and "AUC" not in printed.err
    assert (again / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    scorer = ScorerConfig.model_validate(tomllib.loads(printed.out)["scorer"])
    assert (scorer.kind, scorer.name, scorer.model.model) == ("prm", "other-prm", str(again))
    assert not scorer.informed  # what it has learnt need not tell right from wrong on two known examples
    assert store.names("scores") == ["own-prm"]


def test_the_trunk_is_kept_and_the_head_is_new(trained):
    from safetensors.torch import load_file

    small, made = load_file(model_dir("small") / "model.safetensors"), load_file(trained / "model.safetensors")
    changed = {name for name, value in made.items() if name not in small or not value.equal(small[name])}
    assert changed == {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias", "model.embed_tokens.weight"}
    rows = (made["model.embed_tokens.weight"] != small["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()
    style = RewardFormat(load_tokenizer(str(trained)), None, "<extra_0>")
    assert rows == [style.step_tag_id]  # which now means the end of a step


def test_a_model_that_was_damaged_since_is_refused(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    model = ModelConfig(backend="transformers", model=str(folder))
    assert identity(model) == identity(model.model_copy(update={"model": str(trained)}))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:])
    with pytest.raises(ConfigError, match="copy: damaged model .*model.safetensors is not what was written.* delete "):
        identity(model)


def test_blocks_learn_if_asked(trees, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "deeper"
    arguments = ["--epochs", "3", "--added", "1", "--unfreeze", "1", "--trunk-rate", "1e-3", "--no-score"]
    assert main(["train-prm", str(trees), str(folder), *EMBEDDED, *arguments]) == 0
    small, made = load_file(model_dir("small") / "model.safetensors"), load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    same = {
        layer: made[name].equal(small[name])
        for layer in (0, 1)
        for name in [f"model.layers.{layer}.mlp.up_proj.weight"]
    }
    assert same == {0: True, 1: False}
    assert made["model.layers.2.mlp.down_proj.weight"].any()  # zero before it learned


def test_it_learns_from_a_trunk_in_half_precision(trees, tmp_path):
    from safetensors.torch import load_file

    role = f'backend = "transformers"\nmodel = "{model_dir("small")}"\nsystem_prompt = ""\ndtype = "bfloat16"\n'
    (tmp_path / "models.toml").write_text(f"[small]\n{role}[large]\n{role}")
    more = ["--models", str(tmp_path / "models.toml"), "--epochs", "1", "--no-score"]
    assert main(["train-prm", str(trees), str(tmp_path / "half"), *more]) == 0
    made = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for name, value in made.items() if name.startswith("score.")} == {torch.float32}


def test_values_may_be_those_of_the_large_model(trees, tmp_path, capsys):
    """Which tell what is right so far: they are greater, and the model that learns them scores higher."""
    taught = []

    def learned(*arguments):
        taught.append([path for problem in arguments[2] for path in problem])
        raise KeyboardInterrupt

    for after in ("small", "large"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rollouts.cli.train_prm.make", learned)
            assert main(["train-prm", str(trees), str(tmp_path / after), *EMBEDDED, "--after", after]) == 130
    small, large = ([value for path in each for value in path.values] for each in taught)
    assert sum(large) > 1.2 * sum(small) and {0.0, 1.0} <= {*large}
    assert all(all(path.weights) and len(path.weights) == len(path.tags) for each in taught for path in each)


def test_it_reads_paths_on_the_date_of_the_store_when_it_learns_and_when_it_scores(tmp_path):
    path, told = tmp_path / "trees", []
    bundled_part(path, scores=False, train=2, validation=1)
    manifest = json.loads((path / "manifest.json").read_text())
    write_sealed(path / "manifest.json", {**manifest, "date": "2021-03-04"})

    def learned(_, prompts, *rest):
        told.append(prompts.template_hash == prompts.hash_on(date(2021, 3, 4)) != prompts.hash_on(date(2021, 3, 5)))
        raise KeyboardInterrupt

    def scored(_, family, *rest):
        told.append(family.date == date(2021, 3, 4))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        dated = "{{ strftime_now('%d %B %Y') }}\n"
        patch.setattr("rollouts.cli.train_prm.transformers_tokenizer", lambda *_: with_template(dated))
        patch.setattr("rollouts.cli.train_prm.make", learned)
        patch.setattr("rollouts.cli.train_prm.run_scoring", scored)
        assert main(["train-prm", str(path), str(tmp_path / "prm"), *EMBEDDED]) == 130
        with pytest.raises(KeyboardInterrupt):
            evaluate(Store(path), load_family("tinymath:transformers"), None)
    assert told == [True, True]


def with_template(head):
    tokenizer = transformers_tokenizer(model_dir("small"), None)
    tokenizer.chat_template = head + tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "own-prm"}, "own-prm exists; choose another folder"),
        ({"folder": "deep/own-prm"}, "has scores of another 'own-prm'"),
        ({"more": ["--layers", "7"]}, "--layers is 7; "),
        ({"more": ["--unfreeze", "3"]}, "has 2 blocks"),
        ({"more": ["--split", "test"]}, "no problem in split 'test'"),
    ],
)
def test_what_cannot_be_trained_is_refused(trees, trained, capsys, change, message):
    folder = trees.parent / change.get("folder", "another")
    assert main(["train-prm", str(trees), str(folder), *EMBEDDED, *change.get("more", [])]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (trees.parent / "another").exists()


def test_a_server_has_no_weights_to_train(trees, tmp_path, capsys):
    section = f'backend = "server"\nurl = "http://localhost:1/v1"\nmodel = "m"\ntokenizer = "{model_dir("small")}"\n'
    (tmp_path / "models.toml").write_text(f"[small]\n{section}[large]\n{section}")
    assert main(["train-prm", str(trees), str(tmp_path / "out"), "--models", str(tmp_path / "models.toml")]) == 2
    assert "[small] is a server, and training needs weights" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(trees, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = set(trees.rglob("*"))
    monkeypatch.setattr(fit, "_descend", interrupted)
    assert main(["train-prm", str(trees), str(tmp_path / "out"), *EMBEDDED]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and set(trees.rglob("*")) == before
