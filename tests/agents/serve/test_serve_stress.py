"""The service stays itself under stress: hard caps, slow upstreams, cheap refusals, a drained end."""

from __future__ import annotations

import json
import logging
import operator
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_harness import QUESTION, Process, Router, Upstreams, policy, streamed

from agents.__main__ import main
from agents.serve import listen
from agents.serve import upstreams as probing
from agents.serve.command import ServeConfig, Server, family_of
from agents.serve.route import UnderWay
from rollouts.text.tokens import Encoder
from rollouts.tinymath import model_dir


@pytest.fixture
def made(upstreams: Upstreams, tmp_path: Path) -> Iterator[Any]:
    """Routers with settings of their own; the upstreams are well again afterwards."""
    running: list[Router] = []

    def make(about: dict[str, Any] | None = None, **settings: Any) -> Router:
        running.append(Router(policy(tmp_path, **about or {}), upstreams.urls(), **settings))
        return running[-1]

    yield make
    for each in running:
        each.stop()
    for upstream in upstreams.every:
        assert upstream.process is not None
        if upstream.process.poll() is not None:
            upstream.start()
            upstream.wait()
        upstream.control(mode="ok", think=upstream.think, window=1024, name=f"tinymath-{upstream.role}")


# ---------------------------------------------------------------- caps


def test_no_request_exceeds_its_cap_whoever_is_killed(made: Any, upstreams: Upstreams) -> None:
    most = 30
    router = made({"max_large_tokens": most, "max_escalations": 3}, when_scorer_fails="large", upstream_timeout=3.0)
    ended, draw = threading.Event(), random.Random(0)

    def disturb() -> None:
        while not ended.is_set():
            victim = draw.choice([upstreams.small, upstreams.prm])
            victim.kill()
            ended.wait(draw.uniform(0.2, 0.8))
            victim.start()
            victim.wait()
            ended.wait(draw.uniform(0.0, 0.5))

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    first = count = 1000  # other numbers than those of other tests
    answers, end = [], time.monotonic() + 6
    try:
        while time.monotonic() < end:
            answers += router.chats(24, clients=12, first=count, trace=True)
            router.chats(12, clients=12, first=count + 24, stream=True)
            count += 36
    finally:
        ended.set()
        disturbing.join()
    assert {answer.status_code for answer in answers} <= {200, 503}
    for answer in answers:
        body = answer.json()
        large = body["usage"]["models"]["large"]
        assert large["completion_tokens"] + large["aborted_tokens"] <= most
        assert body["trim"]["large_steps"] <= 3
        if answer.status_code == 503:
            assert "cap" in body["error"]["message"]
    noted = {role: getattr(upstreams, role).asked("decoded", "left") for role in ("small", "large")}
    asked = [noted["large"].get(number, []) for number in range(first, count)]
    assert any(asked) and all(sum(tokens) <= most and len(tokens) <= 3 for tokens in asked)
    for number, answer in zip((n for n in range(first, count) if (n - first) % 36 < 24), answers, strict=True):
        for role in ("small", "large"):
            told = answer.json()["usage"]["models"][role]
            decoded = sum(noted[role].get(number, ()))
            assert told["completion_tokens"] <= decoded <= told["completion_tokens"] + told["aborted_tokens"]
    notes = " ".join(note for answer in answers for note in answer.json()["trim"]["fallbacks"])
    assert "small" in notes and "scorer" in notes and "cap" in notes


def test_a_missing_small_model_can_end_the_request(made: Any, upstreams: Upstreams) -> None:
    router = made(when_small_fails="error")
    upstreams.small.kill()
    answer = router.chat()
    assert answer.status_code == 503 and "There is no proposal: small" in answer.json()["error"]["message"]


# ---------------------------------------------------------------- slow is not down


