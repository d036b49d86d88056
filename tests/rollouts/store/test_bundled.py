"""The bundled rollouts: complete, sound, small, and of the difficulty that routers need."""

from __future__ import annotations

import pytest

from rollouts.store.store import BUNDLED, Store, locate
from rollouts.tinymath import generate_problems, label_steps
from rollouts.trees.compile import compile_store
from rollouts.trees.stats import split_statistics
from rollouts.trees.verify import verify_store

HASH = "36955da54596adf3ea8e4833"  # that stored runs and policies name


@pytest.fixture(scope="module")
def trees():
    return compile_store("quickstart")


def test_the_store_is_found_by_name_and_sound():
    assert locate("quickstart") == BUNDLED / "quickstart"
    assert not verify_store(Store("quickstart")).problems


def test_it_is_small_and_names_no_folder_of_the_machine_that_made_it():
    files = [path for path in (BUNDLED / "quickstart").rglob("*") if path.is_file() and ".compiled" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert all("/" not in Store("quickstart").manifest["process"][role]["model"] for role in ("small", "large"))


@pytest.mark.parametrize(
    ("split", "problems", "replicas"), [("train", 2000, 1), ("validation", 400, 4), ("test", 1000, 4), ("ood", 500, 2)]
)
def test_splits_are_as_large_as_said_and_complete(trees, split, problems, replicas):
    statistics = split_statistics(trees, split)
    assert statistics.problems >= problems
    assert problems * replicas - 5 <= statistics.trees <= problems * replicas
    assert (trees.child >= -1).all()  # complete: both proposals everywhere


def test_its_problems_are_those_of_the_embedded_set():
    stored = {problem.id: problem.question for problem in Store("quickstart").problems()}
    for split in ("train", "validation", "test", "ood"):
        assert all(stored[problem.id] == problem.question for problem in generate_problems(split))


def test_the_fresh_split_is_sound_and_shares_no_question():
    """Nothing that a router reaches on it is looked at here."""
    fresh, store = Store("quickstart/test2"), Store("quickstart")
    assert store.holding("test2").path == fresh.path and store.holding("test").path == store.path
    assert not verify_store(fresh).problems
    problems = fresh.problems()
    assert {problem.split for problem in problems} == {"test2"} and len(problems) == 1000
    assert [problem.question for problem in problems] == [each.question for each in generate_problems("test2")]
    assert not {problem.question for problem in problems} & {problem.question for problem in store.problems()}
    trees = compile_store("quickstart", split="test2")
    assert 1995 <= len(trees.select("test2")) <= 2000 and (trees.child >= -1).all()
    assert trees.meta["scorer"] == compile_store("quickstart").meta["scorer"]
    seeds = [each["seed"] for each in (*fresh.manifest["engines"], *store.manifest["engines"])]
    assert len(set(seeds)) == len(seeds)
    files = [path for path in fresh.path.rglob("*") if path.is_file() and ".compiled" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 1.5e6


def test_what_was_trained_on_the_bundled_rollouts_stays_theirs(trees):
    assert trees.meta["hash"] == HASH


def test_there_is_something_to_route(trees):
    statistics = split_statistics(trees, "test")
    assert 0.35 <= statistics.small_accuracy.mean <= 0.60
    assert 0.85 <= statistics.large_accuracy.mean <= 0.97
    assert statistics.oracle_share < 0.15 and statistics.oracle_accuracy.mean > statistics.large_accuracy.mean
    assert 0.85 <= statistics.min_score_auc <= 0.95
    assert 4 <= statistics.small_steps <= 12


def test_labels_are_those_of_the_steps(trees):
    store = Store("quickstart")
    table = next(store.steps.read({"tinymath-test-00003"}))
    question = next(problem.question for problem in store.problems() if problem.id == "tinymath-test-00003")
    roots = [row for row in table.to_pylist() if row["prefix"] == 0]
    assert roots and all(row["label"] == label_steps(question, [row["text"]])[0] for row in roots)
    assert ((trees.label == 0) | (trees.label == 1)).all()
