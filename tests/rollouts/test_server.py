"""The HTTP backends: faults against a server that misbehaves on command, meaning against real vLLM servers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from vllm_server import VllmServer, free_port, vllm_servers

from rollouts.config import GeneratorConfig, ModelConfig
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import Completion, CompletionRequest, LogprobRequest, PoolingRequest, Sampling
from rollouts.models.chat import first_step, open_chat
from rollouts.models.server import ServerBackend, open_server
from rollouts.prompts import PromptFormat, RewardFormat, load_tokenizer
from rollouts.tinymath import STEP_TAG, model_dir

__all__ = ["vllm_servers"]

KEY = "sk-very-secret"
HANG, DROP = object(), object()
TAG = 9
Reply = tuple[int, dict[str, str], Any]  # status, headers, body (bytes, or something for JSON)


class FakeServer(ThreadingHTTPServer):
    """Answers like vLLM until `fault` (path, body, how many requests of that path before) returns something else."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault: Callable[[str, Any, int], Any] = lambda path, body, count: None
        self.seen: list[tuple[str, Any]] = []
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


# ---------------------------------------------------------------- what is asked and understood


def test_every_sampling_field_is_sent_and_no_seed(fake: FakeServer) -> None:
    with open_server("large", config(fake)) as backend:
        sampling = Sampling(0.3, 0.9, 20, 0.05)
        done = backend.submit(CompletionRequest((7, 8), 500, sampling, ("\n\n",), seed=3)).result(10)
        assert done == Completion("x\n\n", 2, (5, 6), "stop")
        assert backend.submit(LogprobRequest((7, 8, 9), 1)).result(10) == [-0.5, -0.5]
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
    with open_server("large", config(fake)) as backend:
        assert not backend.capabilities.token_ids and not backend.capabilities.prompt_logprobs
        done = backend.submit(ask()).result(10)
    assert (done.finish, done.text, done.tokens, done.token_ids) == (finish, text, 4, None)


def test_what_a_server_lacks_is_found_at_the_start(fake: FakeServer) -> None:
    with pytest.raises(ConfigError, match="does not serve 'fak'. Did you mean 'fake'?"):
        open_server("large", config(fake, model="fak"))
    fake.card = {"id": "fake"}
    with pytest.raises(ConfigError, match="max_length"):
        open_server("large", config(fake))
    with open_server("large", config(fake, max_length=64)) as backend:
        assert backend.window == 64
    plain = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    fake.fault = lambda path, *_: (200, {}, plain) if path == "/v1/completions" else None
    with pytest.raises(ConfigError, match="stop_reason"):
        open_server("large", config(fake, max_length=64))
    fake.fault = lambda path, *_: error_reply(404, "Not Found") if path == "/v1/completions" else None
    with pytest.raises(ConfigError, match="chat_only"):
        open_server("large", config(fake, max_length=64))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[0.25, 0.75]], "1 rows for 2 step tags"),
        ([[-1.5, 2.5]] * 2, "not two probabilities"),
        ([0.5, 0.5], "0.5, not two"),
    ],
)
def test_wrong_scores_are_errors_not_scores(fake: FakeServer, rows: Any, words: str) -> None:
    with open_server("scorer", config(fake), pooling=True, step_tag_id=TAG) as backend:
        assert backend.submit(PoolingRequest((1, TAG, 2, TAG))).result(10) == [0.75, 0.75]
        fake.fault = lambda *_: (200, {}, {"data": [{"data": rows}]})
        with pytest.raises(BackendError, match=words) as caught:
            backend.submit(PoolingRequest((1, TAG, 2, TAG))).result(10)
        assert "--pooler-config" in str(caught.value) and "scorer" in str(caught.value)
        fake.fault = lambda *_: None
        assert backend.submit(PoolingRequest((TAG,))).result(10) == [0.75]
        with pytest.raises(ConfigError, match="CompletionRequest"):
            backend.submit(ask())


# ---------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("reply", [error_reply(500, "boom"), (200, {}, b"<html>"), (200, {}, {"choices": []}), DROP])
def test_a_passing_fault_is_retried(fake: FakeServer, reply: Any) -> None:
    with open_server("large", config(fake)) as backend:
        pending = {"left": 1}

        def fault(path: str, body: Any, count: int) -> Any:
            if real(body) and pending["left"]:
                pending["left"] -= 1
                return reply
            return None

        fake.fault = fault
        assert backend.submit(ask()).result(10).finish == "stop"


