"""Exchanges with one HTTP server: concurrency, retries, and whether it is still there."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential, wait_random

from rollouts.config import ModelConfig
from rollouts.errors import BackendError
from rollouts.models.server.connection import Answer, Broken, Connection, patience

T = TypeVar("T")
_HEARTBEAT_S = 15.0  # longest wait for the smallest request there is
_LONGEST_PAUSE_S = 120.0  # a server that asks for a longer Retry-After counts as gone
_HOPELESS = 32  # this many requests in a row without one answer are no accident
_GAVE_UP_WAITING = (408, 504, 524)  # somebody on the way ran out of patience: the request's own time was exceeded
_BUSY = (429, 503)
_REMEDY = {
    401: "It refuses the API key: check `api_key_env`",
    402: "It wants to be paid first",
    403: "It refuses the API key: check `api_key_env`",
    404: "Check that `url` ends in /v1 (or whatever the server's base path is) and that it serves `model`",
}
_BACK_OFF = wait_exponential(multiplier=0.5, max=30.0) + wait_random(0.0, 0.5)


class RequestFailed(Exception):
    """Raised when one request failed on its own, on a server that is well; the message has the server's words."""


class _Trouble(Exception):
    """One attempt that failed in a way that may concern the whole server."""

    busy: bool = False  # the server asks for patience
    final: bool = False  # if the server is well, this request is not sent again
    remedy: str = ""  # set: retrying cannot help
    pause: float = 0.0  # seconds, from Retry-After

    def __init__(self, words: str, **attributes: Any) -> None:
        super().__init__(words)
        self.__dict__.update(attributes)


