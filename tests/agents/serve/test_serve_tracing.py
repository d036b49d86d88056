"""Who asks, told to upstreams (ids, W3C trace context), and requests and steps as spans for a real collector."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from fake_server import HANG, error_reply
from serve_harness import QUESTION, ROLES, Router, policy
from starlette.datastructures import Headers
from test_serve_upstreams import Trio

from agents.serve import upstreams as probing
from agents.serve.tracing import Trace
from rollouts.errors import ConfigError

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT, STATE = f"00-{TRACE}-{SPAN}-01", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
SENT = {"traceparent": PARENT, "tracestate": STATE, "X-Request-ID": "abc-9"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


class Longer(Trio):
    """Solutions of three steps, the second of which is worth little."""

    def good(self, path: str, body: Any) -> Any:
        if path == "/v1/chat/completions":
            return {"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}]}
        answer = super().good(path, body)
        if path == "/pooling":
            count = len(answer["data"][0]["data"])
            answer["data"][0]["data"] = [[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]][:count]
        elif path == "/v1/completions" and body["max_tokens"] > 1 and len(body["prompt"]) > 60:
            answer["choices"][0] |= {"text": "So \\boxed{7}", "stop_reason": None}
        return answer

    def asked_for(self) -> list[tuple[str, dict[str, str]]]:
        """Paths and headers of what was asked for a request, and forget them."""
        found = [(path, heads) for path, heads in self.heads if "x-request-id" in heads]
        self.heads.clear()
        return found


@pytest.fixture(scope="module")
def trio() -> Iterator[Longer]:
    server = Longer()
    yield server
    server.die()


class Collector(ThreadingHTTPServer):
    """Where spans are sent by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def take(self, count: int, within: float = 10) -> list[Any]:
        """The next spans, by their beginning, and forget them."""
        end = time.monotonic() + within
        while len(self.spans) < count:
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.02)
        found, self.spans = sorted(self.spans, key=lambda span: span.start_time_unix_nano), []
        assert len(found) == count
        return found


