"""Shards: one index for all readings, compaction problem by problem, and readers beside it."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_stores import PROBLEMS, finished, grown

from benchmarks import synthetic
from rollouts.__main__ import main
from rollouts.errors import StoreError
from rollouts.store import shards
from rollouts.store.rows import Rows
from rollouts.store.shards import KEY, SCORES, STEPS, Table
from rollouts.store.store import Store
from rollouts.trees.annotate import grade_store, left, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.verify import verify_store

ROOT = Path(__file__).parents[3]


def append(table: Table, *problems: str, start: int = 0) -> None:
    count = len(problems)
    table.append({
        "problem": problems, "replica": [0] * count, "prefix": range(start, start + count), "role": ["small"] * count,
        "content": range(start, start + count), "score": [0.5] * count,
    })  # fmt: skip


def rows_of(table: Table, problems=None) -> list[tuple]:
    return sorted(tuple(row.values()) for part in table.read(problems, KEY) for row in part.to_pylist())


@pytest.fixture
def table(tmp_path) -> Table:
    return Table(tmp_path / "scores", SCORES)


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_ROWS", 3)
    monkeypatch.setattr(shards, "_COMPACTED_TOGETHER", 2)


@pytest.mark.usefixtures("small_groups")
def test_only_row_groups_of_a_problem_are_read_before_and_after_compaction(table, monkeypatch):
    generator, names = random.Random(0), [f"p{i}" for i in range(7)]
    for shard in range(4):
        append(table, *(generator.choice(names) for _ in range(10)), start=10 * shard)
    everything = rows_of(table)
    for _ in range(2):
        read = []
        plain = table.read_shard
        monkeypatch.setattr(table, "read_shard", lambda *a, read=read, plain=plain: read.append(plain(*a)) or read[-1])
        for name in names:
            assert rows_of(table, {name}) == [row for row in everything if row[0] == name]
        assert rows_of(table, {"p1", "p5", "nobody"}) == [row for row in everything if row[0] in ("p1", "p5")]
        del read[:]
        list(table.read({"p2"}, KEY))
        assert all("p2" in part["problem"].to_pylist() for part in read)
        monkeypatch.setattr(table, "read_shard", plain)
        table.compact()
    assert max(part.num_rows for part in read) < 15  # of 40 in one shard


def test_the_index_is_read_once_and_follows_what_is_written_and_removed(table, monkeypatch):
    indexed, plain = [], table.read_shard

    def counted(path, columns=None, groups=None):
        indexed.extend([path.name] if columns == ["problem"] else [])
        return plain(path, columns, groups)

    monkeypatch.setattr(table, "read_shard", counted)
    for shard in range(5):
        append(table, "p", "q", start=2 * shard)
        assert len(rows_of(table, {"p"})) == shard + 1
    assert indexed == [f"part-00000{shard}.parquet" for shard in range(5)]
    table.shards()[0].unlink()
    assert len(rows_of(table, {"p"})) == 4
    append(Table(table.directory, SCORES), "p", start=20)  # another process
    assert len(rows_of(table, {"p"})) == 5


@pytest.mark.usefixtures("small_groups")
def test_compaction_keeps_the_order_of_problems_and_the_first_of_two_rows(table):
    append(table, "z", "a", "z", "m")
    append(table, "a", "b", "z", start=1)
    table.append(
        {**dict.fromkeys(("replica", "prefix", "content"), [0]), "problem": ["z"], "role": ["small"], "score": [1]}
    )
    before = rows_of(table)
    table.compact()
    found = [row for part in table.read() for row in part.to_pylist()]
    assert list(dict.fromkeys(row["problem"] for row in found)) == ["z", "a", "m", "b"]
    assert rows_of(table) == sorted(set(before)) and {row["score"] for row in found} == {0.5}
    assert pq.ParquetFile(table.shards()[0]).num_row_groups > 1


def test_a_store_of_an_earlier_version_reads_on_beside_new_shards(tmp_path):
    before = pa.schema([field for field in STEPS if field.name != "reason"])
    numbers = dict.fromkeys(("replica", "prefix", "tokens", "prompt_tokens"), [0])
    texts = {"problem": ["p"], "role": ["small"], "text": ["x"], "stop_reason": ["failed"]}
    row = {**numbers, **texts, "terminal": [True], "label": [None]}
    Table(tmp_path, before).append(row)
    table = Table(tmp_path, STEPS)
    table.append({**row, "prefix": [1], "reason": ["HTTP 400"]})
    for _ in range(2):
        assert [value for part in table.read({"p"}) for value in part["reason"].to_pylist()] == [None, "HTTP 400"]
        table.compact()


def test_a_reader_that_is_overtaken_by_compaction_sees_all_rows_once(table, monkeypatch):
    for shard in range(4):
        append(table, "p", "q", start=2 * shard)
    everything, plain = rows_of(table), table.read_shard
    for problems in (None, {"p", "q"}):
        reader = Table(table.directory, SCORES)
        overtaken = []

        def slow(path, *arguments, reader=reader, overtaken=overtaken):
            if path == reader.shards()[-1] and not overtaken:
                overtaken.append(path)
                table.compact()
                append(table)  # and somebody else adds a shard without rows
            return Table.read_shard(reader, path, *arguments)

        monkeypatch.setattr(reader, "read_shard", slow)
        assert rows_of(reader, problems) == everything and overtaken
    assert plain(table.shards()[0]).num_rows == 8


@pytest.mark.usefixtures("small_groups")
def test_a_reader_that_is_overtaken_by_a_shard_of_the_same_name_reads_that(table, monkeypatch):
    append(table, *"pqpqpqpqpq")
    reader, plain, overtaken = Table(table.directory, SCORES), table.read_shard, []

    def slow(path, columns=None, groups=None):
        if groups is not None and not overtaken:
            overtaken.append(path)
            assert table.drop("problem", "q") == 5
        return plain(path, columns, groups)

    monkeypatch.setattr(reader, "read_shard", slow)
    assert len(rows_of(reader, {"p"})) == 5 and overtaken


def test_what_a_compaction_that_was_cut_off_left_is_passed_over(table, monkeypatch):
    for shard in range(3):
        append(table, "p", "q", start=2 * shard)
    everything = rows_of(table)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        table.compact()
    assert len(table.shards()) == 4
    for reader in (table, Table(table.directory, SCORES)):
        assert rows_of(reader) == rows_of(reader, {"p", "q"}) == everything and reader.keys().num_rows == 6
    append(table, "p", start=9)
    assert len(rows_of(table)) == 7
    table.compact()
    assert len(table.shards()) == 1 and len(rows_of(table)) == 7


def shard_names(table: Table) -> list[str]:
    return [path.stem for path in table.shards()]


def test_many_new_shards_are_merged_and_those_merged_before_are_left(table):
    everything = []
    for turn in range(3):
        for shard in range(5):
            start = 100 * turn + 2 * shard
            append(table, "p", f"q{shard}", start=start)
            table.append({name: [] for name in table.schema.names}, {"asked": 1})
            everything += [("p", 0, start, "small"), (f"q{shard}", 0, start + 1, "small")]
        merged = shard_names(table)[:turn]
        before = table.shards()[:turn]
        stamps = [path.stat() for path in before]
        table.compact(10)
        assert len(table.shards()) == turn + 10  # not more than so many
        append(table, "r", start=90 + turn)
        everything.append(("r", 0, 90 + turn, "small"))
        table.compact(10)
        assert len(table.shards()) == turn + 1 and shard_names(table)[:turn] == merged
        assert [path.stat() for path in before] == stamps
        for reader in (table, Table(table.directory, SCORES)):
            assert rows_of(reader) == sorted(everything) and reader.counters() == {"asked": 5 * (turn + 1)}
            assert rows_of(reader, {"p"}) == sorted(row for row in everything if row[0] == "p")
    table.compact()
    assert len(table.shards()) == 1 and rows_of(table) == sorted(everything) and table.counters() == {"asked": 15}


def test_a_merge_of_new_shards_that_was_cut_off_is_passed_over_and_cleared(table, monkeypatch):
    for turn in range(2):
        for shard in range(4):
            append(table, "p", "q", start=100 * turn + 2 * shard)
            table.append({name: [] for name in table.schema.names}, {"asked": 1})
        everything, counters, there = rows_of(table), table.counters(), len(table.shards())
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", interrupted)
            table.compact(3)
        assert len(table.shards()) == there + 1
        assert table.drop("problem", "nobody") == 0 and table.drop("problem", "q") == 8  # of the old and the new ones
        everything = [row for row in everything if row[0] != "q"]
        for reader in (table, Table(table.directory, SCORES)):
            assert rows_of(reader) == rows_of(reader, {"p", "q"}) == everything
            assert reader.counters() == counters and reader.problems() == {"p": len(everything)}
        table.compact(3)
        assert len(table.shards()) == turn + 1 and rows_of(table) == everything and table.counters() == counters


def test_the_millionth_shard_comes_after_those_before_it(table):
    append(table, "a")
    table.shards()[0].rename(table.directory / "part-999998.parquet")
    for start in (1, 2, 0):  # the last has a key that is there
        append(table, *"abc"[: start or 1], start=start)
    assert shard_names(table) == ["part-999998", "part-999999", "part-1000000", "part-1000001"]
    assert [row["problem"] for part in table.read() for row in part.to_pylist()] == ["a", "a", "a", "b", "a"]
    assert list(table.read({"a"}))[0].num_rows == 1
    table.compact()
    assert shard_names(table) == ["part-1000002"] and len(rows_of(table)) == 4


@pytest.mark.usefixtures("small_groups")
def test_row_groups_of_a_compacted_shard_name_their_own_problems_alone(table):
    """Dictionaries of all problems in every row group would make shards grow with the square of what is in them."""
    for shard in range(3):
        append(table, *(f"p{number}" for number in range(20)), start=20 * shard)
    shards._COMPACTED_TOGETHER = 1000
    table.compact()
    file = pq.ParquetFile(table.shards()[0])
    names = [file.read_row_group(group)["problem"].chunk(0).dictionary for group in range(file.num_row_groups)]
    assert len(names) == 20 and max(map(len, names)) <= 3


def test_a_shard_of_many_row_groups_is_opened_once_until_it_is_another(table, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_ROWS", 1)
    append(table, *(f"p{number}" for number in range(40)))
    opened, plain = [], pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **options: opened.append(a) or plain(*a, **options))
    for number in range(40):
        assert rows_of(table, {f"p{number}"}) == [(f"p{number}", 0, number, "small")]
    assert len(opened) == 1
    assert Table(table.directory, SCORES).drop("problem", "p3") == 1
    assert not rows_of(table, {"p3"}) and len(rows_of(table)) == 39


def test_commands_that_add_rows_merge_new_shards(tmp_path, monkeypatch):
    store = finished(tmp_path / "s", replicas=1)
    grades = store.grades("exact")
    for _ in range(3):
        grades.append({name: [] for name in grades.schema.names})
    monkeypatch.setattr("rollouts.store.store.MANY", 3)
    before = compile_store(store, cache=False).meta["hash"]
    assert main(["grade", str(store.path)]) == 0
    assert len(grades.shards()) == 1 and compile_store(store, cache=False).meta["hash"] == before


def interrupted(*_):
    raise KeyboardInterrupt


COMPACT = """
import sys
from rollouts.store.store import Store
from rollouts.store.shards import Table
store = Store(sys.argv[1])
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    for table in store.tables():
        rows = [table.read_shard(path) for path in table.shards()]
        table.compact()
        whole = table.read_shard(table.shards()[0])
        cuts = [whole.num_rows * part // 7 for part in range(8)]
        for begin, end in zip(cuts, cuts[1:]):  # shards again, after the compacted one: nothing but repeated rows
            table.append(whole.slice(begin, end - begin).to_pydict())
"""


def test_readers_beside_repair_compact_miss_nothing_and_meet_no_missing_file(tmp_path):
    store = finished(tmp_path / "s", replicas=1)

    def read() -> tuple:
        trees = compile_store(Store(store.path), cache=False)
        walked = [len(tree.nodes) for tree in load_trees(store, PROBLEMS, None, None)]
        keys = [len(set(zip(*table.keys().to_pydict().values(), strict=True))) for table in store.tables()]
        return trees.meta["hash"], walked, keys, sorted(store.steps.counters())

    expected = read()
    command = [sys.executable, "-c", COMPACT, str(store.path), "12"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    readings = 0
    while process.poll() is None:
        assert read() == expected
        readings += 1
    assert process.returncode == 0 and readings > 3


def test_verify_beside_compaction_finds_the_store_sound(tmp_path):
    store = finished(tmp_path / "s", replicas=1)
    for table in store.tables():
        for _ in range(3):
            table.append({name: [] for name in table.schema.names})
    over = threading.Event()

    def compact() -> None:
        for _ in range(10):
            for table in Store(store.path).tables():
                table.append({name: [] for name in table.schema.names})
                table.compact()
        over.set()

    worker = threading.Thread(target=compact)
    worker.start()
    while not over.is_set():
        found = verify_store(Store(store.path)).problems
        assert not [line for line in found if "unfinished" not in line], found
    worker.join()
    assert not verify_store(store).problems


def test_damage_is_damage_even_if_shards_come_meanwhile(table):
    append(table, "p", "q")
    append(table, "p", start=2)
    shard = table.shards()[0]
    shard.write_bytes(shard.read_bytes()[:-50])
    for problems in (None, {"p"}):
        with pytest.raises(StoreError, match="part-000000.*repair"):
            rows_of(table, problems)


def test_compaction_holds_a_part_of_the_texts_at_once(tmp_path, monkeypatch):
    """Texts of 2 GiB do not fit into one array; here a part is a few problems of a hundred."""
    store = grown(tmp_path / "s", problems=[type(PROBLEMS[0])(f"p{i}", "train", "Q", "7", "", "") for i in range(100)])
    largest, plain = [], Table._merged

    def merged(self, *arguments):
        part = plain(self, *arguments)
        largest.append(part.num_rows)
        return part

    monkeypatch.setattr(Table, "_merged", merged)
    monkeypatch.setattr(shards, "_COMPACTED_TOGETHER", 100)
    whole = store.steps.keys().num_rows
    store.steps.compact()
    assert sum(largest) == whole and max(largest) < whole / 10


def test_texts_are_joined_as_large_strings(table):
    append(table, "p")
    plain = shards.plain(table.read_shard(table.shards()[0]), pa.large_string())
    assert plain.schema.field("problem").type == pa.large_string()


@pytest.mark.parametrize("compacted", [False, True])
def test_what_is_read_grows_with_the_problems_and_not_with_their_square(tmp_path, monkeypatch, compacted):
    monkeypatch.setattr(shards, "_GROUP_ROWS", 200)
    plain = Table.read_shard

    def scan(problems: int) -> tuple[int, int]:
        store, items = synthetic.make(tmp_path / str(problems), problems, 1, 1)
        store.add_problems(items)
        synthetic.grow(store, items, 1, 0, 500)
        score_store(store, synthetic.Scorer())
        grade_store(store, synthetic.Grader())
        if compacted:
            for table in store.tables():
                table.compact()
        store, rows = Store(store.path), []
        with monkeypatch.context() as patched:
            patched.setattr(Table, "read_shard", lambda *a: rows.append(plain(*a)) or rows[-1])
            scores, grades = Rows(store.scores("hash")), Rows(store.grades("hash"))
            trees = list(load_trees(store, items, None, 1, chunk=16, along=[scores, grades]))
            assert not list(left(store, scores, chunk=16)) and not list(left(store, grades, chunk=16))
        assert len(trees) == problems
        return sum(part.num_rows for part in rows), store.steps.keys().num_rows

    counted = {problems: scan(problems) for problems in (60, 480)}
    (few, few_steps), (many, many_steps) = counted.values()
    assert many / few < 1.4 * many_steps / few_steps, counted
