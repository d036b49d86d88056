"""Engines in a thread of the test process, for tests whose subject is not that engines have processes of their own."""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from rollouts.errors import BackendError, RequestFailed
from rollouts.models import process
from rollouts.models.base import Backend, Request
from rollouts.models.process import Engine

# vLLM keeps the batch at work in global variables: one engine at a time.
_AT_WORK = threading.Lock()


def _keep_what_engines_share() -> None:
    """Let vLLM's engines end without taking down the groups of processes, which those that go on use too."""
    if core := sys.modules.get("vllm.v1.engine.core"):
        core.cleanup_dist_env_and_memory = lambda: None  # type: ignore[attr-defined]


class EngineThread(Backend):
    """Stands for `rollouts.models.process.EngineProcess`: the same engine, without importing everything each time."""

    def __init__(self, role: str, factory: Callable[..., Engine], environment: Mapping[str, str], **settings: Any):
        self.role = role
        # Left alone, vLLM pins the process to some cores.
        os.environ.update(environment, VLLM_CPU_OMP_THREADS_BIND="nobind")
        try:
            with _AT_WORK:
                self._engine = factory(**settings)
                _keep_what_engines_share()
        except Exception as error:
            message = f"{role}: the model could not be loaded. {type(error).__name__}: {error}"
            raise BackendError(message) from error
        self.capabilities, self.window = self._engine.capabilities, self._engine.window
        self._description = dict(self._engine.description)
        self._requests: queue.SimpleQueue[tuple[Request, Future[Any]] | None] = queue.SimpleQueue()
        self._pending: dict[int, Future[Any]] = {}
        self._failure: BackendError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Any]:
        if self._failure or self._closed:
            raise self._failure or BackendError(f"{self.role}: its process was closed.")
        future: Future[Any] = Future()
        self._requests.put((request, future))
        return future

    def describe(self) -> Mapping[str, Any]:
        return self._description

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._requests.put(None)
            self._thread.join()
            del self._engine
            gc.collect()  # its memory is not given back to the system by the end of a process

    def _work(self) -> None:
        number = 0
        try:
            while True:
                while not self._pending or not self._requests.empty():
                    given = self._requests.get()
                    if given is None:
                        return
                    self._pending[number] = given[1]
                    with _AT_WORK:
                        refused = process.queue_requests(self._engine, [(number, given[0])])
                    for key, result in refused:
                        self._answer(self._pending.pop(key), result)
                    number += 1
                with _AT_WORK:
                    finished = self._engine.step()
                for key, result in finished:
                    self._answer(self._pending.pop(key), result)
        except Exception as error:
            self._failure = BackendError(f"{self.role}: its engine failed. {type(error).__name__}: {error}")
            for future in self._pending.values():
                future.set_exception(self._failure)
        finally:
            for future in self._pending.values():
                future.cancel()

    def _answer(self, future: Future[Any], result: Any) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if isinstance(result, BackendError):
            future.set_exception(RequestFailed(f"{self.role}: the engine refused a request. {result}"))
        else:
            future.set_result(result)


@contextmanager
def in_threads() -> Iterator[None]:
    """Whatever engine is opened inside runs in a thread; one that would start a process is an error."""

    def refuse(*args: Any, **settings: Any) -> None:
        pytest.fail("an engine was to start in a process of its own: where is EngineProcess taken from now?")

    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.EngineProcess, "__init__", refuse)
        patch.setattr(process, "EngineProcess", EngineThread)
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def engines_in_threads() -> Iterator[None]:
    """In-process engines of a module's tests run in threads; ask for it with ``pytest.mark.usefixtures``."""
    with in_threads():
        yield
