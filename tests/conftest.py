"""How workers share the tests: whole files, those of the same engines together, the longest first."""

from __future__ import annotations

from pathlib import Path

import pytest

_ENGINES = ("test_truth", "test_formats", "test_server_vllm")  # use the same engines and servers, which start once
_LONGEST = (
    *_ENGINES,
    "test_readme",
    "test_cli",
    "test_safety",
    "test_serve_vllm",
    "test_serve_faults",
    "test_engines",
    "test_tinymath",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by file and name their groups; within a file nothing changes."""
    rank = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.path).stem, len(rank)))
    for item in items:
        name = Path(item.path).stem
        item.add_marker(pytest.mark.xdist_group("engines" if name in _ENGINES else name))
