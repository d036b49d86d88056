"""Connections to one configured server: credentials, requests, and what servers say when they refuse."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from rollouts.config import ModelConfig
from rollouts.errors import ConfigError

_LOCAL = ("localhost", "127.0.0.1", "::1")
# Servers close idle connections after 5 s; one that is used just then would fail its request.
_KEEPALIVE_S = 2.0
_TOKENS_IN_TIME = 512  # tokens that a request may decode within `timeout_s`


def patience(timeout_s: float, tokens: int) -> float:
    """Return the seconds that a request may take: as many times `timeout_s` as it may decode 512 tokens, but one."""
    return timeout_s * max(1.0, tokens / _TOKENS_IN_TIME)


class Broken(Exception):
    """Raised when a connection could not be made, or broke before the answer was complete.

    Attributes:
        refused: Whether it could not even be made.
    """

    def __init__(self, words: str, *, refused: bool) -> None:
        """Say why."""
        super().__init__(words)
        self.refused = refused


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # pairs are written so, too


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN, expected numbers")
    return float(name)


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the server did what was asked of it."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Return the content, halves of surrogate pairs replaced; raises ValueError if it is no JSON, or has NaN."""
        text = self.body.decode()
        if _HALF.search(text):
            whole = json.dumps(json.loads(text), ensure_ascii=False)
            text = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return json.loads(text, parse_constant=_constant)

    @property
    def text(self) -> str:
        """The body, for messages."""
        return self.body.decode(errors="replace")

    @property
    def words(self) -> str:
        """What a server says about an error, on one line."""
        try:
            said = self.json()
            if isinstance(said, dict):
                said = said.get("error") or said.get("message") or said.get("detail") or said
            if isinstance(said, dict):
                said = said.get("message") or said
        except (ValueError, RecursionError):
            said = self.text
        return " ".join(str(said).split())

    @property
    def unpaid(self) -> bool:
        """Whether it is an account that is empty: OpenAI answers 429 then, as to somebody who is only too fast."""
        return self.status == 402 or (self.status == 429 and b"insufficient_quota" in self.body)

    @property
    def retry_after(self) -> float:
        """The seconds that a Retry-After header asks for; it may hold a number or a date."""
        value = self.headers.get("Retry-After", "")
        with suppress(ValueError):
            return max(0.0, float(value))
        with suppress(ValueError, TypeError):
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        return 0.0


class Connection:
    """Connections to one server, opened as they are needed and kept for the next requests.

    Cancelling a request closes its connection, which ends the generation there.

    Attributes:
        url: Base URL without credentials.
        root: The same without ``/v1``.
    """

    def __init__(
        self,
        role: str,
        model: ModelConfig,
        url: str,
        connect_s: float = 10.0,
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Check the configuration; nothing is sent.

        Args:
            role: Named in errors.
            model: Configuration with backend ``server``.
            url: Which of its servers.
            connect_s: Longest time to connect, seconds.
            headers: Returns what else a request has that is sent now.

        Raises:
            ConfigError: The URL is none, or the variable with the key is not set.
        """
        checked = _checked(role, url)
        self._headers = {"Content-Type": "application/json"}
        self._secrets = [checked.password] if checked.password else []
        if model.api_key_env is not None:
            key = _key(role, model.api_key_env)
            self._headers["Authorization"] = f"Bearer {key}"
            self._secrets.append(key)
        elif checked.user:
            self._headers["Authorization"] = aiohttp.BasicAuth(checked.user, checked.password or "").encode()
        self._limit, self._connect_s, self._more = model.concurrency + 2, connect_s, headers
        self._proxy = _proxy_for(checked)
        self._session: aiohttp.ClientSession | None = None
        self.url = str(checked.with_user(None)).rstrip("/")
        self.root = self.url.removesuffix("/v1")

    def address(self, path: str) -> str:
        """Return the URL of a path below the base URL; below the root if it begins with a slash."""
        return f"{self.root}{path}" if path.startswith("/") else f"{self.url}/{path}"

    async def request(self, path: str, payload: Mapping[str, Any] | None) -> Answer:
        """Send one request and return the answer, however it reads. Redirections are not followed.

        Raises:
            Broken: There is no complete answer.
        """
        async with self.open(path, payload) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    @asynccontextmanager
    async def open(self, path: str, payload: Mapping[str, Any] | None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request, as `request` does, and give the answer whose body is still to come."""
        if self._session is None:  # it belongs to the event loop that is running when it is needed first
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._limit, keepalive_timeout=_KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            )
        body = None if payload is None else json.dumps(payload, separators=(",", ":")).encode()
        method = "GET" if payload is None else "POST"
        sent: Any = {"data": body, "headers": self._more(), "allow_redirects": False, "proxy": self._proxy}
        try:
            async with self._session.request(method, self.address(path), **sent) as answer:
                yield answer
        except (aiohttp.ClientError, OSError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise Broken(self.clean(f"{type(error).__name__}: {error}"), refused=refused) from None

    def clean(self, words: str) -> str:
        """Return words without passwords and keys, on one line, and without what terminals would act on."""
        for secret in self._secrets:
            words = words.replace(secret, "***")
        return "".join(each if each.isprintable() else " " for each in words)

    async def close(self) -> None:
        """Disconnect."""
        if self._session is not None:
            await self._session.close()


def _checked(role: str, raw: str) -> URL:
    try:
        url = URL(raw)
        usable = url.scheme in ("http", "https") and bool(url.host) and not url.query_string
    except ValueError:
        usable = False
    if not usable:
        shown = "is" if set(raw) & set("@?") else f"{raw!r} is"  # the parts after these may be keys
        raise ConfigError(f"{role}: `url` {shown} not of the form http://host:8000/v1, without a query.")
    return url


def _proxy_for(url: URL) -> str | None:
    """Return the proxy that the environment names for a server; none for this machine.

    aiohttp's own `trust_env` would also read ~/.netrc for each request, and its entries contradict our header.
    """
    host = url.host or ""
    return None if host in _LOCAL or proxy_bypass(host) else getproxies().get(url.scheme)


def _key(role: str, variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        fault = "holds characters that no key has" if key else "is not set"
        raise ConfigError(f"{role}: the environment variable {variable} {fault}; it must hold the API key.")
    return key
