"""Files of a store of which some bytes are damaged: either nothing changes, or the file is named."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollouts.errors import StoreError
from rollouts.files.parquet import open_parquet, write_parquet
from rollouts.files.sealed import refusing_damage
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from tests.support.made_stores import grown


def _damaged(content: bytes, generator: random.Random, cases: int):
    """Yield contents with one byte changed, half of them in the last tenth, and contents that are cut."""
    for _ in range(cases):
        place = generator.randrange(len(content) * 9 // 10 * generator.randrange(2), len(content))
        changed = bytearray(content)
        changed[place] ^= generator.choice((0x01, 0x80, 0xFF))
        yield bytes(changed)
    for _ in range(cases // 10):
        yield content[: generator.randrange(len(content))]


def test_no_damage_of_a_shard_goes_unnoticed(tmp_path):
    store = grown(tmp_path / "s", replicas=1)
    table = store.steps
    shard = table.shards()[0]
    counters = table.counters()
    before, content, found = [part.to_pylist() for part in table.read()], shard.read_bytes(), 0
    for damaged in _damaged(content, random.Random(1), 300):
        shard.write_bytes(damaged)
        try:
            table = Store(store.path).steps
            assert [part.to_pylist() for part in table.read()] == before
            assert table.counters() == counters
        except StoreError as error:
            assert str(shard) in str(error)
            assert "repair" in str(error)
            found += 1
    assert found > 250


def test_no_damage_of_the_problems_goes_unnoticed(tmp_path):
    store = grown(tmp_path / "s", replicas=1)
    store.add_problems([Problem(f"more/{number}", "train", "1 + 1?", "2", "more", "none") for number in range(50)])
    file = store.path / "problems.parquet"
    before, content, found = store.problems(), file.read_bytes(), 0
    for damaged in _damaged(content, random.Random(2), 200):
        file.write_bytes(damaged)
        try:
            assert store.problems() == before
        except StoreError as error:
            assert str(file) in str(error)
            found += 1
    assert found > 150


def test_any_reader_of_parquet_reads_them_and_files_of_others_are_read(tmp_path):
    table = pa.table({"a": list(range(100))})
    write_parquet(tmp_path / "ours.parquet", table.schema, [table.slice(0, 40), table.slice(40)])
    assert pq.read_table(tmp_path / "ours.parquet").equals(table)
    pq.write_table(table, tmp_path / "theirs.parquet")
    assert open_parquet(tmp_path / "theirs.parquet").read().equals(table)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 8, b"PAR1\xff\xff\xff\x7fPAR1"])
def test_what_is_no_parquet_file_is_named(tmp_path, content):
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    with pytest.raises(StoreError, match="x.parquet: damaged file"), refusing_damage(file, StoreError, "file", ""):
        open_parquet(file)