def test_asking_for_health_asks_nobody(made: Any, upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_PROBE_S", 0.2)
    router = made()
    upstreams.small.control(think=0.8)
    probes, ended = upstreams.small.probes(), threading.Event()

    def poll() -> None:
        while not ended.is_set():
            assert router.client.get("/health").json()["status"] == "ok"
            time.sleep(0.02)

    polling = threading.Thread(target=poll)
    polling.start()
    answers = router.chats(4, clients=4, max_tokens=30)
    ended.set()
    polling.join()
    assert all(answer.json()["trim"]["fallbacks"] == [] for answer in answers)
    assert upstreams.small.probes() == probes
    assert router.client.get("/live").status_code == router.client.get("/ready").status_code == 200


def test_a_slow_upstream_is_up_from_the_start(made: Any, upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_PROBE_S", 0.3)
    upstreams.small.control(think=0.8)
    router = made()
    assert router.chat(max_tokens=30).json()["trim"]["fallbacks"] == []


def test_who_answers_some_requests_is_not_down(made: Any, upstreams: Upstreams) -> None:
    router = made(upstream_timeout=0.8)
    upstreams.small.mode("lame")
    answers = router.chats(8, clients=8, max_tokens=30)
    kinds = {note.split("(")[1].split(")")[0] for answer in answers for note in answer.json()["trim"]["fallbacks"]}
    assert kinds == {"timeout"}  # and never "down"
    assert router.client.get("/health").json()["status"] == "ok"


def test_too_much_to_do_changes_no_answer(made: Any) -> None:
    router = made(max_concurrent=4)
    alone = [answer.json() for answer in router.chats(24, clients=2)]
    answers = router.chats(24, clients=24)
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer, quiet in zip(answers, alone, strict=True):
        if answer.status_code == 200:
            assert answer.json()["choices"] == quiet["choices"] and answer.json()["trim"] == quiet["trim"]
        else:
            assert answer.headers["Retry-After"] == "1"
    assert router.client.get("/health").json()["status"] == "ok" and router.metric("trim_fallbacks_total") == 0


# ---------------------------------------------------------------- refusals


def test_refused_requests_cost_nothing(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None]] = []
    encode = Encoder.__call__
    monkeypatch.setattr(
        Encoder,
        "__call__",
        lambda self, text: seen.append((len(text), threading.current_thread().ident)) or encode(self, text),
    )
    began = time.monotonic()
    for number in range(40):
        huge = f"{number} " + "Be brief. " * 25_000
        answer = router.chat(messages=[{"role": "system", "content": huge}, {"role": "user", "content": QUESTION}])
        assert answer.status_code == 400 and "too long" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 4 and not seen  # tokenising them takes half a minute
    assert router.chat("word " * 2000).status_code == 400
    assert [size for size, _ in seen if size > 5000]
    assert all(thread != router.thread.ident for size, thread in seen if size > 5000)


def test_who_is_one_too_many_is_not_tokenised(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    router = made(max_concurrent=1)
    monkeypatch.setattr(router.server.service, "_under_way", {UnderWay()})
    monkeypatch.setattr(Encoder, "__call__", None)
    assert router.chat("What is 3 times 31?").status_code == 429


# ---------------------------------------------------------------- the end


@pytest.fixture
def process(upstreams: Upstreams, folder: Path) -> Iterator[tuple[Process, str]]:
    flags = [part for role, url in upstreams.urls().items() for part in (f"--{role}", url)]
    running = Process("--policy", folder, "--port", 0, "--drain-seconds", 2, *flags)
    yield running, running.wait()
    running.process.kill()
    running.process.wait()
    upstreams.well()


def test_sigterm_drains_and_cut_streams_say_so(process: tuple[Process, str], upstreams: Upstreams) -> None:
    running, url = process
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
    lines: list[str] = []
    ready: list[tuple[int, int]] = []

    watcher = httpx.Client(base_url=url)  # making one takes a while

    def watch() -> None:
        time.sleep(0.3)
        ready.append((watcher.get("/ready").status_code, watcher.get("/live").status_code))

    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            lines += [line] if line else []
            if line and len(lines) == 2:
                upstreams.prm.mode("stall")
                began = time.monotonic()
                running.process.send_signal(signal.SIGTERM)
                watching = threading.Thread(target=watch)
                watching.start()
    assert 1.5 < time.monotonic() - began < 4
    watching.join()
    assert ready == [(503, 200)]
    assert "shutting down" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
    assert lines[-1] == "data: [DONE]"
    assert running.process.wait(5) == 143 and "Traceback" not in running.log.read_text()


def test_sigterm_lets_requests_end(process: tuple[Process, str]) -> None:
    running, url = process
    found: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        body = {"messages": [{"role": "user", "content": QUESTION}], "stream": stream}
        found.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30))

    asking = [threading.Thread(target=ask, args=(number > 3,)) for number in range(12)]
    for each in asking:
        each.start()
    time.sleep(0.2)
    running.process.send_signal(signal.SIGTERM)
    for each in asking:
        each.join()
    assert {answer.status_code for answer in found} == {200} and running.process.wait(5) == 0
    assert sum(answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text for answer in found) == 8


