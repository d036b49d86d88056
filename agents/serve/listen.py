"""The listening socket, patience with clients whose headers do not come, and how the service ends."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from agents.serve.guard import LARGE
from agents.serve.service import Service
from rollouts.errors import ConfigError

_HEADERS_S = 10.0  # headers that take longer are not coming
_NOTICE_S = 2.0  # load balancers have it to see that the service is not ready; at most half of the time to drain
_LAST_WORDS_S = 2  # cut requests have it to say so


class _Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, but connections without a complete request's headers are closed."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._wait_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(_HEADERS_S, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Listener(uvicorn.Server):
    """uvicorn, which drains when it is told to end.

    After SIGTERM the service is not ready but answers for a moment, so that load balancers turn elsewhere; then nothing
    new is taken, and what is under way has the rest of the time; what is left is cut. SIGINT skips the moment, and a
    second signal everything.

    Attributes:
        signal: The signal that ended it; None while there was none.
    """

    def __init__(self, app: Any, service: Service) -> None:
        """Prepare; nothing is answered yet."""
        self._service, self._drain_s = service, service.config.drain_seconds
        self._told_at = math.inf
        self.signal: int | None = None
        super().__init__(
            uvicorn.Config(
                app,
                http=_Impatient,
                log_level="info" if service.config.access_log else "warning",
                access_log=service.config.access_log,
                lifespan="off",
                server_header=False,
                log_config=None if service.config.log_format == "json" else uvicorn.config.LOGGING_CONFIG,
                timeout_graceful_shutdown=math.ceil(self._drain_s) + _LAST_WORDS_S,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; uvicorn calls it for signals."""
        self.force_exit = self.signal is not None
        if self.signal is None:
            self.signal, self._told_at = sig, time.monotonic()
        self._service.draining = True
        self.should_exit = self.force_exit or sig == signal.SIGINT

    async def on_tick(self, counter: int) -> bool:
        """Return whether to take nothing new any more; uvicorn asks ten times a second."""
        if time.monotonic() >= self._told_at + min(_NOTICE_S, self._drain_s / 2):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what is under way end, and cut what takes too long."""
        self._service.draining = True
        left = min(self._told_at, time.monotonic()) + self._drain_s - time.monotonic()
        cutting = asyncio.get_running_loop().call_later(max(left, 0.0), self._cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    def _cut_off(self) -> None:
        """End what is under way; requests that are not there yet will not be answered."""
        self._service.cut_off()
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Impatient) and connection.cycle is not None and connection.cycle.more_body:
                connection.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The address is none of this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server((host, port), family=family, dualstack_ipv6=both, backlog=1024)
    except (OSError, OverflowError) as error:
        flag = "--host" if isinstance(error, socket.gaierror) else "--port"
        raise ConfigError(f"Cannot listen on {address(host, port)} ({error}). Choose another {flag}.") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE)  # what is not read yet waits where it comes from
    return listening


def address(host: str, port: int) -> str:
    """Return host and port as URLs have them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