def test_a_fault_of_one_request_fails_it_alone(fake: FakeServer) -> None:
    with open_server("large", config(fake)) as backend:
        fake.fault = lambda path, body, count: error_reply(500, "boom") if body and body["prompt"] == [66] else None
        bad, good = backend.submit(ask(66)), [backend.submit(ask(index)) for index in range(20)]
        assert {future.result(10).finish for future in good} == {"stop"}
        assert bad.result(10) == Completion("", 0, None, "failed", "HTTP 500: boom")
        assert sum(body["prompt"] == [66] for path, body in fake.seen if body) == 2  # once, and one retry


def test_refused_requests_fail_alone_with_the_servers_words(fake: FakeServer) -> None:
    fake.fault = lambda path, body, count: (
        error_reply(400, "too long") if body and len(body.get("prompt", ())) > 9 else None
    )
    with open_server("large", config(fake)) as backend:
        assert backend.submit(ask(*range(50))).result(10).detail == "HTTP 400: too long"
        with pytest.raises(BackendError, match="large: http.*too long"):
            backend.submit(LogprobRequest(tuple(range(50)), 1)).result(10)
        assert backend.submit(ask()).result(10).finish == "stop"


def test_retry_after_pauses_all_requests(fake: FakeServer) -> None:
    with open_server("large", config(fake)) as backend:
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

    with open_server("large", config(fake)) as backend:
        fake.fault = one_in_a_while
        futures = [backend.submit(ask()) for _ in range(8)]
        assert {future.result(60).finish for future in futures} == {"stop"}
        fake.fault = lambda *_: error_reply(429, "quota")
        gone(lambda: backend.submit(ask()), [backend.submit(ask())], "busy", "HTTP 429: quota", "concurrency")


def test_a_long_retry_after_is_an_error_at_once(fake: FakeServer) -> None:
    with open_server("large", config(fake)) as backend:
        fake.fault = lambda *_: error_reply(429, "quota", **{"Retry-After": "3600"})
        gone(lambda: backend.submit(ask()), [backend.submit(ask())], "3600 s", "quota")


# ---------------------------------------------------------------- faults that stay


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(BackendError, match=f"large: {url} gave no answer in 2 attempts .ConnectError"):
        open_server("large", ModelConfig(backend="server", model="fake", url=url, retries=1))
    for wrong in ("localhost:8000/v1", "http://host/v1?key=1", "http://host:port/v1", "us:pw@host"):
        with pytest.raises(ConfigError, match="large: `url`(?!.*pw)"):
            open_server("large", ModelConfig(backend="server", model="fake", url=wrong))


def test_a_request_beyond_its_time_fails_and_is_not_redrawn(fake: FakeServer) -> None:
    with open_server("large", config(fake, timeout_s=1.5)) as backend:
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


def test_a_server_that_answers_heartbeats_only_is_no_server(fake: FakeServer) -> None:
    with open_server("large", config(fake, timeout_s=1.0, concurrency=32)) as backend:
        fake.fault = lambda path, body, count: HANG if real(body) else None
        futures = [backend.submit(ask(index)) for index in range(200)]
        outcomes = Counter("failed" if future.exception(30) is None else "raised" for future in futures)
        assert outcomes["raised"] >= 168
        gone(lambda: backend.submit(ask()), futures[-1:], "none of the last 32 requests", "timeout_s")


@pytest.mark.parametrize("reply", [HANG, DROP, error_reply(502, "bad gateway"), (200, {}, b"<html>login</html>")])
def test_a_server_that_went_bad_ends_everything(fake: FakeServer, reply: Any) -> None:
    with open_server("large", config(fake, timeout_s=1.0, concurrency=4)) as backend:
        fake.fault = lambda *_: reply
        began = time.monotonic()
        gone(
            lambda: backend.submit(ask()),
            [backend.submit(ask(index)) for index in range(100)],
            "gave no answer in 2 attempts",
        )
        assert time.monotonic() - began < 12


