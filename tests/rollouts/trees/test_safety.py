"""Kill, corrupt, contradict: nothing that was committed is lost, and every fault has a name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scripted_run
from handmade import ScriptedScorer, ScriptedWriter, problem, process
from made_stores import rows_of
from rich.console import Console
from test_trees import PROBLEMS, all_steps, finish, grow

from rollouts.__main__ import main
from rollouts.cli.generate import Generate
from rollouts.errors import BackendError, StoreError
from rollouts.files.sealed import write_sealed
from rollouts.store.store import Store
from rollouts.tasks.answers import final_answer
from rollouts.text.steps import LARGE, ROLES, SMALL, Step, StopReason, solution_text
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.verify import verify_store

ROOT = Path(__file__).parents[3]
GENERATE = ["--problems", "tinymath:test", "--limit", "6", "--models", "tinymath:transformers", "--replicas", "2"]


def shards(folder: Path) -> int:
    return sum(1 for table in ("steps", "scores", "grades") for _ in (folder / table).rglob("part-*.parquet"))


def test_sigkill_at_random_moments_and_resume_gives_the_uninterrupted_store(tmp_path, seed):
    scripted_run.run(tmp_path / "whole", 10)
    command = [sys.executable, scripted_run.__file__, str(tmp_path / "cut"), "0.05"]
    generator = random.Random(seed)
    committed: dict = {}
    kills = 0
    for _ in range(8):
        wanted = shards(tmp_path / "cut") + generator.randint(1, 3)
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        while process.poll() is None and shards(tmp_path / "cut") < wanted:
            time.sleep(0.005)  # kill while it works, not while it starts
        time.sleep(generator.uniform(0.0, 0.08))
        kills += process.poll() is None
        process.kill()
        process.wait(timeout=60)
        now = rows_of(Store(tmp_path / "cut").steps)
        assert all(now[key] == row for key, row in committed.items())
        assert len(now) >= len(committed) > 0 or not committed
        committed = now
    assert kills >= 3
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120).returncode == 0
    same_content(Store(tmp_path / "cut"), Store(tmp_path / "whole"))


def same_content(cut: Store, whole: Store) -> None:
    assert rows_of(cut.steps) == rows_of(whole.steps)
    (scores,) = whole.names("scores")
    for one, other in ((cut.scores(scores), whole.scores(scores)), (cut.grades("exact"), whole.grades("exact"))):
        assert rows_of(one).keys() == rows_of(other).keys()
    assert rows_of(cut.grades("exact")) == rows_of(whole.grades("exact"))
    assert main(["repair", str(cut.path)]) == 0
    assert not verify_store(cut).problems


@pytest.mark.usefixtures("engines_in_threads")
def test_a_real_run_keeps_everything_at_ctrl_c_says_so_and_goes_on(tmp_path):
    """The only real processes: a command with two engines; draws in float64 are the same in a thread."""
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "rollouts", "generate", str(cut), *GENERATE, "--flush-seconds", "0.2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not shards(cut):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the engines as well
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted" in output and "Traceback" not in output
    committed = rows_of(Store(cut).steps)
    assert committed
    assert main(["generate", str(cut), *GENERATE]) == 0
    assert main(["generate", str(tmp_path / "whole"), *GENERATE]) == 0
    assert len(committed) < len(rows_of(Store(cut).steps))
    assert all(rows_of(Store(cut).steps)[key] == row for key, row in committed.items())
    same_content(Store(cut), Store(tmp_path / "whole"))


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


class MoodyWriter(ScriptedWriter):
    """Writes something else every time, as engines that are started again do; often the text of another draw."""

    def __init__(self, role: str, seed: int) -> None:
        super().__init__(role)
        self.generator = random.Random(f"{role}{seed}")

    def step(self, prefix, steps):
        draw = self.generator.randrange(4)
        if len(steps) + 1 >= self.depth or self.generator.random() < 0.2:
            return Step(f"so \\boxed{{{7 + draw % 2}}}", 5 + draw, StopReason.BOXED, 20)
        return Step(f"step {len(steps)} says {draw}\n\n", 3 + draw, StopReason.DELIMITER, 20)


def grown_anew(path: Path, seed: int) -> Store:
    who = {role: MoodyWriter(role, seed) for role in ROLES}
    return finish(grow(path, max_escalations=1, replicas=1, who=who, flush_rows=20))


def check_that_all_is_about_its_own_text(store: Store) -> Trees:
    """Compile; every score and grade of the compiled store is that of the proposal's text, computed anew."""
    trees, row = compile_store(store, cache=False), 0
    for tree in load_trees(store, store.problems(), None, 1):
        for node in tree.nodes.values():
            for action, role in enumerate(ROLES):
                if step := node.proposals.get(role):
                    steps = [*node.steps, step.text]
                    score = np.float32(ScriptedScorer().of(tree.problem.question, steps))
                    right = final_answer(solution_text(steps)) == tree.problem.answer
                    assert trees.proposal(row, action) == step.text
                    assert trees.score[row, action] == score
                    assert trees.correct[row, action] == (right if step.terminal else -1)
            row += 1
    assert row == trees.nodes
    return trees


