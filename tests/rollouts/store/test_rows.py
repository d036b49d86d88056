"""Keyed rows of one table: what is there, what is new, and shards that an interrupt breaks off."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from rollouts.store import shards
from rollouts.store.rows import Rows
from rollouts.store.shards import CONTENT, GRADES, KEY, SCORES, STEPS, Table
from rollouts.text.steps import extend_hash


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "scores", SCORES)


def key(problem="p", replica=0, prefix=0, role="small", text="x"):
    return (problem, replica, prefix, role, extend_hash(prefix, text))


def stored(table):
    return [tuple(row.values()) for part in table.read() for row in part.to_pylist()]


def test_of_duplicate_keys_the_first_wins_and_what_is_there_stays(table):
    for score in (0.25, 0.5):  # two writers, two shards
        rows = Rows(table)
        rows.put(key(), score=score)
        rows.flush()
    rows = Rows(table)
    rows.read([("p", 0), ("q", 0)])
    assert rows[key()] == rows.get(key()) == 0.25
    assert key("q") not in rows and rows.get(key("q"), ...) is ...
    rows.put(key(), score=0.75)
    rows.put(key("q"), score=None)
    rows.put(key("q"), score=1.0)
    assert rows.added == 1 and rows[key()] == 0.25 and key("q") in rows and rows[key("q")] is None
    rows.flush()
    assert stored(table) == [(*key(), 0.25), (*key(), 0.5), (*key("q"), None)]


def test_only_trees_at_hand_are_kept(table):
    rows = Rows(table)
    for replica in (0, 1):
        rows.put(key(replica=replica), score=0.5)
    rows.flush()
    rows.read([("p", 1)])
    assert key(replica=1) in rows
    with pytest.raises(KeyError):
        assert key(replica=0) in rows
    rows.forget([("p", 1), ("q", 0)])
    with pytest.raises(KeyError):
        assert key(replica=1) in rows


def test_a_shard_is_due_after_so_many_rows_or_seconds(table):
    rows = Rows(table, rows=3, seconds=1e9)
    for prefix in range(7):
        rows.put(key(prefix=prefix), score=0.5)
        rows.flush_if_due()
    assert [table.read_shard(path).num_rows for path in table.shards()] == [3, 3]
    assert not rows.due
    rows.max_seconds = 0.0
    assert rows.due
    rows.flush_if_due()
    rows.flush()
    assert len(table.shards()) == 3 and len(stored(table)) == 7


@pytest.mark.parametrize("written", [False, True])
def test_an_interrupt_while_a_shard_is_written_loses_no_row_and_doubles_none(table, monkeypatch, written):
    def interrupted(source, target):
        if written:
            replace(source, target)
        raise KeyboardInterrupt

    replace = os.replace
    rows = Rows(table)
    rows.put(key(), score=0.5)
    rows.count({"requests": 1})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shards.os, "replace", interrupted)
        rows.flush()
    assert len(stored(table)) == written
    rows.put(key(prefix=1), score=0.75)  # what was under way still comes in
    rows.count({"requests": 10})
    rows.flush()
    rows.flush()
    assert stored(table) == [(*key(), 0.5), (*key(prefix=1), 0.75)]
    assert table.counters() == {"requests": 11}


def test_problems_that_lack_rows(tmp_path):
    steps = Table(tmp_path / "steps", STEPS)
    keys = [key(name, prefix=prefix) for name in ("p", "q") for prefix in (0, 1)]
    columns = {name: list(values) for name, values in zip((*KEY, CONTENT), zip(*keys, strict=True), strict=True)}
    steps.append({
        **columns, "text": ["x"] * 4, "tokens": [1] * 4, "prompt_tokens": [1] * 4, "stop_reason": ["eos"] * 4,
        "terminal": [False, True, False, False], "label": [None] * 4,
    })  # fmt: skip
    scores, grades = Rows(Table(tmp_path / "scores", SCORES)), Rows(Table(tmp_path / "grades", GRADES))
    assert scores.lacking(steps, {"p", "q", "r"}) == {"p", "q"} and scores.lacking(steps, {"q"}) == {"q"}
    assert grades.lacking(steps, {"p", "q"}) == {"p"}  # only solutions have grades
    for each in keys[:3]:
        scores.put(each, score=None)
    grades.put(keys[1], correct=True, extracted="7", error=None)
    for rows in (scores, grades):
        rows.flush()
    assert scores.lacking(steps, {"p", "q"}) == {"q"} and not grades.lacking(steps, {"p", "q"})


def test_only_shards_that_mention_a_problem_are_read(table, monkeypatch):
    for name in ("p", "q", "p"):
        rows = Rows(table)
        rows.put(key(name, prefix=len(table.shards())), score=0.5)
        rows.flush()
    read = Counter()
    read_shard = table.read_shard

    def counted(path, columns=None, *groups):
        read[path.name, tuple(columns)] += 1
        return read_shard(path, columns, *groups)

    monkeypatch.setattr(table, "read_shard", counted)
    for _ in range(2):
        assert [part.num_rows for part in table.read({"q"}, KEY)] == [1]
    assert read == {(f"part-00000{n}.parquet", ("problem",)): 1 for n in range(3)} | {("part-000001.parquet", KEY): 2}
    first = table.shards()[0]
    first.unlink()
    os.utime(table.shards()[0], ns=(1, 1))  # another shard under a name that was read before
    assert [part.num_rows for part in table.read({"q"}, KEY)] == [1]
    assert read["part-000001.parquet", ("problem",)] == 2


def test_a_row_is_found_for_the_text_that_it_was_made_for(table):
    one, other = key(text="one"), key(text="other")
    rows = Rows(table)
    rows.put(one, score=0.25)
    rows.flush()
    rows = Rows(table)
    rows.read([("p", 0)])
    assert rows[one] == 0.25 and other not in rows and rows.get(other, ...) is ...
    with pytest.raises(KeyError):
        rows[other]
    assert rows.unclaimed(("p", 0), [other]) == 1 and not rows.unclaimed(("p", 0), [one, other])
    rows.put(other, score=0.75)
    rows.flush()
    table.compact()
    rows = Rows(table)
    rows.read([("p", 0)])
    assert rows[one] == 0.25 and rows[other] == 0.75


@pytest.mark.parametrize("by_place", [True, False])
def test_rows_from_before_contents(tmp_path, by_place):
    before = Table(tmp_path / "scores", pa.schema([field for field in SCORES if field.name != CONTENT]))
    columns = dict(zip(KEY, ([value] for value in key()), strict=False))
    before.append({**columns, "score": [0.5]})
    table = Table(tmp_path / "scores", SCORES, by_place=by_place)
    rows = Rows(table)
    rows.read([("p", 0)])
    assert (key() in rows) == by_place and rows.get(key(text="any")) == (0.5 if by_place else None)
    rows.put(key(), score=0.75)
    rows.flush()
    assert len(stored(table)) == (1 if by_place else 2)
    table.complete({key()[: len(KEY)]: extend_hash(0, "x")})
    rows.read([("p", 0)])
    assert rows[key()] == 0.5 and key(text="any") not in rows


def test_counters_after_a_crash_between_compaction_and_removal(table, monkeypatch):
    for score in (0.25, 0.5):
        rows = Rows(table)
        rows.put(key(prefix=len(table.shards())), score=score)
        rows.count({"requests": 3})
        rows.flush()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        table.compact()
    assert len(table.shards()) == 3 and table.counters() == {"requests": 6}
    rows.put(key(prefix=9), score=1.0)
    rows.count({"requests": 1})
    rows.flush()
    assert table.counters() == {"requests": 7}
    table.compact()
    assert len(table.shards()) == 1 and table.counters() == {"requests": 7}


def interrupted(*_):
    raise KeyboardInterrupt


def test_rows_that_another_has_encoded_go_into_the_same_shard(tmp_path):
    far, near = Rows(Table(tmp_path / "elsewhere", SCORES)), Rows(Table(tmp_path / "scores", SCORES), rows=3)
    far.put(key("p"), score=0.25)
    far.put(key("q"), score=0.5)
    far.count({"asked": 2})
    parts, counters = far.taken()
    assert far.taken() == ([], {}) and not (tmp_path / "elsewhere").exists()
    near.put(key("r"), score=0.75)
    near.count({"asked": 1})
    near.receive(parts, counters)
    near.receive([], {"asked": 4})
    assert near.due and near.added == 3
    near.flush()
    assert len(near.table.shards()) == 1 and near.table.counters() == {"asked": 7}
    assert {(row[0], row[-1]) for row in stored(near.table)} == {("p", 0.25), ("q", 0.5), ("r", 0.75)}


def test_an_interrupt_at_any_point_of_writing_neither_loses_nor_doubles_a_row(tmp_path):
    """At each bytecode of `Rows.flush` in turn."""
    for point in range(1000):
        table, left = Table(tmp_path / str(point), SCORES), point
        rows, other = Rows(table), Rows(table)
        other.put(key("q"), score=1.0)
        rows.receive(other.taken()[0], {"n": 1})
        rows.put(key(), score=0.5)

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code is not Rows.flush.__code__:
                return None
            frame.f_trace_opcodes = True
            left -= event == "opcode"
            if left < 0:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            rows.flush()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        rows.flush()
        assert len(stored(table)) == 2 and table.counters() == {"n": 1}, point
        if left >= 0:
            assert point > 50
            return
    raise AssertionError("flush never ended")
