"""Several servers of one role behind the service: shares, one that is killed under load, one of another model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import DROP, HANG, Begun, FakeServer, error_reply, silent
from serve_harness import Router, UpstreamProcess, Upstreams, policy, streamed

from agents.routers.base import Threshold
from agents.serve import several
from agents.serve import upstreams as probing
from agents.serve.command import ServeConfig, Server, family_of
from agents.serve.config import with_file
from agents.serve.metrics import Metrics
from agents.serve.upstreams import Probe
from rollouts.config import ModelConfig
from rollouts.errors import ConfigError

TOOLS = [{"type": "function", "function": {"name": "add"}}]
LOAD = 32


@pytest.fixture(scope="module")
def twins(upstreams: Upstreams) -> Iterator[dict[str, UpstreamProcess]]:
    """A second server of each role."""
    running = {role: UpstreamProcess(role) for role in ("small", "large", "prm")}
    for each in running.values():
        each.start()
    for each in running.values():
        each.wait()
    yield running
    for each in running.values():
        each.kill()


@pytest.fixture(scope="module")
def doubled(upstreams: Upstreams, twins: dict[str, UpstreamProcess], folder: Path) -> Iterator[Router]:
    urls: dict[str, Any] = {role: (url, twins[role].url) for role, url in upstreams.urls().items()}
    running = Router(folder, urls, upstream_timeout=3.0)
    yield running
    running.stop()


def counts(server: UpstreamProcess) -> int:
    return len(server.notes("delivered"))


def test_each_gets_its_share_and_health_and_metrics_tell_of_each(
    doubled: Router, upstreams: Upstreams, twins: dict[str, UpstreamProcess]
) -> None:
    pairs = [(each, twins[each.role]) for each in upstreams.every]
    before = [(counts(one), counts(other)) for one, other in pairs]
    assert {answer.status_code for answer in doubled.chats(LOAD)} == {200}
    for (one, other), (first, second) in zip(pairs, before, strict=True):
        shares = counts(one) - first, counts(other) - second
        assert 0.3 < shares[0] / sum(shares) < 0.7, (one.role, shares)
    found = doubled.client.get("/health").json()
    assert found["status"] == "ok" and found["upstreams"]["small"] == {"up": True, "servers": [{"up": True}] * 2}
    assert "127.0.0.1" not in json.dumps(found)
    for server in ("1", "2"):
        assert doubled.metric("trim_upstream_up", model="large", server=server) == 1
        assert doubled.metric("trim_upstream_seconds_count", model="large", server=server) > 0


@pytest.mark.parametrize("role", ["small", "large", "prm"])
def test_one_of_two_that_is_killed_under_load_fails_no_request(
    doubled: Router, twins: dict[str, UpstreamProcess], role: str
) -> None:
    victim, name = twins[role], "scorer" if role == "prm" else role
    failed = doubled.metric("trim_upstream_errors_total", model=name, server="2")
    answers: list[Any] = []
    load = threading.Thread(target=lambda: answers.extend(doubled.chats(LOAD)))
    steps, end = doubled.metric("trim_steps_total", author="small"), time.monotonic() + 30
    load.start()
    while doubled.metric("trim_steps_total", author="small") < steps + 8 and time.monotonic() < end:
        time.sleep(0.01)
    victim.kill()
    load.join(60)
    assert len(answers) == LOAD and {answer.status_code for answer in answers} == {200}
    assert [note for answer in answers for note in answer.json()["trim"]["fallbacks"]] == []
    assert doubled.metric("trim_upstream_errors_total", model=name, server="2") > failed
    while doubled.metric("trim_upstream_up", model=name, server="2") and time.monotonic() < end:
        doubled.chat()
    found = doubled.client.get("/health").json()
    assert found["status"] == "degraded" and doubled.client.get("/ready").status_code == 200
    assert found["upstreams"][name] == {"up": True, "servers": [{"up": True}, {"up": False, "why": "connection"}]}
    victim.start()
    victim.wait()
    end = time.monotonic() + 20
    while not doubled.metric("trim_upstream_up", model=name, server="2"):
        assert time.monotonic() < end, "it does not come back"
        time.sleep(0.05)
    before = counts(victim)
    doubled.chats(8)
    assert counts(victim) > before


def test_all_of_a_role_may_be_away(doubled: Router, upstreams: Upstreams, twins: dict[str, UpstreamProcess]) -> None:
    for each in (upstreams.prm, twins["prm"]):
        each.mode("error")
    answer = doubled.chat()
    assert answer.status_code == 200 and "scorer (" in answer.json()["trim"]["fallbacks"][0]
    for each in (upstreams.prm, twins["prm"]):
        each.mode("ok")
    doubled.wait_up()


# ---------------------------------------------------------------- what is passed on


@pytest.fixture
def fakes() -> Iterator[tuple[FakeServer, FakeServer]]:
    servers = FakeServer(), FakeServer()
    for server in servers:
        server.card = {"id": "tinymath-large", "max_model_len": 1024}
    yield servers
    for server in servers:
        server.released.set()
        server.die()


@pytest.fixture
def passing(upstreams: Upstreams, fakes: Any, tmp_path: Path) -> Iterator[Router]:
    urls: dict[str, Any] = {**upstreams.urls(), "large": [fake.url for fake in fakes]}
    router = Router(policy(tmp_path, Threshold(0.0)), urls, otherwise="large", request_timeout=5.0)
    yield router
    router.stop()


def chats(reply: Any) -> Any:
    return lambda path, *_: reply if "chat" in path else None


def asked_first(passing: Router, fakes: Any) -> int:
    """The place of the one that is asked while both are idle."""
    assert passing.chat(tools=TOOLS).status_code == 200
    return next(place for place, fake in enumerate(fakes) if any("chat" in path for path, _ in fake.seen))


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "reply", [DROP, error_reply(500, "boom"), error_reply(429, "busy"), error_reply(401, "key"), EVENTS[:-30]]
)
def test_what_is_passed_on_is_answered_by_the_other(passing: Router, fakes: Any, reply: Any) -> None:
    first = asked_first(passing, fakes)
    fakes[first].fault = chats(reply)
    for _ in range(4):
        answer = passing.chat(tools=TOOLS)
        assert answer.status_code == 200 and answer.headers["X-Trim-Passed-To"] == "large"
    assert passing.metric("trim_upstream_errors_total", model="large", server=str(first + 1)) >= 1


def test_a_stream_goes_to_the_other_until_its_first_byte_and_ends_with_an_error_after_it(
    passing: Router, fakes: Any
) -> None:
    whole = EVENTS + b'data: {"choices": [1]}\n\ndata: [DONE]\n\n'
    cut = EVENTS.replace(b"Connection: close", b"Content-Length: 999")
    first = asked_first(passing, fakes)
    fakes[first].fault, fakes[1 - first].fault = chats(cut), chats(whole)
    for _ in range(2):
        assert [event["choices"] for event in streamed(passing, tools=TOOLS)] == [[1]]
    assert sum("chat" in path for path, _ in fakes[first].seen) > 1
    fakes[1].fault = fakes[0].fault = chats(cut + b'data: {"choices": [1]}\n\n')
    begun, end = streamed(passing, tools=TOOLS)
    assert begun["choices"] == [1] and end["error"]["code"] == 503


def test_one_that_fails_what_is_passed_on_is_noticed(passing: Router, fakes: Any) -> None:
    """Before, nobody looked: only requests that are routed told that a server was down."""
    for fake in fakes:
        fake.fault = lambda *_: DROP
    answer = passing.chat(tools=TOOLS)
    assert answer.status_code == 503 and answer.json()["trim"]["passed_to"] == "large"
    end = time.monotonic() + 20
    while passing.client.get("/health").json()["upstreams"]["large"]["up"]:
        assert time.monotonic() < end
        passing.chat(tools=TOOLS)
    before = [len(fake.seen) for fake in fakes]
    assert passing.chat(tools=TOOLS).status_code == 503
    assert not any("chat" in path for fake, n in zip(fakes, before, strict=True) for path, _ in fake.seen[n:])


@pytest.mark.parametrize("reply", [HANG, Begun(EVENTS), Begun(EVENTS + b'data: {"choices": [1]}\n\n')])
def test_one_that_leaves_what_is_passed_on_without_an_answer_is_down(
    upstreams: Upstreams, fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Any
) -> None:
    """Before, it was noticed when a client had waited for all of the longest time of a request."""
    monkeypatch.setattr(probing, "_PROBE_S", 0.3)
    urls: dict[str, Any] = {**upstreams.urls(), "large": fakes[0].url}
    router = Router(policy(tmp_path, Threshold(0.0)), urls, otherwise="large", upstream_timeout=0.5)
    asking = threading.Thread(target=router.chat, kwargs={"tools": TOOLS, "stream": True})
    try:
        fakes[0].fault = lambda path, *_: reply if "chat" in path else HANG
        asking.start()
        router.wait_down("large", within=20)
    finally:
        fakes[0].released.set()
        asking.join(20)
        router.stop()


def test_one_that_is_slow_about_what_is_passed_on_is_not_down(
    upstreams: Upstreams, fakes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    urls: dict[str, Any] = {**upstreams.urls(), "large": fakes[0].url}
    router = Router(policy(tmp_path, Threshold(0.0)), urls, otherwise="large", upstream_timeout=0.3)
    try:
        fakes[0].fault = lambda path, *_: time.sleep(1.0) if "chat" in path else None  # type: ignore[func-returns-value]
        assert router.chat(tools=TOOLS, max_tokens=8).status_code == 200
        assert sum(body is not None and "prompt" in body for _, body in fakes[0].seen) == 2, "nobody looked"
        assert "is down" not in caplog.text
    finally:
        router.stop()


def test_half_a_surrogate_pair_is_passed_on_and_named(passing: Router, fakes: Any) -> None:
    """Before, it made the service fail: UTF-8 has none."""
    for fake in fakes:
        fake.fault = chats((200, {}, {"choices": [{"message": {"content": "\ud800"}}]}))
    assert passing.chat(tools=TOOLS).json()["choices"][0]["message"]["content"] == "\ud800"
    body = json.dumps({"model": "\ud800", "tools": TOOLS, "messages": [{"role": "user", "content": "x"}]})
    headers = {"Content-Type": "application/json"}
    answer = passing.client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 404 and "\ud800" in answer.json()["error"]["message"]


# ---------------------------------------------------------------- who they are


def test_those_that_are_not_there_at_the_start_are_met_at_once(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.serve.upstreams._PROBE_S", 1.0)

    async def started(urls: list[str]) -> tuple[float, dict[str, Any]]:
        probe = Probe(lambda wire: ("completions", {"prompt": [1]}), lambda wire, body: None)
        model = ModelConfig(backend="server", model="tinymath-large", url=urls)
        made = several.Upstreams("large", model, probe, 5.0, Metrics())
        began = time.monotonic()
        await made.start()
        took, health = time.monotonic() - began, made.health()
        await made.close()
        return took, health

    with silent(6) as urls:
        took, health = asyncio.run(started([*urls, fakes[0].url]))
    assert took < 4  # one after the other they take 6 s
    assert [each["up"] for each in health["servers"]] == [*[False] * 6, True] and health["up"]


def test_one_of_another_model_is_refused_by_name(upstreams: Upstreams, fakes: Any, folder: Path) -> None:
    fakes[1].card |= {"max_model_len": 512}
    urls: dict[str, Any] = {**upstreams.urls(), "large": f"{fakes[0].url},{fakes[1].url}"}
    server = Server(ServeConfig(policy=str(folder), port=0, **urls))
    with pytest.raises(ConfigError, match=f"large: {fakes[1].url} .* than {fakes[0].url}: max_model_len 512 instead"):
        server.run()


def test_one_that_comes_back_as_another_is_left_alone(passing: Router, fakes: Any) -> None:
    first = asked_first(passing, fakes)
    one, other = (passing.server.models.upstreams["large"].each[place] for place in (first, 1 - first))
    fakes[first].fault = lambda *_: DROP
    end = time.monotonic() + 20
    while one.well:
        assert time.monotonic() < end
        assert passing.chat(tools=TOOLS).status_code == 200
    fakes[first].card, fakes[first].fault = {**fakes[first].card, "max_model_len": 512}, lambda *_: None
    while one.why != "another server":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert f"than {other.url}: max_model_len 512 instead of 1024" in str(one.trouble)
    assert passing.chat(tools=TOOLS).status_code == 200 and passing.server.models.window("large") == 1024


def test_how_several_are_written(tmp_path: Path) -> None:
    found = {"small": "tinymath-small", "large": "tinymath-large"}
    for small in (("http://a:1", "http://b:1/v1"), "http://a:1/v1/, http://b:1"):
        config = ServeConfig("p", small=small, large="http://c:1", prm="http://d:1")  # type: ignore[arg-type]
        assert family_of(config, found).small.url == ("http://a:1/v1", "http://b:1/v1")
    with pytest.raises(ConfigError, match="twice"):
        family_of(ServeConfig("p", small="http://a:1,http://a:1/v1", large="http://c:1", prm="http://d:1"), found)  # type: ignore[arg-type]
    file = tmp_path / "serve.toml"
    file.write_text('small = ["http://a:1", "http://b:1"]\nlarge = "http://c:1"\n')
    flags = ["--config", str(file)]
    assert with_file(flags)[:2] == ["--small=http://a:1", "--small=http://b:1"]
    assert with_file([*flags, "--small", "http://x:1"])[:1] == ["--large=http://c:1"]