def without_contents(store: Store) -> None:
    """Make scores and grades as they were before rows said what they are about."""
    for table in store.tables()[1:]:
        for shard in table.shards():
            pq.write_table(pq.ParquetFile(shard).read().drop_columns("content"), shard)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_after_repairs_with_other_draws_nothing_old_sticks_to_anything_new(tmp_path, old):
    store = grown_anew(tmp_path / "s", 0)
    if old:
        without_contents(store)
    check_that_all_is_about_its_own_text(store)
    generator, unclaimed = random.Random(1), 0
    for attempt in range(1, 8 if old else 21):
        truncate(generator.choice(store.steps.shards()))
        if attempt % 3 == 0:
            truncate(generator.choice(store.scores("scripted").shards()))
        store.repair()
        before = store.scores("scripted").keys().num_rows
        grown_anew(store.path, attempt)
        trees = check_that_all_is_about_its_own_text(store)
        assert not verify_store(store).problems
        added = store.scores("scripted").keys().num_rows - before
        assert added < before or attempt % 3 == 0  # what is still there is not scored again
        unclaimed += trees.meta["unclaimed_rows"]
        if attempt % 5 == 0:
            for table in store.tables():
                table.compact()
            check_that_all_is_about_its_own_text(store)
            store = grown_anew(store.path, -attempt)  # nothing is left to do: shards are whole again
    assert unclaimed


def test_old_rows_of_a_store_that_was_repaired_before_are_not_believed(tmp_path):
    store = grown_anew(tmp_path / "s", 0)
    shard = store.steps.shards()[1]
    (store.path / "set-aside" / "steps").mkdir(parents=True)
    shard.rename(store.path / "set-aside" / "steps" / shard.name)  # as repair did when rows said nothing
    without_contents(store)
    with pytest.raises(StoreError, match="no score"):
        compile_store(grow(store.path, 1, 1, who={role: MoodyWriter(role, 1) for role in ROLES}), cache=False)
    check_that_all_is_about_its_own_text(finish(store))
    assert any("belong to no step" in fact for fact in verify_store(store).facts)


REFUSAL = "HTTP 400: no such model [such] as this"


class RefusedWriter(ScriptedWriter):
    """Fails on all requests, or on every fifth."""

    def __init__(self, role: str, every: int) -> None:
        super().__init__(role)
        self.every = every

    def step(self, prefix, steps):
        return Step("", 0, StopReason.FAILED) if len(self.asked) % self.every == 0 else super().step(prefix, steps)

    def submit(self, prefix, *, whole):
        future = Future()
        future.set_result(replace(super().submit(prefix, whole=whole).result(), reason=REFUSAL))
        return future


@pytest.mark.parametrize(("cap", "replicas", "count"), [(0, 1, 6), (1, 9, 20)])
def test_requests_that_always_fail_stop_the_run_and_can_be_asked_again(tmp_path, capsys, cap, replicas, count):
    who = {SMALL: ScriptedWriter(SMALL), LARGE: RefusedWriter(LARGE, 1)}
    with pytest.raises(
        BackendError, match=rf"large: {count} of its first {count} .*no such model.* repair .*s --drop-failed"
    ):
        grow(tmp_path / "s", cap, replicas, who=who)
    store = Store(tmp_path / "s")
    finish(store)
    assert main(["repair", str(store.path), "--drop-failed"]) == 0
    assert "failed steps; `generate` asks" in capsys.readouterr().out
    assert not any("failed" in part["stop_reason"].to_pylist() for part in store.steps.read())
    finish(grow(store.path, cap, replicas))
    assert all_steps(store) == all_steps(grow(tmp_path / "whole", cap, replicas))
    assert not verify_store(store).problems


class SpentWriter(ScriptedWriter):
    """Fails on all requests from one on, as where an account is empty."""

    def __init__(self, role: str, good: int) -> None:
        super().__init__(role)
        self.good = good

    def submit(self, prefix, *, whole):
        told = super().submit(prefix, whole=whole)
        if len(self.asked) <= self.good:
            return told
        future = Future()
        future.set_result(replace(told.result(), steps=(Step("", 0, StopReason.FAILED),), reason=REFUSAL))
        return future


def test_a_role_that_fails_from_some_request_on_stops_the_run_too(tmp_path):
    who = {SMALL: ScriptedWriter(SMALL), LARGE: SpentWriter(LARGE, 250)}
    with pytest.raises(BackendError, match=r"large: 64 requests in a row failed .*no such model.* --drop-failed"):
        grow(tmp_path / "s", 1, 60, who=who)
    kept = [reason for part in Store(tmp_path / "s").steps.read() for reason in part["stop_reason"].to_pylist()]
    assert kept.count("failed") >= 64


