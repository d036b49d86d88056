"""Two stores of one process become one; copies that somebody makes of a store while it is read."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from handmade import process
from made_stores import PROBLEMS, LatexWriter, finished

from rollouts.__main__ import main
from rollouts.errors import StoreError
from rollouts.files.sealed import write_sealed
from rollouts.store.merge import merge
from rollouts.store.shards import CONTENT
from rollouts.store.store import Store
from rollouts.trees.compile import compile_store
from rollouts.trees.verify import verify_store

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of all problems, and two that share some of them; each with engine starts."""
    place = tmp_path_factory.mktemp("made")
    for name, part in (("whole", PROBLEMS), ("a", PROBLEMS[:4]), ("b", PROBLEMS[2:])):
        store = finished(place / name, problems=part)
        for role in ("small", "large"):
            store.record_engine({"role": role, "seed": store.next_start()})
    return place


@pytest.fixture
def two(made, tmp_path):
    return [Store(shutil.copytree(made / name, tmp_path / name, dirs_exist_ok=True)) for name in "ab"]


def contents(store: Store) -> dict[str, list]:
    """Return all rows of all tables, sorted."""
    return {
        str(table.directory.relative_to(store.path)): sorted(
            (tuple(row.values()) for part in table.read() for row in part.to_pylist()), key=repr
        )
        for table in store.tables()
    }


def bytes_of(store: Store) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file() and path.name != ".lock"}


def merged(store: Store, other: Store) -> dict[str, int]:
    with store.writing():
        return merge(store, other)


@pytest.mark.parametrize("into", [False, True])
def test_what_both_hold_is_there_once(made, two, tmp_path, capsys, into):
    whole, (a, b) = Store(made / "whole"), two
    before = [bytes_of(store) for store in two]
    extra = ["--into", str(tmp_path / "c")] if into else []
    for again in (False, True):
        assert main(["merge", str(a.path), str(b.path), *extra]) == 0
        found = Store(tmp_path / "c" if into else a.path)
        assert contents(found) == contents(whole) and found.problems() == whole.problems()
        assert [each["start"] for each in found.manifest["engines"]] == [0, 1, 2, 3] and found.next_start() == 4
        assert not verify_store(found).problems
        assert compile_store(found, cache=False).meta["hash"] == compile_store(whole, cache=False).meta["hash"]
        assert found.steps.counters() == {
            name: sum(store.steps.counters()[name] for store in map(Store, (made / "a", made / "b")))
            for name in whole.steps.counters()
        }
        told = " ".join(capsys.readouterr().out.split())
        assert ("steps: 0 rows added" in told) == (again or into and not again and "steps: 0" in told)
    assert bytes_of(b) == before[1] and (not into or bytes_of(a) == before[0])


@pytest.mark.parametrize("named", [True, False], ids=["", "without an id"])
def test_a_store_that_has_grown_is_counted_once_when_it_is_merged_again(made, tmp_path, named):
    a, b = Store(shutil.copytree(made / "a", tmp_path / "a")), finished(tmp_path / "b", problems=PROBLEMS[4:5])
    if not named:
        del b.manifest["id"]
    b.record_engine({"role": "small", "seed": 1})
    merged(a, b)
    between = a.steps.counters()
    finished(b.path, problems=PROBLEMS[4:])
    b.record_engine({"role": "small", "seed": 2})
    for _ in range(2):
        merged(a, Store(b.path))
        own, theirs = Store(made / "a").steps.counters(), b.steps.counters()
        assert a.steps.counters() == {name: own[name] + theirs[name] for name in own} != between
        seeds = [each["seed"] for each in Store(a.path).manifest["engines"]]
        assert seeds == [0, 1, 1, 2] and Store(a.path).next_start() == 4
    other = finished(tmp_path / "c", problems=PROBLEMS[5:], replicas=3)  # another one, where b has been
    b.path.rename(tmp_path / "gone")
    if named:
        other.path.rename(b.path)
    merged(a, Store(b.path if named else other.path))
    assert a.steps.counters()["requests_small"] > own["requests_small"] + theirs["requests_small"]


def test_copies_of_a_store_that_went_on_apart_are_each_counted(made, tmp_path):
    a, b = Store(shutil.copytree(made / "a", tmp_path / "a")), finished(tmp_path / "b", problems=PROBLEMS[3:4])
    own, each = Counter(a.steps.counters()), []
    for seed, problem in enumerate(PROBLEMS[4:], 2):
        each.append(finished(shutil.copytree(b.path, tmp_path / f"copy-{seed}"), problems=[problem]))
        each[-1].record_engine({"role": "small", "seed": seed})
        merged(a, each[-1])
        own += Counter(each[-1].steps.counters())
    assert [found["seed"] for found in Store(a.path).manifest["engines"]] == [0, 1, 2, 3]
    assert Counter(a.steps.counters()) == own


