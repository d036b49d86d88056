"""Several servers of one model: which of them takes a request, and whether they are of one model. Sends nothing."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar

_BUSIER = 1.25  # times as busy as the least busy, a server may still be the best one for a problem that it knows


class NobodyThere(Exception):
    """Raised when no server is well, and nobody is to wait for one."""


class Member(Protocol):
    """One of the servers.

    Attributes:
        url: What tells it from the others.
        busy: Requests that it has; kept by the pool.
    """

    url: str
    busy: int

    @property
    def well(self) -> bool:
        """Whether it is sent requests at all."""

    @property
    def resting(self) -> bool:
        """Whether it has asked for a pause."""


M = TypeVar("M", bound=Member)


class Pool(Generic[M]):
    """Servers of one model that share its requests.

    A request goes to the least busy that is well. Its problem's own server is chosen as long as that is hardly busier:
    its prefix cache knows how the prompt begins.
    """

    def __init__(self, members: Sequence[M], most: int, *, patient: bool) -> None:
        """Take the servers.

        Args:
            members: The servers.
            most: Most requests at once at each of them.
            patient: Whether requests wait while no server is well.
        """
        self.members, self._most, self._patient = members, most, patient
        self._turns: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def one(self, about: str = "", tried: Collection[M] = ()) -> AsyncIterator[M]:
        """Give the server for a request once there is one that can take it.

        Args:
            about: What it is about; requests about the same are best answered by the same server.
            tried: Servers that are only taken if there is no other.

        Raises:
            NobodyThere: None is well, and requests do not wait for that.
        """
        server = await self._taken(about, tried)
        try:
            yield server
        finally:
            server.busy -= 1
            self._wake(1)

    def others(self, tried: Collection[M]) -> bool:
        """Whether there is another server that could be asked at once."""
        return any(each.well and not each.resting and each not in tried for each in self.members)

    def changed(self) -> None:
        """Look again, as some server is now well, or is so no longer."""
        self._wake(len(self._turns))

    async def _taken(self, about: str, tried: Collection[M]) -> M:
        while (server := self._best(about, tried)) is None:
            if not self._patient and not any(each.well for each in self.members):
                raise NobodyThere
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._turns.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it is another's turn now
                    self._wake(1)
                raise
        server.busy += 1
        return server

    def _best(self, about: str, tried: Collection[M]) -> M | None:
        found = [each for each in self.members if each.well]
        found = [each for each in found if not each.resting] or found
        found = [each for each in found if each not in tried] or found
        least = min((each.busy for each in found), default=0)
        near = (each for each in found if each.busy <= _BUSIER * least and each.busy < self._most)
        known = zlib.crc32(about.encode(errors="replace"))
        return min(near, key=lambda each: _rank(known, each.url), default=None)

    def _wake(self, count: int) -> None:
        while self._turns and count:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1


@lru_cache(1 << 16)
def _rank(about: int, url: str) -> bytes:
    return blake2b(f"{about} {url}".encode(), digest_size=8).digest()


def another(known: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return in words what a server tells of its model that differs from what is known of it; "" if nothing does.

    What one of both does not tell is passed over, and so are versions.
    """
    told = [part for part in known if part != "version" and None not in (known[part], found.get(part))]
    return ", ".join(
        f"{part} {found[part]!r} instead of {known[part]!r}" for part in told if found[part] != known[part]
    )


def cards_of(body: Any) -> dict[str, dict[str, Any]]:
    """Return a server's entries of its models by name; none if its list cannot be read, as vendors may have none."""
    try:
        return {card["id"]: dict(card) for card in body["data"]}
    except (TypeError, ValueError, LookupError):
        return {}


def told_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an entry tells of where a model comes from."""
    return {part: card.get(part) for part in ("root", "owned_by", "max_model_len")}
