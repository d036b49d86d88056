"""A server that misbehaves on command, and short words for tests of HTTP backends."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from vllm_server import VllmServer

from rollouts.config import GeneratorConfig, ModelConfig, Sampling
from rollouts.errors import BackendError
from rollouts.models.base import CompletionRequest

KEY = "sk-very-secret"
HANG, DROP = object(), object()
TAG = 9
Reply = tuple[int, dict[str, str], Any]  # status, headers, body (bytes, or something for JSON); or all of it as bytes


class Begun(bytes):
    """The beginning of an answer, of which no more comes."""


class FakeServer(ThreadingHTTPServer):
    """Answers like vLLM until `fault` (path, body, how many requests of that path before) returns something else."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault: Callable[[str, Any, int], Any] = lambda path, body, count: None
        self.seen: list[tuple[str, Any]] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.counts: Counter[str] = Counter()
        self.card: dict[str, Any] = {"id": "fake", "max_model_len": 100}
        self.released = threading.Event()  # ends what hangs
        self.lock = threading.Lock()
        self.busy, self.most_busy, self.delay = 0, 0, 0.0
        self.sockets: list[Any] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, path: str, body: Any) -> Any:
        with self.lock:
            count = self.counts[path]
            self.counts[path] += 1
            self.seen.append((path, body))
        fault = self.fault(path, body, count)
        return fault if fault is not None else (200, {}, self.good(path, body))

    def good(self, path: str, body: Any) -> Any:
        usage = {"completion_tokens": 2}
        if path == "/v1/models":
            return {"data": [self.card]}
        if path == "/version":
            return {"version": "0.fake"}
        if path == "/pooling":
            return {"data": [{"data": [[0.25, 0.75]] * body["input"].count(TAG)}]}
        if path == "/v1/chat/completions":
            return {"choices": [{"message": {"content": "Step 1: a=1"}, "finish_reason": "stop"}], "usage": usage}
        rows = [None, *({str(token): {"logprob": -0.5}} for token in body["prompt"][1:])]
        choice = {"text": "x\n\n", "finish_reason": "stop", "stop_reason": "\n\n", "token_ids": [5, 6]}
        return {"choices": [{**choice, "prompt_logprobs": rows}], "usage": usage}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""

    def die(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def silent(number: int) -> Iterator[list[str]]:
    """URLs at which connections are taken and nothing is said."""
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        yield [f"http://127.0.0.1:{each.getsockname()[1]}/v1" for each in listening]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: Any) -> None:
        server = self.server
        with server.lock:
            server.sockets.append(self.connection)
            server.heads.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            reply = server.answer(self.path, body)
            time.sleep(server.delay)
            if reply is HANG:
                server.released.wait(30)
            if reply is HANG or reply is DROP:
                self.close_connection = True
                return
            if isinstance(reply, bytes):
                self.close_connection = True
                self.wfile.write(reply)
                if isinstance(reply, Begun):
                    server.released.wait(30)
                return
            status, headers, content = reply
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)
        except OSError:
            self.close_connection = True
        finally:
            with server.lock:
                server.busy -= 1


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.released.set()
    server.die()


def config(server: FakeServer | VllmServer, **settings: Any) -> ModelConfig:
    values = {"model": getattr(server, "model", "fake"), "url": server.url, "retries": 1, **settings}
    return ModelConfig(backend="server", **values)


def error_reply(status: int, message: str, **headers: str) -> Reply:
    return status, headers, {"error": {"message": message}}


def real(body: Any) -> bool:
    """Whether a request is one of ours and not a probe or heartbeat."""
    return bool(body) and body.get("prompt", [1, 2, 3]) != [1, 2, 3]


def ask(
    *ids: int, max_tokens: int = 8, temperature: float = 0.7, stop: tuple[str, ...] = ("\n\n",)
) -> CompletionRequest:
    return CompletionRequest(tuple(ids) or (7, 8), max_tokens, Sampling(temperature), stop)


def gone(submit: Callable[[], Any], futures: list[Any], *words: str) -> None:
    """Everything pending and to come raises an error that names role and URL."""
    for future in futures:
        with pytest.raises(BackendError) as caught:
            future.result(timeout=10)
        for word in ("large: http://127.0.0.1:", *words):
            assert word in str(caught.value)
    with pytest.raises(BackendError, match="large: http"):
        submit()


def chat_config(server: FakeServer | VllmServer, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig(**{**config(server).model_dump(), **settings})


def chat_reply(content: Any, reason: str = "stop", tokens: int = 5) -> Reply:
    choice = {"message": {"content": content}, "finish_reason": reason}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": tokens}}
