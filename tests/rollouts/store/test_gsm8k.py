"""The bundled trees of real language models: sound, small, attributed, of problems that were not picked."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.real import weighted_auc
from rollouts.__main__ import main
from rollouts.store.store import BUNDLED, Store
from rollouts.trees.compile import compile_store
from rollouts.trees.stats import auc, split_statistics
from rollouts.trees.verify import verify_store

PATTERN = ["train", "test", "train", "validation", "train", "test", "train", "validation", "train", "test"]


@pytest.fixture(scope="module")
def store():
    return Store("gsm8k")


def test_it_is_sound_closed_and_small(store):
    assert not verify_store(store).problems
    files = [path for path in store.path.rglob("*") if path.is_file() and ".compiled" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8e6


def test_it_names_models_and_no_folders(store):
    files = [file for file in store.path.rglob("*.json") if ".compiled" not in file.parts]
    text = "".join(file.read_text("utf-8") for file in files)
    assert not re.search(r"[\"'/](tmp|home|root|work|mnt)/", text)
    process = store.manifest["process"]
    assert process["small"]["model"] == "Qwen2.5-Coder-0.5B-Instruct"
    assert process["large"]["model"] == "Qwen2.5-Coder-1.5B-Instruct"
    assert {process[role]["licence"] for role in ("small", "large")} == {"Apache-2.0"}
    about = (BUNDLED / "README.md").read_text("utf-8")
    assert "[MIT licence](gsm8k/LICENSE-GSM8K)" in about and "2110.14168" in about and "Apache 2.0" in about
    assert "Copyright (c) 2021 OpenAI" in (store.path / "LICENSE-GSM8K").read_text("utf-8")


def test_its_problems_are_the_first_of_one_shuffle_and_all_of_them(store):
    order = list(range(1319))
    random.Random(13).shuffle(order)
    found = {problem.id: problem.split for problem in store.problems()}
    wanted = {f"gsm8k/test-{number:04d}": PATTERN[place % 10] for place, number in enumerate(order[: len(found)])}
    assert found == wanted
    assert Counter(found.values()) == {"train": 110, "validation": 44, "test": 66}
    assert {problem.licence for problem in store.problems()} == {"MIT"}


def test_every_split_compiles_with_all_signals():
    trees = compile_store("gsm8k")
    for split in ("train", "validation", "test"):
        assert split_statistics(trees, split).trees > 10
    inside = trees.child[:, 0] != -2
    signals = [
        f"{role}.{name}" for role in ("small", "large") for name in ("min_logprob", "mean_logprob", "max_entropy")
    ]
    for signal in (*signals, "gsm8k-prm.score"):
        assert np.isfinite(trees.signals[signal][inside, 0]).all()


def test_commands_take_it_by_name(capsys):
    assert main(["stats", "gsm8k"]) == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "K = 1, scorer gsm8k-prm, grader numeric; left out 0 trees" in printed
    assert main(["show", "gsm8k", "--most", "40"]) == 0
    assert "boxed" in "".join(capsys.readouterr())
    assert main(["verify", "gsm8k"]) == 0
    assert "The store is sound." in "".join(capsys.readouterr())


def test_areas_under_weights_are_those_of_repeated_items():
    draw = np.random.default_rng(0)
    scores, right = draw.integers(0, 6, 40).astype(float), draw.random(40) < 0.4
    assert weighted_auc(scores, right, np.ones(40)) == pytest.approx(auc(scores, right))
    weights = draw.integers(0, 4, (3, 40))
    wanted = [auc(np.repeat(scores, each), np.repeat(right, each)) for each in weights]
    assert weighted_auc(scores, right, weights.astype(float)) == pytest.approx(wanted)
