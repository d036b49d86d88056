"""What all tests share: how they are spread over workers, engines in threads, and vLLM's engines and servers."""

from __future__ import annotations

import pytest
from thread_engine import engines_in_threads

__all__ = ["engines_in_threads"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file on one worker, and all tests of vLLM on the same: each engine and server starts once.

    Those come first, as they take longest by far; within a file nothing changes.
    """
    for item in items:
        vllm = item.get_closest_marker("vllm") is not None
        item.add_marker(pytest.mark.xdist_group("vllm" if vllm else item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)
