"""What all tests share: their spread over workers, threads, limits of fixtures, engines in threads, vLLM servers."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported. There are more workers than cores: further threads of one wait for those of others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from thread_engine import engines_in_threads  # noqa: E402
from vllm_server import vllm_servers  # noqa: E402

__all__ = ["engines_in_threads", "vllm_servers"]
# Machines are busy. What fails is printed so that it can be repeated.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("busy")
FIXTURE_LIMIT = 900  # seconds; `timeout` of pyproject.toml is that of a test without its fixtures


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Logs and sockets of servers lie where pytest clears up, those of processes that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("files"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def seed() -> int:
    """Another one in each run, told where the test fails; ``TRIM_TEST_SEED`` gives it again."""
    value = int(os.environ.get("TRIM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TRIM_TEST_SEED={value}")
    return value


@cache
def needs_vllm(file: Path) -> bool:
    return "pytest.mark.vllm" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need vLLM come first, as they take longest by far; nothing else changes."""
    items.sort(key=lambda item: not needs_vllm(item.path))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is imported stays: looking for garbage in it takes a quarter of the time that collecting does."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Libraries that count what is left at the end are not to find what was only frozen."""
    gc.unfreeze()


class ByFile(LoadScopeScheduling):
    """Keeps a file on one worker, and all files of vLLM on the same: each engine and server starts once.

    The groups of ``--dist loadgroup`` are not seen by xdist 3.8 under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "vllm" if needs_vllm(self.config.rootpath / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


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
