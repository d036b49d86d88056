"""End to end: real vLLM servers, the router in front, the official client and curl; compared with cached trees."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from scipy import stats
from serve_harness import QUESTION, Router, policy
from vllm_server import VllmServer, VllmServers

from agents.evaluation.walk import references, run
from agents.learners.pomdp.fit import estimate
from agents.routers.base import Constant
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

pytestmark = pytest.mark.vllm

PROBLEMS = 200
CLIENTS = 32
_ERROR = {"message", "type", "param", "code"}  # where no handler of its own is asked, vLLM has a `detail` instead
LEVEL = 0.01  # of all comparisons together


@dataclass
class Served:
    router: Router
    small: VllmServer
    policy: Any


@pytest.fixture(scope="module")
def served(vllm_servers: VllmServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """TRIM-POMDP, as it has a memory, in front of the embedded family."""
    planned = estimate(compile_store("quickstart")).routers([3e-3])[0]
    urls = {role: server.url for role, server in vllm_servers._asdict().items()}
    running = Router(policy(tmp_path_factory.mktemp("policy"), planned), urls, upstream_timeout=60)
    yield Served(running, vllm_servers.small, planned)
    running.stop()


@dataclass
class Live:
    """What came back, (P,) each."""

    correct: np.ndarray
    large_tokens: np.ndarray
    steps: np.ndarray


@pytest.fixture(scope="module")
def live(served: Served) -> Live:
    problems = test_problems()

    async def solve(client: openai.AsyncOpenAI, slots: asyncio.Semaphore, index: int) -> tuple[str, Any, Any]:
        messages: Any = [{"role": "user", "content": problems[index].question}]
        async with slots:
            if index % 2:
                options: Any = {"include_usage": True}
                chunks = await client.chat.completions.create(
                    model="trim-pomdp", messages=messages, stream=True, stream_options=options
                )
                seen = [chunk async for chunk in chunks]
                text = "".join(chunk.choices[0].delta.content or "" for chunk in seen if chunk.choices)
                return text, seen[-1].usage, seen[-2].model_dump()["trim"]
            answer = await client.chat.completions.create(model="trim-pomdp", messages=messages)
            return answer.choices[0].message.content or "", answer.usage, answer.model_dump()["trim"]

    async def everything() -> list[tuple[str, Any, Any]]:
        client = openai.AsyncOpenAI(base_url=served.router.url, api_key="none", timeout=300, max_retries=0)
        slots = asyncio.Semaphore(CLIENTS)
        async with client:
            return list(await asyncio.gather(*(solve(client, slots, index) for index in range(PROBLEMS))))

    answers = asyncio.run(everything())
    with closing(make_grader("exact")) as grader:
        grades = grader.grade_many([(p.answer, text) for p, (text, _, _) in zip(problems, answers, strict=True)])
    assert not [trim["fallbacks"] for _, _, trim in answers if trim["fallbacks"]]
    return Live(
        np.array([grade.correct for grade in grades], float),
        np.array([usage.model_dump()["models"]["large"]["completion_tokens"] for _, usage, _ in answers], float),
        np.array([trim["steps"] for _, _, trim in answers], float),
    )


def test_problems() -> list[Any]:
    return Store("quickstart").problems("test")[:PROBLEMS]


test_problems.__test__ = False  # type: ignore[attr-defined]


def expected(router: Any) -> Live:
    """The same from the cached trees of the same problems."""
    outcomes = run(router, decision_tables("quickstart", "test"))
    place = {name: index for index, name in enumerate(outcomes.problem_ids)}
    rows = [place[problem.id] for problem in test_problems()]
    return Live(outcomes.correct[rows], outcomes.large_tokens[rows], outcomes.steps[rows])


def p_values(found: Live, wanted: Live) -> dict[str, float]:
    """Paired by problem."""
    values = {}
    for name in ("correct", "large_tokens", "steps"):
        difference = getattr(found, name) - getattr(wanted, name)
        values[name] = float(stats.ttest_1samp(difference, 0.0).pvalue) if difference.any() else 1.0
    return values


def test_accuracy_and_large_token_share_agree_with_the_evaluation(served: Served, live: Live) -> None:
    wanted = expected(served.policy)
    both = references(decision_tables("quickstart", "test"))
    rows = [list(both.large.problem_ids).index(problem.id) for problem in test_problems()]
    spent = both.large.large_tokens[rows].sum()
    found = p_values(live, wanted)
    print(
        f"accuracy {live.correct.mean():.3f} (evaluation {wanted.correct.mean():.3f}), large-token share "
        f"{live.large_tokens.sum() / spent:.3f} ({wanted.large_tokens.sum() / spent:.3f}), p {found}"
    )
    assert min(found.values()) > LEVEL / len(found), found
    assert 0.02 < live.large_tokens.sum() / spent < 0.9


def test_the_comparison_would_find_another_router(live: Live) -> None:
    for other in (Constant(0), Constant(1)):
        found = p_values(live, expected(other))
        assert min(found.values()) < LEVEL / len(found), found


def test_plain_curl(served: Served) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "trace": True})
    command = ["curl", "-sS", "-N", "--max-time", "60", f"{served.router.url}/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d"]
    whole = json.loads(subprocess.run([*command, body], capture_output=True, check=True).stdout)
    assert whole["object"] == "chat.completion" and whole["trim"]["trace"]
    body = json.dumps({**json.loads(body), "stream": True})
    lines = subprocess.run([*command, body], capture_output=True, check=True, text=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])


# ---------------------------------------------------------------- beside vLLM's own chat endpoint


def ask_both(served: Served, **more: Any) -> tuple[httpx.Response, httpx.Response]:
    """The same request to the router and to vLLM's own endpoint of the small model."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 200, **more}
    own = httpx.post(f"{served.small.url}/chat/completions", json={**body, "model": "tinymath-small"}, timeout=60)
    return served.router.client.post("/v1/chat/completions", json=body), own


