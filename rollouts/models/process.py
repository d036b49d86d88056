"""An in-process engine in a process of its own: requests go in through a pipe, futures come back."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, Protocol

from rollouts.errors import BackendError, RequestFailed
from rollouts.models.base import Backend, Capabilities, Completion, CompletionRequest, Request

_START_TIMEOUT_S = 1800.0
_LOADING = -1  # the key under which a process says that its model is loaded
_ENVIRONMENT_LOCK = threading.Lock()


class Engine(Protocol):
    """What runs inside the process: a queue of requests that is worked off in steps.

    Attributes:
        window: Most tokens of prompt and completion together.
        description: Engine, version, seed and the like, for the manifest.
    """

    capabilities: Capabilities
    window: int
    description: Mapping[str, Any]

    def add(self, key: int, request: Request) -> None:
        """Queue one request; raises `BackendError` with the reason if it cannot be served."""

    def step(self) -> list[tuple[int, Any]]:
        """Work for a while; return the requests that finished, as (key, result)."""


class EngineProcess(Backend):
    """A `Backend` over an `Engine` that lives in a spawned process.

    The process is started with ``spawn``, so programs that use it need the ``if __name__ == "__main__"`` guard.
    """

    def __init__(self, role: str, factory: Callable[..., Engine], environment: Mapping[str, str], **settings: Any):
        """Start the process and wait until its model is loaded.

        Args:
            role: Named in errors.
            factory: Module-level function that builds the engine inside the process, from `settings`.
            environment: Environment variables that must be set before anything is imported there.
            settings: Arguments of `factory`; they must be picklable.

        Raises:
            BackendError: The engine could not be built; the message has the process's own words.
        """
        self.role = role
        self._keys = itertools.count()
        self._futures: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._failure: str | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, settings), name=f"trim-{role}")
        with _exported(environment):
            self._process.start()
        theirs.close()
        self._outbox: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()  # None: the end
        loading = self._futures[_LOADING] = Future()
        self._reader = threading.Thread(target=self._read, name=f"trim-{role}-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"trim-{role}-writer", daemon=True)
        self._reader.start()
        self._writer.start()
        atexit.register(self.close)  # multiprocessing would wait for a process that waits for us
        self._description: Mapping[str, Any]
        try:
            self.capabilities, self.window, self._description = loading.result(_START_TIMEOUT_S)
        except BaseException as error:
            self._process.kill()
            self.close()
            if isinstance(error, TimeoutError):
                raise BackendError(f"{role}: the model was not loaded within {_START_TIMEOUT_S:.0f} s.") from None
            raise

    def submit(self, request: Request) -> Future[Any]:
        """Queue one request in the process."""
        future: Future[Any] = Future()
        with self._lock:
            if self._failure or self._closed:
                raise BackendError(self._failure or f"{self.role}: its process was closed.")
            key = next(self._keys)
            self._futures[key] = future
        self._outbox.put((key, request))
        return future

    def describe(self) -> Mapping[str, Any]:
        """Return what the engine said of itself at its start."""
        return self._description

    def _write(self) -> None:
        while True:
            batch = [self._outbox.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._outbox.get_nowait())
            closing = None in batch
            try:
                self._connection.send(None if closing else batch)
            except (OSError, ValueError):
                return  # the reader sees the same end and fails what is pending
            if closing:
                return

    def _read(self) -> None:
        try:
            while True:
                kind, payload = self._connection.recv()
                if kind == "failed":
                    loading = _LOADING in self._futures
                    self._fail(f"{'the model could not be loaded' if loading else 'its engine failed'}. {payload}")
                    return
                for key, result in payload:
                    with self._lock:
                        future = self._futures.pop(key)
                    self._resolve(future, result)
        except (EOFError, OSError):
            self._process.join(10)
            what = "died while loading" if _LOADING in self._futures else "ended"
            self._fail(f"its process {what} (exit code {self._process.exitcode}).")

    def _resolve(self, future: Future[Any], result: Any) -> None:
        if not future.set_running_or_notify_cancel():
            return  # the caller gave up on it
        if isinstance(result, BackendError):
            future.set_exception(RequestFailed(f"{self.role}: the engine refused a request. {result}"))
        else:
            future.set_result(result)

    def _fail(self, why: str) -> None:
        message = f"{self.role}: {why}"
        with self._lock:
            self._failure = message
            futures, self._futures = self._futures, {}
        for future in futures.values():
            if self._closed:
                future.cancel()
            elif future.set_running_or_notify_cancel():  # else the caller gave up on it
                future.set_exception(BackendError(message))

    def close(self) -> None:
        """Ask the process to end, and end it if it does not within some seconds."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._outbox.put(None)
        self._process.join(15)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        threads = [each for each in (self._reader, self._writer) if each is not threading.current_thread()]
        for thread in threads:
            thread.join(5)  # the reader sees the end of the pipe and cancels what is pending
        # A thread that still holds the pipe would go on with whatever is opened next under its descriptor's number.
        if not any(thread.is_alive() for thread in threads):
            self._connection.close()
        atexit.unregister(self.close)


@contextlib.contextmanager
def _exported(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started within.

    Setting them in the new process would be too late: it imports the main program first, perhaps torch with it.
    """
    with _ENVIRONMENT_LOCK:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _serve(connection: Connection, factory: Callable[..., Engine], settings: Mapping[str, Any]) -> None:
    """Run one engine until the parent says that it is done, which alone gives exit code 0."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the orchestrator decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 0
    try:
        engine = factory(**settings)
        about = (engine.capabilities, engine.window, dict(engine.description))
        connection.send(("results", [(_LOADING, about)]))
        _work(connection, engine)
    except BaseException as error:
        status = 1
        with contextlib.suppress(OSError):
            connection.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking a loaded engine apart takes seconds, and the system frees its memory anyway


def _work(connection: Connection, engine: Engine) -> None:
    """Answer requests until the parent says that it is done."""
    pending = 0
    while True:
        while pending == 0 or connection.poll(0):
            batch = connection.recv()
            if batch is None:
                return
            refused = queue_requests(engine, batch)
            if refused:
                connection.send(("results", refused))
            pending += len(batch) - len(refused)
        finished = engine.step()
        if finished:
            pending -= len(finished)
            connection.send(("results", finished))


def queue_requests(engine: Engine, batch: Iterable[tuple[int, Request]]) -> list[tuple[int, Any]]:
    """Hand requests to an engine; return the answers to those that it refuses, as (key, result)."""
    refused: list[tuple[int, Any]] = []
    for key, request in batch:
        try:
            engine.add(key, request)
        except BackendError as error:
            failed = Completion("", 0, (), "failed", str(error))
            refused.append((key, failed if isinstance(request, CompletionRequest) else error))
    return refused


def _end_with_parent() -> None:
    """End this process when its parent is gone: a killed orchestrator must not leave a model in memory."""
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1.0)
    os._exit(1)
