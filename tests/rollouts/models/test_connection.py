"""Connections to servers elsewhere: proxies of the environment, and nobody else's credentials."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rollouts.config import ModelConfig
from rollouts.models.server.connection import Answer, Connection

URL = "http://models.example:8000/v1"


class Handler(BaseHTTPRequestHandler):
    """Notes what it was asked for and with which credentials."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, str | None]]]:
    """A proxy that the environment names, and a .netrc with an entry for the server behind it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:{}".format(*server.server_address[1:]))
    (tmp_path / "netrc").write_text("machine models.example login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TRIM_TEST_KEY", "sk-ours")
    yield server.seen  # type: ignore[attr-defined]
    server.shutdown()


def ask(url: str = URL, key: str | None = "TRIM_TEST_KEY") -> Answer:
    async def once() -> Answer:
        connection = Connection("large", ModelConfig(backend="server", model="fake", url=url, api_key_env=key), url)
        try:
            return await connection.request("models", None)
        finally:
            await connection.close()

    return asyncio.run(once())


def test_servers_elsewhere_are_reached_through_the_proxy(proxy: list[tuple[str, str | None]]) -> None:
    assert ask().ok and ask(key=None).ok
    assert proxy == [(f"{URL}/models", "Bearer sk-ours"), (f"{URL}/models", None)]


def test_servers_of_this_machine_and_excepted_ones_are_not(
    proxy: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = URL.rpartition(":")[2].partition("/")[0]
    url = f"http://localhost:{port}"
    assert Connection("large", ModelConfig(backend="server", model="fake", url=url), url)._proxy is None
    monkeypatch.setenv("NO_PROXY", "models.example")
    assert Connection("large", ModelConfig(backend="server", model="fake", url=URL), URL)._proxy is None
    assert proxy == []


def test_texts_are_whole_and_numbers_are_numbers() -> None:
    """What cannot be stored or written comes in nowhere."""
    said = Answer(200, {}, b'{"a": ["x\\ud800y", "\\ud83d\\ude00", -Infinity]}').json()
    assert said == {"a": ["x\ufffdy", "\U0001f600", float("-inf")]}
    for body in (b'{"a": NaN}', b'["\\ud800", NaN]', b"{", b"\xff"):
        with pytest.raises(ValueError):
            Answer(200, {}, body).json()