def test_of_two_rows_with_one_key_the_first_stays(tmp_path):
    a, b = finished(tmp_path / "a"), finished(tmp_path / "b", kind=LatexWriter)
    before, others = contents(a), contents(b)
    merged(a, b)
    now = contents(a)
    assert all(set(rows) <= set(now[name]) for name, rows in before.items())
    assert len({row[:4] for row in now["steps"]}) == len(now["steps"]) > len(before["steps"])
    assert {row[:4] for row in now["steps"]} == {row[:4] for row in before["steps"] + others["steps"]}
    assert not verify_store(a).problems
    assert (
        compile_store(a, cache=False).meta["hash"] == compile_store(finished(tmp_path / "c"), cache=False).meta["hash"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.note(process=process(1)), "max_escalations is None there and 1 here"),
        (lambda b: b.note(process=process(seed=1)), "seed is 0 there and 1 here"),
        (lambda b: b.note(identities={"small": {"weights": "two"}}), "small model: weights differ"),
        (lambda b: shutil.copytree(b.path / "scores/scripted", b.path / "scores/else"), None),
        (lambda b: other_table(b), "scores/scripted was made by another process: kind"),
        (lambda b: other_question(b), "problem 'p2' is there with other content"),
    ],
)
def test_what_differs_is_named_and_nothing_is_changed(two, change, message):
    a, b = two
    a.note(identities={"small": {"weights": "one"}})
    change(b)
    before = bytes_of(a)
    if message is None:  # a table that the first does not have
        merged(a, Store(b.path))
        assert a.names("scores") == ["else", "scripted"]
        return
    with pytest.raises(StoreError, match=message):
        merged(a, Store(b.path))
    assert bytes_of(a) == before


def other_table(store: Store) -> None:
    manifest = store.path / "scores" / "scripted" / "manifest.json"
    changed = json.loads(manifest.read_text().replace('"kind": "', '"kind": "other '))
    write_sealed(manifest, changed)


def other_question(store: Store) -> None:
    file = store.path / "problems.parquet"
    rows = pq.read_table(file)
    questions = [f"{question}?" for question in rows["question"].to_pylist()]
    pq.write_table(rows.set_column(2, rows.schema.field("question"), [questions]), file)


def test_a_store_is_not_merged_into_itself(two, capsys):
    assert main(["merge", str(two[0].path), str(two[0].path / ".." / "a")]) == 2
    assert "into itself" in capsys.readouterr().err


@pytest.mark.parametrize("name", "ab")
def test_one_of_the_two_is_not_the_new_store(two, capsys, name):
    before = [bytes_of(store) for store in two]
    assert main(["merge", *(str(store.path) for store in two), "--into", str(two[0].path / ".." / name)]) == 2
    assert "is one of the two" in capsys.readouterr().err and [bytes_of(store) for store in two] == before


def test_what_the_other_knows_of_the_models_is_known_then(two):
    a, b = two
    b.note(identities={"small": {"weights": "two"}})
    merged(a, Store(b.path))
    assert Store(a.path).manifest["identities"] == {"small": {"weights": "two"}}


def test_live_trees_stay_live_and_closed_ones_closed(two):
    a, b = two
    b.note_live([("p2", 0), ("p5", 1)])
    merged(a, b)
    assert a.live == {("p5", 1)}  # the first had the other one, closed


def test_rows_from_before_there_were_contents_get_theirs(two, made):
    a, b = two
    for path in b.grades("exact").shards():
        rows = b.grades("exact").read_shard(path)
        pq.write_table(rows.drop_columns(CONTENT), path)
    merged(a, Store(b.path))
    assert contents(a) == contents(Store(made / "whole"))


MERGE = """
import os, sys
from rollouts.store import shards
from rollouts.store.merge import merge
from rollouts.store.store import Store
left, plain = int(sys.argv[3]), os.replace
def replace(*paths):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    plain(*paths)
shards.os.replace = replace
store = Store(sys.argv[1])
with store.writing():
    merge(store, Store(sys.argv[2]))
"""


def test_a_merge_that_was_killed_goes_on(made, tmp_path):
    """Killed before each of its renames in turn, which are all that it does to files that are there."""
    whole = contents(Store(made / "whole"))
    store = Store(shutil.copytree(made / "a", tmp_path / "a"))
    command = [sys.executable, "-c", MERGE, str(store.path), str(made / "b")]
    codes = []
    while not codes or codes[-1]:
        codes.append(subprocess.run([*command, "1"], cwd=ROOT).returncode)  # does one thing more each time
        assert len(codes) < 12
    assert set(codes) == {0, 9} and len(codes) > 3
    found = Store(store.path)
    assert contents(found) == whole and not [table.leftovers() for table in found.tables() if table.leftovers()]
    assert [each["start"] for each in found.manifest["engines"]] == [0, 1, 2, 3]
    both = [Store(made / name).steps.counters()["requests_small"] for name in "ab"]
    assert found.steps.counters()["requests_small"] == sum(both)


def in_copying_order(store: Store, shuffle: random.Random | None) -> list[Path]:
    """Return the files in the order that docs/rollouts.md names; a first copy may have its parts in any."""
    files = sorted(path for path in store.path.rglob("*") if path.is_file() and path.name != ".lock")
    if shuffle:
        shuffle.shuffle(files)
    order = ["scores", "grades", "steps", "live.json", "problems.parquet", "manifest.json"]
    own = {path: path.relative_to(store.path).parts[0] for path in files}
    return sorted(files, key=lambda path: order.index(own[path]) if not shuffle else own[path] == order[-1])


def test_a_reader_beside_a_copy_sees_a_whole_store_or_none(two, tmp_path):
    a, b = two
    target, whole, seen = tmp_path / "copy", set[str](), []
    for turn in range(2):
        whole.add(compile_store(a, cache=False).meta["hash"])
        for path in in_copying_order(a, None if turn else random.Random(0)):
            place = target / path.relative_to(a.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "arriving")
            (tmp_path / "arriving").replace(place)  # objects appear as a whole
            try:
                seen.append(compile_store(target, cache=False).meta["hash"])
            except StoreError as error:
                assert not turn and "no rollout store here" in str(error)
        assert set(seen) == whole
        merged(a, b)
