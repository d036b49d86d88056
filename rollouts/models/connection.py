"""An HTTP client for one configured server, with its credentials, and what servers say when they refuse."""

from __future__ import annotations

import os
import time
from email.utils import parsedate_to_datetime

import httpx

from rollouts.config import ModelConfig
from rollouts.errors import ConfigError


def connect(role: str, model: ModelConfig, connect_s: float = 10.0) -> tuple[str, httpx.AsyncClient, list[str]]:
    """Return the URL without credentials, a client that has them, and the words that must never be printed.

    Args:
        role: Named in errors.
        model: Configuration with backend ``server``.
        connect_s: Longest time to connect, seconds.

    Raises:
        ConfigError: The URL is none, or the variable with the key is not set.
    """
    raw = model.url or ""
    try:
        url = httpx.URL(raw)
        usable = url.scheme in ("http", "https") and bool(url.host) and not url.query
    except httpx.InvalidURL:
        usable = False
    if not usable:
        shown = "is" if set(raw) & set("@?") else f"{raw!r} is"  # the parts after these may be keys
        raise ConfigError(f"{role}: `url` {shown} not of the form http://host:8000/v1, without a query.")
    headers, secrets = {}, [url.password] if url.password else []
    if model.api_key_env is not None:
        key = os.environ.get(model.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            fault = "holds characters that no key has" if key else "is not set"
            raise ConfigError(
                f"{role}: the environment variable {model.api_key_env} {fault}; it must hold the API key."
            )
        headers["Authorization"] = f"Bearer {key}"
        secrets.append(key)
    connections = model.concurrency + 2
    client = httpx.AsyncClient(
        headers=headers,
        auth=(url.username, url.password) if url.username and not headers else None,
        timeout=httpx.Timeout(None, connect=connect_s),
        verify=url.scheme == "https",  # else it loads certificates for nothing
        # Servers close idle connections after 5 s; one that is used just then would fail its request.
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=2.0),
        trust_env=url.host not in ("localhost", "127.0.0.1", "::1"),  # proxies are not for this machine
    )
    return str(url.copy_with(userinfo=b"")).rstrip("/"), client, secrets


def words_of(answer: httpx.Response) -> str:
    """Return what a server says about an error, on one line."""
    try:
        said = answer.json()
        if isinstance(said, dict):
            said = said.get("error") or said.get("message") or said.get("detail") or said
        if isinstance(said, dict):
            said = said.get("message") or said
    except ValueError:
        said = answer.text
    return " ".join(str(said).split())


def retry_after(answer: httpx.Response) -> float:
    """Return the seconds that a Retry-After header asks for; it may hold a number or a date."""
    value = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
