"""Order of the tests: files that take longest come first, so that workers that share the tests end together."""

from __future__ import annotations

from pathlib import Path

import pytest

_LONGEST = (
    "test_truth",
    "test_readme",
    "test_formats",
    "test_cli",
    "test_safety",
    "test_serve_vllm",
    "test_serve_faults",
    "test_engines",
    "test_tinymath",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by file; the sort is stable, so within a file nothing changes."""
    rank = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.path).stem, len(rank)))
