"""Append-only Parquet tables of immutable shards: a crash loses at most the shard in flight."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import file_digest
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollouts.errors import StoreError
from rollouts.files.parquet import open_parquet, write_parquet
from rollouts.files.sealed import refusing_damage
from rollouts.text.likelihood import STATISTICS
from rollouts.text.steps import ROLES

T = TypeVar("T")
KEY = ("problem", "replica", "prefix", "role")
_STRING = pa.string()
_TEXT = pa.dictionary(pa.int32(), _STRING)
_KEY_FIELDS = [
    pa.field("problem", _TEXT, nullable=False),
    pa.field("replica", pa.int16(), nullable=False),
    pa.field("prefix", pa.uint64(), nullable=False),
    pa.field("role", _TEXT, nullable=False),
]
STEPS = pa.schema(
    [
        *_KEY_FIELDS,
        pa.field("text", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("stop_reason", _TEXT, nullable=False),
        pa.field("terminal", pa.bool_(), nullable=False),
        pa.field("label", pa.bool_()),
        pa.field("reason", pa.string()),  # why its request failed
        *(pa.field(name, pa.float32()) for name in STATISTICS),  # under its author; null where that did not tell
    ]
)
CONTENT = "content"  # what a row is about: the hash of its prefix and of the proposal's text
_CONTENT_FIELD = pa.field(CONTENT, pa.uint64())  # null in rows from before there was such a column
_LATER = {CONTENT, "reason", *STATISTICS}  # null in shards from before there were such columns
GRADES = pa.schema(
    [
        *_KEY_FIELDS,
        _CONTENT_FIELD,
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("extracted", pa.string()),
        pa.field("error", pa.string()),
    ]
)


def scores_of(columns: Sequence[str]) -> pa.Schema:
    """Return the schema of a score table with such columns."""
    return pa.schema([*_KEY_FIELDS, _CONTENT_FIELD, *(pa.field(name, pa.float32()) for name in columns)])


SCORES = scores_of(("score",))
# In the metadata of shards: counters; that all shards before are in this one; the first of those before that are.
_OURS, _COUNTER, _COMPACTED, _MERGED = "trim", "trim.", "trim-compacted", "trim-merged"
_REMEDY = "`python -m rollouts repair` sets it aside; the same command then generates what is missing."
_SHARD = re.compile(r"part-(\d{6,})\.parquet")
_SAME_TIME_NS = 2_000_000_000  # two changes so close may leave a directory the same time
_GROUP_ROWS = 10_000  # rows that are read together for a few problems
_GROUPS_TOGETHER = 25  # that are in memory when all are looked at
_COMPACTED_TOGETHER = 250_000  # rows, of whole problems
MANY = 64  # shards beyond which those that no compaction has seen are merged


def batched(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield lists of so many items; the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, most)):
        yield some


class Table:
    """One append-only table: a directory of shards with one schema.

    Attributes:
        directory: Where its shards are.
        schema: Their columns.
        key: The columns that name a row.
        values: The columns that rows are looked up for.
        roles: Whose steps have rows.
        by_place: Whether a row without `CONTENT` belongs to whatever step is at its place.
    """

    def __init__(
        self,
        directory: Path,
        schema: pa.Schema,
        values: Sequence[str] = (),
        roles: Sequence[str] = ROLES,
        *,
        by_place: bool = True,
    ) -> None:
        """Name the table; the directory is made at the first `append`."""
        self.directory = directory
        self.schema = schema
        self.key = (*KEY, CONTENT) if CONTENT in schema.names else KEY
        self.roles = tuple(roles)
        self.values = tuple(values) or (schema.names[len(self.key)],)
        self.by_place = by_place
        self._listed: tuple[int, dict[Path, tuple[int, int]]] = (-1, {})
        self._valued: dict[str, tuple[dict[Path, tuple[int, int]], bool]] = {}
        self._open: dict[Path, tuple[tuple[int, int], pq.ParquetFile]] = {}
        self._indexed: dict[Path, tuple[int, int]] = {}
        self._groups: dict[str, list[tuple[Path, int]]] = {}  # row groups by problem

    def shards(self) -> list[Path]:
        """Return the shards in the order in which they were written."""
        return sorted(self._stamps(), key=_number)

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        """Return the shards, each with what is another when a file takes its name: inode and time.

        The directory is listed until two lists agree: one during which shards are replaced may have neither old nor
        new ones. It is not listed again while its own time says that nothing came or went.
        """
        before = None
        while self.directory.is_dir():
            now, changed = {}, self.directory.stat().st_mtime_ns
            if changed == self._listed[0]:
                return self._listed[1]
            try:
                with os.scandir(self.directory) as entries:
                    for entry in entries:
                        if _SHARD.fullmatch(entry.name):
                            now[Path(entry.path)] = _stamp(entry.stat())
            except FileNotFoundError:
                continue
            if now == before:
                if time.time_ns() - changed > _SAME_TIME_NS:
                    self._listed = changed, now
                return now
            before = now
        return {}

    def _undisturbed(self, read: Callable[[], T]) -> T:
        """Read, and again if shards went or were replaced meanwhile: what compaction removes is in a new one."""
        while True:
            before = self._stamps()
            try:
                result = read()
            except (StoreError, OSError):
                if self._stamps() == before:
                    raise
                continue
            now = self._stamps()
            if all(now.get(path, stamp) == stamp for path, stamp in before.items()):
                return result

    def _current(self) -> list[Path]:
        """Return the shards without those that compaction is about to remove, or has left after a crash."""
        found: list[Path] = []
        for path in self.shards():
            since = _since(self._about(path))
            while found and since is not None and _number(found[-1]) >= since:
                found.pop()
            found.append(path)
        return found

    def _of_all(self, of: Callable[[Path], T]) -> list[T]:
        """Return something of every shard, as they were at one moment."""
        return self._undisturbed(lambda: [of(path) for path in self._current()])

    def next_shard(self) -> Path:
        """Return where the next shard goes."""
        existing = self.shards()
        number = _number(existing[-1]) + 1 if existing else 0
        return self.directory / f"part-{number:06d}.parquet"

    def append(
        self,
        rows: Mapping[str, Sequence[Any]],
        counters: Mapping[str, int] | None = None,
        path: Path | None = None,
    ) -> None:
        """Write one shard.

        Args:
            rows: Columns of the schema, equally long; those that came later may be left out.
            counters: Whole numbers to be summed over shards (`counters`), such as dropped segments.
            path: Where to; default `next_shard`.
        """
        self.write([self.encode(rows)], counters or {}, path or self.next_shard())

    def encode(self, rows: Mapping[str, Sequence[Any]]) -> pa.Table:
        """Return rows as shards hold them; columns as of `append`."""
        unknown = [None] * len(rows["problem"])
        columns = [rows.get(name, unknown) if name in _LATER else rows[name] for name in self.schema.names]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, self.schema, strict=True)]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def write(self, parts: Iterable[pa.Table], counters: Mapping[str, int], path: Path, **metadata: str) -> None:
        """Write one shard of encoded rows."""
        self.directory.mkdir(parents=True, exist_ok=True)
        counted = {f"{_COUNTER}{name}": str(value) for name, value in counters.items()}
        schema = self.schema.with_metadata(counted | metadata)

        write_parquet(path, schema, parts, _GROUP_ROWS)

    def read_shard(
        self, path: Path, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> pa.Table:
        """Return one shard, or some of its columns and row groups.

        Raises:
            StoreError: The shard is truncated, corrupted or has another schema; the message names it.
        """
        wanted = list(columns) if columns else self.schema.names
        with self._opened(path) as file:
            there = file.schema_arrow.names
            some = [name for name in wanted if name in there]
            groups = range(file.num_row_groups) if groups is None else groups
            table = file.read_row_groups(groups, some if columns else None)
            table.validate(full=True)  # a header of a page, too, may be damaged
        for name in _LATER.intersection(wanted).difference(there):
            field = self.schema.field(name)
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        if missing := [name for name in wanted if name not in table.column_names]:
            raise StoreError(f"{path}: columns {missing} are missing, found {table.column_names}.")
        return table.select(wanted)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[pq.ParquetFile]:
        """Open a shard; the last one stays open, and those of many row groups, whose metadata take long to read."""
        with refusing_damage(path, StoreError, "shard", _REMEDY):
            stamp = _stamp(path.stat())
            if path not in self._open or self._open[path][0] != stamp:
                many = {key: kept for key, kept in self._open.items() if kept[1].num_row_groups > _GROUPS_TOGETHER}
                self._open = {**many, path: (stamp, open_parquet(path))}
            yield self._open[path][1]

    def _about(self, path: Path) -> pq.FileMetaData:
        with self._opened(path) as file:
            return file.metadata

    def parts(self, path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield one shard in parts that fit into memory, at least one; all of its columns by default."""
        groups = range(self._about(path).num_row_groups)
        for start in range(0, max(1, len(groups)), _GROUPS_TOGETHER):
            yield self.read_shard(path, columns, groups[start : start + _GROUPS_TOGETHER])

    def read(self, problems: Collection[str] | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the shards one by one, cut to some problems; row groups without any of them are not read.

        What is yielded was there at one moment, whatever is written or compacted meanwhile; all of it is in memory.
        """
        if problems is None:
            tables = self._of_all(lambda path: self.read_shard(path, columns))
        else:
            tables = self._undisturbed(lambda: self._read_of(problems, columns))
        yield from (table for table in tables if table.num_rows)

    def _read_of(
        self, problems: Collection[str], columns: Sequence[str] | None, shards: Collection[Path] | None = None
    ) -> list[pa.Table]:
        self._update_index()
        groups: dict[Path, set[int]] = {}
        for problem in problems:
            for path, group in self._groups.get(problem, ()):
                if shards is None or path in shards:
                    groups.setdefault(path, set()).add(group)
        wanted, found = pa.array(sorted(problems), type=pa.string()), []
        for path in sorted(groups, key=_number):
            table = self.read_shard(path, columns, sorted(groups[path]))
            found.append(table.filter(pc.is_in(pc.cast(table["problem"], pa.string()), value_set=wanted)))
        return found

    def _update_index(self) -> None:
        """Note the problems of new row groups; shards do not change, and what took the name of one is read anew."""
        now = self._stamps()
        if any(now.get(path) != stamp for path, stamp in self._indexed.items()):
            self._indexed, self._groups, self._open = {}, {}, {}
        for path in sorted(now.keys() - self._indexed.keys(), key=_number):
            since = _since(self._about(path))
            for places in self._groups.values() if since is not None else ():
                places[:] = (place for place in places if _number(place[0]) < since)  # type: ignore[operator]
            for group, problems in enumerate(self._problems_of(path)):
                for problem in problems:
                    self._groups.setdefault(problem, []).append((path, group))
            self._indexed[path] = now[path]

    def _problems_of(self, path: Path) -> Iterator[list[str]]:
        """Yield the problems of each row group, in the order in which they came."""
        about = self._about(path)
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        for part, own in zip(self.parts(path, ["problem"]), batched(sizes, _GROUPS_TOGETHER), strict=False):
            column, start = pc.cast(part["problem"], _STRING), 0
            for rows in own:
                yield pc.unique(column.slice(start, rows)).to_pylist()
                start += rows

    def keys(self, problems: Collection[str] | None = None) -> pa.Table:
        """Return the keys of all rows, or those of some problems, duplicates included."""
        empty = plain(self.schema.empty_table().select(self.key))
        return pa.concat_tables([empty, *(plain(part).cast(empty.schema) for part in self.read(problems, self.key))])

    def problems(self) -> Counter[str]:
        """Return the number of rows of each problem; all bytes are read, so that damage anywhere is found."""
        return Counter({name: rows for (name,), rows in self.counts("problem", whole=True).items()})

    def counts(self, *columns: str, whole: bool = False) -> Counter[tuple[Any, ...]]:
        """Count rows by their values in some columns, a part at a time.

        Args:
            columns: The columns.
            whole: Read the others, too, to find damage anywhere.
        """

        def counted() -> Counter[tuple[Any, ...]]:
            found: Counter[tuple[Any, ...]] = Counter()
            for path in self._current():
                for part in self.parts(path, None if whole else columns):
                    table = plain(part.select(columns)).group_by(columns).aggregate([([], "count_all")])
                    found.update({row[:-1]: row[-1] for row in values_of(table, (*columns, "count_all"))})
            return found

        return self._undisturbed(counted)

    def digests(self) -> list[bytes]:
        """Return a digest of each shard's bytes."""

        def of(path: Path) -> bytes:
            with path.open("rb") as handle:
                return file_digest(handle, "blake2b").digest()

        return self._of_all(of)

    def has_values(self, column: str) -> bool:
        """Whether any row has a value in a column; shards that cannot be read count as having none."""
        now = self._stamps()
        if column not in self._valued or self._valued[column][0] != now:
            self._valued[column] = now, any(self._has_values(path, column) for path in now)
        return self._valued[column][1]

    def _has_values(self, path: Path, column: str) -> bool:
        with suppress(StoreError):
            about = self._about(path)
            if column in about.schema.names:
                place = about.schema.names.index(column)
                groups = (about.row_group(group).column(place) for group in range(about.num_row_groups))
                return any(each.statistics is None or each.statistics.null_count < each.num_values for each in groups)
        return False

    def counters(self) -> dict[str, int]:
        """Return the shards' counters, summed."""
        totals: Counter[str] = Counter()
        for about in self._of_all(self._about):
            totals.update(_counters_in(about))
        return dict(totals)

    def complete(self, content_of: Mapping[tuple[Any, ...], int]) -> None:
        """Give rows that have no `CONTENT` that of the step at their place, where one is known."""
        for path in self.shards():
            if any(part[CONTENT].null_count for part in self.parts(path, [CONTENT])):
                self._rewrite(path, lambda part: with_contents(part, content_of))

    def drop(self, column: str, value: str) -> int:
        """Drop all rows with a value in a column; return how many there were."""
        dropped = 0
        for path in self.shards():
            texts = (pc.cast(part[column], pa.string()) for part in self.parts(path, [column]))
            if own := sum(pc.sum(pc.equal(text, value)).as_py() or 0 for text in texts):
                dropped += own
                self._rewrite(path, lambda part: part.filter(pc.not_equal(pc.cast(part[column], pa.string()), value)))
        return dropped

    def _rewrite(self, path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
        about = self._about(path)
        marks = {name: value for name, value in _texts(about).items() if name in (_COMPACTED, _MERGED)}
        self.write(map(change, self.parts(path)), _counters_in(about), path, **marks)

    def compact(self, many: int | None = None) -> None:
        """Rewrite shards as one, problem by problem, duplicates dropped (first wins), then remove the old ones.

        Problems stay in the order in which they came, so that those that are read together lie together; memory grows
        with what some of them need. A crash in between leaves the old shards, which readers then pass over.

        Args:
            many: Only where more than so many were added since the last time, and only those; so no row is rewritten
                twice in this way. Default: all.
        """
        old = self._current()
        for path in set(self.shards()).difference(old):
            path.unlink()
        mark = {_COMPACTED: ""}
        if many is not None:
            seen = [place for place, path in enumerate(old) if _since(self._about(path)) is not None]
            old = old[seen[-1] + 1 :] if seen else old
        if len(old) <= (many or 0):
            return
        if many is not None:
            mark = {_MERGED: str(_number(old[0]))}
        counters: Counter[str] = Counter()
        problems: dict[str, None] = {}  # in the order in which they came
        rows = 0
        for path in old:
            about = self._about(path)
            rows += about.num_rows
            counters.update(_counters_in(about))
            problems.update(dict.fromkeys(chain.from_iterable(self._problems_of(path))))
        together = max(1, len(problems) * _COMPACTED_TOGETHER // max(1, rows))
        merged = (self._merged(some, set(old)) for some in batched(problems, together))
        self.write(chain.from_iterable(map(self.in_groups, merged)), counters, self.next_shard(), **mark)
        for path in old:
            path.unlink()

    def _merged(self, problems: Sequence[str], shards: Collection[Path]) -> pa.Table:
        """Return all rows of some problems, each once, problem by problem."""
        found = self._undisturbed(lambda: self._read_of(problems, None, shards))
        table = pa.concat_tables([plain(part, pa.large_string()) for part in found])
        order = pc.index_in(table["problem"], value_set=pa.array(problems, pa.large_string()))
        numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64())).append_column("order", order)
        first = numbered.group_by(self.key).aggregate([("row", "min"), ("order", "min")])
        return table.take(first.sort_by([(name, "ascending") for name in ("order_min", *self.key[1:])])["row_min"])

    def in_groups(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield row groups of plain rows, each with dictionaries of its own: those of all would be in every one."""
        for start in range(0, table.num_rows, _GROUP_ROWS):
            group = table.slice(start, _GROUP_ROWS)
            arrays = [
                group[field.name].dictionary_encode() if pa.types.is_dictionary(field.type) else group[field.name]
                for field in self.schema
            ]
            yield pa.Table.from_arrays(arrays, names=self.schema.names).cast(self.schema)

    def leftovers(self) -> list[Path]:
        """Return temporary files that a crash left behind."""
        return sorted(self.directory.glob(".*.tmp")) if self.directory.is_dir() else []


def with_contents(table: pa.Table, content_of: Mapping[tuple[Any, ...], int]) -> pa.Table:
    """Return rows of which those without `CONTENT` have that of the step at their place, where one is known."""
    keys = values_of(table, (*KEY, CONTENT))
    found = [content_of.get(key[:-1]) if key[-1] is None else key[-1] for key in keys]
    column = pa.array(found, type=pa.uint64())
    return table.set_column(table.column_names.index(CONTENT), _CONTENT_FIELD, column)


def values_of(table: pa.Table, columns: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of some columns as Python values; texts of a dictionary are one object wherever they occur."""
    return zip(*(_values(table[name]) for name in columns), strict=True)


def _values(column: pa.ChunkedArray) -> list[Any]:
    found: list[Any] = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type) and not chunk.null_count:
            found += np.array(chunk.dictionary.to_pylist(), object)[chunk.indices.to_numpy()].tolist()
        else:
            found += chunk.to_pylist()  # twenty times as slow for dictionaries
    return found


def _texts(about: pq.FileMetaData) -> dict[str, str]:
    texts = {name.decode(): value for name, value in (about.metadata or {}).items()}
    return {name: value.decode() for name, value in texts.items() if name.startswith(_OURS)}


def _counters_in(about: pq.FileMetaData) -> dict[str, int]:
    return {
        name.removeprefix(_COUNTER): int(value) for name, value in _texts(about).items() if name.startswith(_COUNTER)
    }


def _since(about: pq.FileMetaData) -> int | None:
    """Return the number of the first shard that is in a compacted one; None if it is none."""
    texts = _texts(about)
    return 0 if _COMPACTED in texts else int(texts[_MERGED]) if _MERGED in texts else None


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_mtime_ns


def plain(table: pa.Table, text: pa.DataType = _STRING) -> pa.Table:
    """Return a table with its texts as plain strings, so that shards can be joined."""
    texts = (pa.types.is_dictionary, pa.types.is_string)
    fields = [field.with_type(text) if any(kind(field.type) for kind in texts) else field for field in table.schema]
    return table.replace_schema_metadata(None).cast(pa.schema(fields))
