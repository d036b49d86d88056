"""JSON files that carry a digest of their contents, checksums of others, and what is said of files that are damaged.

That guards against accidents, not against people: whoever can write a file can write its digest, too. Files of earlier
versions have none and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollouts.errors import TrimError
from rollouts.files.atomic import write_text

_DIGEST = "digest"
_WORDS = 200  # letters of a library's own words in a message
_READ = 1 << 20  # bytes at once


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an object as JSON has it, but for its digest, however it is laid out."""
    plain = {name: value for name, value in values.items() if name != _DIGEST}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(file: Path, values: Mapping[str, Any]) -> None:
    """Write an object as JSON has it, with its digest under ``digest``."""
    plain = json.loads(json.dumps(values))
    text = json.dumps({**plain, _DIGEST: digest_of(plain)}, indent=1, sort_keys=True, ensure_ascii=False)
    write_text(file, text + "\n")


def read_sealed(file: Path) -> dict[str, Any]:
    """Return the object in a file, without its digest.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is none, or not the one that was written.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("expected an object")
    found = digest_of(values)
    if values.pop(_DIGEST, found) != found:
        raise ValueError("not what was written; if you changed it on purpose, take out its entry `digest`")
    return values


def checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of the files in a folder, by name: as good as a hash against accidents, and faster."""
    return {file.name: _checksum(file) for file in sorted(folder.iterdir()) if file.is_file()}


def check(folder: Path, expected: Mapping[str, int]) -> None:
    """Compare files with their checksums.

    Raises:
        OSError: One is not there, or cannot be read.
        ValueError: One is not what was written.
    """
    for name, checksum in expected.items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} is not what was written")


def _checksum(file: Path) -> int:
    found = 0
    with file.open("rb") as handle:
        while part := handle.read(_READ):
            found = zlib.crc32(part, found)
    return found


@contextmanager
def refusing_damage(file: Path, raised: type[TrimError], what: str, remedy: str) -> Iterator[None]:
    """Turn whatever damage makes readers raise into one line.

    Args:
        file: The file that is read within.
        raised: Type of the error.
        what: What it holds.
        remedy: What to do, a sentence.
    """
    try:
        yield
    except TrimError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_WORDS]
        raise raised(f"{file}: damaged {what} ({why}). {remedy}") from error