def test_a_server_that_dies_in_the_middle(fake: FakeServer) -> None:
    with open_server("large", config(fake, concurrency=4)) as backend:
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
    with open_server("large", config(fake, retries=9)) as backend:
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
        open_server("large", config(fake, api_key_env="TRIM_TEST_KEY"))
    monkeypatch.setenv("TRIM_TEST_KEY", KEY)
    url = fake.url.replace("//", "//user:hunter2@")
    with open_server("large", config(fake, url=url, api_key_env="TRIM_TEST_KEY")) as backend:
        shown = repr(backend) + str(backend.describe())
        fake.fault = lambda *_: error_reply(401, f"Incorrect API key provided: {KEY}")
        with pytest.raises(BackendError, match="api_key_env") as caught:
            backend.submit(ask()).result(10)
    shown += str(caught.value) + repr(caught.value) + caplog.text
    assert KEY not in shown and "hunter2" not in shown and "provided: ***" in shown
    monkeypatch.setenv("TRIM_TEST_KEY", "sk-\u00e9")
    with pytest.raises(ConfigError, match="characters") as wrong:
        open_server("large", config(fake, api_key_env="TRIM_TEST_KEY"))
    assert "sk-" not in str(wrong.value)


def test_at_most_so_many_requests_at_once_and_a_quick_end(fake: FakeServer) -> None:
    backend = open_server("large", config(fake, concurrency=5))
    fake.delay = 0.02
    assert len([backend.submit(ask(index)).result for index in range(50)]) == 50
    backend.submit(ask()).result(10)
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


# ---------------------------------------------------------------- chat


def chat_config(server: FakeServer | VllmServer, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig(**{**config(server).model_dump(), **settings})


def chat_reply(content: str | None, reason: str = "stop", tokens: int = 5) -> Reply:
    choice = {"message": {"content": content}, "finish_reason": reason}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": tokens}}


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        ("Step 4: b=3", "b=3"),
        ("**Step 4:** b=3\n\nStep 5: c=4", "b=3"),
        ("**Step 4: Compute b**\n\nb=3\n\nc=4", "b=3"),
        ("### Step 4\nSo b=3", "So b=3"),
        ("4. So b=3", "So b=3"),
        ("4.5+1=5.5", "4.5+1=5.5"),
        ("12. So", "12. So"),
        ("Step 4 (add) - b=3", "b=3"),
        ("**Step 4: first,** then b=3", "**first,** then b=3"),
        ("The next step is to add 3.", "The next step is to add 3."),
        ("Step functions jump.", "Step functions jump."),
        ("---\n\nb=3\n\nc=4", "b=3"),
        ("<think>hm\n\nwell</think>\n\nb=3", "b=3"),
        ("<think>hm", ""),
        ("Step 4:", ""),
        ("\n\n---", ""),
    ],
)
def test_first_step_of_an_answer(answer: str, step: str) -> None:
    assert first_step(answer, 4)[0] == step


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([chat_reply("Step 3: c=7")], Completion("c=7\n\n", 5, None, "stop")),
        ([chat_reply("c=7\n\nd=8", "length")], Completion("c=7\n\n", 5, None, "stop")),
        ([chat_reply("c=7 and", "length")], Completion("c=7 and", 5, None, "length")),
        ([chat_reply("So \\boxed{7}.\n\nDone")], Completion("So \\boxed{7}.", 5, None, "eos")),
        (
            [chat_reply("## Step 3"), chat_reply("## Step 3\n\nc=7\n\nd", "stop", 9)],
            Completion("c=7\n\n", 14, None, "stop"),
        ),
        (
            [chat_reply(None, "content_filter")],
            Completion("", 5, None, "failed", "the server ended the answer with 'content_filter'"),
        ),
        ([error_reply(400, "no")], Completion("", 0, None, "failed", "HTTP 400: no")),
    ],
)
def test_chat_answers(fake: FakeServer, replies: list[Reply], expected: Completion) -> None:
    with open_chat("large", chat_config(fake)) as backend:
        first = len(fake.seen)
        fake.fault = lambda *_: replies[len(fake.seen) - first - 1]
        assert backend.submit("Find c.", ["a=1\n\n", "b=2\n\n"], 64, Sampling(0.5)).result(10) == expected
    asked = [body for _, body in fake.seen[first:]]
    assert len(asked) == len(replies)
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
    text = asked[0]["messages"][1]["content"]
    assert "Find c." in text and "Step 1: a=1\nStep 2: b=2\n" in text and "next step" in text and "\\boxed{}" in text
    assert (asked[0]["max_tokens"], asked[0]["temperature"], asked[0]["stop"]) == (64, 0.5, ["\n\n"])
    assert all("stop" not in body for body in asked[1:])


