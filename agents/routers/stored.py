"""What a stored router may hold: one table for ``policy.json``, and strict readers of JSON and safetensors.

Files come from anywhere, so nothing is built before all of it has been checked, within bounded time and memory. NumPy
is enough: machines that only decide have no validation library.
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ArtefactError

WEIGHTS, ONNX = "policy.safetensors", "policy.onnx"
MOST_JSON, MOST_WEIGHTS = 32 << 20, 1 << 30  # bytes of a file
_DIGITS, _LETTERS, _AXIS = 40, 10_000, 10_000  # of a whole number, of a text, along an axis of an array
_HEADER = 1 << 20  # bytes

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
shown = _SHORT.repr  # a value in a message, however large

Check = Callable[[Any, str], None]
"""Raises ValueError unless a value, named by its place, is what it should be."""


def read_file(file: Path, most: int) -> bytes:
    """Return the contents of a file.

    Raises:
        ArtefactError: There is none, or it is no plain file of at most `most` bytes.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise ArtefactError(f"{file}: damaged policy (no plain file of at most {most >> 20} MiB).")
        with file.open("rb") as opened:
            return opened.read(most)
    except FileNotFoundError as error:
        raise ArtefactError(f"{file.parent}: no policy here ({file.name} is missing).") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{file}: cannot be read ({error}).") from error


