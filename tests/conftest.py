"""What all tests share: their spread over workers, threads, limits of fixtures, engines in threads, vLLM servers."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

# Before torch is imported. There are as many workers as cores: further threads of one wait for those of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from thread_engine import engines_in_threads  # noqa: E402
from vllm_server import vllm_servers  # noqa: E402

__all__ = ["engines_in_threads", "vllm_servers"]
FIXTURE_LIMIT = 900  # seconds; `timeout` of pyproject.toml is that of a test without its fixtures


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file on one worker, and all tests of vLLM on the same: each engine and server starts once.

    Those come first, as they take longest by far; within a file nothing changes.
    """
    for item in items:
        vllm = item.get_closest_marker("vllm") is not None
        item.add_marker(pytest.mark.xdist_group("vllm" if vllm else item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Fail after `FIXTURE_LIMIT` seconds instead of hanging; only while no other alarm is set."""

    def fail(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{what} took longer than {FIXTURE_LIMIT} s")

    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, FIXTURE_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    with limited(f"fixture {fixturedef.argname}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    with limited(f"what follows {item.name}"):
        return (yield)