def test_chat_leaves_out_what_a_vendor_refuses(fake: FakeServer) -> None:
    def vendor(path: str, body: Any, count: int) -> Any:
        if path != "/v1/chat/completions":
            return error_reply(404, "nothing here")
        if "max_tokens" in body:
            return error_reply(
                400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            )
        refused = next((name for name in ("stop", "top_p", "min_p") if name in body), None)
        if refused:
            return error_reply(400, f"Unsupported parameter: '{refused}'")
        return error_reply(422, "Extra inputs are not permitted") if "top_k" in body else None

    fake.fault = vendor
    with open_chat("large", chat_config(fake, system_prompt=None)) as backend:
        done = backend.submit("Find a.", [], 64, Sampling(0.5)).result(10)
        assert done == Completion("a=1\n\n", 2, None, "stop") and backend.window is None
        assert backend.describe()["unsent"] == ["min_p", "repetition_penalty", "stop", "top_k", "top_p"]
        with pytest.raises(ConfigError, match="takes no top_k"):
            backend.submit("Find a.", [], 64, Sampling(0.5, top_k=5))
        fake.fault = lambda *_: error_reply(500, "boom")
        submit = partial(backend.submit, "Find a.", [], 64, Sampling(0.5))
        gone(submit, [submit()], "HTTP 500: boom")
    fake.fault = vendor
    with pytest.raises(ConfigError, match="refuses min_p = 0.1"):
        open_chat("large", chat_config(fake, sampling={"min_p": 0.1}))
    fake.fault = lambda path, *_: error_reply(404, "no such model") if "chat" in path else None
    with pytest.raises(BackendError, match="no such model.*Did you mean 'fake'"):
        open_chat("large", chat_config(fake, model="fak"))


# ---------------------------------------------------------------- real servers

QUESTION = "Let a=70+33, b=a+49, c=b*12. Find c."
STEPS = ["a=70+33=103\n\n", "b=a+49=103+49=152\n\n"]


@pytest.fixture(scope="module")
def small(vllm_servers: tuple[VllmServer, VllmServer]) -> Iterator[ServerBackend]:
    with open_server("small", config(vllm_servers[0], timeout_s=60)) as backend:
        yield backend


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    return PromptFormat(load_tokenizer(str(model_dir("small"))))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir("small"), dtype="float32").eval()


def logprobs(reference: Any, ids: tuple[int, ...]) -> Any:
    """Row i: log-probabilities of the token after ids[:i + 1]."""
    import torch

    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.vllm
def test_vllm_is_recognised(small: ServerBackend, vllm_servers: tuple[VllmServer, VllmServer]) -> None:
    assert small.window == 1024
    assert small.capabilities.token_ids and small.capabilities.prompt_logprobs and not small.capabilities.pooling
    described = small.describe()
    assert re.match(r"\d+\.\d+", described["version"]) and described["model"] == "tinymath-small"
    assert described["url"] == vllm_servers[0].url and described["root"].endswith("small")
    with pytest.raises(ConfigError, match="Did you mean 'tinymath-small'"):
        open_server("small", config(vllm_servers[0], model="tinymath-smal"))
    with pytest.raises(ConfigError, match="--runner pooling"):
        open_server("scorer", config(vllm_servers[0]), pooling=True, step_tag_id=3)
    with pytest.raises(ConfigError, match="does not continue token ids"):
        open_server("small", config(vllm_servers[1]))


@pytest.mark.vllm
def test_vllm_greedy_text_ids_and_count(small: ServerBackend, prompts: PromptFormat, reference: Any) -> None:
    prompt = prompts.ids(QUESTION, STEPS[:1])
    done = small.submit(ask(*prompt, max_tokens=30, temperature=0.0, stop=())).result(60)
    assert done.token_ids and done.tokens == len(done.token_ids)
    assert done.text == prompts.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    rows = logprobs(reference, prompt + done.token_ids)[len(prompt) - 1 : -1]
    for token, row in zip(done.token_ids, rows, strict=True):
        assert row[token] >= row.max() - 1e-3  # the likeliest token at every place
    # The same as one step: it ends with the stop string, which counts.
    end = done.text[4]
    cut = small.submit(ask(*prompt, max_tokens=30, temperature=0.0, stop=(end,))).result(60)
    length = done.text.index(end) + 1
    assert cut == Completion(done.text[:length], length, done.token_ids[:length], "stop")
    short = small.submit(ask(*prompt, max_tokens=3, temperature=0.0, stop=())).result(60)
    assert short == Completion(done.text[:3], 3, done.token_ids[:3], "length")


