"""Append-only Parquet tables of immutable shards: a crash loses at most the shard in flight."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollouts.errors import StoreError

KEY = ("problem", "replica", "prefix", "role")
_TEXT = pa.dictionary(pa.int32(), pa.string())
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
    ]
)
CONTENT = "content"  # what a row is about: the hash of its prefix and of the proposal's text
_CONTENT_FIELD = pa.field(CONTENT, pa.uint64())  # null in rows from before there was such a column
SCORES = pa.schema([*_KEY_FIELDS, _CONTENT_FIELD, pa.field("score", pa.float32())])
GRADES = pa.schema(
    [
        *_KEY_FIELDS,
        _CONTENT_FIELD,
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("extracted", pa.string()),
        pa.field("error", pa.string()),
    ]
)
_COUNTER, _COMPACTED = "trim.", "trim-compacted"  # in the metadata of shards
_SHARD = re.compile(r"part-(\d{6})\.parquet$")


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary)``, flush it to the disk and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Table:
    """One append-only table: a directory of shards with one schema.

    Attributes:
        directory: Where its shards are.
        schema: Their columns.
        key: The columns that name a row.
        by_place: Whether a row without `CONTENT` belongs to whatever step is at its place.
    """

    def __init__(self, directory: Path, schema: pa.Schema, *, by_place: bool = True) -> None:
        """Name the table; the directory is made at the first `append`."""
        self.directory = directory
        self.schema = schema
        self.key = (*KEY, CONTENT) if CONTENT in schema.names else KEY
        self.by_place = by_place
        self._mentioned: dict[tuple[Path, int], set[str]] = {}

    def shards(self) -> list[Path]:
        """Return the shards in the order in which they were written."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _SHARD.fullmatch(path.name))

    def next_shard(self) -> Path:
        """Return where the next shard goes."""
        existing = self.shards()
        number = int(_SHARD.fullmatch(existing[-1].name).group(1)) + 1 if existing else 0  # type: ignore[union-attr]
        return self.directory / f"part-{number:06d}.parquet"

    def append(
        self,
        rows: Mapping[str, Sequence[Any]],
        counters: Mapping[str, int] | None = None,
        path: Path | None = None,
    ) -> None:
        """Write one shard.

        Args:
            rows: Columns of the schema, equally long; `CONTENT` may be left out.
            counters: Whole numbers to be summed over shards (`counters`), such as dropped segments.
            path: Where to; default `next_shard`.
        """
        unknown = [None] * len(rows["problem"])
        columns = [rows.get(name, unknown) if name == CONTENT else rows[name] for name in self.schema.names]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, self.schema, strict=True)]
        self._write(pa.Table.from_arrays(arrays, schema=self.schema), counters or {}, path or self.next_shard())

    def _write(self, table: pa.Table, counters: Mapping[str, int], path: Path, **metadata: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        counted = {f"{_COUNTER}{name}": str(value) for name, value in counters.items()}
        table = table.replace_schema_metadata(counted | metadata)

        def write(target: Path) -> None:
            pq.write_table(table, target, compression="zstd", compression_level=12, write_page_checksum=True)

        write_atomically(path, write)

    def read_shard(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Return one shard.

        Raises:
            StoreError: The shard is truncated, corrupted or has another schema; the message names it.
        """
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read(columns=list(columns) if columns else None)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{path}: unreadable shard ({str(error).splitlines()[0][:160]}). "
                "`python -m rollouts repair` sets it aside; the same command then generates what is missing."
            ) from error
        wanted = list(columns) if columns else self.schema.names
        if CONTENT in wanted and CONTENT not in table.column_names:
            table = table.append_column(_CONTENT_FIELD, pa.nulls(table.num_rows, pa.uint64()))
        if missing := [name for name in wanted if name not in table.column_names]:
            raise StoreError(f"{path}: columns {missing} are missing, found {table.column_names}.")
        return table.select(wanted)

    def read(self, problems: Collection[str] | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the shards one by one, cut to some problems; shards without any of them are not read."""
        wanted = None if problems is None else pa.array(sorted(problems), type=pa.string())
        for path in self.shards():
            if problems is not None and self._problems_of(path).isdisjoint(problems):
                continue
            table = self.read_shard(path, columns)
            if wanted is not None:
                table = table.filter(pc.is_in(pc.cast(table["problem"], pa.string()), value_set=wanted))
            if table.num_rows:
                yield table

    def _problems_of(self, path: Path) -> set[str]:
        """Return the problems that a shard mentions; read once, as shards do not change."""
        key = path, path.stat().st_mtime_ns if path.exists() else 0
        if key not in self._mentioned:
            column = self.read_shard(path, ["problem"])["problem"]
            self._mentioned[key] = set(pc.unique(pc.cast(column, pa.string())).to_pylist())
        return self._mentioned[key]

    def keys(self) -> pa.Table:
        """Return the keys of all rows, duplicates included; whole shards are read, so that damage anywhere is found."""
        empty = _plain(self.schema.empty_table().select(self.key))
        return pa.concat_tables([empty, *(_plain(table.select(self.key)).cast(empty.schema) for table in self.read())])

    def counters(self) -> dict[str, int]:
        """Return the shards' counters, summed."""
        totals: Counter[str] = Counter()
        for path in self.shards():
            metadata = _metadata_of(path)
            if _COMPACTED in metadata:  # those before it are in it, and there only because of a crash
                totals.clear()
            totals.update(_counters_in(metadata))
        return dict(totals)

    def complete(self, content_of: Mapping[tuple[Any, ...], int]) -> None:
        """Give rows that have no `CONTENT` that of the step at their place, where one is known."""
        for path in self.shards():
            table = self.read_shard(path)
            if not table[CONTENT].null_count:
                continue
            rows = zip(*(table[name].to_pylist() for name in self.key), strict=True)
            found = [content_of.get(key[:-1]) if key[-1] is None else key[-1] for key in rows]
            column = pa.array(found, type=pa.uint64())
            self._rewrite(path, table.set_column(table.column_names.index(CONTENT), _CONTENT_FIELD, column))

    def drop(self, column: str, value: str) -> int:
        """Drop all rows with a value in a column; return how many there were."""
        dropped = 0
        for path in self.shards():
            table = self.read_shard(path)
            kept = table.filter(pc.not_equal(pc.cast(table[column], pa.string()), value))
            if kept.num_rows < table.num_rows:
                dropped += table.num_rows - kept.num_rows
                self._rewrite(path, kept)
        return dropped

    def _rewrite(self, path: Path, table: pa.Table) -> None:
        metadata = _metadata_of(path)
        self._write(table, _counters_in(metadata), path, **{name: "" for name in metadata if name == _COMPACTED})

    def compact(self) -> None:
        """Rewrite all shards as one, sorted by key, duplicates dropped (first wins), then remove the old ones.

        A crash in between leaves rows twice, which readers resolve to the same content, and counters once.
        """
        old = self.shards()
        if not old:
            return
        table = pa.concat_tables([_plain(self.read_shard(path)) for path in old])
        numbered = table.append_column("row", pa.array(range(table.num_rows), type=pa.int64()))
        first = numbered.group_by(self.key).aggregate([("row", "min")])
        first = first.sort_by([(name, "ascending") for name in self.key])
        table = table.take(first["row_min"])
        arrays = [
            table[field.name].dictionary_encode() if pa.types.is_dictionary(field.type) else table[field.name]
            for field in self.schema
        ]
        table = pa.Table.from_arrays(arrays, names=self.schema.names).cast(self.schema)
        self._write(table, self.counters(), self.next_shard(), **{_COMPACTED: ""})
        for path in old:
            path.unlink()

    def leftovers(self) -> list[Path]:
        """Return temporary files that a crash left behind."""
        return sorted(self.directory.glob(".*.tmp")) if self.directory.is_dir() else []


def _metadata_of(path: Path) -> dict[str, bytes]:
    return {name.decode(): value for name, value in (pq.read_metadata(path).metadata or {}).items()}


def _counters_in(metadata: Mapping[str, bytes]) -> dict[str, int]:
    return {name.removeprefix(_COUNTER): int(value) for name, value in metadata.items() if name.startswith(_COUNTER)}


def _plain(table: pa.Table) -> pa.Table:
    """Return a table with its texts as plain strings, so that shards can be joined."""
    fields = [field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in table.schema]
    return table.replace_schema_metadata(None).cast(pa.schema(fields))
