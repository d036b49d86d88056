"""Parquet files of which no byte can change unnoticed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rollouts.files.atomic import write_atomically

_TAIL = 8  # bytes at the end of Parquet files: the length of the footer before them, and a mark
_MARK = b"TRIM"  # before the footer, with its checksum: Parquet has one for its pages alone


def write_parquet(path: Path, schema: pa.Schema, parts: Iterable[pa.Table], group_rows: int | None = None) -> None:
    """Write a Parquet file atomically, with checksums of its pages and its footer."""

    def write(target: Path) -> None:
        with pq.ParquetWriter(
            target, schema, compression="zstd", compression_level=12, write_page_checksum=True
        ) as file:
            for part in parts:
                file.write_table(part.replace_schema_metadata(schema.metadata), row_group_size=group_rows)
        with target.open("rb+") as handle:
            footer = _footer(handle)
            handle.seek(-len(footer), os.SEEK_END)
            handle.write(_checked(footer) + footer)

    write_atomically(path, write)


def _footer(handle: BinaryIO) -> bytes:
    """Return the footer of a Parquet file, with its length and the mark at the end."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - _TAIL))
    length = int.from_bytes(handle.read(_TAIL)[:4], "little")
    handle.seek(max(0, size - _TAIL - length))
    return handle.read()


def _checked(footer: bytes) -> bytes:
    return _MARK + zlib.crc32(footer).to_bytes(4, "little")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file whose pages are checked as they are read; within `refusing_damage`.

    Raises:
        ArrowInvalid: The footer is not the one that was written, as files of `write_parquet` tell.
    """
    with path.open("rb") as handle:
        footer = _footer(handle)
        handle.seek(max(0, handle.tell() - len(footer) - len(_checked(footer))))
        before = handle.read(len(_checked(footer)))
    if before.startswith(_MARK) and before != _checked(footer):
        raise pa.ArrowInvalid("the checksum of the footer is another")
    return pq.ParquetFile(path, page_checksum_verification=True)