def read_json(data: bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: It is none, names something twice, or holds numbers that are not finite or far too long.
        RecursionError: It is nested too deeply.
    """
    return json.loads(
        data.decode("utf-8"), object_pairs_hook=_once, parse_int=_int, parse_float=_finite, parse_constant=_finite
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def read_safetensors(data: bytes) -> dict[str, NDArray[np.float32]]:
    """Parse float32 tensors in the safetensors format: a length in eight bytes, a JSON header, raw values.

    Raises:
        ValueError: It is not that, tensors overlap or leave gaps, or a value is not finite.
    """
    if len(data) < 8:
        raise ValueError("the weights end before their header")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(len(data) - 8, _HEADER):
        raise ValueError(f"the header of the weights has {size} bytes")
    header, body = read_json(data[8 : 8 + size]), memoryview(data)[8 + size :]
    _HEADER_OF_WEIGHTS(header, "the header of the weights")
    header.pop("__metadata__", None)
    tensors, read = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != read or end - begin != 4 * math.prod(entry["shape"]) or end > len(body):
            raise ValueError(f"tensor {shown(name)} of shape {entry['shape']} is at {begin} to {end}")
        tensors[name] = np.frombuffer(body[begin:end], "<f4").reshape(entry["shape"])
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"tensor {shown(name)} has values that are not finite")
        read = end
    if read != len(body):
        raise ValueError(f"the weights hold {len(body)} bytes, their header names {read}")
    return {name: tensors[name] for name in header}


def _is(expected: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any, place: str) -> None:
        if not fits(value):
            raise ValueError(f"{place} is {shown(value)}, expected {expected}")

    return check


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _whole(least: int, most: int = 10**9) -> Check:
    return _is(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _maybe(check: Check) -> Check:
    return lambda value, place: None if value is None else check(value, place)


def _each(check: Check) -> Check:
    def all_of(value: Any, place: str) -> None:
        _LIST(value, place)
        for number, each in enumerate(value):
            check(each, f"{place}[{number}]")

    return all_of


def _array(axes: int) -> Check:
    def fits(value: Any, left: int = axes) -> bool:
        if type(value) is not list or len(value) > _AXIS:
            return False
        return all(map(_is_number, value)) if left == 1 else all(fits(each, left - 1) for each in value)

    return _is(f"numbers along {axes} axes of at most {_AXIS}", fits)


def _entries(named: Mapping[str, Check], others: Check | None = None, noun: str = "an entry") -> Check:
    """Return a check of objects: ``name?`` may be missing; names that are not in the table are for `others`, if any."""
    known = {name.removesuffix("?"): check for name, check in named.items()}
    needed = [name for name in named if not name.endswith("?")]

    def check(value: Any, place: str) -> None:
        _OBJECT(value, place)
        for name in needed:
            if name not in value:
                raise ValueError(f"{place}: {name!r} is missing")
        for name, each in value.items():
            told = known.get(name, others)
            if told is None:
                raise ValueError(f"{place} names {noun} {shown(name)}, expected {', '.join(known)}")
            told(each, f"{place}: {shown(name)}")

    return check


_OBJECT = _is("an object", lambda value: type(value) is dict)
_LIST = _is("a list", lambda value: type(value) is list)
_TEXT = _is(f"text of at most {_LETTERS} letters", lambda value: type(value) is str and len(value) <= _LETTERS)
NAME = _is("a name of at most 500 letters", lambda value: type(value) is str and len(value) <= 500)
_HASH = _is("a SHA-256", lambda value: type(value) is str and len(value) == 64)
_FLAG = _is("true or false", lambda value: type(value) is bool)
_NUMBER = _is("a number", _is_number)
_ABOVE_0 = _is("a number above 0", lambda value: _is_number(value) and value > 0)
_SHARE = _is("a probability", lambda value: _is_number(value) and 0 <= value <= 1)
_ANY = _is("anything", lambda value: True)

_HEADER_OF_WEIGHTS = _entries(
    {"__metadata__?": _OBJECT},
    _entries(
        {
            "dtype": _is("'F32'", lambda value: value == "F32"),
            "shape": _each(_whole(0)),
            "data_offsets": _is(
                "two places in order",
                lambda value: (
                    type(value) is list and [type(each) for each in value] == [int, int] and 0 <= value[0] <= value[1]
                ),
            ),
        }
    ),
)
_DECISIONS = _entries({"scores": _each(_SHARE), "escalated": _SHARE}, _ANY)  # what a service compares its own with
_ABOUT = _entries(
    {
        **dict.fromkeys(("package?", "small?", "large?", "scorer?", "grader?", "cost?"), _maybe(NAME)),
        "rollouts?": _entries({"store?": NAME, "hash?": NAME}, _ANY),
        "max_steps?": _whole(1),
        "splitting?": _entries({"name": NAME, "version": _whole(1)}, _ANY),
        "max_escalations?": _maybe(_whole(0)),
        "max_large_tokens?": _maybe(_whole(0)),
        "features?": _each(_entries({"name": NAME}, _ANY)),
        "held_out?": _each(
            _entries({"lam": _NUMBER, "verdict?": _TEXT, "sentence?": _TEXT, "decisions?": _DECISIONS}, _ANY)
        ),
        "calibration?": _entries({"target": NAME, "value": _NUMBER}, _ANY),
        "budgets?": _each(_entries({"lam": _ABOVE_0, "share": _NUMBER}, _ANY)),
        "default_lam?": _maybe(_ABOVE_0),
    },
    _ANY,
)
_ONE_KNOB = {"knob": _entries({"name": NAME, "value": _NUMBER})}
_CAP = {"max_large_tokens?": _maybe(_whole(0))}
_NETWORK = {"activation?": NAME, **_CAP}
_MODEL = _entries(
    {
        "kinds": _entries({"token_edges": _array(1), "single": _FLAG}),
        "level": _each(_whole(0)),
        "repair": _SHARE,
        **dict.fromkeys(("edges", "large_end_value"), _array(1)),
        **dict.fromkeys(("kind", "p_small", "p_large", "ends", "large_ends", "end_value", "tokens"), _array(2)),
        **dict.fromkeys(("large", "token_line"), _array(3)),
        "small": _array(4),
    }
)
_POMDP = _entries({"model": _MODEL, "lam": _NUMBER, "value": _array(3), "price": _NUMBER, "name": NAME})

_OWN: dict[str, dict[str, Check]] = {
    "mlp": {**_ONE_KNOB, **_NETWORK},
    "mlp-lam": {"knob": _entries({"name": NAME, "low": _ABOVE_0, "high": _ABOVE_0}), **_NETWORK},
    "seq": {**_ONE_KNOB, "heads": _whole(1), **_CAP},
    "threshold": _ONE_KNOB,
    "constant": {"knob": _entries({"name": NAME, "value": _whole(0, 1)})},
    "random": {"knob": _entries({"name": NAME, "value": _SHARE})},
    "pomdp": {**_ONE_KNOB, "pomdp": _POMDP},
    "ask": {**_ONE_KNOB, **_NETWORK, "asks": _entries({"source": NAME, "facts": _each(NAME)})},
    "query": {**_ONE_KNOB, "head": NAME, "vocabulary": _each(NAME)},
    "alone": {"knob": _entries({"name": NAME, "value": _whole(0, 1)})},
    "mixture": {**_ONE_KNOB, "share": _SHARE, "parts": _entries({"first": _HASH, "second": _HASH})},
}
_OTHERS: dict[str, Check] = {**_ONE_KNOB, "router": _ANY}


def check(described: Any, network: bool) -> None:
    """Check the contents of a ``policy.json``, whose version and kind are known, and with `network` has weights.

    Raises:
        ValueError: Something is missing, unknown or of another type; the message names it.
    """
    own = _OWN.get(described["kind"], _OTHERS)
    named: dict[str, Check] = dict.fromkeys(("format", "kind", "name", "schema"), NAME)
    named |= {"version": _whole(1), "about": _ABOUT, **own}
    if described["version"] == 1:
        named["weights" if network else "weights?"] = _HASH if network else _maybe(_HASH)
    else:
        weights = WEIGHTS if network and described["kind"] in _OWN else f"{WEIGHTS}?"
        named |= {"files": _entries({weights: _HASH, f"{ONNX}?": _HASH}, noun="a file"), "digest": _HASH}
    _entries(named)(described, "its contents")
