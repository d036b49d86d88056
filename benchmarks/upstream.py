"""An upstream that answers with recorded steps after a stated time, and misbehaves on command.

    python -m benchmarks.upstream small --port 8001 --think 0.05 --replies FILE

It speaks what the router asks of vLLM: /v1/models, /v1/completions and /pooling. Steps are those that the embedded
models wrote for the bundled rollouts; which one comes is a hash of the prompt. POST /control with {"mode": ...}
makes it stall, answer half, answer nonsense, refuse or be slow; with {"name": ..., "window": ...} it is another model.
Every answer is appended to --log, see `Note`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

_WRITES = {"surrogate": "a\ud800b\n\n", "separator": "a\u2028b\x85c\n\n"}
_SLOW_S = 5.0  # how much longer mode slow takes


class Note(NamedTuple):
    """A line of the log: what became of one request.

    Attributes:
        word: ``decoded`` before it was sent, ``delivered`` after; ``left`` if the client did not wait.
        path: What was asked for.
        tokens: Tokens that were decoded or read; 0 for probes.
        arrived: When the request was there, seconds of the machine's monotonic clock.
        sent: When the answer was handed over.
        prompt: Token ids.
    """

    word: str
    path: str
    tokens: int
    arrived: float
    sent: float
    prompt: list[int]

    def line(self) -> str:
        """Return it as the log holds it."""
        ids = ",".join(map(str, self.prompt)) or "-"
        return f"{self.word} {self.path} {self.tokens} {self.arrived:.6f} {self.sent:.6f} {ids}\n"


def read_log(path: Path, word: str | None = None) -> list[Note]:
    """Return the lines of a log; with a word: those that begin with it."""
    notes = []
    for line in path.read_text().splitlines():
        found, asked, tokens, arrived, sent, ids = line.split()
        prompt = [] if ids == "-" else [int(each) for each in ids.split(",")]
        notes.append(Note(found, asked, int(tokens), float(arrived), float(sent), prompt))
    return [note for note in notes if word in (None, note.word)]


def record(path: Path) -> Path:
    """Write the steps that the embedded models wrote for the bundled rollouts, for upstreams to answer with."""
    from rollouts.store.store import Store

    table = next(iter(Store("quickstart").steps.read(columns=["role", "text", "tokens", "stop_reason"])))
    rows = table.slice(0, 8_000).to_pylist()
    path.write_text(json.dumps({role: [row for row in rows if row["role"] == role] for role in ("small", "large")}))
    return path


class StandIn:
    """An upstream in a process of its own, always on the same port.

    Attributes:
        role: small, large or prm.
        log: File that gets its notes.
        process: The process; None before it is started.
    """

    def __init__(self, role: str, think: float, replies: Path, spread: float = 0.0) -> None:
        """Choose a port; nothing is started. The arguments are those of `Upstream`; replies are in a file."""
        self.role, self.think, self._spread, self._replies = role, think, spread, replies
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.log = Path(tempfile.mkstemp(prefix=f"upstream-{role}-", suffix=".log")[1])
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start it; it answers a while later."""
        flags = {"port": self.port, "think": self.think, "spread": self._spread, "tag": step_tag_id()}
        flags |= {"log": self.log, "replies": self._replies}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "benchmarks.upstream", self.role, *arguments]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[1])

    def wait(self) -> None:
        """Wait until it answers."""
        assert self.process is not None
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urlopen(f"{self.url}/models", timeout=5).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"no upstream {self.role}")

    def control(self, **values: Any) -> None:
        """Set attributes of the `Upstream`."""
        urlopen(Request(f"http://127.0.0.1:{self.port}/control", json.dumps(values).encode()), timeout=10).close()

    def signal(self, number: int) -> None:
        """Send a signal; does nothing to the dead."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def notes(self, word: str) -> list[Note]:
        """Return what was noted of answers, probes left out."""
        return [note for note in read_log(self.log, word) if note.tokens]

    def asked(self, *words: str) -> dict[int, list[int]]:
        """Return the tokens of the answers to each question ``Let a=NUMBER+33, ...``, by its number."""
        from rollouts.text.tokenizer import load_tokenizer
        from rollouts.tinymath import model_dir

        tokenizer = load_tokenizer(str(model_dir(self.role)))
        found: dict[int, list[int]] = defaultdict(list)
        for note in (note for word in words for note in self.notes(word)):
            number = re.search(r"a\s*=\s*(\d+)\s*\+\s*33", tokenizer.decode(note.prompt))
            if number:
                found[int(number[1])].append(note.tokens)
        return found


def step_tag_id() -> int:
    """Return the token that the embedded reward model is read at."""
    from rollouts.tinymath import STEP_TAG, model_dir

    added = json.loads((model_dir("prm") / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return int(next(token["id"] for token in added if token["content"] == STEP_TAG))


class Upstream:
    """A server of one role, as an ASGI application."""

    def __init__(
        self, role: str, think: float, spread: float, tag: int, log: str | None, replies: dict[str, Any]
    ) -> None:
        """Begin well-behaved.

        Args:
            role: small, large or prm.
            think: Seconds until an answer, in the mean.
            spread: Times are uniform between ``(1 - spread) * think`` and ``(1 + spread) * think``.
            tag: Token that the reward model is read at.
            log: File that gets a line for each answer.
            replies: As `record` wrote them.
        """
        self.role, self.think, self.spread, self.tag, self.mode = role, think, spread, tag, "ok"
        self._random, self._asked = random.Random(role), 0
        self.name, self.window = f"tinymath-{role}", 1024
        self.recorded = replies.get(role, [])
        self._sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if log else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/control":
            vars(self).update(json.loads(body))
            await _reply(send, 200, b"{}")
            return
        asked = json.loads(body) if body else {}
        if asked and asked["model"] != self.name:
            await _reply(send, 404, b'{"error": {"message": "no such model"}}')
            return
        content, tokens = self._answer(path, asked)
        note = Note("delivered", path, tokens, scope["arrived"], 0.0, asked.get("prompt") or asked.get("input") or [])
        left = asyncio.create_task(_left(receive))
        try:
            await self._serve(content, note, send, left)
        finally:
            left.cancel()

    async def _serve(self, content: dict[str, Any], note: Note, send: Any, left: asyncio.Task[None]) -> None:
        raw = json.dumps(content).encode()
        think = self.think * self._random.uniform(1 - self.spread, 1 + self.spread)
        delay = 0.0 if note.path == "/v1/models" else think + _SLOW_S * (self.mode == "slow")
        if self.mode == "half":
            await _reply(send, 200, raw, upto=len(raw) // 2)
        self._asked += 1
        probe = note.tokens == 0 and note.path == "/v1/completions"
        lame = self.mode == "lame" and (probe or (note.path == "/v1/completions" and self._asked % 3 == 0))
        if self.mode in ("stall", "half") or lame:
            delay = 3600.0
        done, _ = await asyncio.wait({left}, timeout=delay)
        if done:
            self._log(note._replace(word="left", sent=time.monotonic()))
            return
        if self.mode in ("error", "busy"):
            await _reply(send, 503 if self.mode == "busy" else 500, b'{"error": {"message": "asked to fail"}}')
        elif self.mode == "garbage":
            await _reply(send, 200, b'{"choices": [\xff')
        elif self.mode == "wrong":
            await _reply(send, 200, b'{"choices": [], "data": [{"data": [[0.2, 3.0]]}]}')
        else:
            self._log(note._replace(word="decoded"))
            await _reply(send, 200, raw)
            self._log(note._replace(sent=time.monotonic()))

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": self.name, "object": "model", "max_model_len": self.window}]}, 0
        if path == "/pooling":
            ids = body["input"]
            seen = [
                zlib.crc32(bytes(str(ids[: place + 1]), "ascii")) for place, each in enumerate(ids) if each == self.tag
            ]
            rows = [[1 - value % 1000 / 1000, value % 1000 / 1000] for value in seen]
            return {"data": [{"data": rows}]}, len(ids)
        place = zlib.crc32(bytes(f"{self.role} {body['prompt']}", "ascii"))
        row = self.recorded[place % len(self.recorded)]
        delimiter = row["stop_reason"] == "delimiter"
        tokens = row["tokens"]
        choice = {
            "index": 0,
            "text": row["text"],
            "finish_reason": "stop",
            "stop_reason": "\n\n" if delimiter else None,
            "token_ids": [5] * tokens,
        }
        probe = body["prompt"] == [1, 2, 3]
        if tokens > body["max_tokens"]:
            tokens = body["max_tokens"]
            cut = {"text": "1" * tokens, "finish_reason": "length", "stop_reason": None, "token_ids": [5] * tokens}
            choice = {**choice, **cut}
        if self.mode == "negative":
            choice, tokens = {**choice, "token_ids": None}, -5
        if self.mode in _WRITES and not probe:
            choice |= {"text": _WRITES[self.mode]}
        if body.get("logprobs") and self.mode != "quiet":
            told = [_logprob(f"{body['prompt']} {place}") for place in range(tokens)]
            choice["logprobs"] = {"token_logprobs": told, "top_logprobs": [{"token_id:5": each} for each in told]}
        if body.get("prompt_logprobs") is not None:
            given = [{str(each): {"logprob": _logprob(f"{place} {each}")}} for place, each in enumerate(body["prompt"])]
            choice["prompt_logprobs"] = [None, *given[1:]]
        return {"choices": [choice], "usage": {"completion_tokens": tokens}}, 0 if probe else tokens

    def _log(self, note: Note) -> None:
        if self._sink is not None:
            os.write(self._sink, note.line().encode())


def _logprob(words: str) -> float:
    return -(zlib.crc32(words.encode()) % 300) / 100


def _stamping() -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, which also tells an application when the last bytes of its request were there."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Stamping(HttpToolsProtocol):
        def data_received(self, data: bytes) -> None:
            arrived = time.monotonic()
            super().data_received(data)
            self.scope["arrived"] = arrived

    return Stamping


async def _reply(send: Any, status: int, body: bytes, upto: int | None = None) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body[:upto], "more_body": upto is not None})


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    """Serve until killed."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("small", "large", "prm"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--think", type=float, default=0.05, help="seconds until an answer, in the mean")
    parser.add_argument("--spread", type=float, default=0.0, help="share of --think by which times vary either way")
    parser.add_argument("--tag", type=int, default=0, help="token that the reward model is read at")
    parser.add_argument("--log", help="file that gets a line for each answer")
    parser.add_argument("--replies", type=Path, required=True, help="file with recorded steps, see `record`")
    flags = parser.parse_args()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    replies = json.loads(flags.replies.read_text())
    upstream = Upstream(flags.role, flags.think, flags.spread, flags.tag, flags.log, replies)
    uvicorn.run(
        upstream,
        host="127.0.0.1",
        port=flags.port,
        http=_stamping(),
        log_level="error",
        access_log=False,
        lifespan="off",
    )


if __name__ == "__main__":
    main()
