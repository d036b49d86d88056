r"""Rows of a problem file: JSON lines, CSV or Parquet, compressed or not, in any UTF; and what damaged them.

Nothing here knows which keys a problem has. A file that is none of these is refused with what it is and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from rollouts.errors import DataError

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zst", ".zstd", ".lz4")
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet: unpack it, or save the sheet as CSV",
    b"\xfd7zXZ": "compressed with xz: unpack it with xz -d",
    b"\x5d\x00\x00": "compressed with lzma: unpack it with xz -d",
    b"\x1f\x9d": "compressed with compress: unpack it with uncompress",
    b"\x02\x21\x4c\x18": "compressed with an old lz4: unpack it with lz4 -d",
    b"\xff\x06\x00\x00sNaPpY": "compressed with snappy: unpack it, or write it with gzip",
    b"Rar!": "a RAR archive: unpack it",
    b"ustar": "a tar archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream, as Dataset.save_to_disk leaves it: write it with Dataset.to_parquet",
    b"SQLite format 3": "a SQLite database: write its table as CSV",
    b"\x89HDF": "an HDF5 file: write it as Parquet",
    b"%PDF": "a PDF",
    b"\x80": "a Python pickle: write it as JSON lines",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
}
#: LaTeX commands whose backslash and first letter an escape sequence has turned into a control character. A backspace,
#: a bell or a vertical tab is always one; after a tab, a line's end or a form feed the rest of a command must follow.
_EATEN = re.compile(
    r"[\x07\x08\x0b](?=[A-Za-z])"
    r"|\f(?=rac|orall|lat|lo|box|rown|footnotesize)"
    r"|\t(?=(?:ext[a-z]*|[dt]?frac|imes|heta|ilde|riangle[a-z]*|herefore|binom|op|fbox|hinspace)(?![A-Za-z]))"
    r"|\t(?=ag\s*\{|(?:anh?|au|o)(?:\s*[-\\(){}^_=$0-9]|\s+[a-z](?![\w-])|$))"
    r"|\r(?=(?:ho|ight[a-z]*|angle|ceil|floor|brace|brack|vert|oot|eals)(?![A-Za-z])|m\s*\{)"
    r"|\n(?=(?:eq|abla|otin|subseteq|cong|earrow|warrow|leq|geq)(?![A-Za-z]))"
)
_LETTERS = dict(zip("\a\b\v\f\t\r\n", "abvftrn", strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """A row and where it stands, for messages.

    Attributes:
        number: The line, or the row, from 1.
        values: What was read: of a good file, a mapping of keys to values.
        written: The line as it stands in a file of JSON lines, else empty.
        unit: What is counted: ``line``, or ``row`` of Parquet.
    """

    path: Path
    number: int
    values: Any
    written: str = ""
    unit: str = "line"

    @property
    def place(self) -> str:
        """``apples.jsonl, line 3``."""
        return f"{self.path}, {self.unit} {self.number}"

    def refuse(self, found: str, expected: str) -> NoReturn:
        """Raise the error for this row."""
        raise DataError(f"{self.place}: {found}; expected {expected}")

    def refuse_eaten(self, key: str, text: str) -> None:
        r"""Refuse a text in which an escape sequence took the backslash of a LaTeX command: a form feed, ``rac{1}{2}``.

        Raises:
            DataError: There is one; names the row, the column where it is known and the remedy.
        """
        match = _EATEN.search(text)
        if match is None:
            return
        letter, rest = _LETTERS[match[0]], re.match(r"[A-Za-z]*", text[match.end() :])
        command = f"\\{letter}{rest[0] if rest else ''}"
        escapes = rf"(?:{letter}|u{ord(match[0]):04x}){re.escape(command[2:])}"
        at = re.search(rf"(?<!\\)(?:\\\\)*\\(?={escapes})", self.written, re.IGNORECASE)
        column = f", column {at.end()}" if at else ""
        raise DataError(
            f"{self.place}{column}: {key!r} holds the control character {match[0]!r} where {command} was meant: "
            f"{shown(text[max(0, match.start() - 10) : match.end() + 20])}; JSON writes a backslash twice, as in "
            f'"\\{command}": write the file with a JSON library, and the LaTeX of Python programs as r"{command}"'
        )


def shown(value: object) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def bare_name(path: Path) -> str:
    """The file's name without suffix, nor that of a compression: ``apples`` of ``apples.jsonl.gz``."""
    return Path(path.stem).stem if path.suffix in _COMPRESSED_SUFFIXES else path.stem


