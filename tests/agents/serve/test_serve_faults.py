"""Faults of real upstream processes during load: nothing hangs, every token is accounted for, recovery is quick."""

from __future__ import annotations

import json
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_harness import QUESTION, ROLES, Router, UpstreamProcess, Upstreams, policy

RECOVERY_S = 5.0
LOAD = 24


@pytest.fixture(autouse=True)
def everything_works(router: Router, upstreams: Upstreams) -> Iterator[None]:
    yield
    for each in upstreams.every:
        assert each.process is not None
        each.signal(signal.SIGCONT)
        if each.process.poll() is None:
            each.mode("ok")
        else:
            each.start()
    for each in upstreams.every:
        each.wait()
    router.wait_up()


@pytest.fixture(scope="module")
def others(upstreams: Upstreams, folder: Path) -> Iterator[dict[str, Router]]:
    """Routers with the other fallbacks."""
    running = {
        fallback: Router(folder, upstreams.urls(), upstream_timeout=1.5, when_scorer_fails=fallback)
        for fallback in ("large", "error")
    }
    yield running
    for each in running.values():
        each.stop()


def spent(answers: list[httpx.Response], role: str) -> int:
    return sum(answer.json()["usage"]["models"][role]["completion_tokens"] for answer in answers)


def during_load(router: Router, fault: Callable[[], None], count: int = LOAD) -> list[httpx.Response]:
    """Answers to requests in the midst of which the fault happens."""
    answers: list[httpx.Response] = []
    done = router.metric("trim_steps_total", author="small") + router.metric("trim_steps_total", author="large")
    load = threading.Thread(target=lambda: answers.extend(router.chats(count, trace=True)))
    load.start()
    end = time.monotonic() + 30
    while time.monotonic() < end:  # some steps are done, most are not
        now = router.metric("trim_steps_total", author="small") + router.metric("trim_steps_total", author="large")
        if now >= done + 8:
            break
        time.sleep(0.01)
    fault()
    load.join(60)
    assert not load.is_alive() and len(answers) == count, "requests hang"
    router.idle()
    return answers


def notes(answers: list[httpx.Response]) -> str:
    return " ".join(note for answer in answers for note in answer.json()["trim"]["fallbacks"])


def recovers(router: Router, role: str) -> None:
    """Within 5 s of the upstream's return, requests go to it again."""
    taken = router.wait_up((role,), within=RECOVERY_S + 1)
    assert taken <= RECOVERY_S
    assert router.chat().json()["trim"]["fallbacks"] == []


def role_of(upstream: UpstreamProcess) -> str:
    return "scorer" if upstream.role == "prm" else upstream.role


def test_without_faults_every_token_is_accounted_for(router: Router, upstreams: Upstreams) -> None:
    before = upstreams.small.decoded(), upstreams.large.decoded()
    answers = router.chats(LOAD)
    assert {answer.status_code for answer in answers} == {200} and notes(answers) == ""
    after = upstreams.small.decoded(), upstreams.large.decoded()
    assert (spent(answers, "small"), spent(answers, "large")) == (after[0] - before[0], after[1] - before[1])
    assert after[1] > before[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("small", "the large model wrote the step"),
        ("large", "the proposal was kept"),
        ("prm", "the proposal was kept"),
    ],
)
def test_a_killed_upstream_during_load(router: Router, upstreams: Upstreams, name: str, words: str) -> None:
    victim = getattr(upstreams, name)
    before = {role: getattr(upstreams, role).decoded() for role in ROLES}
    began = time.monotonic()
    answers = during_load(router, victim.kill)
    assert time.monotonic() - began < 30
    assert {answer.status_code for answer in answers} == {200}
    assert f"{role_of(victim)} (connection): {words}" in notes(answers)
    for role in ("small", "large"):
        wrong = spent(answers, role) - (getattr(upstreams, role).decoded() - before[role])
        # Killed between sending an answer and noting it: one answer at most.
        assert wrong == 0 or (role == name and 0 < wrong < 64), role
    router.wait_down(role_of(victim))
    began = time.monotonic()
    assert router.chat().status_code == 200 and time.monotonic() - began < 2.5  # no waiting for the dead
    victim.start()
    victim.wait()
    recovers(router, role_of(victim))


