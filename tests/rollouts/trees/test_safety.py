"""Kill, corrupt, contradict: nothing that was committed is lost, and every fault has a name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from handmade import ScriptedScorer, problem, process
from test_trees import PROBLEMS, all_steps, finish, grow

from rollouts.__main__ import main
from rollouts.errors import StoreError
from rollouts.store.store import Store
from rollouts.trees.verify import verify_store

GENERATE = ["--problems", "tinymath:test", "--limit", "6", "--models", "tinymath:transformers", "--replicas", "2"]


def run(out: Path, *extra: str, wait: bool = True) -> subprocess.Popen:
    command = [sys.executable, "-m", "rollouts", "generate", str(out), *GENERATE, *extra]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits "ignored"
    )
    if wait:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    return process


def rows_of(table) -> dict:
    names = [name for name in table.schema.names]
    rows = {}
    for part in table.read():
        for row in part.to_pylist():
            key = (row["problem"], row["replica"], row["prefix"], row["role"])
            assert key not in rows, f"duplicate {key}"
            rows[key] = tuple(row[name] for name in names)
    return rows


def test_sigkill_at_random_moments_and_resume_gives_the_uninterrupted_store(tmp_path):
    started = time.monotonic()
    run(tmp_path / "whole")
    duration = time.monotonic() - started
    generator = random.Random(os.getpid())
    committed: dict = {}
    kills = 0
    for attempt in range(5):
        process = run(tmp_path / "cut", "--flush-seconds", "0.2", wait=False)
        deadline = time.monotonic() + duration * 3
        steps = tmp_path / "cut" / "steps"
        while process.poll() is None and time.monotonic() < deadline and not steps.is_dir():
            time.sleep(0.05)  # kill while it generates, not while it loads
        time.sleep(generator.uniform(0.0, 0.3 + 0.5 * attempt))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait(timeout=60)
        now = rows_of(Store(tmp_path / "cut").steps)
        assert all(now[key] == row for key, row in committed.items())
        assert len(now) >= len(committed)
        committed = now
    assert kills >= 2
    run(tmp_path / "cut")
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    assert rows_of(cut.steps) == rows_of(whole.steps)
    assert all(rows_of(cut.steps)[key] == row for key, row in committed.items())
    (scores,) = whole.names("scores")
    assert rows_of(cut.scores(scores)).keys() == rows_of(whole.scores(scores)).keys()
    assert rows_of(cut.grades("exact")) == rows_of(whole.grades("exact"))
    assert main(["repair", str(tmp_path / "cut")]) == 0
    assert not verify_store(cut).problems


def test_ctrl_c_keeps_everything_and_says_so(tmp_path):
    process = run(tmp_path / "s", "--limit", "60", "--flush-seconds", "0.2", wait=False)
    deadline = time.monotonic() + 240
    while not (tmp_path / "s" / "steps").is_dir() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted" in output and "Traceback" not in output
    assert rows_of(Store(tmp_path / "s").steps)


@pytest.fixture
def store(tmp_path):
    return finish(grow(tmp_path / "s"))


def test_a_truncated_shard_is_named_repaired_and_grown_again(store, capsys):
    reference = all_steps(store)
    shard = store.steps.shards()[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    for command in ("stats", "verify", "show"):
        assert main([command, str(store.path)]) == 2
        assert shard.name in capsys.readouterr().err
    assert main(["repair", str(store.path)]) == 0
    assert not shard.exists() and (store.path / "set-aside" / "steps" / shard.name).exists()
    grow(store.path)
    assert all_steps(store) == reference


def test_a_flipped_byte_is_found(store, capsys):
    shard = store.steps.shards()[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    assert main(["verify", str(store.path)]) == 2
    assert shard.name in capsys.readouterr().err


def test_leftovers_of_a_crash_are_found_and_removed(store, capsys):
    leftover = store.steps.directory / ".part-000009.parquet.tmp"
    leftover.write_bytes(b"half")
    assert main(["verify", str(store.path)]) == 2
    assert main(["repair", str(store.path)]) == 0
    assert not leftover.exists() and main(["verify", str(store.path)]) == 0


def test_another_process_is_refused_and_the_fields_are_named(store):
    with pytest.raises(StoreError, match=r"small\.sampling\.temperature is 0\.7 there and 0\.2 here"):
        Store.create(store.path, process(small={"model": "s", "sampling": {"temperature": 0.2}}))
    with pytest.raises(StoreError, match="max_escalations"):
        Store.create(store.path, process(2))
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["schema_version"] = 99
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="99"):
        Store(store.path)
    (store.path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store(store.path)


def test_another_scorer_under_the_same_name_is_refused(store):
    with pytest.raises(StoreError, match="kind"):
        store.attach("scores", ScriptedScorer.name, {"kind": "other"})


def test_a_problem_with_other_content_is_refused_and_new_ones_are_added(store):
    with pytest.raises(StoreError, match="p0"):
        store.add_problems([problem("p0", answer="8")])
    store.add_problems([problem("p9", "train")])
    assert len(store.problems()) == len(PROBLEMS) + 1
    with pytest.raises(StoreError, match="Did you mean 'train'"):
        store.problems("trian")


def test_two_writers_at_once_are_refused(store):
    with store.writing(), pytest.raises(StoreError, match="another process"), Store(store.path).writing():
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere"], "no rollout store"),
        (["generate", "out", "--problems", "missing.jsonl"], "missing.jsonl"),
        (["generate", "out", "--models", "missing.toml"], "missing.toml"),
        (["generate", "out", "--replicas", "none"], "--replicas"),
        (["generate", "out", "--grader", "exakt"], "Did you mean 'exact'"),
        (["generate", "out", "--models", "tinymath:vlm"], "Did you mean 'vllm'"),
    ],
)
def test_mistakes_are_one_line_without_traceback(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") <= 2
    assert not (tmp_path / "out").exists()


MODELS = """
[small]
backend = "transformers"
model = "a"
[large]
backend = "server"
model = "b"
url = "http://localhost:1/v1"
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[large.sampling]\npresence_penalty = 0.1\n", "penalties are refused"),
        ("[small.sampling]\ntemprature = 0.1\n", "Did you mean 'temperature'"),
        ("[scorer]\nkind = 'prm'\n", "scorer"),
        ("[limits]\nmax_steps = 0\n", "limits.max_steps"),
        ("[[", "TOML"),
    ],
)
def test_a_wrong_models_file_names_file_and_key(tmp_path, capsys, change, message):
    file = tmp_path / "models.toml"
    file.write_text(MODELS + change)
    assert main(["generate", str(tmp_path / "out"), "--models", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and "models.toml" in error


def test_a_problem_longer_than_the_window_is_left_out_and_counted(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    rows = [{"question": "Let a=1+2. Find a.", "answer": "3"}, {"question": "9" * 3000, "answer": "9"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    out = str(tmp_path / "out")
    models = "tinymath:transformers"
    assert main(["generate", out, "--problems", str(file), "--models", models, "--no-score"]) == 0
    assert "1 problems are longer" in capsys.readouterr().err
    assert len(Store(out).problems()) == 1