@pytest.mark.vllm
def test_vllm_end_of_sequence_is_no_stop_string(small: ServerBackend, prompts: PromptFormat) -> None:
    end = prompts.tokenizer.eos_token_id
    request = ask(*prompts.ids(QUESTION), max_tokens=2000, temperature=1.5, stop=("Q", "Z"))
    results = [future.result(60) for future in [small.submit(request) for _ in range(16)]]
    finishes = Counter(done.finish for done in results)
    assert finishes["eos"] and not finishes["failed"], finishes
    for done in results:
        assert done.token_ids and done.tokens == len(done.token_ids)
        assert (done.finish == "eos") == (done.token_ids[-1] == end)
        assert (done.finish == "stop") == done.text.endswith(("Q", "Z"))
        assert "<|im_end|>" not in done.text
    assert len({done.token_ids for done in results}) > 1


@pytest.mark.vllm
def test_vllm_logprobs_are_the_models(small: ServerBackend, prompts: PromptFormat, reference: Any) -> None:
    ids = prompts.ids(QUESTION, STEPS)
    start = len(prompts.ids(QUESTION))
    rows = logprobs(reference, ids)
    expected = [float(rows[place - 1, ids[place]]) for place in range(start, len(ids))]
    assert small.submit(LogprobRequest(ids, start)).result(60) == pytest.approx(expected, abs=2e-3)


@pytest.mark.vllm
def test_vllm_refuses_a_prompt_beyond_its_window(small: ServerBackend, prompts: PromptFormat) -> None:
    long = prompts.ids(QUESTION) * 40
    done = small.submit(ask(*long)).result(60)
    assert done.finish == "failed" and "1024" in done.detail and done.tokens == 0
    with pytest.raises(BackendError, match="small: http.*1024"):
        small.submit(LogprobRequest(long, 1)).result(60)
    full = small.submit(ask(*prompts.ids(QUESTION), max_tokens=5000, temperature=0.0, stop=())).result(60)
    assert full.finish in ("eos", "length")


@pytest.mark.vllm
def test_vllm_scores_are_the_reward_models(vllm_servers: tuple[VllmServer, VllmServer]) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, Qwen2Model

    prompts = RewardFormat(load_tokenizer(str(model_dir("prm"))), None, STEP_TAG)
    ids = prompts.ids(QUESTION, [*STEPS, "c=b*12=999\n\n"])
    weights = {name: value.float() for name, value in load_file(model_dir("prm") / "model.safetensors").items()}
    body = Qwen2Model(AutoConfig.from_pretrained(model_dir("prm"), dtype="float32")).float().eval()
    body.load_state_dict({name.removeprefix("model."): value for name, value in weights.items() if "score" not in name})
    with torch.inference_mode():
        hidden = body(torch.tensor([ids])).last_hidden_state[0]
        hidden = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
        scores = (hidden @ weights["score.2.weight"].T + weights["score.2.bias"]).softmax(-1)[:, 1]
    expected = [float(score) for token, score in zip(ids, scores, strict=True) if token == prompts.step_tag_id]
    with open_server("scorer", config(vllm_servers[1]), pooling=True, step_tag_id=prompts.step_tag_id) as backend:
        assert backend.capabilities.pooling and not backend.capabilities.continue_prefix
        futures = [backend.submit(PoolingRequest(ids)) for _ in range(8)]
        for future in futures:
            assert future.result(60) == pytest.approx(expected, abs=2e-3)
        with pytest.raises(BackendError, match="1024"):
            backend.submit(PoolingRequest(ids * 30)).result(60)
        assert backend.submit(PoolingRequest(ids)).result(60) == pytest.approx(expected, abs=2e-3)
    with pytest.raises(BackendError, match="rows for 2 step tags"):
        open_server("scorer", config(vllm_servers[1]), pooling=True, step_tag_id=prompts.step_tag_id - 1)


@pytest.mark.vllm
def test_vllm_chat_gives_one_step(vllm_servers: tuple[VllmServer, VllmServer]) -> None:
    with open_chat("large", chat_config(vllm_servers[0])) as backend:
        assert backend.window == 1024 and backend.describe()["unsent"] == []
        futures = [backend.submit(QUESTION, STEPS, 64, Sampling(1.0)) for _ in range(8)]
        for done in [future.result(60) for future in futures]:
            assert done.tokens > 0 and (done.finish == "failed" or done.text.strip())
            assert "\n\n" not in done.text.removesuffix("\n\n")
            assert done.text.endswith("\n\n") == (done.finish == "stop")
