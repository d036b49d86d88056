"""Exchanges with one upstream server: shared connections, time limits, and whether it is there.

Knows neither prompts nor routing. Made for serving, where waiting is what must not happen; generating rollouts has the
opposite needs and its own client (`rollouts.models.server.http`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar

from agents.serve import tracing
from agents.serve.metrics import Metrics
from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError, did_you_mean
from rollouts.models.server.connection import Answer, Broken, Connection, patience
from rollouts.models.server.dialects import wire_of
from rollouts.models.server.pool import another, told_of
from rollouts.models.server.wire import Wire

T = TypeVar("T")
_log = logging.getLogger("trim.serve")
_CONNECT_S = 2.0
_PROBE_S = 3.0  # longest wait for a probe, twice as long for each that failed so, and
_PAUSE_S = 0.5  # between two of them: together what a recovery may stay unnoticed
_IN_A_ROW = 3  # connections that fail in a row: nobody is there
_LONGEST_PATIENCE_S = 2.0  # "busy" servers that ask for longer pauses count as unavailable for this request
_LONGEST_REST_S = 30.0  # that a "busy" server is spared while there are others
_BUSY = (429, 503)
_UNASKED = "not asked yet"


class Unavailable(Exception):
    """Raised when an upstream gave no usable answer to a request.

    Attributes:
        role: ``small``, ``large`` or ``scorer``.
        kind: ``down``, ``timeout``, ``connection``, ``status``, ``busy``, ``malformed`` or ``refused``.
        pause: Seconds after which the request may be sent once more; None if it may not.
        elsewhere: Whether another upstream may be sent it at once.
        suspect: Whether the upstream may be down, or be another one.
        lost: Whether the upstream may have worked on it.
    """

    def __init__(
        self,
        role: str,
        kind: str,
        words: str,
        pause: float | None = None,
        *,
        suspect: bool = True,
        lost: bool = False,
    ) -> None:
        """Say why; `words` are for the log, as they may be the upstream's own."""
        super().__init__(f"{role}: {words}")
        self.role, self.kind, self.pause, self.suspect, self.lost = role, kind, pause, suspect, lost
        self.elsewhere = kind not in ("timeout", "refused")  # these are about the request


@dataclass(frozen=True)
class Probe:
    """The smallest real request: a server that answers it works.

    Attributes:
        request: From how the server is asked to the path, as of `Upstream.post`, and the body.
        check: What must be possible with the answer, by how the server is asked; raises as `Upstream.post` says of
            `parse`, or `BackendError` where the server does not do what is needed.
        adapt: Takes the server's words and the body where it is refused; returns whether to ask again, in another way.
            None for a server that lists its models and may refuse what is no longer right, as its window.
    """

    request: Callable[[Wire], tuple[str, Mapping[str, Any]]]
    check: Callable[[Wire, Any], Any]
    adapt: Callable[[str, Mapping[str, Any]], bool] | None = None


