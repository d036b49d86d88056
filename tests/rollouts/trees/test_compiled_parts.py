"""A store that is compiled and verified a part at a time, and what a killed process left of the former."""

from __future__ import annotations

import fcntl
import os
import shutil

import numpy as np
import pytest
from made_stores import LatexWriter, finished

from rollouts.errors import StoreError
from rollouts.trees import compile as compiling
from rollouts.trees import verify
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from rollouts.trees.verify import verify_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("parts") / "s", kind=LatexWriter)


def arrays(trees: Trees) -> dict[str, np.ndarray]:
    own = {name: value for name, value in vars(trees).items() if isinstance(value, np.ndarray)}
    return own | trees.signals


def test_arrays_are_the_same_in_parts_of_any_size(store, monkeypatch):
    whole, written = compile_store(store, cache=False), []
    plain = compiling._Part.write

    def write(self, arrays, signals):
        written.append(len(self.nodes))
        plain(self, arrays, signals)

    monkeypatch.setattr(compiling._Part, "write", write)
    for size in (1, 7, 10**6):
        monkeypatch.setattr(compiling, "_PART", size)
        written.clear()
        found = compile_store(store, cache=False)
        assert vars(found).keys() == vars(whole).keys() and found.meta == whole.meta
        for name, values in arrays(whole).items():
            again = arrays(found)[name]
            assert again.dtype == values.dtype and np.array_equal(again, values, equal_nan=values.dtype.kind == "f")
        assert sum(written) == whole.nodes and (len(written) > 5) == (size < 10)
        assert [found.proposal(row, 1) for row in range(9)] == [whole.proposal(row, 1) for row in range(9)]


def test_what_a_killed_process_left_of_compiling_goes_and_what_another_writes_stays(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "s", ignore=shutil.ignore_patterns(".compiled"))
    place = tmp_path / "s" / ".compiled"
    for name in ("killed", "at-work"):
        (place / f".scratch-{name}.tmp").mkdir(parents=True)
    handle = os.open(place / ".scratch-at-work.tmp", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    compile_store(tmp_path / "s")
    os.close(handle)
    assert [path.name for path in place.glob(".*")] == [".scratch-at-work.tmp"] and len(list(place.iterdir())) == 2


def test_a_store_that_is_refused_leaves_nothing(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "s", ignore=shutil.ignore_patterns(".compiled"))
    for path in (tmp_path / "s" / "grades" / "exact").glob("part-*"):
        path.unlink()
    with pytest.raises(StoreError, match="no grade"):
        compile_store(tmp_path / "s")
    assert not list((tmp_path / "s" / ".compiled").iterdir())


def test_rows_that_are_there_twice_or_of_nobody_are_counted_over_all_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_TOGETHER", 2)
    store = finished(tmp_path / "s", replicas=1)
    table = store.grades("exact")
    rows = table.read_shard(table.shards()[0])
    for some in (rows.slice(0, 1), rows.slice(rows.num_rows - 2, 2)):
        table.append(some.to_pydict())
    table.append({**rows.slice(0, 3).to_pydict(), "problem": ["nobody"] * 3})
    found = verify_store(store)
    assert "grades/exact: 3 duplicate keys." in found.problems
    assert "grades/exact: 3 rows of problems that problems.parquet does not have." in found.problems
    assert f"grades/exact: {rows.num_rows + 6} rows in 4 shards" in found.facts