class HttpServer:
    """Exchanges with one server: a thread of its own, bounded concurrency, retries, and whether it is still there.

    It knows nothing of what requests mean. After a failed attempt it sends the *heartbeat*, the smallest real
    request, one at a time for all that failed together:

    - The heartbeat is not answered, in `retries` further attempts with exponential back-off: the server is
      gone, and everything pending and to come raises `BackendError`.
    - It is answered at once, and the request had exceeded its time: the request has failed. It is not sent
      again, which would be to redraw until the answer is short.
    - Otherwise (5xx, garbage, a broken connection) the request is sent again, at most `retries` times, and
      has failed after that.

    "Busy" answers (429, 503) pause all requests for as long as the server asks; they use up a request's retries
    only while nobody else is answered. Many failures in a row without one answer count as a server that is gone.

    Attributes:
        role: Named in errors.
        url: Base URL without credentials.
        heartbeat: Path and payload (None: GET) of the smallest request.
    """

    def __init__(self, role: str, model: ModelConfig) -> None:
        """Start the thread; nothing is sent yet.

        Args:
            role: Named in errors.
            model: URL, key, times and limits.

        Raises:
            ConfigError: The URL is none, or the variable with the key is not set.
        """
        self.role = role
        self.heartbeat: tuple[str, Any] = ("models", None)
        self._timeout, self._retries, self._concurrency = model.timeout_s, model.retries, model.concurrency
        self._connection = Connection(role, model)
        self.url, self.address = self._connection.url, self._connection.address
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._closed = False
        self._answered_at, self._resume_at, self._failures = 0.0, 0.0, 0
        self._checking: asyncio.Task[bool] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(ready)), name=f"trim-{role}-http", daemon=True
        )
        self._thread.start()
        ready.wait()

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._slots = asyncio.Semaphore(self._concurrency)
        ready.set()
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.close()

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine in the thread; a future that is cancelled cancels its request.

        Raises:
            BackendError: The server is gone, or was closed.
        """
        with self._lock:
            if self._failure or self._closed:
                raise BackendError(self._failure or f"{self.role}: the connection to {self.url} was closed.")
            return asyncio.run_coroutine_threadsafe(self._run(work), self._loop)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = asyncio.current_task()
        assert task is not None  # every coroutine runs in one
        self._tasks.add(task)
        try:
            if self._failure:
                raise BackendError(self._failure)
            return await work()
        except asyncio.CancelledError:
            if self._failure:  # it was `_give_up` that cancelled it
                raise BackendError(self._failure) from None
            raise
        finally:
            self._tasks.discard(task)

    async def post(self, path: str, payload: Mapping[str, Any] | None, parse: Callable[[Any], T], tokens: int = 0) -> T:
        """Send one request, again where that helps, and return what `parse` makes of the answer's JSON.

        Args:
            path: Below the base URL; below the root if it begins with a slash.
            payload: Body; None sends a GET.
            parse: May raise ValueError, LookupError or TypeError for an answer that makes no sense.
            tokens: Most tokens that it decodes; it has as much more time as they are more than 512.

        Raises:
            RequestFailed: The request failed, on a server that is well.
            BackendError: The server is gone.
        """
        timeout = patience(self._timeout, tokens)
        async with self._slots:
            try:
                result: T = await self._retrying()(self._attempt, path, payload, parse, timeout)
            except _Trouble as trouble:
                if trouble.busy:
                    self._give_up(f"is still busy after {self._retries} retries ({trouble}). Lower `concurrency`.")
                self._failures += 1
                if self._failures >= max(_HOPELESS, self._concurrency):
                    self._give_up(
                        f"answered none of the last {self._failures} requests ({trouble}), although it is there. "
                        "If they ran out of time, raise `timeout_s` or lower `concurrency`."
                    )
                raise RequestFailed(str(trouble)) from None
        self._failures = 0
        return result

    def _retrying(self) -> AsyncRetrying:
        used, seen = 0, self._answered_at

        def stop(state: RetryCallState) -> bool:
            nonlocal used, seen
            used = 0 if _trouble(state).busy and self._answered_at > seen else used + 1
            seen = self._answered_at
            return used > self._retries

        def again(error: BaseException) -> bool:
            return isinstance(error, _Trouble) and not error.final

        def wait(state: RetryCallState) -> float:
            return max(_BACK_OFF(state), _trouble(state).pause)

        return AsyncRetrying(retry=retry_if_exception(again), stop=stop, wait=wait, reraise=True)

    async def _attempt(self, path: str, payload: Any, parse: Callable[[Any], T], timeout: float) -> T:
        """Send once; after trouble find out whether the server is there."""
        try:
            result = await self._exchange(path, payload, parse, timeout)
        except _Trouble as trouble:
            if not trouble.busy:
                at_once = await self._check()
                trouble.final = trouble.final and at_once
            raise
        self._answered_at = time.monotonic()
        return result

    async def _check(self) -> bool:
        """Return whether the heartbeat is answered at its first attempt; raise BackendError if never."""
        if self._checking is None or self._checking.done():
            self._checking = self._loop.create_task(self._beat())
            self._checking.add_done_callback(lambda it: it.cancelled() or it.exception())  # all may be gone
        return await asyncio.shield(self._checking)

    async def _beat(self) -> bool:
        attempts = 0

        async def once() -> None:
            nonlocal attempts
            attempts += 1
            began = time.monotonic()
            try:
                await self._exchange(*self.heartbeat, json.dumps, min(self._timeout, _HEARTBEAT_S))
            except RequestFailed:
                pass  # refused, so somebody is there
            except _Trouble as trouble:
                if trouble.remedy:
                    self._give_up(f"answered {trouble}. {trouble.remedy}.")
                trouble.final = False
                if self._answered_at <= began:  # else it serves others, only slowly
                    raise

        try:
            await self._retrying()(once)
        except _Trouble as trouble:
            self._give_up(f"gave no answer in {attempts} attempts ({trouble}). Is the server running?")
        return attempts == 1

    async def _exchange(self, path: str, payload: Any, parse: Callable[[Any], T], timeout: float) -> T:
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        try:
            async with asyncio.timeout(timeout):
                answer = await self._connection.request(path, payload)
        except TimeoutError:
            raise _Trouble(f"no answer within {timeout:g} s", final=True) from None
        except Broken as error:
            raise _Trouble(str(error)) from None
        if not answer.ok:
            self._refuse(answer)
        try:
            return parse(answer.json())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            said = self._connection.clean(answer.text)[:80]
            raise _Trouble(f"an answer that cannot be read: {said!r}, {type(error).__name__}: {error}") from None

    def _refuse(self, answer: Answer) -> NoReturn:
        """Raise what an error status means."""
        status = answer.status
        words = f"HTTP {status}: {self._connection.clean(answer.words)[:300]}"
        if answer.unpaid:
            raise _Trouble(words, final=True, remedy=_REMEDY[402])
        if status in _BUSY:
            pause = answer.retry_after
            if pause > _LONGEST_PAUSE_S:
                self._give_up(f"asks to wait for {pause:.0f} s ({words}).")
            self._resume_at = max(self._resume_at, time.monotonic() + pause)
            raise _Trouble(words, busy=True, pause=pause)
        if status in _GAVE_UP_WAITING:
            raise _Trouble(words, final=True)
        if status in _REMEDY or status < 400:
            remedy = _REMEDY.get(status, "Check `url`; redirections are not followed")
            raise _Trouble(words, final=True, remedy=remedy)
        if status >= 500:
            raise _Trouble(words)
        raise RequestFailed(words)

    def _give_up(self, what: str) -> NoReturn:
        with self._lock:
            self._failure = self._failure or f"{self.role}: {self.url} {what}"
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        raise BackendError(self._failure)

    def ask(self, path: str, payload: Mapping[str, Any] | None, parse: Callable[[Any], T]) -> T:
        """Do as `post` does, and wait for it."""
        return self.submit(lambda: self.post(path, payload, parse)).result()

    def peek(self, path: str) -> Any:
        """Return the JSON that a GET gives, or None at the first obstacle."""

        async def once() -> Any:
            try:
                return await self._exchange(path, None, lambda body: body, min(self._timeout, _HEARTBEAT_S))
            except (_Trouble, RequestFailed):
                return None

        return self.submit(once).result()

    def version(self) -> str | None:
        """Return what the server says of its version, if it does."""
        answer = self.peek("/version")
        return answer.get("version") if isinstance(answer, dict) else None

    def close(self) -> None:
        """Cancel what is pending and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(10)


def _trouble(state: RetryCallState) -> _Trouble:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _Trouble)  # nothing else is retried
    return error