def test_nothing_is_begun_when_time_is_up(made: Any) -> None:
    router = made()
    router.server.service.cut_off()
    answer = router.chat()
    assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]


def test_requests_that_are_not_there_in_time_are_dropped(process: tuple[Process, str], upstreams: Upstreams) -> None:
    running, url = process
    upstreams.small.mode("stall")
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    where = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    late, never = (socket.create_connection(where, timeout=10) for _ in range(2))
    for connection in (late, never):
        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body[:-1])
    time.sleep(0.3)
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    time.sleep(1.7)
    late.sendall(body[-1:])
    assert b"503" in late.recv(4096) and never.recv(4096) == b""
    assert running.process.wait(5) == 143 and time.monotonic() - began < 4
    assert "Traceback" not in running.log.read_text()


def test_headers_that_do_not_come_are_given_up(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_HEADERS_S", 0.4)
    router = made()
    where = ("127.0.0.1", int(router.url.rsplit(":", 1)[1].split("/")[0]))
    whole = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
    for first in (b"", whole):
        with socket.create_connection(where, timeout=3) as connection:
            connection.sendall(first)
            while first and not connection.recv(4096).endswith(b'{"status":"alive"}'):
                pass
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
            began = time.monotonic()
            assert connection.recv(4096) == b"" and time.monotonic() - began < 2
    assert router.chat().status_code == 200  # which takes longer


# ---------------------------------------------------------------- settings


def test_the_models_files_concurrency_counts(upstreams: Upstreams) -> None:
    config = ServeConfig(policy="none", models="tinymath", **upstreams.urls(), max_concurrent=300)
    assert {family_of(config, {}).generator(role).concurrency for role in ("small", "large")} == {64}


def test_a_range_without_a_usual_setting_is_refused_at_the_start(
    upstreams: Upstreams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from agents.routers.mlp import ConditionedMLP

    shapes = {"0.weight": (8, 5), "0.bias": (8,), "1.weight": (2, 8), "1.bias": (2,)}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    folder = policy(tmp_path, ConditionedMLP("ranged", "agg/1", 1e-4, 1e-2, weights))
    servers = [part for role, url in upstreams.urls().items() for part in (f"--{role}", url)]
    assert main(["serve", "--policy", str(folder), *servers, "--port", "0"]) == 2
    assert "serves every lam from 0.0001 to 0.01" in (error := capsys.readouterr().err) and "--lam" in error
    Server(ServeConfig(policy=str(folder), **upstreams.urls(), port=0, lam=1e-3))._listening.close()


def test_addresses_of_all_kinds(upstreams: Upstreams, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    server = Server(ServeConfig(policy=str(folder), **upstreams.urls(), port=0, host="::1"))
    server._listening.close()
    assert server.url.startswith("http://[::1]:") and "may use the models" not in caplog.text
    for host in ("::", "0.0.0.0"):
        caplog.clear()
        Server(ServeConfig(policy=str(folder), **upstreams.urls(), port=0, host=host))._listening.close()
        assert "may use the models" in caplog.text


def test_pages_of_named_origins_may_call(made: Any, router: Router) -> None:
    asked = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"}
    path = "/v1/chat/completions"
    answer = made(cors_origins=("https://mine.example",)).client.options(path, headers=asked)
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://mine.example"
    assert "Access-Control-Allow-Origin" not in router.client.options(path, headers=asked).headers


# ---------------------------------------------------------------- upstreams


def test_an_upstream_under_another_name_or_window_is_identified_anew(made: Any, upstreams: Upstreams) -> None:
    router = made()
    assert router.chat().status_code == 200
    upstreams.small.control(name="somebody-else")
    router.chat()
    router.wait_down("small")
    upstreams.small.control(name=str(model_dir("small")), window=512)
    router.wait_up(("small",), within=5)
    assert router.chat().json()["trim"]["fallbacks"] == []
    assert router.server.models.window("small") == 512


@pytest.mark.parametrize(("mode", "text"), [("surrogate", "a\ufffdb\n\n"), ("separator", "a\u2028b\x85c\n\n")])
def test_texts_of_every_kind_reach_the_client(made: Any, upstreams: Upstreams, mode: str, text: str) -> None:
    router = made()
    upstreams.small.mode(mode)
    upstreams.large.mode(mode)
    assert text in router.chat().json()["choices"][0]["message"]["content"]
    steps = [chunk["choices"][0]["delta"]["content"] for chunk in streamed(router)]  # of an iterator over lines
    assert text in steps


def test_negative_counts_are_no_answer(made: Any, upstreams: Upstreams) -> None:
    router = made()
    upstreams.small.mode("negative")
    answer = router.chat()
    assert answer.status_code == 200 and "small (malformed)" in answer.json()["trim"]["fallbacks"][0]


def test_what_was_decoded_for_nobody_is_counted(made: Any, upstreams: Upstreams) -> None:
    router = made()
    upstreams.small.mode("stall")
    with pytest.raises(httpx.ReadTimeout):
        router.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}]}, timeout=0.3
        )
    router.idle()
    assert router.metric("trim_tokens_total", model="small", kind="aborted") > 0