class Upstream:
    """One upstream server and the connections to it, shared by all requests.

    After a failed exchange it is identified anew and sent the probe. It is *down* after `_IN_A_ROW` connections in a
    row that failed (those that break together count once), after a probe that it answers wrongly, or that it leaves
    without an answer when a request was, too, and nothing was answered within the time limit of a request: slow is not
    down; and as long as it has another model than the others of its role. Then it is sent no requests, while the probe
    is repeated until it is answered, so that a recovery is noticed within about `_PROBE_S` + `_PAUSE_S` seconds.
    Cancelling a request closes its connection, which ends the generation there.

    Attributes:
        role: ``small``, ``large`` or ``scorer``.
        number: Its place among those of the role, from 1.
        url: Base URL without credentials.
        busy: Requests that it has.
        model: Name that the server gives the model, once it is known.
        told: What else it tells of the model.
        window: Its window in tokens, as far as the server has told.
        wire: How it is asked.
        trouble: Why it counts as down; None while it is up.
        why: The same in a word, without the upstream's own ones.
    """

    def __init__(
        self, role: str, model: ModelConfig, url: str, probe: Probe, timeout_s: float, metrics: Metrics,
        others: list[Upstream],
    ) -> None:  # fmt: skip
        """Prepare the connections; nothing is sent before `start`.

        Args:
            role: Named in errors.
            model: Key, and the names that the server may use for the model.
            url: Where it is.
            probe: The smallest real request.
            timeout_s: Longest time of one request, seconds.
            metrics: What counts its answers and failures.
            others: The upstreams of the role before it; they get this one, too.

        Raises:
            ConfigError: The URL is none, or the variable with the key is not set.
        """
        self.role, self._all, self.number = role, others, len(others) + 1
        others.append(self)
        self._connection = Connection(role, model, url, _CONNECT_S, tracing.forwarded)
        self.url = self._connection.url
        self._names = list(dict.fromkeys((model.model, model.display_name)))  # as configured, or as its store names it
        self._probe, self._timeout, self._metrics = probe, timeout_s, metrics
        self.changed: Callable[[], None] = lambda: None
        self.busy, self._resume_at = 0, -math.inf
        self.model: str | None = None
        self.told: Mapping[str, Any] = {}
        self.window: int | None = None
        self.wire = Wire()
        self.trouble: str | None = _UNASKED
        self.why: str | None = "unasked"
        self._watcher: asyncio.Task[None] | None = None
        self._broken, self._broken_at = 0, -math.inf  # connections in a row, and when the last one broke
        self._answered_at = self._timed_out_at = -math.inf
        metrics.upstream_up.labels(role, self.number).set(0)

    @property
    def well(self) -> bool:
        """Whether requests are sent at all."""
        return self.trouble is None and self.model is not None

    @property
    def resting(self) -> bool:
        """Whether it has asked for a pause."""
        return self._resume_at > time.monotonic()

    async def answers(self) -> bool:
        """Whether anything comes back at all; else go on asking in the background."""
        try:
            await self._exchange("models", None, lambda body: None, _PROBE_S)
        except Unavailable as fault:
            if fault.kind in ("connection", "timeout"):
                self._set(str(fault).removeprefix(f"{self.role}: "), fault.kind)
                self._watch()
                return False
        return True

    async def start(self) -> None:
        """Ask once; go on asking in the background if there is no answer.

        Raises:
            ConfigError: Somebody answers, but it is not the server that is needed.
        """
        if not await self._try(_PROBE_S):
            self._watch()

    async def close(self) -> None:
        """Disconnect."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._connection.close()

    @contextlib.asynccontextmanager
    async def open(self, path: str, payload: Mapping[str, Any]) -> AsyncIterator[Opened]:
        """Send a request as it is, but for the model's name, and give its answer, if it is about the request.

        Raises:
            Unavailable: There is none.
        """
        tokens = payload.get("max_completion_tokens") or payload.get("max_tokens") or self.window
        patient = patience(self._timeout, tokens if isinstance(tokens, int) and not payload.get("stream") else 0)
        began = time.monotonic()
        try:
            async with contextlib.AsyncExitStack() as stack:
                with self._expected(patient):
                    opening = self._connection.open(path, {**payload, "model": self.model})
                    answer = await stack.enter_async_context(opening)
                    streams = answer.headers.get("Content-Type", "").startswith("text/event-stream")
                    chunks = answer.content.iter_any() if answer.status == 200 and streams else None
                    content = await answer.read() if chunks is None else await anext(chunks, b"")
                self._broken = 0
                if chunks is not None:
                    self._answered_at = time.monotonic()
                    yield Opened(self, answer.status, b"", self._in_time(content, chunks))
                    return
        except Broken as error:
            raise self._broke(error, began) from None
        whole = Answer(answer.status, answer.headers, content)
        if not whole.ok and (fault := self._refusal(whole)).kind != "refused":
            raise fault
        self._answered_at = time.monotonic()
        yield Opened(self, whole.status, whole.body)

    async def _in_time(self, first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the chunks of a stream, each of which is as good as an answer."""
        yield first
        while True:
            with self._expected(self._timeout):
                chunk = await anext(others, None)
            if chunk is None:
                return
            self._answered_at = time.monotonic()
            yield chunk

    @contextlib.contextmanager
    def _expected(self, patient: float) -> Iterator[None]:
        """Look whether the server is there if what is waited for inside takes longer; it may come all the same."""

        def overdue() -> None:
            self._timed_out_at = time.monotonic()
            self._watch()

        late = asyncio.get_running_loop().call_later(patient, overdue)
        try:
            yield
        finally:
            late.cancel()

    def failed(self, fault: Unavailable) -> None:
        """Count a failure, and ask whether the upstream is there if that is in question."""
        self._metrics.upstream_errors.labels(self.role, self.number, fault.kind).inc()
        _log.warning("%s", fault)
        if fault.kind == "timeout":
            self._timed_out_at = time.monotonic()
        if fault.suspect:
            self._watch()

    @contextlib.asynccontextmanager
    async def post(
        self,
        path: str,
        payload: Mapping[str, Any],
        parse: Callable[[Any], T],
        lost: Callable[[], bool],
        tokens: int,
    ) -> AsyncIterator[T]:
        """Do as `agents.serve.several.Upstreams.post` does, once."""
        began = time.monotonic()
        try:
            timeout = patience(self._timeout, tokens)
            answer = await self._exchange(path, {"model": self.model, **payload}, parse, timeout)
        except Unavailable as fault:
            if fault.lost and not lost():
                fault.pause, fault.elsewhere = None, False
            raise
        except asyncio.CancelledError:
            lost()
            raise
        self._metrics.upstream_seconds.labels(self.role, self.number).observe(time.monotonic() - began)
        self._answered_at = time.monotonic()
        yield answer

    async def _exchange(self, path: str, payload: Any, parse: Callable[[Any], T], timeout: float) -> T:
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                answer = await self._connection.request(path, payload)
        except TimeoutError:
            raise Unavailable(self.role, "timeout", f"no answer within {timeout:g} s", lost=True) from None
        except Broken as error:
            raise self._broke(error, began) from None
        self._broken = 0
        if not answer.ok:
            raise self._refusal(answer)
        try:
            return parse(answer.json())
        except BackendError as error:
            raise Unavailable(self.role, "malformed", self._connection.clean(str(error)), lost=True) from None
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            words = f"an answer that cannot be read: {answer.text[:80]!r}, {type(error).__name__}: {error}"
            raise Unavailable(self.role, "malformed", self._connection.clean(words), 0.0, lost=True) from None

    def _broke(self, error: Broken, began: float) -> Unavailable:
        if began >= self._broken_at:  # those that break together count once
            self._broken, self._broken_at = self._broken + 1, time.monotonic()
        if self._broken >= _IN_A_ROW:
            self._set(str(error), "connection")
            self._watch()
        pause = None if error.refused else 0.0
        return Unavailable(self.role, "connection", str(error), pause, lost=not error.refused)

    def _refusal(self, answer: Answer) -> Unavailable:
        status = answer.status
        words = f"HTTP {status}: {self._connection.clean(answer.words)[:300]}"
        if status in _BUSY and not answer.unpaid:
            pause = max(answer.retry_after, 0.25)
            self._resume_at = time.monotonic() + min(pause, _LONGEST_REST_S)
            patient = pause if pause <= _LONGEST_PATIENCE_S else None
            return Unavailable(self.role, "busy", words, patient, suspect=status == 503)
        if 400 <= status < 500 and status not in (401, 403, 404, 408) and not answer.unpaid:
            return Unavailable(self.role, "refused", words)  # perhaps its window is another one now
        return Unavailable(self.role, "status", words, lost=status >= 500)

    def _watch(self) -> None:
        """See to it that somebody asks whether the server is there."""
        if self._watcher is None or self._watcher.done():
            # Not for the request that is under way, whose id and trace it would have.
            self._watcher = asyncio.create_task(self._ask_until_up(), context=Context())

    async def _ask_until_up(self) -> None:
        patience = _PROBE_S
        while not await self._try(patience):
            patience = min(2 * patience, max(self._timeout, _PROBE_S))
            await asyncio.sleep(_PAUSE_S)

    async def _try(self, patience: float) -> bool:
        """Ask who is there and whether it works; return whether there is nothing more to ask."""
        began = time.monotonic()
        try:
            await self._identify()
            assert self.model is not None
            await self._ask(patience)
        except Unavailable as fault:
            if (
                fault.kind == "refused" and self.model is not None
            ) or self._answered_at > began:  # somebody works there
                self._set(None)
                return True
            if fault.kind == "timeout" and patience >= self._timeout:
                self._timed_out_at = time.monotonic()
            unknown = self.trouble not in (None, _UNASKED) or self.model is None
            if fault.kind == "timeout" and not unknown and not self._silent:  # slow, as far as is known
                self._set(None)
                return False
            if fault.kind != "connection" or not self.well:
                words = str(fault).removeprefix(f"{self.role}: ")
                self._set(words, words.partition(":")[0] if words.startswith("HTTP ") else fault.kind)
            return False
        except ConfigError as error:
            if self.trouble == _UNASKED:
                raise
            self._set(str(error), "another server")
            return False
        self._set(None)
        return True

    async def _ask(self, patience: float) -> None:
        """Send the probe, in other ways where it is refused as far as there are any."""
        while True:
            path, payload = self._probe.request(self.wire)
            try:
                await self._exchange(path, {"model": self.model, **payload}, self._probed, patience)
                return
            except Unavailable as fault:
                if fault.kind != "refused" or self._probe.adapt is None:
                    raise
                words = str(fault).removeprefix(f"{self.role}: ")
            if not self._probe.adapt(words, payload):
                raise ConfigError(f"{self.role}: {self.url} refuses a chat with {self.model}: {words}")

    @property
    def _silent(self) -> bool:
        """Whether something that was as patient as requests are got no answer, and nothing else did meanwhile."""
        return self._answered_at < min(self._timed_out_at, time.monotonic() - self._timeout)

    def _probed(self, body: Any) -> None:
        try:
            self._probe.check(self.wire, body)
        except BackendError as error:
            raise ConfigError(f"{self.role}: {self.url}: {error}") from None

    async def _identify(self) -> None:
        """Find out what the server calls the model."""
        cards: dict[str, Any] = {}
        try:
            cards = await self._exchange(
                "models", None, lambda body: {card["id"]: card for card in body["data"]}, _PROBE_S
            )
        except Unavailable:
            if self._probe.adapt is None:
                raise  # vendors of chats list nothing, or not everything that they serve
        known = next((name for name in self._names if name in cards), None)
        if known is None and self._probe.adapt is None:
            raise ConfigError(
                f"{self.role}: {self.url} does not serve {self._names[0]!r}.{did_you_mean(self._names[0], cards)} "
                "Start it with --served-model-name, or name its model as the server does in the models file."
            )
        told = told_of(cards.get(known or "", {}))
        for other in self._all:
            if other is not self and other.well and (differs := another(other.told, told)):
                raise ConfigError(f"{self.role}: {self.url} serves another model than {other.url}: {differs}.")
        self.told = told
        if self._probe.adapt is None:
            self.wire = wire_of(told)
            self.window = self.wire.window(cards[known or ""])
        self.model = known or self._names[0]

    def _set(self, trouble: str | None, why: str | None = None) -> None:
        before, self.trouble, self.why = self.trouble, trouble, why
        self.changed()
        if (trouble is None) == (before is None) and before != _UNASKED:
            return
        self._metrics.upstream_up.labels(self.role, self.number).set(trouble is None)
        if trouble is None:
            _log.warning("%s: %s answers", self.role, self.url)
        else:
            _log.warning("%s: %s is down: %s", self.role, self.url, trouble)


@dataclass(frozen=True)
class Opened:
    """An answer to a request that was sent as it is.

    Attributes:
        upstream: Whose it is.
        status: HTTP status.
        content: All of it, unless it is a stream of events.
        chunks: The stream.
    """

    upstream: Upstream
    status: int
    content: bytes
    chunks: AsyncIterator[bytes] | None = None