@pytest.mark.parametrize("name", ROLES)
def test_a_stalled_upstream_during_load(router: Router, upstreams: Upstreams, name: str) -> None:
    victim = getattr(upstreams, name)
    answers = during_load(router, lambda: victim.signal(signal.SIGSTOP), count=16)
    assert {answer.status_code for answer in answers} == {200}
    assert max(answer.elapsed.total_seconds() for answer in answers) < 20  # its time limit is 3 s
    assert f"{role_of(victim)} (timeout)" in notes(answers)
    router.wait_down(role_of(victim))
    began = time.monotonic()
    assert router.chat().status_code == 200 and time.monotonic() - began < 2.5
    victim.signal(signal.SIGCONT)
    recovers(router, role_of(victim))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("small", "half"), ("small", "wrong"), ("small", "error")),
        *(("large", "garbage"), ("large", "busy")),
        *(("prm", "half"), ("prm", "wrong"), ("prm", "error")),
    ],
)
def test_an_upstream_that_answers_nonsense(router: Router, upstreams: Upstreams, name: str, mode: str) -> None:
    victim = getattr(upstreams, name)
    before = upstreams.small.decoded(), upstreams.large.decoded()
    answers = during_load(router, lambda: victim.mode(mode), count=16)
    assert {answer.status_code for answer in answers} == {200} and role_of(victim) in notes(answers)
    assert max(answer.elapsed.total_seconds() for answer in answers) < 20
    assert spent(answers, "small") == upstreams.small.decoded() - before[0]
    assert spent(answers, "large") == upstreams.large.decoded() - before[1]
    victim.mode("ok")
    recovers(router, role_of(victim))


def test_a_slow_upstream_is_not_waited_for_beyond_its_limit(router: Router, upstreams: Upstreams) -> None:
    upstreams.large.mode("slow")
    began = time.monotonic()
    answer = next(each for each in (router.chat(f"Let a={i}+1. Find a.") for i in range(50)) if notes([each]))
    assert "large (timeout): the proposal was kept" in notes([answer]) and time.monotonic() - began < 30


def test_the_scorers_other_fallbacks(others: dict[str, Router], upstreams: Upstreams) -> None:
    upstreams.prm.kill()
    answers = others["large"].chats(6, trace=True)
    assert {answer.status_code for answer in answers} == {200}
    steps = [step for answer in answers for step in answer.json()["trim"]["trace"]]
    assert {step["author"] for step in steps} == {"large"} and all(step["score"] is None for step in steps)
    refused = others["error"].chat()
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "ServiceUnavailableError"
    assert "scorer" in refused.json()["error"]["message"] and refused.headers["Retry-After"] == "1"
    assert refused.json()["usage"]["models"]["small"]["completion_tokens"] > 0  # a proposal was decoded in vain
    assert str(upstreams.prm.port) not in refused.text
    upstreams.prm.start()
    upstreams.prm.wait()
    recovers(others["error"], "scorer")
    assert others["error"].chat().status_code == 200


def test_nobody_there_is_an_error_at_once(router: Router, upstreams: Upstreams) -> None:
    upstreams.small.kill()
    upstreams.large.kill()
    router.chat()
    for role in ("small", "large"):
        router.wait_down(role)
    failed = router.metric("trim_requests_total", status="503")
    began = time.monotonic()
    answers = router.chats(20)
    assert time.monotonic() - began < 5
    assert {answer.status_code for answer in answers} == {503}
    assert router.chat(stream=True).status_code == 503
    assert router.metric("trim_requests_total", status="503") == failed + 21
    assert router.metric("trim_requests_in_flight") == 0
    health = router.client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "unavailable"
    told = health.json()["upstreams"]
    assert {role: of["up"] for role, of in told.items()} == {"small": False, "large": False, "scorer": True}
    assert all(told[role]["why"] for role in ("small", "large")) and "why" not in told["scorer"]
    assert router.metric("trim_upstream_up", model="large") == 0
    assert router.metric("trim_upstream_errors_total", model="small", kind="connection") > 0