def shape(value: Any) -> Any:
    """Keys and types; null and lists' lengths do not matter."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items() if each is not None}
    return [shape(each) for each in value][:1] if isinstance(value, list) else type(value).__name__


def contains(ours: Any, theirs: Any, place: str = "") -> None:
    if isinstance(theirs, dict):
        for name in theirs:
            assert name in ours, f"{place}.{name} is missing"
            contains(ours[name], theirs[name], f"{place}.{name}")
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            contains(one, other, place)
    else:
        assert ours == theirs, f"{place}: {ours} instead of {theirs}"


def test_answers_have_the_shape_of_vllms(served: Served) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    ours, own = ask_both(served)
    assert ours.status_code == own.status_code == 200
    assert ours.headers["content-type"] == own.headers["content-type"]
    contains(shape(ours.json()), shape(own.json()))
    assert set(own.json()["choices"][0]) - {"routed_experts"} <= set(ours.json()["choices"][0])
    assert set(own.json()["choices"][0]["message"]) <= set(ours.json()["choices"][0]["message"])
    ChatCompletionResponse.model_validate(ours.json())


def test_streams_have_the_shape_of_vllms(served: Served) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        ours, own = ask_both(served, stream=True, **options)
        assert ours.headers["content-type"] == own.headers["content-type"]
        events = [[line for line in answer.text.split("\n\n") if line] for answer in (ours, own)]
        assert {each[-1] for each in events} == {"data: [DONE]"}
        parsed = [[json.loads(line.removeprefix("data: ")) for line in each[:-1]] for each in events]
        for one, other in (
            (parsed[0][0], parsed[1][0]),
            (parsed[0][1], parsed[1][1]),
            (parsed[0][-1], parsed[1][-1]),
            (parsed[0][-2], parsed[1][-2]) if options else (parsed[0][-1], parsed[1][-1]),
        ):
            contains(shape(one), shape(other))


@pytest.mark.parametrize(
    "more",
    [
        {"model": "gpt"},
        {"messages": None},
        {"messages": "q"},
        {"max_tokens": -1},
        {"temperature": -1},
        {"top_p": 2},
        {"temperature": "warm"},
        {"stream_options": {"include_usage": True}},
        {"top_logprobs": 2},
        {"messages": [{"role": "user", "content": "7 " * 4000}]},
    ],
)
def test_errors_have_the_shape_and_status_of_vllms(served: Served, more: Any) -> None:
    body = {"model": "tinymath-small", "messages": [{"role": "user", "content": QUESTION}], **more}
    own = httpx.post(f"{served.small.url}/chat/completions", json=body, timeout=60)
    body = {**body, "model": more.get("model", "trim-pomdp")}
    ours = served.router.client.post("/v1/chat/completions", json=body)
    assert ours.status_code == own.status_code, (ours.text, own.text)
    assert {name: type(value) for name, value in ours.json()["error"].items() if name != "param"} == {
        name: type(value) for name, value in own.json()["error"].items() if name != "param"
    }
    assert set(ours.json()["error"]) == set(own.json()["error"])


def test_other_refusals_have_the_status_of_vllms(served: Served) -> None:
    url = "chat/completions"
    for content, headers in (
        (b"{", {"Content-Type": "application/json"}),
        (b"\xff", {"Content-Type": "application/json"}),
        (b"{}", {"Content-Type": "text/plain"}),
        (b"", {"Content-Type": "application/json"}),
    ):
        own = httpx.post(f"{served.small.url}/{url}", content=content, headers=headers)
        ours = served.router.client.post(f"/v1/{url}", content=content, headers=headers)
        assert ours.status_code == own.status_code, (content, ours.text, own.text)
        assert set(ours.json()["error"]) == _ERROR >= set(own.json().get("error", ()))
    for method, path in (("GET", url), ("GET", "nothing")):
        own = httpx.request(method, f"{served.small.url}/{path}")
        ours = served.router.client.request(method, f"/v1/{path}")
        assert ours.status_code == own.status_code and set(ours.json()["error"]) == _ERROR
    cards = [httpx.get(f"{base}/models").json() for base in (served.small.url, served.router.url)]
    assert set(cards[0]) <= set(cards[1]) and set(cards[0]["data"][0]) <= set(cards[1]["data"][0])