def test_why_steps_failed_is_stored_and_told_with_counts(tmp_path, capsys):
    store = finish(grow(tmp_path / "s", 1, 9, who={role: RefusedWriter(role, 5) for role in ROLES}))
    failed = Counter()
    for part in store.steps.read():
        for row in part.to_pylist():
            assert (row["reason"] is None) == (row["stop_reason"] != "failed")
            failed[row["role"], row["reason"]] += 1
    lines = [f"{failed[role, REFUSAL]:,} failed steps of {role}: {REFUSAL}" for role in ROLES]
    assert main(["stats", str(store.path), "--json-out", str(tmp_path / "s.json")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(line.split()) in told for line in lines)
    numbers = json.loads((tmp_path / "s.json").read_text())["generated"]["failures"]
    assert {(each["role"], each["reason"]): each["steps"] for each in numbers} == {
        key: count for key, count in failed.items() if key[1]
    }
    assert main(["verify", str(store.path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(line.split()) in told for line in lines)
    shown = ""
    for item in PROBLEMS:
        assert main(["show", str(store.path), "--problem", item.id]) == 0
        shown += "".join(capsys.readouterr().out.split())
    assert "".join(f"wrong (failed: {REFUSAL})".split()) in shown
    store.steps.compact()
    assert main(["verify", str(store.path)]) == 0
    assert " ".join(lines[0].split()) in " ".join(capsys.readouterr().out.split())


def test_steps_that_failed_in_a_store_of_an_earlier_version_have_no_reason(tmp_path, capsys):
    store = finish(grow(tmp_path / "s", 1, 9, who={role: RefusedWriter(role, 5) for role in ROLES}))
    for shard in store.steps.shards():
        pq.write_table(pq.ParquetFile(shard).read().drop_columns("reason"), shard)
    for command in ("stats", "verify", "show"):
        assert main([command, str(store.path)]) == 0
        assert ("no reason stored" in capsys.readouterr().out) == (command != "show")
    assert main(["repair", str(store.path), "--drop-failed"]) == 0
    store = finish(grow(store.path, 1, 9))
    assert not verify_store(store).problems


def test_some_requests_may_fail(tmp_path):
    store = grow(tmp_path / "s", 1, 9, who={role: RefusedWriter(role, 5) for role in ROLES})
    assert not verify_store(finish(store)).problems


def test_shards_of_one_name_that_are_set_aside_are_both_kept(store):
    for _ in range(3):
        truncate(store.steps.shards()[-1])
        store.repair()
        grow(store.path)
    assert len(list((store.path / "set-aside" / "steps").iterdir())) == 3


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
    write_sealed(store.path / "manifest.json", manifest)
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


def test_no_engine_start_is_lost_between_opening_and_writing(store):
    early, late = Store.create(store.path, process()), Store(store.path)
    with early.writing():
        early.record_engine({"role": "small", "seed": early.next_start()})
    with late.writing():
        late.record_engine({"role": "small", "seed": late.next_start()})
    assert [start["seed"] for start in Store(store.path).manifest["engines"]] == [0, 1]


def test_numbers_of_engine_starts_never_come_again(store):
    """Seeds follow from them. Workers have numbers that were kept for them; others are left out."""
    store.record_engine({"role": "small"})
    assert store.next_start() == 1
    store.record_engine({"role": "small", "start": 7})
    assert store.next_start() == 8
    store.record_engine({"role": "large"})
    assert [start["start"] for start in Store(store.path).manifest["engines"]] == [0, 7, 8]


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
        (["generate", "out", "--replicas", "trian=4"], "Did you mean 'train'"),
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


@pytest.mark.usefixtures("engines_in_threads")
def test_a_problem_longer_than_the_window_is_left_out_and_counted(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    rows = [{"question": "Let a=1+2. Find a.", "answer": "3"}, {"question": "9" * 3000, "answer": "9"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    out = str(tmp_path / "out")
    models = "tinymath:transformers"
    assert main(["generate", out, "--problems", str(file), "--models", models, "--no-score"]) == 0
    assert "1 problems are longer" in capsys.readouterr().err
    assert len(Store(out).problems()) == 1
    assert Store(out).manifest["process"]["max_escalations"] == 2  # free text


def test_how_many_escalations_trees_hold_by_default(tmp_path):
    def most(complete, **options):
        there = Store(tmp_path / "s") if (tmp_path / "s").exists() else None
        return Generate(tmp_path / "s", **options)._most_escalations(Console(quiet=True), there, complete)

    assert (most(True), most(False)) == (None, 2)
    assert (most(False, max_escalations="none"), most(False, max_escalations=None)) == (None, None)
    assert (most(True, max_escalations=0), most(False, max_escalations=3)) == (0, 3)
    Store.create(tmp_path / "s", process(1))
    assert most(True) == most(False) == 1
