"""Every example runs as its first lines say, and does what it is an example of."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from forked import Command

from rollouts.store.store import BUNDLED

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def documented(name):
    """The commands in an example's docstring."""
    lines = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1].splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


@pytest.fixture
def place(tmp_path):
    """A working folder that looks like the root of the repository."""
    for name in ("train.py", "evaluate.py", "examples", "rollouts"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(line, place, fails=False):
    words = shlex.split(line)
    assert words[0] == "python", line
    if words[1] == "train.py":
        words += ["--tracking", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    ended = Command(words[1:], place, environment)
    assert (ended.wait(400) == 0) != fails, f"{line}\n{ended.output[-4000:]}"
    return ended.output


def test_examples_are_short_and_none_is_forgotten():
    assert len(EXAMPLES) == 5
    for file in EXAMPLES:
        assert len(file.read_text().splitlines()) < 80, file.name
        assert any(re.search(rf"\b{file.stem}\b", line) for line in documented(file.stem)), file.name
        assert f'documented("{file.stem}")' in Path(__file__).read_text(), f"{file.name} is not run here"


BETTER_THAN_A_THRESHOLD = re.compile(r"\[\+[\d.]+,\s+\+[\d.]+\]\s+against\s+the\s+best\s+threshold")  # its interval


def test_ppo_in_a_single_file_learns(place):
    (command,) = documented("ppo_single_file")
    assert run(command, place).startswith("Better than the best simple rule.")


def test_an_own_router_is_trained_evaluated_and_exported(place):
    train, evaluate, export = documented("own_router")
    assert BETTER_THAN_A_THRESHOLD.search(run(train, place))
    assert "two-numbers" in run(evaluate, place)
    assert "two-router: two-numbers, lam=0.003" in run(export, place)
    refused = run(evaluate.replace("--import examples.own_router", ""), place, fails=True)
    assert "error: " in refused and "--import examples.own_router" in refused


def test_a_policy_of_stable_baselines3_becomes_a_router_without_its_module(place):
    train, evaluate, export = documented("sb3_dqn")
    assert BETTER_THAN_A_THRESHOLD.search(run(train, place))
    assert "dqn" in run(evaluate, place)
    assert "dqn-router: dqn, lam=0.003" in run(export, place)
    assert json.loads((place / "dqn-router" / "policy.json").read_text())["kind"] == "mlp"


def test_an_own_feature_goes_from_training_to_the_artefact(place):
    train, evaluate, export = documented("own_feature")
    run(f"{train} --ppo.iterations 2 --ppo.num-envs 128 --attempts 1", place)
    assert "trim-agg" in run(evaluate, place)
    run(export, place)
    described = json.loads((place / "doubts-router" / "policy.json").read_text())
    assert described["schema"] == "agg+/1,examples.own_feature:doubts/1"
    assert described["about"]["features"][-1]["name"] == "low_scores / max_steps"
    code = (
        "import agents, examples.own_feature; print(agents.load('doubts-router').session().decide(0.4, 20, text='x'))"
    )
    assert run(f'python -c "{code}"', place).strip() in ("0", "1")
    assert "--import examples.own_feature" in run(evaluate.replace("--import examples.own_feature", ""), place, True)


def test_an_own_scorer_scores_a_store_that_exists(place):
    copy, score, stats, train = documented("own_scorer")
    assert copy == "cp -r rollouts/datasets/quickstart my-trees"
    shutil.copytree(BUNDLED / "quickstart", place / "my-trees", ignore=shutil.ignore_patterns(".compiled"))
    keep_few(place / "my-trees")
    run(score, place)
    found = run(f"{stats} --json-out stats.json", place)
    assert "scorer arithmetic" in found
    assert "λ = 0.003" in run(train, place)
    (shard,) = (place / "my-trees" / "scores" / "arithmetic").glob("*.parquet")
    assert sorted(set(pq.read_table(shard)["score"].to_pylist())) == pytest.approx([0.02, 0.99])


def keep_few(store):
    """Leave some problems of each split in a store: fewer steps to score."""
    problems = pq.read_table(store / "problems.parquet")
    few = pc.match_substring_regex(problems["id"], r"-000[0-3]\d$")
    pq.write_table(problems.filter(few), store / "problems.parquet")
    ids = problems.filter(few)["id"]
    for shard in [*(store / "steps").glob("*.parquet"), *(store / "grades").rglob("*.parquet")]:
        rows = pq.read_table(shard)
        pq.write_table(rows.filter(pc.is_in(rows["problem"].cast("string"), value_set=ids)), shard)
