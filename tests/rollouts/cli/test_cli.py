"""The command line on real models, without vLLM: every command, each as a user would type it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from made_stores import finished
from scripted_thinking import ThinkingWriter, splitting

from rollouts.__main__ import main
from rollouts.config import embedded_family
from rollouts.errors import StoreError
from rollouts.store.store import Store
from rollouts.tinymath import model_dir

pytestmark = pytest.mark.usefixtures("engines_in_threads")
PROBLEMS = [
    "--problems",
    "tinymath:test",
    "--limit",
    "5",
    "--models",
    "tinymath:transformers",
    "--max-escalations",
    "1",
]


@pytest.fixture(scope="module")
def store(engines_in_threads, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "trees"
    assert main(["generate", str(out), *PROBLEMS]) == 0
    return out


def rows(store):
    found = [row for table in Store(store).steps.read() for row in table.to_pylist()]
    return {(row["problem"], row["prefix"], row["role"]): row["text"] for row in found}


def test_stats_show_and_verify(store, tmp_path, capsys):
    capsys.readouterr()
    assert main(["stats", str(store), "--json-out", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr().out
    assert "always-small accuracy" in printed and "steps ended by boxed" in printed
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["splits"]["test"]["trees"] == 5 and numbers["meta"]["max_escalations"] == 1
    assert main(["show", str(store), "--problem", "tinymath-test-00003"]) == 0
    shown = capsys.readouterr().out
    assert "Find d" in shown and "tok" in shown and ("right (" in shown or "wrong (" in shown)
    assert main(["show", str(store), "--problem", "tinymath-test-0003"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main(["verify", str(store)]) == 0


def test_the_same_command_again_does_nothing(store, capsys):
    before = rows(store)
    assert main(["generate", str(store), *PROBLEMS]) == 0
    assert "All 5 trees are there" in capsys.readouterr().err
    assert rows(store) == before


def test_one_model_at_a_time_gives_the_same_store(store, tmp_path):
    assert main(["generate", str(tmp_path / "s"), *PROBLEMS, "--sequential", "--no-score"]) == 0
    assert rows(tmp_path / "s") == rows(store)


def test_another_setting_is_refused(store, capsys):
    assert main(["generate", str(store), *PROBLEMS[:-1], "2"]) == 2
    assert "max_escalations is 1 there and 2 here" in capsys.readouterr().err


def test_expand_reaches_beyond_the_cap(store, capsys):
    before = rows(store)
    models = ["--models", "tinymath:transformers"]
    assert main(["expand", str(store), "--router", "threshold:0.9", *models]) == 0
    after = rows(store)
    assert before.items() <= after.items()
    assert main(["verify", str(store)]) == 0
    assert main(["expand", str(store), "--router", "treshold:0.9", *models]) == 2
    assert "Did you mean 'threshold'" in capsys.readouterr().err


def models_file(folder, *sections):
    values, found = embedded_family("transformers").model_dump(), [*sections]
    for role in ("small", "large"):
        model = values[role]
        found.append(
            f"[{role}]\nbackend = 'transformers'\nmodel = '{model_dir(role)}'\nname = '{model['name']}'\n"
            f"dtype = 'float32'\nmax_length = 1024\n"
        )
    (folder / "models.toml").write_text("\n".join(found))
    return folder / "models.toml"


def test_a_store_without_a_scorer_is_expanded_by_the_small_models_numbers(engines_in_threads, tmp_path, capsys):
    out, models = str(tmp_path / "s"), ["--models", str(models_file(tmp_path))]
    given = ["--problems", "tinymath:test", "--limit", "2", "--max-escalations", "0"]
    assert main(["generate", out, *given, *models]) == 0
    before = rows(out)
    assert main(["expand", out, "--router", "threshold:0.9999", *models]) == 0
    assert before.items() < rows(out).items() and Store(out).names("scores") == ["small"]
    assert main(["verify", out]) == 0
    capsys.readouterr()
    assert main(["expand", out, "--router", "threshold:0.9999", *models]) == 0
    assert "0 steps added." in capsys.readouterr().err


def test_likelihood_needs_no_reward_model(store, tmp_path):
    file = models_file(tmp_path, "[scorer]\nkind = 'likelihood'\nunder = 'large'\nname = 'likely'\n")
    assert main(["score", str(store), "--models", str(file)]) == 0
    assert Store(store).names("scores") == ["likely", "tinymath-prm"]
    assert main(["stats", str(store)]) == 2  # which of the two?
    assert main(["stats", str(store), "--scorer", "likely"]) == 0
    assert main(["grade", str(store), "--grader", "numeric"]) == 0
    assert Store(store).names("grades") == ["exact", "numeric"]


def test_dry_run_estimates_and_writes_nothing(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "s"), *PROBLEMS, "--dry-run"]) == 0
    printed = capsys.readouterr().err
    assert "Estimate for 5 trees" in printed and "tokens decoded" in printed
    said = " ".join(printed.split())
    assert "A step ends at a blank line" in said and "% delimiter" in said and "% boxed" in said
    assert not (tmp_path / "s").exists()


def test_expanding_without_a_router_closes_the_trees_that_are_there(tmp_path, capsys):
    out, models = str(tmp_path / "s"), ["--models", "tinymath:transformers"]
    assert main(["generate", out, *PROBLEMS, "--max-large-tokens", "30", "--no-score", "--no-grade"]) == 0
    before, store = rows(out), Store(out)
    with store.writing():
        store.note_live([(problem.id, 0) for problem in store.problems()])  # as a service does that records them
    assert main(["expand", out, *models]) == 0
    assert before.items() < rows(out).items() and not Store(out).live
    assert main(["verify", out]) == 0
    capsys.readouterr()
    assert main(["expand", out, *models]) == 0
    assert "0 steps added." in capsys.readouterr().err


def test_a_token_budget_stops_the_run_and_a_new_one_goes_on(tmp_path, capsys, store):
    out = str(tmp_path / "s")
    assert main(["generate", out, *PROBLEMS, "--max-large-tokens", "30", "--no-score"]) == 0
    assert "token budget is spent" in capsys.readouterr().err
    assert 0 < len(rows(out))
    assert main(["generate", out, *PROBLEMS]) == 0
    assert main(["verify", out]) == 0


def test_what_generating_tells_is_what_score_adds_and_routers_read_it(tmp_path, capsys):
    from rollouts.trees.arrays import MISSING
    from rollouts.trees.compile import compile_store
    from trim_env.tables import decision_tables

    store, silent = tmp_path / "told", tmp_path / "silent"
    assert main(["generate", str(store), *PROBLEMS, "--models", config(tmp_path)]) == 0
    assert main(["generate", str(silent), *PROBLEMS]) == 0
    assert not Store(silent).step_statistics() and Store(store).step_statistics()
    told = compile_store(store)
    with pytest.raises(StoreError, match=rf"Run `python -m rollouts score {silent} --scorer small`"):
        decision_tables(compile_store(silent), "test", schema="free")
    for role in ("small", "large"):
        assert main(["score", str(silent), "--models", "tinymath:transformers", "--scorer", role]) == 0
    added = compile_store(silent)
    assert added.meta["hash"] == told.meta["hash"] and main(["verify", str(silent)]) == 0
    for name in ("small.min_logprob", "small.mean_logprob", "small.max_entropy", "small.first_entropy"):
        np.testing.assert_allclose(added.signals[name][:, 0], told.signals[name][:, 0], atol=1e-4)
    tables = decision_tables(added, "test", schema="prefill,least(large.min_logprob)")
    assert np.isfinite(tables.features[added.child[:, 0] != MISSING]).all()
    capsys.readouterr()
    assert main(["show", str(silent), "--scorer", "large.mean_logprob"]) == 0 and " tok" in capsys.readouterr().out
    assert main(["stats", str(silent), "--scorer", "small"]) == 0 and "scorer small" in capsys.readouterr().out


def config(folder):
    """Write the embedded family with models that tell the log-probabilities of what they decode."""
    file, family = folder / "telling.toml", embedded_family("transformers").model_dump()
    lines = []
    for role in ("small", "large"):
        own = family[role]
        lines += [f"[{role}]", 'backend = "transformers"', 'dtype = "float64"', "max_length = 1024", 'licence = "MIT"']
        lines += [f'model = "{own["model"]}"', f'name = "{own["name"]}"', 'system_prompt = ""', "logprobs = true"]
    prm = family["scorer"]["model"]
    lines += ["[scorer]", 'kind = "prm"', 'name = "tinymath-prm"', 'system_prompt = ""', "[scorer.model]"]
    lines += ['backend = "transformers"', f'model = "{prm["model"]}"', f'name = "{prm["name"]}"', 'dtype = "float64"']
    lines += ["max_length = 1024", "[limits]", "max_steps = 16"]
    file.write_text("\n".join(lines))
    return str(file)


def test_solutions_are_verified_by_the_small_model_itself(store, tmp_path, monkeypatch):
    store = shutil.copytree(store, tmp_path / "copy")
    monkeypatch.setattr("rollouts.scoring.verification.PROMPT", "{question} {solution}?")  # a window of 256 tokens
    monkeypatch.setattr("rollouts.scoring.verification.MOST_TOKENS", 4)
    arguments = ["score", str(store), "--models", "tinymath:transformers", "--scorer", "verification"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(arguments) == 0
    (table,) = [each for each in Store(store).tables() if each.directory.name == "verification"]
    (found,) = table.read()
    assert found["samples"].to_pylist() == [8] * 5 and set(found["role"].to_pylist()) == {"small"}
    assert all(0 < each <= 32 for each in found["decoded"].to_pylist())
    assert main(["verify", str(store)]) == 0


@pytest.mark.parametrize("command", [["score"], ["score", "--scorer", "small"], ["train-prm"]])
def test_solutions_that_think_are_not_read_as_if_they_did_not(tmp_path, capsys, command):
    """A models file without [steps] would have the mark that closes the block read as a text, in other prompts."""
    path = finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting()).path
    where = [str(path), str(tmp_path / "prm")] if command == ["train-prm"] else [str(path)]
    models = ["--models", "tinymath:transformers"]
    assert main([command[0], *where, *command[1:], *models]) == 2
    assert "of the models file do not: set split = 'thinking' under [steps] there" in " ".join(
        capsys.readouterr().err.split()
    )
