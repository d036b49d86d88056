"""Several servers of one model: who is asked, and what becomes of requests and servers when one of them fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import step_server
from fake_server import DROP, HANG, TAG, FakeServer, ask, chat_config, config, error_reply, real, silent

from rollouts.__main__ import main
from rollouts.config import ModelConfig, ScorerConfig, parse_family
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import LogprobRequest, PoolingRequest
from rollouts.models.identity import served
from rollouts.models.server.chat import ChatWriter
from rollouts.models.server.completions import ServerBackend
from rollouts.models.server.pool import NobodyThere, Pool, another
from rollouts.scoring.judge import JudgeScorer
from rollouts.store.store import Store
from rollouts.text.prompts import Reading
from rollouts.tinymath import model_dir


@pytest.fixture
def pair() -> Iterator[tuple[FakeServer, FakeServer]]:
    servers = FakeServer(), FakeServer()
    yield servers
    for server in servers:
        server.released.set()
        server.die()


def of(pair: tuple[FakeServer, ...], **settings: Any) -> ModelConfig:
    return config(pair[0], **{"url": [server.url for server in pair], **settings})


def served_by(server: FakeServer) -> int:
    return sum(real(body) for _, body in server.seen)


# ---------------------------------------------------------------- who is asked


@dataclass(eq=False)
class Member:
    url: str
    busy: int = 0
    well: bool = True
    resting: bool = False


def taken(pool: Pool[Member], about: str = "", tried: Any = ()) -> str:
    async def once() -> str:
        async with pool.one(about, tried) as member:
            return member.url

    return asyncio.run(once())


def test_the_least_busy_that_is_well_is_asked() -> None:
    a, b, c = members = [Member("a"), Member("b"), Member("c")]
    pool = Pool(members, 8, patient=False)
    a.busy, b.busy, c.busy = 2, 1, 3
    assert taken(pool) == "b"
    b.well = False
    assert taken(pool) == "a"
    a.resting = True
    assert taken(pool) == "c"
    assert taken(pool, tried=[c]) == "c"  # rather than one that rests
    a.resting = False
    assert taken(pool, tried=[a]) == "c" and taken(pool, tried=[a, c]) == "a"
    for member in members:
        member.well = False
    with pytest.raises(NobodyThere):
        taken(pool)
    assert not pool.others([]) and [each.busy for each in members] == [2, 1, 3]


def test_requests_wait_in_turn_for_a_place_and_those_that_leave_give_it_on() -> None:
    async def run() -> list[int]:
        pool, order = Pool([Member("a")], 1, patient=True), list[int]()

        async def one(number: int) -> None:
            async with pool.one():
                order.append(number)
                await asyncio.sleep(0)

        async with pool.one():
            tasks = [asyncio.create_task(one(number)) for number in range(4)]
            await asyncio.sleep(0)
            tasks[1].cancel()
        tasks[0].cancel()  # its turn has come, but it has not noticed yet
        await asyncio.gather(*tasks, return_exceptions=True)
        return order

    assert asyncio.run(run()) == [2, 3]


def test_problems_stay_with_a_server_as_far_as_the_load_allows() -> None:
    """Of 64 requests under way some 80 % are with the server that had the last one about the same problem."""
    members = [Member(f"http://{name}:8000/v1") for name in "abcd"]
    pool, draw = Pool(members, 64, patient=False), random.Random(0)

    async def run() -> float:
        last, same, busiest = dict[str, Member](), 0, 0
        under_way: list[Any] = []
        for _ in range(4000):
            about = f"problem {draw.randrange(400)}"
            context = pool.one(about)
            member = await context.__aenter__()
            same += last.get(about) in (None, member)
            last[about] = member
            under_way.append(context)
            busiest = max(busiest, max(each.busy for each in members) - min(each.busy for each in members))
            if len(under_way) > 64:
                await under_way.pop(draw.randrange(len(under_way))).__aexit__(None, None, None)
        assert busiest <= 8
        return same / 4000

    assert 0.7 < asyncio.run(run())


def test_each_gets_its_share_by_how_quick_it_is_and_no_more_than_its_concurrency(pair: Any) -> None:
    with ServerBackend("large", of(pair, concurrency=4)) as backend:
        pair[0].delay, pair[1].delay = 0.05, 0.5
        pair[0].most_busy = pair[1].most_busy = 0
        assert all(future.result(30).finish == "stop" for future in [backend.submit(ask(i)) for i in range(80)])
    assert 2 <= pair[0].most_busy <= 4 and 2 <= pair[1].most_busy <= 4
    assert served_by(pair[0]) > 2 * served_by(pair[1]) > 10


def test_the_same_problem_and_the_tokens_of_one_path_go_to_one_server(pair: Any) -> None:
    with ServerBackend("large", of(pair)) as backend:
        for number in range(12):
            request = replace(ask(number, 8), about=f"problem {number % 3}")
            assert backend.submit(request).result(10).finish == "stop"
        for _ in range(3):
            backend.submit(LogprobRequest((5, 6, 7), 1)).result(10)
    where = {n: sum(body["prompt"][0] % 3 == n for _, body in pair[0].seen if real(body) and body["prompt"][1] == 8)
             for n in range(3)}  # fmt: skip
    assert set(where.values()) <= {0, 4}
    looked = [sum(real(body) and body["prompt"] == [5, 6, 7] for _, body in server.seen) for server in pair]
    assert sorted(looked) == [0, 3]


# ---------------------------------------------------------------- who fails


@pytest.mark.parametrize("reply", [DROP, error_reply(500, "boom"), error_reply(404, "gone"), (200, {}, b"<html>")])
def test_what_fails_at_one_is_done_by_another(pair: Any, reply: Any) -> None:
    with ServerBackend("large", of(pair, retries=2)) as backend:
        pair[0].fault = lambda *_: reply
        futures = [backend.submit(ask(number)) for number in range(40)]
        assert Counter(future.result(20).finish for future in futures) == {"stop": 40}


def test_a_server_that_dies_in_the_middle_costs_nothing(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    pair[0].delay = pair[1].delay = 0.02
    with ServerBackend("large", of(pair, concurrency=8, retries=1)) as backend:
        futures = [backend.submit(ask(number)) for number in range(200)]
        futures[20].result(10)
        pair[0].die()
        assert Counter(future.result(30).finish for future in futures) == {"stop": 200}
    assert f"large: {pair[0].url} gave no answer" in caplog.text and "The others go on." in caplog.text


def test_one_that_comes_back_is_asked_again_if_it_is_still_the_same(pair: Any) -> None:
    with ServerBackend("large", of(pair, retries=4)) as backend:
        pair[0].fault = lambda *_: DROP
        assert all(future.result(10).finish == "stop" for future in [backend.submit(ask(i)) for i in range(8)])
        pair[0].card = {"id": "fake", "max_model_len": 50}
        pair[0].fault = lambda *_: None
        other, end = backend._http._members[0], time.monotonic() + 20
        while "max_model_len 50 instead of 100" not in str(other.gone) and time.monotonic() < end:
            time.sleep(0.1)
        before = served_by(pair[0])
        assert all(future.result(10).finish == "stop" for future in [backend.submit(ask(i)) for i in range(8)])
        assert served_by(pair[0]) == before, "it has another model now"
        assert "serves another model" in str(other.gone)


def test_one_that_comes_back_gets_requests(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    with ServerBackend("large", of(pair, retries=4)) as backend:
        pair[0].fault = lambda *_: DROP
        assert all(future.result(10).finish == "stop" for future in [backend.submit(ask(i)) for i in range(8)])
        pair[0].fault = lambda *_: None
        end = time.monotonic() + 20
        while "answers again" not in caplog.text and time.monotonic() < end:
            time.sleep(0.1)
        before = served_by(pair[0])
        pair[0].delay = pair[1].delay = 0.05
        assert all(future.result(10).finish == "stop" for future in [backend.submit(ask(i)) for i in range(20)])
        assert served_by(pair[0]) >= before + 5


def test_all_gone_is_an_error_that_names_each(pair: Any) -> None:
    with ServerBackend("large", of(pair, retries=1)) as backend:
        for server, status in zip(pair, (401, 502), strict=True):
            server.fault = lambda *_, status=status: error_reply(status, "no")
        with pytest.raises(BackendError) as caught:
            backend.submit(ask()).result(20)
        words = str(caught.value)
        assert f"{pair[0].url} answered HTTP 401" in words and f"{pair[1].url} gave no answer in 2 attempts" in words
        with pytest.raises(BackendError, match="HTTP 401"):
            backend.submit(ask())
    for server in pair:
        server.die()
    with pytest.raises(BackendError) as caught:
        ServerBackend("large", of(pair, retries=0))
    assert all(f"{server.url} gave no answer in 1 attempts" in str(caught.value) for server in pair)


def test_one_that_is_not_there_at_the_start_is_gone_without(pair: Any) -> None:
    pair[0].die()
    with ServerBackend("large", of(pair)) as backend:
        assert backend.submit(ask()).result(10).finish == "stop"
        assert backend.describe()["servers"] == 2


def test_those_that_are_not_there_at_the_start_are_met_at_once(pair: Any) -> None:
    began = time.monotonic()
    with silent(4) as urls, ServerBackend("large", of(pair, url=[*urls, pair[0].url], timeout_s=1.0)) as backend:
        assert time.monotonic() - began < 5  # one after the other they take 8 s
        assert backend.submit(ask()).result(10).finish == "stop"


def test_a_request_that_is_too_slow_is_not_tried_elsewhere(pair: Any) -> None:
    """It would be drawn again until it is short."""
    with ServerBackend("large", of(pair, timeout_s=0.5)) as backend:
        for server in pair:
            server.fault = lambda path, body, count: HANG if real(body) else None
        assert backend.submit(ask(66)).result(20).detail == "no answer within 0.5 s"
    assert (
        sum(served_by(server) for server in pair)
        - sum(
            body is not None and body.get("prompt_logprobs") is not None and real(body)
            for s in pair
            for _, body in s.seen
        )
        == 1
    )


def test_a_pause_of_one_is_work_for_the_other(pair: Any) -> None:
    with ServerBackend("large", of(pair, concurrency=4)) as backend:
        pair[0].fault = lambda path, body, count: (
            error_reply(429, "slow", **{"Retry-After": "8"}) if real(body) else None
        )
        began = time.monotonic()
        assert all(future.result(10).finish == "stop" for future in [backend.submit(ask(i)) for i in range(40)])
        assert time.monotonic() - began < 6


# ---------------------------------------------------------------- who they are


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"max_model_len": 64}, "max_model_len 64 instead of 100"),
        ({"root": "/models/b"}, "root '/models/b' instead of '/models/a'"),
        ({"id": "other"}, "does not serve 'fake'"),
        ({"owned_by": "sglang"}, "owned_by 'sglang' instead of 'vllm'|does not continue"),
    ],
)
def test_servers_of_several_models_are_refused_by_name(pair: Any, card: dict[str, Any], words: str) -> None:
    for server in pair:
        server.card = {"id": "fake", "max_model_len": 100, "root": "/models/a", "owned_by": "vllm"}
    pair[1].card |= card
    with pytest.raises(ConfigError, match=f"large: {pair[1].url}.*({words})"):
        ServerBackend("large", of(pair))


def test_what_one_of_them_cannot_do_is_refused_by_name(pair: Any) -> None:
    plain = {
        "choices": [{"text": "x", "finish_reason": "stop", "stop_reason": None}],
        "usage": {"completion_tokens": 1},
    }
    pair[1].fault = lambda path, *_: (200, {}, plain) if path == "/v1/completions" else None
    with pytest.raises(ConfigError, match=f"{pair[1].url} serves another.*token_ids False instead of True"):
        ServerBackend("large", of(pair))


def judge(settings: ModelConfig) -> JudgeScorer:
    return JudgeScorer("s", ScorerConfig(kind="judge", model=settings, max_tokens=8), {})


def test_reward_models_judges_and_chats_may_have_several_too(pair: Any) -> None:
    for server in pair:
        server.delay = 0.02
    with ServerBackend("scorer", of(pair), Reading(tag=TAG)) as backend:
        futures = [backend.submit(PoolingRequest((number, TAG), (1,))) for number in range(20)]
        pair[0].fault = lambda *_: DROP
        assert all(future.result(20) == [0.75] for future in futures)
    pair[0].fault = lambda *_: None
    settings = chat_config(pair[0], url=[server.url for server in pair])
    for made in (judge(settings), ChatWriter("large", settings, None, None)):  # type: ignore[arg-type]
        assert made.describe()["servers"] == 2
        made.close()
    for server in pair:
        server.card = {"id": "fake", "root": server.url}
    for build in (lambda: judge(settings), lambda: ChatWriter("large", settings, None, None)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="serves another model"):
            build()


@pytest.mark.parametrize("role", ["scorer", "large"])
def test_one_that_comes_later_and_takes_less_changes_nothing_for_the_others(pair: Any, role: str) -> None:
    settings = chat_config(pair[0], url=[server.url for server in pair])
    pair[1].fault = lambda *_: DROP
    made: Any = judge(settings) if role == "scorer" else ChatWriter(role, settings, None, None)  # type: ignore[arg-type]
    before, other = str(made.describe()), made._http._members[1]
    refused = "logprobs" if role == "scorer" else "top_k"
    pair[1].fault = lambda path, body, *_: (
        error_reply(400, f"unknown field {refused}") if refused in (body or {}) else None
    )
    end = time.monotonic() + 20
    while "refuses a chat" not in str(other.gone) and not other.well and time.monotonic() < end:
        time.sleep(0.05)
    assert str(made.describe()) == before and not other.well
    made.close()


def test_a_manifest_has_no_addresses(pair: Any) -> None:
    with ServerBackend("large", of(pair)) as backend:
        told = backend.describe()
    assert told["servers"] == 2 and "127.0.0.1" not in str(told)
    assert served(told) == {"name": "fake", "window": 100}


def test_how_several_are_written() -> None:
    def model(url: Any) -> dict[str, Any]:
        return {"backend": "server", "model": "m", "url": url}

    for some in (["http://a/v1", "http://b/v1"], "http://a/v1, http://b/v1"):
        assert parse_family({"small": model(some), "large": model("http://c/v1")}).small.url == (
            "http://a/v1",
            "http://b/v1",
        )
    for wrong, words in ((["http://a/v1", "http://a/v1/"], "twice"), ([], "needs it"), (5, "url"), ([5], "url")):
        with pytest.raises(ConfigError, match=f"small.*{words}"):
            parse_family({"small": model(wrong), "large": model("http://c/v1")})
    assert another({"a": 1, "b": None, "c": 3, "version": 1}, {"a": 1, "b": 2, "version": 2}) == ""


# ---------------------------------------------------------------- a whole run


def generated(folder: Path, small: list[str], large: list[str]) -> list[Any]:
    sections = [
        f'[{role}]\nbackend = "server"\nmodel = "{role}"\nurl = {urls!r}\ntokenizer = "{model_dir(role)}"\n'
        f"max_length = 1024\nconcurrency = 8\nretries = 1\nsystem_prompt = ''\n"
        for role, urls in (("small", small), ("large", large))
    ]
    folder.mkdir()
    (folder / "models.toml").write_text("\n".join(sections) + "[limits]\nmax_steps = 6\n")
    asked = ["--problems", "tinymath:test", "--limit", "4", "--max-escalations", "2", "--no-score"]
    assert main(["generate", str(folder / "store"), *asked, "--models", str(folder / "models.toml")]) == 0
    assert main(["verify", str(folder / "store")]) == 0
    columns = ["problem", "replica", "prefix", "role", "text", "tokens", "stop_reason"]
    return [row for table in Store(folder / "store").steps.read(columns=columns) for row in table.to_pylist()]


def test_a_server_that_is_killed_while_rollouts_are_generated(tmp_path: Path) -> None:
    """The store is that of a run without a fault: complete, and nothing is in it twice."""
    with step_server.running(("small", 0), ("large", 0), ("small", 20), ("large", 12)) as urls:
        whole = generated(tmp_path / "whole", urls[:1], urls[1:2])
        found = generated(tmp_path / "killed", [urls[2], urls[0]], [urls[1], urls[3]])
        assert len(whole) > 50

        def rows(some: list[Any]) -> list[str]:
            return sorted(map(str, some))

        assert rows(found) == rows(whole) and len(set(rows(found))) == len(found)
        assert not any(row["stop_reason"] == "failed" for row in found)
