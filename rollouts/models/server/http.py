"""Exchanges with the HTTP servers of one model: concurrency, retries, and whether they are still there."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError, RequestFailed
from rollouts.models.server.connection import Answer, Broken, Connection, patience
from rollouts.models.server.pool import Pool, another, cards_of, told_of

T = TypeVar("T")
_log = logging.getLogger("trim.rollouts")
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
_LONGEST_BACK_OFF_S = 30.0


class _Trouble(Exception):
    """One attempt that failed in a way that may concern the whole server."""

    busy: bool = False  # the server asks for patience
    final: bool = False  # if the server is well, this request is not sent again
    lasting: str = ""  # set: why waiting cannot help
    pause: float = 0.0  # seconds, from Retry-After

    def __init__(self, words: str, **attributes: Any) -> None:
        super().__init__(words)
        self.__dict__.update(attributes)


def _back_off(attempts: int) -> float:
    """Return the seconds to wait after so many attempts that failed."""
    return min(_LONGEST_BACK_OFF_S, 2.0 ** (attempts - 2)) + random.uniform(0.0, 0.5)


class Server:
    """One of the servers, and what is known of it.

    Attributes:
        url: Base URL without credentials.
        heartbeat: Path and payload (None: GET) of the smallest request.
        cards: Its entries of models by name, once it was asked to chat.
        busy: Requests that it has.
        gone: Why it is sent none; None while it is well.
        lost: Whether it has been gone for so long, or for such a reason, that nobody should wait for it.
    """

    def __init__(self, role: str, model: ModelConfig, url: str) -> None:
        """Check the configuration; nothing is sent. Raises as `Connection` does."""
        self.role, self.name = role, model.model
        self.connection = Connection(role, model, url)
        self.url, self.address = self.connection.url, self.connection.address
        self.heartbeat: tuple[str, Any] = ("models", None)
        self.cards: Mapping[str, Mapping[str, Any]] = {}
        self.gone: str | None = "was not asked yet."
        self.busy, self.lost = 0, False
        self.attempts, self.failures = 0, 0  # in a row: heartbeats without an answer, requests that failed
        self.answered_at = 0.0
        self.checking: asyncio.Task[bool] | None = None
        self._timeout, self._retries, self._resume_at = model.timeout_s, model.retries, 0.0

    @property
    def well(self) -> bool:
        """Whether it is sent requests."""
        return self.gone is None

    @property
    def resting(self) -> bool:
        """Whether it has asked for a pause."""
        return self._resume_at > time.monotonic()

    async def ask(self, path: str, payload: Mapping[str, Any] | None, parse: Callable[[Any], T]) -> T:
        """Do as `Servers.post` does, with this server alone."""
        attempts = 0
        while True:
            try:
                return await self.exchange(path, payload, parse, self._timeout)
            except _Trouble as trouble:
                attempts += 1
                await self.beat()
                if trouble.final or attempts > self._retries:
                    raise RequestFailed(str(trouble)) from None
            await asyncio.sleep(_back_off(attempts))

    async def chat(
        self, body: Callable[[], Mapping[str, Any]], read: Callable[[Any], T], adapt: Callable[[str, Any], bool]
    ) -> tuple[T, dict[str, Any]]:
        """Ask for a first chat, and return what is read of the answer, and what is told of the model.

        Args:
            body: Returns the payload as it is to be now.
            read: As `parse` of `Servers.post`.
            adapt: Takes the server's words and the payload where it is refused; returns whether to ask again.

        Raises:
            ConfigError: It refuses, and there is nothing more to adapt.
        """
        self.cards = cards_of(await self.peek("models"))
        while True:
            self.heartbeat = "chat/completions", body()
            try:
                found = await self.ask(*self.heartbeat, read)
            except RequestFailed as error:
                if not adapt(str(error), self.heartbeat[1]):
                    raise ConfigError(f"{self.role}: {self.url} refuses a chat with {self.name}: {error}") from None
            else:
                return found, {**told_of(self.cards.get(self.name, {})), "version": await self.version()}

    async def beat(self) -> None:
        """Send the heartbeat; `_Trouble` if it is not answered."""
        try:
            await self.exchange(*self.heartbeat, json.dumps, min(self._timeout, _HEARTBEAT_S))
        except RequestFailed:
            pass  # refused, so somebody is there

    async def peek(self, path: str) -> Any:
        """Return the JSON that a GET gives, or None at the first obstacle."""
        try:
            return await self.exchange(path, None, lambda body: body, min(self._timeout, _HEARTBEAT_S))
        except (_Trouble, RequestFailed):
            return None

    async def version(self) -> str | None:
        """Return what the server says of its version, if it does."""
        answer = await self.peek("/version")
        return answer.get("version") if isinstance(answer, dict) else None

    async def exchange(self, path: str, payload: Any, parse: Callable[[Any], T], timeout: float) -> T:
        """Send once; `_Trouble` or RequestFailed if no answer comes of it."""
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        answer = await self._answer(path, payload, timeout)
        if not answer.ok:
            self._refuse(answer)
        try:
            return parse(answer.json())
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            said = self.connection.clean(answer.text)[:80]
            raise _Trouble(f"an answer that cannot be read: {said!r}, {type(error).__name__}: {error}") from None

    async def _answer(self, path: str, payload: Any, timeout: float) -> Answer:
        try:
            async with asyncio.timeout(timeout):
                return await self.connection.request(path, payload)
        except TimeoutError:
            raise _Trouble(f"no answer within {timeout:g} s", final=True) from None
        except Broken as error:
            raise _Trouble(str(error)) from None

    async def silence(self) -> _Trouble | None:
        """Return what is wrong if nothing at all comes back, soon; None if something does."""
        try:
            await self._answer("models", None, min(self._timeout, _HEARTBEAT_S))
        except _Trouble as trouble:
            return trouble
        return None

    def _refuse(self, answer: Answer) -> NoReturn:
        """Raise what an error status means."""
        status = answer.status
        words = f"HTTP {status}: {self.connection.clean(answer.words)[:300]}"
        if status in _BUSY and not answer.unpaid:
            pause = answer.retry_after
            if pause > _LONGEST_PAUSE_S:
                raise _Trouble(words, lasting=f"asks to wait for {pause:.0f} s ({words}).")
            self._resume_at = max(self._resume_at, time.monotonic() + pause)
            raise _Trouble(words, busy=True, pause=pause)
        if status in _GAVE_UP_WAITING:
            raise _Trouble(words, final=True)
        if status in _REMEDY or status < 400 or answer.unpaid:
            remedy = _REMEDY.get(402 if answer.unpaid else status, "Check `url`; redirections are not followed")
            raise _Trouble(words, final=True, lasting=f"answered {words}. {remedy}.")
        if status >= 500:
            raise _Trouble(words)
        raise RequestFailed(words)


class Servers:
    """Exchanges with the servers of a model: a thread of their own, bounded concurrency, retries, and who is there.

    It knows nothing of what requests mean. Each goes to one server (`rollouts.models.server.pool.Pool`). After a failed
    attempt that one is sent its *heartbeat*, the smallest real request, one at a time for all that failed together:

    - The heartbeat is not answered: the server is left alone, others get its requests, and it is asked again with
      exponential back-off. Once it answers, and is still the same model, it gets requests again. When no server has
      answered in `retries` further attempts, or waiting cannot help, everything pending and to come raises
      `BackendError`.
    - It is answered at once, and the request had exceeded its time: the request has failed. It is not sent
      again, which would be to redraw until the answer is short.
    - Otherwise (5xx, garbage, a broken connection) the request is sent again, to another server if there is one, at
      most `retries` times, and has failed after that.

    "Busy" answers (429, 503) pause all requests to a server for as long as it asks; they use up a request's retries
    only while nobody else is answered. Many failures in a row without one answer count as a server that is gone.

    Attributes:
        role: Named in errors.
        url: Base URLs without credentials, for messages.
    """

    def __init__(self, role: str, model: ModelConfig) -> None:
        """Start the thread; nothing is sent yet.

        Args:
            role: Named in errors.
            model: URLs, key, times and limits.

        Raises:
            ConfigError: A URL is none, or the variable with the key is not set.
        """
        self.role = role
        self._timeout, self._retries, self._concurrency = model.timeout_s, model.retries, model.concurrency
        self._members = [Server(role, model, url) for url in model.url]
        self.url = ", ".join(server.url for server in self._members)
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._closed = False
        self._answered_at = 0.0
        self._identify: Callable[[Server], Awaitable[Mapping[str, Any]]]
        self._known: tuple[str, Mapping[str, Any]] | None = None  # who said first of which model it is, and what
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watching: set[asyncio.Task[Any]] = set()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(ready)), name=f"trim-{role}-http", daemon=True
        )
        self._thread.start()
        ready.wait()

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._pool = Pool(self._members, self._concurrency, patient=True)
        ready.set()
        await self._stop.wait()
        for task in (tasks := self._tasks | self._watching):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._members:
            await server.connection.close()

    def meet(self, identify: Callable[[Server], Awaitable[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """Find out who is there; return what the first of them tells of its model. Disconnects if that fails.

        Servers that do not answer are left alone until they do, as long as another one answers.

        Args:
            identify: From a server to what it tells of its model, by name; asks at least its heartbeat, which it sets.
                Called again when a server comes back.

        Raises:
            ConfigError: A server cannot do what is needed, or has another model than the others.
            BackendError: None is there, or all refuse us.
        """
        self._identify = identify
        try:
            self.submit(self._met).result()
        except BaseException:
            self.close()
            raise
        assert self._known is not None
        return self._known[1]

    def described(self, engine: str, **more: Any) -> dict[str, Any]:
        """Return what manifests hold of servers that are asked to chat: their version and number, the model's name."""
        assert self._known is not None
        told = {"version": self._known[1]["version"], "servers": len(self._members), "model": self._members[0].name}
        return {"engine": engine, **told, "seed": None, **more}

    @property
    def listed(self) -> list[str]:
        """Names of models that servers list, as far as they were asked to chat."""
        return [name for server in self._members for name in server.cards]

    async def _met(self) -> None:
        silent: list[_Trouble | None] = [None]
        if len(self._members) > 1:  # who is not there is met at once, the others one after the other
            silent = await asyncio.gather(*(server.silence() for server in self._members))
        for server, silence in zip(self._members, silent, strict=True):
            try:
                if silence is not None:
                    raise silence
                await self._recognise(server)
            except _Trouble as trouble:
                self._leave(server, trouble)
        async with self._pool.one():
            pass

    async def _recognise(self, server: Server) -> None:
        """Send it requests from now on, if it is of the same model as the others."""
        told = await self._identify(server)
        url, known = self._known = self._known or (server.url, told)
        if differs := another(known, told):
            raise ConfigError(f"{self.role}: {server.url} serves another model than {url}: {differs}.")
        server.gone, server.lost, server.attempts, server.failures = None, False, 0, 0
        self._pool.changed()

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine in the thread; a future that is cancelled cancels its request.

        Raises:
            BackendError: The servers are gone, or were closed.
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
            self._check_there()
            return await work()
        except asyncio.CancelledError:
            self._check_there()  # else it was not `_leave` that cancelled it
            raise
        finally:
            self._tasks.discard(task)

    def _check_there(self) -> None:
        if self._failure:
            raise BackendError(self._failure) from None

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any] | None,
        parse: Callable[[Any], T],
        tokens: int = 0,
        about: str = "",
    ) -> T:
        """Send one request, again where that helps, and return what `parse` makes of the answer's JSON.

        Args:
            path: Below the base URL; below the root if it begins with a slash.
            payload: Body; None sends a GET.
            parse: May raise ValueError, LookupError or TypeError for an answer that makes no sense.
            tokens: Most tokens that it decodes; it has as much more time as they are more than 512.
            about: What it is about, as `Pool.one` has it.

        Raises:
            RequestFailed: The request failed, on a server that is well.
            BackendError: The servers are gone.
        """
        timeout = patience(self._timeout, tokens)
        attempts, used, deaths, seen = 0, 0, 0, self._answered_at
        tried: tuple[Server, ...] = ()  # the last one
        while True:
            async with self._pool.one(about, tried) as server:
                try:
                    result = await server.exchange(path, payload, parse, timeout)
                except _Trouble as found:
                    trouble = found
                    if not trouble.busy and not await self._beats(server):
                        trouble.final = False
                        deaths += 1  # each server may go down once in the midst of it
                else:
                    server.answered_at = self._answered_at = time.monotonic()
                    server.failures = 0
                    return result
            attempts += 1
            used = 0 if trouble.busy and self._answered_at > seen else used + 1
            seen, tried = self._answered_at, (server,)
            if trouble.final or used > self._retries + min(deaths, len(self._members)):
                self._failed(server, trouble)
                used = 0
            await asyncio.sleep(max(_back_off(attempts), 0.0 if self._pool.others(tried) else trouble.pause))

    def _failed(self, server: Server, trouble: _Trouble) -> None:
        """Raise RequestFailed after the last attempt; where all that was busy, only leave the server alone."""
        if trouble.busy:
            lasting = f"is still busy after {self._retries} retries ({trouble}). Lower `concurrency`."
            self._leave(server, _Trouble(str(trouble), lasting=lasting))
            return
        server.failures += 1
        if server.failures >= max(_HOPELESS, self._concurrency):
            lasting = (
                f"answered none of the last {server.failures} requests ({trouble}), although it is there. "
                "If they ran out of time, raise `timeout_s` or lower `concurrency`."
            )
            self._leave(server, _Trouble(str(trouble), lasting=lasting))
        self._check_there()
        raise RequestFailed(str(trouble)) from None

    async def _beats(self, server: Server) -> bool:
        """Return whether the heartbeat is answered at once; if not, the server is left alone."""
        if not server.well:
            return False
        if server.checking is None or server.checking.done():
            server.checking = self._loop.create_task(self._beat(server))
        return await asyncio.shield(server.checking)

    async def _beat(self, server: Server) -> bool:
        began = time.monotonic()
        try:
            await server.beat()
        except _Trouble as trouble:
            if trouble.lasting or server.answered_at <= began:  # else it serves others, only slowly
                self._leave(server, trouble)
                return False
        return True

    def _leave(self, server: Server, trouble: _Trouble) -> None:
        """Send a server no more requests until it is back; end everything if no server is worth waiting for."""
        watched = not server.well and server.attempts > 0
        server.attempts += 1
        server.gone = trouble.lasting or (
            f"gave no answer in {server.attempts} attempts ({trouble}). Is the server running?"
        )
        server.lost = bool(trouble.lasting) or server.attempts > self._retries
        if all(each.lost for each in self._members):
            with self._lock:
                gone = " ".join(f"{each.url} {each.gone}" for each in self._members)
                self._failure = self._failure or f"{self.role}: {gone}"
            for task in self._tasks | self._watching:
                task.cancel()
        elif not watched:
            if len(self._members) > 1:
                _log.warning("%s: %s %s The others go on.", self.role, server.url, server.gone)
            watch = self._loop.create_task(self._watch(server))
            self._watching.add(watch)
            watch.add_done_callback(self._watching.discard)

    async def _watch(self, server: Server) -> None:
        """Ask a server that is gone again and again, until it is back."""
        while not server.well:
            await asyncio.sleep(_LONGEST_BACK_OFF_S if server.lost else _back_off(server.attempts))
            try:
                await self._recognise(server)
            except _Trouble as trouble:
                self._leave(server, trouble)
            except (ConfigError, BackendError) as error:
                words = str(error).removeprefix(f"{self.role}: ").removeprefix(f"{server.url} ")
                self._leave(server, _Trouble(words, lasting=words))
        if len(self._members) > 1:
            _log.warning("%s: %s answers again.", self.role, server.url)

    def close(self) -> None:
        """Cancel what is pending and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(10)