def read_rows(path: Path) -> Iterator[Row]:
    """Every row that is not blank.

    Args:
        path: JSON lines, CSV or TSV (by suffix, with a header) or Parquet; perhaps in gzip, bz2, zstd or lz4.

    Raises:
        DataError: The file or a row of it cannot be read; names file, line, what was found and what to do.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; expected JSON lines, CSV or Parquet, or 'tinymath' for the embedded set"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a file of problems") from error
    suffix = path.suffix
    for magic, codec in _COMPRESSIONS.items():
        if content.startswith(magic):
            content, suffix = _unpacked(path, content, codec), Path(path.stem).suffix
    if content.startswith(b"PAR1"):
        yield from _parquet_rows(path, content)
        return
    for magic, what in _OTHERS.items():
        if content.startswith(magic) or magic == b"ustar" == content[257:262]:
            raise DataError(f"{path}: this is {what}; expected JSON lines, CSV or Parquet")
    content = _as_utf8(path, content)
    if suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(path, content, "\t" if suffix.lower() == ".tsv" else ",")
    else:
        yield from _json_rows(path, content)


def _unpacked(path: Path, content: bytes, codec: str) -> bytes:
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(pa.BufferReader(content), codec) as stream:
            return bytes(stream.read())
    except OSError as error:
        raise DataError(f"{path}: damaged {codec} data ({error}); expected a complete file: fetch it again") from error


def _as_utf8(path: Path, content: bytes) -> bytes:
    encoding = json.detect_encoding(content[:4])
    if encoding.startswith("utf-8"):
        return content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode(encoding).encode()
    except UnicodeError as error:
        raise DataError(
            f"{path}: it begins like {encoding.upper()}, but is not: {error}; expected text: if it is a binary file, "
            "write its rows as JSON lines"
        ) from None


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} at position {error.start} is not "
            f"UTF-8; expected UTF-8: convert the file, for instance with iconv -f LATIN1 -t UTF-8"
        ) from None


def _json_rows(path: Path, content: bytes) -> Iterator[Row]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        text = _decoded(path, number, line)
        if not text.strip():
            continue
        try:
            yield Row(path, number, json.loads(text, parse_float=Decimal), text)
        except (ValueError, ArithmeticError, RecursionError) as error:
            remedy = (
                "each backslash written twice (\\\\sqrt)"
                if "\\" in str(error)
                else f"one JSON object per line (of a JSON array: jq -c '.[]' {path.name})"
            )
            raise DataError(
                f"{path}, line {number}: not JSON ({error}): {shown(text.strip())}; expected {remedy}"
            ) from None


def _csv_rows(path: Path, content: bytes, delimiter: str) -> Iterator[Row]:
    text = "\n".join(_decoded(path, number, line) for number, line in enumerate(content.split(b"\n"), start=1))
    header = text.partition("\n")[0]
    if delimiter not in header and ";" in header:
        delimiter = ";"
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = 2
    try:
        for values in reader:
            row = Row(path, first, values)
            if None in values or None in values.values():
                row.refuse(
                    f"not as many fields as the header's {len(reader.fieldnames or ())}",
                    "a field with commas, quotes or line ends in double quotes",
                )
            yield row
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not CSV ({error}); expected one header and rows like it"
        ) from None


def _parquet_rows(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged Parquet data ({error}); expected a complete file: fetch it again") from error
    for number, values in enumerate(rows, start=1):
        yield Row(path, number, values, unit="row")
