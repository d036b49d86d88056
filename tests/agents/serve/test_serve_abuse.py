"""The command line as a process of its own: what it refuses to start with, and what clients cannot do to it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_harness import QUESTION, Process, Upstreams, policy

MALFORMED = 1000
GROWTH_MB = 20.0
LIMIT = 1 << 18


@pytest.fixture(scope="module")
def served(upstreams: Upstreams, folder: Path) -> Iterator[tuple[Process, str]]:
    urls = upstreams.urls()
    process = Process(
        *("--policy", folder, "--port", 0, "--max-body-bytes", LIMIT),
        *("--small", urls["small"], "--large", urls["large"].removesuffix("/v1"), "--prm", urls["prm"]),
    )
    try:
        yield process, process.wait()
    finally:
        process.process.kill()
        process.process.wait()


def malformed(seed: int) -> tuple[bytes, dict[str, str]]:
    """A request that nobody can mean, of one of many kinds."""
    draw = random.Random(seed)
    good: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]}
    text = json.dumps(good).encode()
    number = draw.choice(["NaN", "Infinity", "-Infinity", "-1", "-0.5", "1e999", "9" * 400, '"x"', "[]", "{}", "true"])
    name = draw.choice(["temperature", "top_p", "min_p", "lam", "budget"])
    count = draw.choice(["max_tokens", "max_completion_tokens", "seed", "n"])
    deep = draw.randrange(500, 50_000)
    headers = {"Content-Type": "application/json"}
    kinds: list[Any] = [
        lambda: text[: draw.randrange(len(text))],
        lambda: draw.randbytes(draw.randrange(1, 2000)),
        lambda: text[: (place := draw.randrange(len(text)))] + bytes([draw.randrange(0xF8, 0x100)]) + text[place:],
        lambda: text[:-1] + f', "{name}": {number if number not in ("{}", "true") else "-2"}}}'.encode(),
        lambda: text[:-1] + f', "{count}": {number if number != "true" else "-7"}}}'.encode(),
        lambda: b"[" * deep + b"]" * deep,
        lambda: b'{"messages":' * deep + b"1" + b"}" * deep,
        lambda: json.dumps({**good, "x" * draw.randrange(1, 5000): 1}).encode(),
        lambda: b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        lambda: json.dumps({"messages": [{}] * draw.randrange(1, 50_000)}).encode(),
        lambda: json.dumps({"messages": draw.choice([None, "q", 3, {}, [[]], ["q"], [{"role": "user"}]])}).encode(),
        lambda: json.dumps({"messages": [{"role": draw.choice(["", "me", 1]), "content": "q"}]}).encode(),
        lambda: json.dumps(
            {"messages": [{"role": "user", "content": "q" * draw.randrange(LIMIT, 3 * LIMIT)}]}
        ).encode(),
        lambda: json.dumps({"messages": [{"role": "user", "content": "7 " * draw.randrange(5000, 60_000)}]}).encode(),
        lambda: json.dumps({**good, "model": "m" * draw.randrange(1, 10_000)}).encode(),
        lambda: json.dumps({**good, "stream_options": draw.choice([1, [], {"include_usage": "maybe"}])}).encode(),
        lambda: json.dumps({**good, "stream": draw.choice([3, [], {}, "perhaps"])}).encode(),
        lambda: (headers.update({"Content-Type": draw.choice(["text/plain", "", "image/png"])}), text)[1],
        lambda: json.dumps(draw.choice([None, 1, "q", [], [good]])).encode(),
        lambda: json.dumps({**good, "tools": [{"type": "function"}] * draw.randrange(1, 100)}).encode(),
    ]
    return draw.choice(kinds)(), headers


def test_nothing_malformed_gets_further_than_a_refusal(served: tuple[Process, str]) -> None:
    process, url = served

    async def send(seeds: range) -> Counter[int]:
        limits = httpx.Limits(max_connections=8)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            found: Counter[int] = Counter()
            for seed in seeds:
                body, headers = malformed(seed)
                answer = await client.post("/v1/chat/completions", content=body, headers=headers)
                found[answer.status_code] += 1
                assert 400 <= answer.status_code < 500, (seed, answer.status_code, body[:200], answer.text[:200])
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 2000
                assert "Traceback" not in answer.text and 'File "' not in answer.text
            return found

    async def everything(first: int, last: int) -> Counter[int]:
        parts = [range(first + lane, last, 8) for lane in range(8)]
        return sum(await asyncio.gather(*map(send, parts)), Counter())

    warm = asyncio.run(everything(0, 300))
    before = process.megabytes()
    found = warm + asyncio.run(everything(300, MALFORMED))
    assert sum(found.values()) == MALFORMED and {400, 404, 413} <= set(found)
    assert process.megabytes() - before < GROWTH_MB
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    good = {"messages": [{"role": "user", "content": QUESTION}]}
    assert httpx.post(f"{url}/v1/chat/completions", json=good, timeout=60).status_code == 200
    assert "Traceback" not in process.log.read_text()


def test_large_requests_take_no_more_memory_for_being_many(served: tuple[Process, str]) -> None:
    """They are read a few at a time; a small one is not held up by those that do not go on."""
    process, url = served
    padding = "Be brief. " * (LIMIT // 11)
    huge = {"messages": [{"role": "system", "content": padding}, {"role": "user", "content": QUESTION}]}
    raw = json.dumps(huge).encode()
    good = {"messages": [{"role": "user", "content": QUESTION}]}
    where = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    )
    before = process.megabytes()
    stuck = [socket.create_connection(where) for _ in range(200)]
    try:
        for connection in stuck:
            connection.setblocking(False)
            connection.send(f"{head}\r\n\r\n".encode() + raw[:-1])
        assert httpx.post(f"{url}/v1/chat/completions", json=good, timeout=60).status_code == 200
        assert process.megabytes() - before < 40.0  # 50 if all of them were kept, and as much while they are parsed
    finally:
        for connection in stuck:
            connection.close()
    assert httpx.post(f"{url}/v1/chat/completions", json=huge, timeout=60).status_code == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 1000,
    ],
)
def test_what_is_no_http_does_no_harm(served: tuple[Process, str], raw: bytes) -> None:
    process, url = served
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(raw)
        connection.settimeout(10)
        answer = connection.recv(4096)
    assert answer == b"" or answer.split(b" ")[1].startswith(b"4"), answer
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200
    assert "Traceback" not in process.log.read_text()


def test_the_service_ends_when_it_is_told(upstreams: Upstreams, folder: Path) -> None:
    urls = upstreams.urls()
    flags = [part for role, url in urls.items() for part in (f"--{role}", url)]
    process = Process("--policy", folder, "--port", 0, *flags)
    process.wait()
    process.process.send_signal(signal.SIGINT)
    process.process.wait(20)
    assert process.process.returncode in (0, 130) and "Traceback" not in process.log.read_text()


def test_mistakes_are_one_line(
    upstreams: Upstreams, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from agents.__main__ import main

    urls = upstreams.urls()
    servers = [part for role, url in urls.items() for part in (f"--{role}", url)]
    foreign = policy(tmp_path, small="Qwen/Qwen2.5-1.5B-Instruct")
    short = policy(tmp_path, max_steps=4)
    swapped = ["--small", urls["small"], "--large", urls["prm"], "--prm", urls["prm"]]
    generator = ["--small", urls["small"], "--large", urls["large"], "--prm", urls["small"]]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [
            (["--policy", str(tmp_path / "none"), *servers], "no policy here"),
            (["--policy", str(folder)], "Give --prm http://host:port/v1"),
            (["--policy", str(foreign), *servers], "--models models.toml"),
            (["--policy", str(foreign), "--models", "tinymath", *servers], "was trained with small 'Qwen"),
            (["--policy", str(short), *servers], "at most 4 steps"),
            (["--policy", str(folder), *servers, "--lam", "0.1"], "fixed setting"),
            (["--policy", str(folder), *servers, "--max-tokens", "0"], "--max-tokens is 0"),
            (["--policy", str(folder), *servers, "--api-key-env", "TRIM_NO_SUCH_KEY"], "TRIM_NO_SUCH_KEY is not set"),
            (["--policy", str(folder), *servers, "--port", str(taken.getsockname()[1])], "Choose another --port"),
            (["--policy", str(folder), *servers, "--small", "localhost"], "not of the form"),
            (["--policy", str(folder), *swapped, "--port", "0"], "large: http"),
            (["--policy", str(folder), *generator, "--port", "0"], "scorer: http"),
        ]
        for arguments, words in cases:
            assert main(["serve", *arguments]) == 2, arguments
            printed = capsys.readouterr()
            assert words in printed.err and "Traceback" not in printed.err, printed.err
            assert printed.err.splitlines()[-1].startswith("error: ")