# ---------------------------------------------------------------- addresses and requests


def test_slashes_and_nulls(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    answer = router.client.post(
        "/v1/chat/completions/", json={"messages": [{"role": "user", "content": QUESTION}], "unheard_of": None}
    )
    assert answer.status_code == 200
    assert router.client.get("/v1/models/", headers={"Host": "evil.example"}).json()["object"] == "list"
    assert router.chat(chat_template_kwargs={"enable_thinking": False}, trace=None).status_code == 200
    assert router.chat(chat_template_kwargs={"enable_thinking": True}).status_code == 400
    assert router.chat(unheard_of=0).status_code == 400


def test_the_schema_is_behind_the_key(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIM_TEST_STRESS_KEY", "sk-1")
    router = made(api_key_env="TRIM_TEST_STRESS_KEY")
    for path, status in (("/openapi.json", 401), ("/v1/models/", 401), ("/health", 200), ("/ready/", 200)):
        assert router.client.get(path).status_code == status
    described = router.client.get("/openapi.json", headers={"Authorization": "Bearer sk-1"}).json()
    assert described["paths"]["/v1/models"]["get"]["security"] and "security" not in described["paths"]["/live"]["get"]
    refused = router.client.put("/v1/models", headers={"Authorization": "Bearer sk-1"})
    assert refused.status_code == 405 and "GET" in refused.headers["Allow"]


def test_every_route_is_described_as_it_answers(made: Any) -> None:
    """Before, chats alone were."""
    router = made(playground=True)
    described = router.client.get("/openapi.json").json()
    routes = {re.sub(r":\w+", "", route.path): route.methods for route in router.server.app.routes}
    told = {path: {method.upper() for method in methods} for path, methods in described["paths"].items()}
    assert told == {path: methods - {"HEAD"} for path, methods in routes.items()}
    assert described["openapi"].startswith("3.") and "/v1/responses" in told and "/" in told
    for place in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(described))):
        assert reduce(operator.getitem, place.split("/"), described)
    for path, methods in described["paths"].items():
        for method, entry in methods.items():
            asked = {"messages": [{"role": "user", "content": QUESTION}]} if "chat" in path else {"input": QUESTION}
            for name, body in (("trim-thr", asked), ("nobody", {})):
                body = {} if method == "get" else {"json": body}
                answer = router.client.request(method, path.replace("{name}", name), **body)
                content = entry["responses"][str(answer.status_code)]["content"]
                assert answer.headers["content-type"].partition(";")[0] in content and entry["summary"], path
    chat, response = (
        described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ("/v1/chat/completions", "/v1/responses")
    )
    assert {"messages", "budget"} <= {*chat["properties"]} and chat["required"] == ["messages"]
    assert {"input", "budget"} <= {*response["properties"]} and "messages" not in response["properties"]


def test_what_should_not_happen_is_an_answer_like_others(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, it had neither the request's id nor a word for pages of elsewhere, and no metric counted it."""
    router = made(cors_origins=("https://a.example",))
    monkeypatch.setattr(router.server.service, "begin", lambda ask: 1 / 0)
    answer = router.client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": QUESTION}]},
        headers={"X-Request-ID": "my-id", "Origin": "https://a.example"},
    )
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "InternalServerError"
    assert answer.headers["X-Request-ID"] == "my-id"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert router.metric("trim_requests_total", status="500") == 1 and "ZeroDivisionError" in caplog.text
