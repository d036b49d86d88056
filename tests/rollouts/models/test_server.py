"""The server backend's faults and protocol, against a server that misbehaves on command."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from fake_server import (
    DROP,
    HANG,
    KEY,
    TAG,
    FakeServer,
    ask,
    config,
    error_reply,
    fake,
    gone,
    real,
)
from vllm_server import free_port

from rollouts.config import ModelConfig, Sampling
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Completion, CompletionRequest, LogprobRequest, PoolingRequest
from rollouts.models.server.completions import ServerBackend
from rollouts.text.likelihood import Likelihood
from rollouts.text.prompts import Reading

__all__ = ["fake"]


# ---------------------------------------------------------------- what is asked and understood


def test_every_sampling_field_is_sent_and_no_seed(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake)) as backend:
        sampling = Sampling(0.3, 0.9, 20, 0.05)
        done = backend.submit(CompletionRequest((7, 8), 500, sampling, ("\n\n",), seed=3)).result(10)
        assert done == Completion("x\n\n", 2, (5, 6), "stop")
        assert backend.submit(LogprobRequest((7, 8, 9), 1)).result(10) == Likelihood((-0.5, -0.5))
        assert backend.window == 100 and backend.describe()["version"] == "0.fake"
    body = next(body for path, body in fake.seen if real(body))
    wanted = {
        **{"temperature": 0.3, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "n": 1, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": ["\n\n"], "prompt": [7, 8]},
        **{"include_stop_str_in_output": True, "return_token_ids": True, "add_special_tokens": False},
        "max_tokens": 98,  # what the window leaves: a server would refuse more, an engine would end there
    }
    assert {name: body.get(name) for name in wanted} == wanted
    assert "seed" not in body


@pytest.mark.parametrize(
    ("choice", "finish", "text"),
    [
        ({"finish_reason": "stop", "stop_reason": None}, "eos", "x"),
        ({"finish_reason": "stop", "stop_reason": 151643}, "eos", "x"),
        ({"finish_reason": "stop", "stop_reason": "\n\n"}, "stop", "x\n\n"),
        ({"finish_reason": "length", "stop_reason": None}, "length", "x"),
        ({"finish_reason": "abort", "stop_reason": None}, "failed", "x"),
    ],
)
def test_finish_reasons_without_token_ids(fake: FakeServer, choice: Any, finish: str, text: str) -> None:
    body = {"choices": [{"text": "x", **choice}], "usage": {"completion_tokens": 4}}
    fake.fault = lambda path, _, count: (200, {}, body) if path == "/v1/completions" else None
    with ServerBackend("large", config(fake)) as backend:
        assert not backend.capabilities.token_ids and not backend.capabilities.prompt_logprobs
        done = backend.submit(ask()).result(10)
    assert (done.finish, done.text, done.tokens, done.token_ids) == (finish, text, 4, None)


def test_what_a_server_lacks_is_found_at_the_start(fake: FakeServer) -> None:
    with pytest.raises(ConfigError, match="does not serve 'fak'. Did you mean 'fake'?"):
        ServerBackend("large", config(fake, model="fak"))
    fake.card = {"id": "fake"}
    with pytest.raises(ConfigError, match="max_length"):
        ServerBackend("large", config(fake))
    with ServerBackend("large", config(fake, max_length=64)) as backend:
        assert backend.window == 64
    plain = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    fake.fault = lambda path, *_: (200, {}, plain) if path == "/v1/completions" else None
    with pytest.raises(ConfigError, match="stop_reason"):
        ServerBackend("large", config(fake, max_length=64))
    fake.fault = lambda path, *_: error_reply(404, "Not Found") if path == "/v1/completions" else None
    with pytest.raises(ConfigError, match="chat_only"):
        ServerBackend("large", config(fake, max_length=64))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[0.25, 0.75]], "1 rows for 2 step tags"),
        ([[-1.5, 2.5]] * 2, "not two probabilities"),
        ([0.5, 0.5], "0.5, not two"),
    ],
)
def test_wrong_scores_are_errors_not_scores(fake: FakeServer, rows: Any, words: str) -> None:
    with ServerBackend("scorer", config(fake), Reading(tag=TAG)) as backend:
        assert backend.submit(PoolingRequest((1, TAG, 2, TAG), (1, 3))).result(10) == [0.75, 0.75]
        fake.fault = lambda *_: (200, {}, {"data": [{"data": rows}]})
        with pytest.raises(BackendError, match=words) as caught:
            backend.submit(PoolingRequest((1, TAG, 2, TAG), (1, 3))).result(10)
        assert "--pooler-config" in str(caught.value) and "scorer" in str(caught.value)
        fake.fault = lambda *_: None
        assert backend.submit(PoolingRequest((TAG,), (0,))).result(10) == [0.75]
        with pytest.raises(ConfigError, match="CompletionRequest"):
            backend.submit(ask())


# ---------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("reply", [error_reply(500, "boom"), (200, {}, b"<html>"), (200, {}, {"choices": []}), DROP])
def test_a_passing_fault_is_retried(fake: FakeServer, reply: Any) -> None:
    with ServerBackend("large", config(fake)) as backend:
        pending = {"left": 1}

        def fault(path: str, body: Any, count: int) -> Any:
            if real(body) and pending["left"]:
                pending["left"] -= 1
                return reply
            return None

        fake.fault = fault
        assert backend.submit(ask()).result(10).finish == "stop"


def test_a_fault_of_one_request_fails_it_alone(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake)) as backend:
        fake.fault = lambda path, body, count: error_reply(500, "boom") if body and body["prompt"] == [66] else None
        bad, good = backend.submit(ask(66)), [backend.submit(ask(index)) for index in range(20)]
        assert {future.result(10).finish for future in good} == {"stop"}
        assert bad.result(10) == Completion("", 0, None, "failed", "HTTP 500: boom")
        assert sum(body["prompt"] == [66] for path, body in fake.seen if body) == 2  # once, and one retry


def test_refused_requests_fail_alone_with_the_servers_words(fake: FakeServer) -> None:
    fake.fault = lambda path, body, count: (
        error_reply(400, "too long") if body and len(body.get("prompt", ())) > 9 else None
    )
    with ServerBackend("large", config(fake)) as backend:
        assert backend.submit(ask(*range(50))).result(10).detail == "HTTP 400: too long"
        with pytest.raises(BackendError, match="large: http.*too long"):
            backend.submit(LogprobRequest(tuple(range(50)), 1)).result(10)
        assert backend.submit(ask()).result(10).finish == "stop"


def test_retry_after_pauses_all_requests(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake)) as backend:
        before = fake.counts["/v1/completions"]
        fake.fault = lambda path, body, count: (
            error_reply(429, "slow", **{"Retry-After": "1.5"}) if count == before else None
        )
        began = time.monotonic()
        first = backend.submit(ask())
        time.sleep(0.5)
        second = backend.submit(ask())
        assert second.result(10).finish == first.result(10).finish == "stop"
        assert 1.5 <= time.monotonic() - began < 8
        assert fake.counts["/v1/completions"] == before + 3


def test_a_rate_limit_uses_up_no_retries_while_others_are_served(fake: FakeServer) -> None:
    served = [0.0]

    def one_in_a_while(path: str, body: Any, count: int) -> Any:
        with fake.lock:
            if time.monotonic() - served[0] < 0.3:
                return error_reply(429, "slow")
            served[0] = time.monotonic()
            return None

    with ServerBackend("large", config(fake)) as backend:
        fake.fault = one_in_a_while
        futures = [backend.submit(ask()) for _ in range(8)]
        assert {future.result(60).finish for future in futures} == {"stop"}
        fake.fault = lambda *_: error_reply(429, "quota")
        gone(lambda: backend.submit(ask()), [backend.submit(ask())], "busy", "HTTP 429: quota", "concurrency")


def test_a_long_retry_after_is_an_error_at_once(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake)) as backend:
        fake.fault = lambda *_: error_reply(429, "quota", **{"Retry-After": "3600"})
        gone(lambda: backend.submit(ask()), [backend.submit(ask())], "3600 s", "quota")


# ---------------------------------------------------------------- faults that stay


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(BackendError, match=f"large: {url} gave no answer in 2 attempts .ClientConnectorError"):
        ServerBackend("large", ModelConfig(backend="server", model="fake", url=url, retries=1))
    for wrong in ("localhost:8000/v1", "http://host/v1?key=1", "http://host:port/v1", "us:pw@host"):
        with pytest.raises(ConfigError, match="large: `url`(?!.*pw)"):
            ServerBackend("large", ModelConfig(backend="server", model="fake", url=wrong))


def test_a_request_beyond_its_time_fails_and_is_not_redrawn(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake, timeout_s=1.5)) as backend:
        fake.fault = lambda path, body, count: HANG if body and body["prompt"] == [66] else None
        slow = [backend.submit(ask(66)), backend.submit(LogprobRequest((66,), 1))]
        assert backend.submit(ask()).result(10).finish == "stop"
        assert slow[0].result(20) == Completion("", 0, None, "failed", "no answer within 1.5 s")
        with pytest.raises(BackendError, match="no answer within 1.5 s"):
            slow[1].result(20)
        assert sum(body["prompt"] == [66] for path, body in fake.seen if body) == 2
        assert backend.submit(ask()).result(10).finish == "stop"
        fake.fault = lambda path, body, count: error_reply(504, "gateway") if real(body) else None
        assert backend.submit(ask()).result(10).detail == "HTTP 504: gateway"


def test_a_request_for_many_tokens_has_more_time(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake, timeout_s=0.4)) as backend:
        fake.fault = lambda path, body, count: time.sleep(0.8) if real(body) else None
        outcomes = {most: backend.submit(ask(max_tokens=most)) for most in (8, 512, 2048)}
        assert outcomes[8].result(10).detail == outcomes[512].result(10).detail == "no answer within 0.4 s"
        assert outcomes[2048].result(10).finish == "stop"
        fake.fault = lambda path, body, count: HANG if real(body) else None
        assert backend.submit(ask(max_tokens=2048)).result(20).detail == "no answer within 1.6 s"


def test_a_server_that_answers_heartbeats_only_is_no_server(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake, timeout_s=1.0, concurrency=32)) as backend:
        fake.fault = lambda path, body, count: HANG if real(body) else None
        futures = [backend.submit(ask(index)) for index in range(200)]
        outcomes = Counter("failed" if future.exception(30) is None else "raised" for future in futures)
        assert outcomes["raised"] >= 168
        gone(lambda: backend.submit(ask()), futures[-1:], "none of the last 32 requests", "timeout_s")


@pytest.mark.parametrize("reply", [HANG, DROP, error_reply(502, "bad gateway"), (200, {}, b"<html>login</html>")])
def test_a_server_that_went_bad_ends_everything(fake: FakeServer, reply: Any) -> None:
    with ServerBackend("large", config(fake, timeout_s=1.0, concurrency=4)) as backend:
        fake.fault = lambda *_: reply
        began = time.monotonic()
        gone(
            lambda: backend.submit(ask()),
            [backend.submit(ask(index)) for index in range(100)],
            "gave no answer in 2 attempts",
        )
        assert time.monotonic() - began < 12


def test_a_server_that_dies_in_the_middle(fake: FakeServer) -> None:
    with ServerBackend("large", config(fake, concurrency=4)) as backend:
        fake.delay = 0.05
        futures = [backend.submit(ask(index)) for index in range(400)]
        futures[8].result(10)
        fake.die()
        began = time.monotonic()
        outcomes = Counter(type(future.exception(20)) for future in futures)
        assert set(outcomes) == {type(None), BackendError} and outcomes[BackendError] > 300
        assert time.monotonic() - began < 10
        gone(lambda: backend.submit(ask()), futures[-1:])


@pytest.mark.parametrize("status", [401, 403, 402, 404, 301])
def test_a_lasting_refusal_is_not_retried(fake: FakeServer, status: int) -> None:
    with ServerBackend("large", config(fake, retries=9)) as backend:
        fake.fault = lambda *_: error_reply(status, "go away")
        began = time.monotonic()
        gone(
            lambda: backend.submit(ask()),
            [backend.submit(ask(index)) for index in range(10)],
            f"HTTP {status}: go away",
        )
        assert time.monotonic() - began < 3


def test_the_key_is_sent_and_never_shown(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    with pytest.raises(ConfigError, match="TRIM_TEST_KEY is not set"):
        ServerBackend("large", config(fake, api_key_env="TRIM_TEST_KEY"))
    monkeypatch.setenv("TRIM_TEST_KEY", KEY)
    url = fake.url.replace("//", "//user:hunter2@")
    with ServerBackend("large", config(fake, url=url, api_key_env="TRIM_TEST_KEY")) as backend:
        shown = repr(backend) + str(backend.describe())
        fake.fault = lambda *_: error_reply(401, f"Incorrect API key provided: {KEY}")
        with pytest.raises(BackendError, match="api_key_env") as caught:
            backend.submit(ask()).result(10)
    shown += str(caught.value) + repr(caught.value) + caplog.text
    assert KEY not in shown and "hunter2" not in shown and "provided: ***" in shown
    monkeypatch.setenv("TRIM_TEST_KEY", "sk-\u00e9")
    with pytest.raises(ConfigError, match="characters") as wrong:
        ServerBackend("large", config(fake, api_key_env="TRIM_TEST_KEY"))
    assert "sk-" not in str(wrong.value)


def test_at_most_so_many_requests_at_once_and_a_quick_end(fake: FakeServer) -> None:
    backend = ServerBackend("large", config(fake, concurrency=5))
    fake.delay = 0.02
    futures = [backend.submit(ask(index)) for index in range(50)]
    assert [future.result(10).finish for future in futures] == ["stop"] * 50
    assert 2 <= fake.most_busy <= 5
    fake.fault = lambda *_: HANG
    futures = [backend.submit(ask(index)) for index in range(50)]
    futures[0].cancel()
    began = time.monotonic()
    backend.close()
    backend.close()
    assert time.monotonic() - began < 2 and all(future.cancelled() for future in futures)
    with pytest.raises(BackendError, match="closed"):
        backend.submit(ask())
