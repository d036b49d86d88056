from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_harness import Router, Upstreams, policy


@pytest.fixture(scope="session")
def upstreams() -> Iterator[Upstreams]:
    running = Upstreams()
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy(tmp_path_factory.mktemp("policies"))


@pytest.fixture(scope="session")
def router(upstreams: Upstreams, folder: Path) -> Iterator[Router]:
    """Timeouts are short, so that stalls cost little."""
    running = Router(folder, upstreams.urls(), upstream_timeout=3.0)
    yield running
    running.stop()