class _Taking(BaseHTTPRequestHandler):
    server: Collector

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert self.path == "/v1/traces"
        body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for each in body.resource_spans:
            self.server.resources.append(told(each.resource))
            self.server.spans += [span for scope in each.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()


def told(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


def running(trio: Trio, folder: Path, **settings: Any) -> Iterator[Router]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "_PAUSE_S", 0.05)
        router = Router(folder, dict.fromkeys(ROLES, trio.url), upstream_timeout=2.0, otherwise="large", **settings)
        yield router
        router.stop()


@pytest.fixture(scope="module")
def plain(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    yield from running(trio, policy(tmp_path_factory.mktemp("plain")), shadow="large")


@pytest.fixture(scope="module")
def noted(trio: Trio, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=here")
        yield from running(trio, policy(tmp_path_factory.mktemp("noted")), otel=True)


def chat(router: Router, headers: Any = SENT, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": QUESTION}], **more}
    return router.client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"tools": TOOLS}])
def test_upstreams_are_told_whose_request_they_are_asked_for(plain: Router, trio: Longer, more: Any) -> None:
    trio.heads.clear()
    more = {**more, "trace": True}  # which waits for the shadow
    assert chat(plain, **more).status_code == 200
    asked = trio.asked_for()
    assert {path for path, _ in asked} == (
        {"/v1/chat/completions"} if "tools" in more else {"/v1/completions", "/pooling"}
    )
    for _, heads in asked:
        assert (heads["traceparent"], heads["tracestate"], heads["x-request-id"]) == (PARENT, STATE, "abc-9")
    own = chat(plain, {}, **more).headers["X-Request-ID"]
    for _, heads in trio.asked_for():
        assert heads["x-request-id"] == own and not {"traceparent", "tracestate"} & {*heads}


@pytest.mark.parametrize(
    ("parents", "kept"),
    [
        ([PARENT], True),
        ([PARENT.replace("-01", "-00")], True),
        ([f"cc-{TRACE}-{SPAN}-01-what-comes-later"], True),
        ([f"{PARENT}-more"], False),
        ([f"ff-{TRACE}-{SPAN}-01"], False),
        ([f"00-{'0' * 32}-{SPAN}-01"], False),
        ([f"00-{TRACE}-{'0' * 16}-01"], False),
        ([PARENT.upper()], False),
        ([PARENT, PARENT], False),
        ([PARENT + "\u00e9"], False),
        (["x"], False),
        ([""], False),
        ([], False),
    ],
)
def test_a_parent_that_is_none_is_not_handed_on_nor_is_its_state(parents: list[str], kept: bool) -> None:
    raw = [(b"traceparent", each.encode("latin-1")) for each in parents]
    for states, state in (
        ([], None),
        ([STATE], STATE),
        (["a=1", "b=2"], "a=1,b=2"),
        (["a=" + "x" * 600], None),
        (["a=\u00e9"], None),
    ):
        heads = Headers(raw=[*raw, *((b"tracestate", each.encode("latin-1")) for each in states)])
        expected = {"traceparent": parents[0], **({"tracestate": state} if state else {})} if kept else {}
        assert Trace(heads).headers() == expected


def test_probes_are_of_no_request(plain: Router, trio: Longer) -> None:
    broken = error_reply(500, "boom")
    trio.wrong, trio.probes_too = {"prm": broken}, True
    chat(plain)
    plain.wait_down("scorer")
    trio.heads.clear()
    trio.wrong, trio.probes_too = {}, False
    plain.wait_up()
    assert trio.heads and not trio.asked_for()


def test_requests_and_steps_are_spans_of_the_trace(noted: Router, trio: Longer, collector: Collector) -> None:
    trio.heads.clear()
    answer = chat(noted, trace=True, model="trim-thr", max_tokens=64).json()
    steps = answer["trim"]["trace"]
    asked = trio.asked_for()
    request, *others = collector.take(len(steps) + 1)
    assert request.name == "chat" and request.kind == request.SPAN_KIND_SERVER
    assert request.trace_id.hex() == TRACE and request.parent_span_id.hex() == SPAN
    assert request.trace_state == STATE
    about = told(request)
    assert (about["trim.policy"], about["trim.threshold"], about["trim.request_id"]) == ("trim-thr", 0.5, "abc-9")
    assert about["trim.status"] == about["http.response.status_code"] == 200
    assert about["gen_ai.request.model"] == "trim-thr" and about["trim.steps"] == len(steps) > 2
    assert about["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert about["trim.large_token_share"] == answer["trim"]["large_token_share"] > 0
    for place, (span, step) in enumerate(zip(others, steps, strict=True), 1):
        assert span.name == "step" and span.parent_span_id == request.span_id and span.trace_id == request.trace_id
        about = told(span)
        for name in ("author", "action", "chance", "score", "tokens", "large_tokens", "stop_reason"):
            assert about.get(f"trim.{name}") == step[name], name
        assert about["trim.step"] == place and about["trim.policy"] == "trim-thr"
        assert not any(str(value) in (step["text"], step["rejected"]) for value in about.values())
    sent = [re.fullmatch(f"00-{TRACE}-([0-9a-f]{{16}})-01", heads["traceparent"]) for _, heads in asked]
    assert {found[1] for found in sent if found} == {span.span_id.hex() for span in others} and all(sent)
    assert {heads["tracestate"] for _, heads in asked} == {STATE}
    resource = collector.resources[-1]
    assert resource["service.name"] == "trim-routing" and resource["deployment.environment"] == "here"


def test_requests_without_a_trace_begin_one(noted: Router, trio: Longer, collector: Collector) -> None:
    assert chat(noted, {}, stream=True).status_code == 200
    request, *steps = collector.take(4)
    assert not request.parent_span_id and {span.trace_id for span in steps} == {request.trace_id}
    assert {heads["traceparent"][3:35] for _, heads in trio.asked_for()} == {request.trace_id.hex()}
    assert noted.client.get("/v1/models").status_code == 200 and chat(noted, messages=[]).status_code == 400
    [refused] = collector.take(1)
    assert told(refused)["http.response.status_code"] == 400 and refused.status.code == 0


def test_a_trace_that_is_not_sampled_is_not_sent_but_handed_on(
    noted: Router, trio: Longer, collector: Collector
) -> None:
    trio.heads.clear()
    assert chat(noted, {**SENT, "traceparent": PARENT[:-2] + "00"}).status_code == 200
    assert chat(noted, {}, tools=TOOLS).status_code == 200
    [passed] = collector.take(1)
    assert told(passed)["trim.passed_to"] == "large" and told(passed)["trim.status"] == 200
    heads = [heads["traceparent"] for path, heads in trio.asked_for() if "chat" not in path]
    assert heads and all(each.startswith(f"00-{TRACE}-") and each.endswith("-00") for each in heads)


def test_what_fails_is_marked_without_words_of_models(noted: Router, trio: Longer, collector: Collector) -> None:
    secret = (200, {}, {"choices": [{"text": "a secret", "finish_reason": "odd"}]})
    trio.wrong = {"small": secret, "large": secret}
    assert chat(noted).status_code == 503
    trio.wrong = {"small": HANG}
    with pytest.raises(httpx.ReadTimeout):
        noted.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=0.3)
    trio.wrong = {}
    failed, step, left, waiting = collector.take(4)
    assert failed.status.code == step.status.code == 2 and told(failed)["trim.status"] == 503
    assert told(left)["trim.status"] == 499 and waiting.status.code == 0 and told(waiting)["trim.step"] == 1
    assert "secret" not in str([failed, step])


def test_the_end_waits_for_no_collector_but_sends_what_there_is(
    trio: Longer, collector: Collector, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    (router,) = [*started(trio, folder)]
    chat(router)
    router.stop()
    assert collector.take(4) and collector.resources[-1]["service.name"] == "mine"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    (router,) = [*started(trio, folder)]
    assert chat(router).status_code == 200
    began = time.monotonic()
    router.stop()
    assert time.monotonic() - began < 8


def test_an_environment_that_opentelemetry_refuses_is_one_line(
    trio: Longer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    with pytest.raises(ConfigError, match="--otel: .* OTEL_.*max_queue_size"):
        next(started(trio, folder))


def started(trio: Trio, folder: Path) -> Iterator[Router]:
    yield Router(folder, dict.fromkeys(ROLES, trio.url), otel=True)