@pytest.mark.parametrize("stream", [False, True])
def test_generation_ends_when_the_client_leaves(router: Router, upstreams: Upstreams, stream: bool) -> None:
    upstreams.large.mode("stall")
    left, delivered = len(upstreams.large.lines("left", "completions")), len(upstreams.small.lines("delivered"))
    body = {
        "messages": [{"role": "user", "content": "Let a=1+33, b=a+49. Find b."}],
        "stream": stream,
        "temperature": 0.5,
    }
    with pytest.raises(httpx.ReadTimeout):
        with router.client.stream("POST", "/v1/chat/completions", json=body, timeout=0.8) as answer:
            for _ in answer.iter_bytes():
                pass
    end = time.monotonic() + 1.0  # well before the upstream's time limit
    while len(upstreams.large.lines("left", "completions")) == left and time.monotonic() < end:
        time.sleep(0.02)
    assert len(upstreams.large.lines("left", "completions")) == left + 1, "the large model went on writing"
    router.idle(1)
    seen = len(upstreams.small.lines("delivered"))
    time.sleep(0.5)
    assert len(upstreams.small.lines("delivered")) - seen <= 1 and seen > delivered  # at most a probe
    assert router.metric("trim_requests_total", status="499") > 0


def test_clients_that_leave_at_any_moment(
    router: Router, upstreams: Upstreams, caplog: pytest.LogCaptureFixture
) -> None:
    where = ("127.0.0.1", int(router.url.removesuffix("/v1").rsplit(":", 1)[1]))

    def spent() -> list[int]:
        kinds = ("completion", "aborted")
        return [int(router.metric("trim_tokens_total", model=r, kind=k)) for r in ("small", "large") for k in kinds]

    def noted() -> list[int]:
        every = (upstreams.small, upstreams.large)
        return [sum(note.tokens for word in ("decoded", "left") for note in each.notes(word)) for each in every]

    def leave(seed: int) -> None:
        draw = random.Random(seed)
        body = {"messages": [{"role": "user", "content": f"Let a={seed}+33. Find a."}], "stream": draw.random() < 0.5}
        raw = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw
        with socket.create_connection(where) as connection:
            connection.sendall(whole[: draw.randrange(len(whole))] if draw.random() < 0.2 else whole)
            time.sleep(draw.uniform(0.0, 0.3))
            if draw.random() < 0.5:  # a reset instead of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    router.idle()
    before, decoded = spent(), noted()
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(100)))
    router.idle()
    time.sleep(0.2)
    small, small_aborted, large, large_aborted = (now - then for now, then in zip(spent(), before, strict=True))
    small_noted, large_noted = (now - then for now, then in zip(noted(), decoded, strict=True))
    assert 0 < small <= small_noted <= small + small_aborted and large <= large_noted <= large + large_aborted
    assert small_aborted and not [record for record in caplog.records if record.exc_info]


def test_a_stream_that_breaks_says_why(router: Router, upstreams: Upstreams, folder: Path) -> None:
    running = Router(folder, upstreams.urls(), upstream_timeout=1.5, when_scorer_fails="error")
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
    lines: list[str] = []
    try:
        with running.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                lines += [line] if line else []
                if len(lines) == 2:
                    upstreams.prm.mode("error")
    finally:
        upstreams.well()
        running.stop()
    assert '"error"' in lines[-2] and "scorer (status)" in lines[-2] and lines[-1] == "data: [DONE]"


def test_the_time_limit_of_a_request(upstreams: Upstreams, tmp_path: Path) -> None:
    running = Router(policy(tmp_path), upstreams.urls(), request_timeout=0.15)
    try:
        upstreams.small.mode("stall")
        answer: Any = running.chat()
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "GatewayTimeoutError"
        upstreams.well()
        running.wait_up()
        cut = [each.json() for each in running.chats(20, clients=2) if each.status_code == 200]
        cut = [each for each in cut if each["trim"]["ended"] == "time"]
        assert cut and all(each["choices"][0]["finish_reason"] == "length" and each["trim"]["steps"] for each in cut)
    finally:
        upstreams.well()
        running.stop()


def test_a_router_starts_before_its_upstreams(tmp_path: Path) -> None:
    late = Upstreams()
    running = None
    try:
        from agents.serve.command import ServeConfig, Server

        server = Server(ServeConfig(policy=str(policy(tmp_path)), **late.urls(), port=0))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        late.start()
        running = httpx.Client(base_url=server.url, timeout=30)
        end = time.monotonic() + RECOVERY_S
        while (answer := running.get(f"{server.url.removesuffix('/v1')}/health")).json()["status"] != "ok":
            assert time.monotonic() < end, answer.text
            time.sleep(0.1)
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
    finally:
        late.stop()
        if running is not None:
            running.close()
