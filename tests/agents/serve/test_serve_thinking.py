"""The service before models that think: real weights behind servers, what clients are told, who writes the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_server import EngineServer
from serve_harness import Router, policy, streamed
from thinking_models import MARKS, thinking_family
from thread_engine import in_threads

from agents.deploy.policy import Policy, load
from agents.routers.base import Constant, Threshold
from agents.serve.command import Server
from agents.serve.config import ServeConfig
from agents.serve.models import Task
from agents.serve.route import Route, RouteFailed
from agents.serve.upstreams import Unavailable
from rollouts.config import Limits, Sampling, StepsConfig
from rollouts.errors import ArtefactError, ConfigError
from rollouts.family import Family
from rollouts.models.open import open_backend
from rollouts.tasks.problems import load_problems
from rollouts.text.splitting import Splitting
from rollouts.text.steps import CLOSE, Step, StopReason

PROBLEMS = list(load_problems("tinymath:test", limit=4))
NAMES = {"small": "thinking-small", "large": "thinking-large", "scorer": "tinymath-prm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, EngineServer]]:
    config = thinking_family(folder)
    reading = Family(config).reward_prompts.reading  # type: ignore[union-attr]
    models = {"small": config.small, "large": config.large, "prm": config.scorer.model}  # type: ignore[union-attr]
    with ExitStack() as stack:
        found = {}
        for role, model in models.items():
            with in_threads():
                backend = open_backend(role, model, seed=5, reading=reading if role == "prm" else None)
            stack.callback(backend.close)
            found[role] = EngineServer(backend, model.display_name, reading.tag)
            stack.callback(found[role].die)
        yield found


def toml(value: Any) -> str:
    return json.dumps(value)


def models_file(path: Path, folder: Path, **steps: Any) -> Path:
    """What `thinking_family` is, as a user writes it."""
    config = thinking_family(folder, **steps)
    lines = ["[limits]", *(f"{name} = {getattr(config.limits, name)}" for name in ("solution_tokens", "max_steps"))]
    lines += ["[steps]", *(f"{name} = {toml(value)}" for name, value in {"split": "thinking", **steps}.items())]
    lines += [] if "max_thinking_tokens" in steps else ["max_thinking_tokens = 300"]
    for section, model in (("small", config.small), ("large", config.large), ("scorer.model", config.scorer.model)):  # type: ignore[union-attr]
        lines += ["[scorer]", 'name = "tinymath-prm"', 'system_prompt = ""'] if section == "scorer.model" else []
        lines += [f"[{section}]", 'backend = "transformers"', 'dtype = "float64"', "max_length = 1024"]
        lines += [f"model = {toml(model.model)}", f"name = {toml(model.display_name)}"]
        lines += [] if section == "scorer.model" else ['system_prompt = ""', f"think = {toml(MARKS[section])}"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def made(
    folder: Path, servers: dict[str, EngineServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Router]]:
    monkeypatch.setattr("agents.serve.upstreams._CONNECT_S", 60.0)  # models and servers share this process
    with ExitStack() as stack:

        def make(router: Any = None, **steps: Any) -> Router:
            models = models_file(tmp_path / "models.toml", folder, **steps)
            splitting = Splitting(thinking_family(folder, **steps).steps).described()
            place = policy(tmp_path, router, **NAMES, splitting=splitting)
            urls = {role: server.url for role, server in servers.items()}
            running = Router(place, urls, models=str(models), upstream_timeout=60)
            stack.callback(running.stop)
            return running

        yield make


def test_thinking_is_told_apart_from_the_answer(made: Callable[..., Router]) -> None:
    router = made(Threshold(0.5))
    for problem in PROBLEMS[:2]:
        body = router.chat(problem.question, trace=True).json()
        message, usage, trim = body["choices"][0]["message"], body["usage"], body["trim"]
        assert message["content"].startswith("he answer is \\boxed{") and body["choices"][0]["finish_reason"] == "stop"
        thought = message["reasoning_content"]
        assert thought == message["reasoning"] and thought.startswith("a=") and "think" not in thought.lower()
        assert [step["thinking"] for step in trim["trace"]] == [True] * trim["thinking"]["steps"] + [False]
        accepted = [step["large_tokens"] if step["author"] == "large" else step["tokens"] for step in trim["trace"]]
        details = usage["completion_tokens_details"]
        assert details["reasoning_tokens"] == sum(accepted[:-1]) and details["accepted_tokens"] == sum(accepted)
        assert usage["completion_tokens"] >= sum(accepted) and not trim["thinking"]["forced"]
        assert trim["trace"][-2]["text"].endswith(CLOSE + "\n\n") and not trim["fallbacks"]


def test_streams_tell_it_before_the_answer(made: Callable[..., Router]) -> None:
    chunks = list(streamed(made(), PROBLEMS[0].question, stream_options={"include_usage": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    kinds = ["".join(sorted(delta)) for delta in deltas if delta.get("content") != ""]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"content", "reasoningreasoning_content"}
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert thought.startswith("a=") and "think" not in thought.lower()
    assert "".join(delta.get("content", "") for delta in deltas).startswith("he answer is \\boxed{")
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_responses_tell_it_as_an_item_of_its_own(made: Callable[..., Router], stream: bool) -> None:
    client = openai.OpenAI(base_url=made().url, api_key="none", max_retries=0)
    if stream:
        with client.responses.stream(model="trim-thr", input=PROBLEMS[0].question) as events:
            response: Any = events.until_done().get_final_response()
    else:
        response = client.responses.create(model="trim-thr", input=PROBLEMS[0].question)
    thought, answer = response.output
    assert (thought.type, answer.type) == ("reasoning", "message") and thought.status == answer.status == "completed"
    assert thought.content[0].text.startswith("a=") and "think" not in thought.content[0].text.lower()
    assert response.output_text.startswith("he answer is \\boxed{")
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_block_that_is_too_long_is_closed_and_answered(made: Callable[..., Router]) -> None:
    body = made(max_thinking_tokens=40).chat(PROBLEMS[0].question, trace=True).json()
    assert body["trim"]["thinking"]["forced"] and body["choices"][0]["message"]["content"].strip()
    assert [step["stop_reason"] for step in body["trim"]["trace"] if step["thinking"]][-1] == "forced"


@pytest.mark.parametrize(("by", "router"), [("small", Constant(1)), ("large", Constant(0))])
def test_one_alone_writes_the_answer(made: Callable[..., Router], servers: Any, by: str, router: Any) -> None:
    """Whatever the policy would have done: it is not asked."""
    service = made(router, answer_by=by)
    for server in servers.values():
        server.seen.clear()
    body = service.chat(PROBLEMS[1].question, trace=True).json()
    *thoughts, answer = body["trim"]["trace"]
    assert answer["author"] == by and answer["action"] is None and not answer["thinking"]
    assert {step["author"] for step in thoughts} == {"large" if by == "small" else "small"}
    assert body["choices"][0]["message"]["content"] == answer["text"] and not body["trim"]["fallbacks"]
    prompts = {role: service.server.models.family.prompts(role) for role in MARKS}
    closes = {role: prompts[role].encode(MARKS[role][1])[0] for role in MARKS}
    of_answers = {
        role
        for role in MARKS
        for path, asked in servers[role].seen
        if path == "/v1/completions" and closes[role] in asked["prompt"]
    }
    assert of_answers == {by}


def test_what_a_request_may_say_of_thinking(made: Callable[..., Router]) -> None:
    router = made()
    for more in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        answer = router.chat(PROBLEMS[0].question, **more)
        assert answer.status_code == 400 and "thinks before it answers" in answer.json()["error"]["message"]
    assert router.chat(PROBLEMS[0].question, chat_template_kwargs={"enable_thinking": True}).status_code == 200


@pytest.mark.parametrize(
    "trained", [None, {"name": "blank-line", "version": 1}, Splitting(StepsConfig(split="thinking")).described()]
)
def test_a_policy_for_other_steps_is_refused(folder: Path, tmp_path: Path, trained: Any) -> None:
    place = policy(tmp_path, **NAMES, **({} if trained is None else {"splitting": trained}))
    models = models_file(tmp_path / "models.toml", folder)
    urls = {role: "http://127.0.0.1:9/v1" for role in ("small", "large", "prm")}
    with pytest.raises(ConfigError, match=r"trained on steps that are split by .*set its \[steps\] so"):
        Server(ServeConfig(policy=str(place), models=str(models), port=0, **urls))  # type: ignore[arg-type]


def test_policies_keep_the_splitting_and_older_versions_refuse_it(tmp_path: Path) -> None:
    splitting = Splitting(StepsConfig(split="thinking", min_tokens=5)).described()
    place = policy(tmp_path, splitting=splitting)
    assert load(place).describe()["splitting"] == splitting
    assert json.loads((place / "policy.json").read_text())["version"] == 6
    plain = policy(tmp_path, splitting=Splitting().described())
    assert json.loads((plain / "policy.json").read_text())["version"] < 6
    for wrong in ({"name": 7, "version": 1}, {"name": "thinking", "version": 0}):
        with pytest.raises(ArtefactError, match="splitting"):
            policy(tmp_path, splitting=wrong)


def test_sessions_want_to_know_what_is_thinking(tmp_path: Path) -> None:
    policy_of = load(policy(tmp_path, Threshold(0.5), splitting=Splitting(StepsConfig(split="thinking")).described()))
    session = policy_of.session()
    with pytest.raises(ConfigError, match="thinking=True"):
        session.decide(score=0.9, tokens=3, text="so \\boxed{3}\n\n")
    assert session.decide(score=0.9, tokens=3, text="so \\boxed{3}\n\n", thinking=True) == 0
    session.accept()
    assert not session.ended
    assert session.decide(score=0.9, tokens=3, text="It is \\boxed{3}", thinking=False) == 0
    session.accept()
    assert session.ended


@pytest.mark.parametrize(("by", "router"), [("small", Constant(1)), ("large", Constant(0))])
@pytest.mark.parametrize("text", [{"text": "It is \\boxed{3}"}, {"terminal": True, "has_answer": True}])
def test_sessions_leave_the_answer_to_whoever_writes_it_alone(tmp_path: Path, by: str, router: Any, text: Any) -> None:
    """Before, the large model was called where it had no say in training, which counted as an escalation."""
    splitting = Splitting(StepsConfig(split="thinking", answer_by=by)).described()  # type: ignore[arg-type]
    session = load(policy(tmp_path, router, splitting=splitting, max_escalations=1)).session()
    thought, action = int(by == "small"), int(by == "large")
    assert session.decide(score=0.9, tokens=3, text="so\n\n", thinking=True) == thought
    session.accept(**({"score": 0.5, "tokens": 4} if thought else {}))  # type: ignore[arg-type]
    assert session.decide(score=0.9, tokens=3, **text, thinking=False) == action
    session.accept(**({"score": 0.5, "tokens": 4, "terminal": True} if action else {}))  # type: ignore[arg-type]
    assert session.ended and session.escalations == thought and session.large_tokens == 4


# ---------------------------------------------------------------- without a model


class Thinkers:
    """Scripted models: two steps of thinking, then an answer; a role in `down` answers no more after the block."""

    def __init__(self, *down: str) -> None:
        self.down = down

    async def step(self, role: str, task: Task, steps: Any, used: int, ledger: Any, most: int | None = None) -> Step:
        if len(steps) >= 2 and role in self.down:
            raise Unavailable(role, "down", "secret words of the server")
        ledger.roles[role].completion_tokens += 5
        if len(steps) == 2:
            return Step(f"{role} \\boxed{{3}}", 5, StopReason.BOXED)
        return Step(f"{role}\n{CLOSE}\n\n" if len(steps) else "a\n\n", 5, StopReason.DELIMITER, thinking=True)

    async def scores(self, task: Task, steps: Any, ledger: Any) -> list[float]:
        return [0.2] * len(steps)

    def prepare(self, task: Task, steps: Any) -> None:
        pass


def routed(by: str, *down: str, **more: Any) -> Route:
    splitting = Splitting(StepsConfig(split="thinking", answer_by=by))  # type: ignore[arg-type]
    task = Task("q", {}, {"small": Sampling(), "large": Sampling()}, Limits(), splitting=splitting)
    session = Policy(Threshold(0.5), {"max_steps": 30}).session()
    route = Route(task, session, **more)

    async def run() -> None:
        async for _ in route.steps(Thinkers(*down), asyncio.get_running_loop().time() + 10):  # type: ignore[arg-type]
            pass

    asyncio.run(run())
    return route


def test_who_answers_for_an_author_that_is_gone() -> None:
    assert [step.author for step in routed("small").written] == ["large", "large", "small"]
    assert [step.author for step in routed("large", "small").written] == ["large", "large", "large"]
    route = routed("large", "large")
    assert [step.author for step in route.written] == ["large", "large", "small"] and route.text == "small \\boxed{3}"
    assert route.summary(trace=False)["fallbacks"] == ["step 3: large (down): the small model wrote the step"]
    route = routed("small", "small")
    assert route.written[-1].author == "large" and route.reasoning == "a\n\nlarge\n"
    assert route.usage()["completion_tokens_details"]["reasoning_tokens"] == 10
    with pytest.raises(RouteFailed, match="There is no proposal"):
        routed("small", "small", when_small_fails="error")
    for by in ("small", "large"):
        with pytest.raises(RouteFailed, match="Neither model answers"):
            routed(by, "small", "large")
