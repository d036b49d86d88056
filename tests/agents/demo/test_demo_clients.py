"""The demo as a user starts it, asked by the clients that people have: OpenAI's, LiteLLM, LangChain, lm-eval, curl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

from rollouts.tinymath import generate_problems

ROOT = Path(__file__).parents[3]
PROBLEMS = generate_problems("validation", 20)
SHORT, NEXT = sorted(PROBLEMS, key=lambda problem: len(problem.question))[:2]
# Nobody is told of these tests, and nothing is fetched.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "OPENAI_API_KEY": "none",
}


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a demo, which ends without a trace."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DISPLAY": ""}
    line = [sys.executable, "-m", "agents", "demo", "--port", "0"]
    running = subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        said: list[str] = []
        while not said or not said[-1].startswith("Playground: "):
            assert running.stdout is not None
            said.append(running.stdout.readline())
            assert said[-1], said
        assert any(each.startswith("Ready after ") for each in said)
        url = said[-1].removeprefix("Playground: ").strip()
        assert url.startswith("http://127.0.0.1:")
        yield url
        models = children(running.pid)
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in models):
            assert time.monotonic() < end, "a process is left"
            time.sleep(0.1)
    finally:
        running.kill()
        running.wait()
    assert not list(folder.iterdir())


def ask(url: str, question: str, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": question}], "trace": True, **more}
    asked = Request(f"{url}v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def test_the_demo_solves_problems(demo: str) -> None:
    with urlopen(demo, timeout=10) as page:
        assert "Router playground" in page.read().decode()
    right = {"router": 0, "large": 0, "small": 0}
    tokens = dict.fromkeys(right, 0)
    for problem in PROBLEMS[:8]:
        for way, more in (("router", {"budget": 0.4}), ("large", {"only": "large"}), ("small", {"only": "small"})):
            answer = ask(demo, problem.question, **more)
            right[way] += answer["trim"]["answer"] == problem.answer
            tokens[way] += answer["usage"]["models"]["large"]["completion_tokens"]
    assert right["router"] >= 4 and right["large"] >= 4 and tokens["small"] == 0 < tokens["router"] < tokens["large"]


class Told(NamedTuple):
    """What a client makes of an answer: pieces of the text, why it ended, and tokens of prompt and answer."""

    pieces: list[str]
    ended: str | None
    prompt: int
    answer: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def by_curl(url: str, messages: Any, stream: bool = False, **more: Any) -> Told:
    body: dict[str, Any] = {"messages": messages, "temperature": 0, **more}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    line = ["curl", "-sSN", "--fail-with-body", f"{url}v1/chat/completions", "-H", "Content-Type: application/json"]
    found = subprocess.run([*line, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    if not stream:
        (choice,), usage = json.loads(found.stdout)["choices"], json.loads(found.stdout)["usage"]
        pieces, ended = [choice["message"]["content"]], choice["finish_reason"]
    else:
        *events, done = [each for each in found.stdout.splitlines() if each]
        assert done == "data: [DONE]"
        *chunks, last = (json.loads(each.removeprefix("data: ")) for each in events)
        pieces = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
        ended, usage = chunks[-1]["choices"][0]["finish_reason"], last["usage"]
    return Told(pieces, ended, usage["prompt_tokens"], usage["completion_tokens"])


def by_openai(url: str, messages: Any, stream: bool = False, **more: Any) -> Told:
    import openai

    client = openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
    asked: Any = {"model": "exact", "messages": messages, "temperature": 0, **more}
    if not stream:
        found = client.chat.completions.create(**asked)
        choice, usage = found.choices[0], found.usage
        return Told([choice.message.content], choice.finish_reason, usage.prompt_tokens, usage.completion_tokens)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    pieces, ended = [chunk.choices[0].delta.content for chunk in chunks], chunks[-1].choices[0].finish_reason
    return Told(pieces, ended, last.usage.prompt_tokens, last.usage.completion_tokens)


def by_responses(url: str, messages: Any, stream: bool = False, **more: Any) -> Told:
    import openai

    client = openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
    asked: Any = {"model": "exact", "input": messages, "temperature": 0, "extra_body": more}
    if not stream:
        found = client.responses.create(**asked)
        pieces = [found.output_text]
    else:
        with client.responses.stream(**asked) as events:
            pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
            found = events.get_final_response()
        assert found.output_text == "".join(pieces)
    assert found.usage is not None
    return Told(pieces, "stop" * (found.status == "completed"), found.usage.input_tokens, found.usage.output_tokens)


def by_litellm(url: str, messages: Any, stream: bool = False, **more: Any) -> Told:
    import litellm

    litellm.telemetry = False
    asked: Any = {"model": "openai/exact@budget=0.25", "messages": messages, "temperature": 0, **more}
    asked |= {"api_base": f"{url}v1", "api_key": "none", "num_retries": 0}
    if not stream:
        found = litellm.completion(**asked)
        choice, usage = found.choices[0], found.usage
        return Told([choice.message.content], choice.finish_reason, usage.prompt_tokens, usage.completion_tokens)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    ended = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    (usage,) = (chunk.usage for chunk in chunks if getattr(chunk, "usage", None))
    return Told(pieces, ended[-1], usage.prompt_tokens, usage.completion_tokens)


def by_langchain(url: str, messages: Any, stream: bool = False, **more: Any) -> Told:
    from langchain_openai import ChatOpenAI

    own: Any = {"base_url": f"{url}v1", "api_key": "none", "max_retries": 0, "stream_usage": True}
    model = ChatOpenAI(model="exact", temperature=0, **own)
    turns = [(message["role"], message["content"]) for message in messages]
    if not stream:
        found: Any = model.invoke(turns, **more)
        pieces = [found.content]
    else:
        chunks: list[Any] = list(model.stream(turns, **more))
        pieces, found = [chunk.content for chunk in chunks], sum(chunks[1:], chunks[0])
    usage = found.usage_metadata
    return Told(pieces, found.response_metadata["finish_reason"], usage["input_tokens"], usage["output_tokens"])


CLIENTS: list[Callable[..., Told]] = [by_curl, by_openai, by_responses, by_litellm, by_langchain]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_has_plain_answers_streams_turns_and_stops(
    demo: str, client: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    if client is by_curl and not shutil.which("curl"):
        pytest.skip("no curl here")
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    turns = [{"role": "user", "content": SHORT.question}]
    whole = client(demo, turns)
    assert "\\boxed{" in whole.text and whole.ended == "stop" and whole.prompt > 10 and whole.answer > 10
    stream = client(demo, turns, stream=True)
    assert stream.text == whole.text and len([piece for piece in stream.pieces if piece]) > 2
    assert (stream.ended, stream.prompt, stream.answer) == ("stop", whole.prompt, whole.answer)
    turns += [{"role": "assistant", "content": whole.text}, {"role": "user", "content": NEXT.question}]
    second = client(demo, turns)
    assert second.text and second.prompt > whole.prompt + 20
    for streamed in (False, True):
        stopped = client(demo, turns[:1], stream=streamed, stop=["="])
        assert stopped.text == whole.text.partition("=")[0] and stopped.ended == "stop"


EVALUATED = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

url, folder = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="local-chat-completions",
    model_args={"model": "exact@budget=0.3", "base_url": f"{url}v1/chat/completions", "num_concurrent": 4},
    tasks=["sums"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    apply_chat_template=True,
    fewshot_as_multiturn=True,
    bootstrap_iters=0,
)
print("found:", json.dumps([found["results"]["sums"], found["samples"]["sums"]], default=str))
"""
TASK = r"""
task: sums
dataset_path: json
dataset_kwargs: {data_files: {train: TRAIN, test: TEST}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: SHOTS
generation_kwargs: {until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, temperature: 0.0}
filter_list:
  - name: boxed
    filter: [{function: regex, regex_pattern: 'boxed\{(-?\d+)\}'}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_has_its_harness_over_twenty_problems(demo: str, tmp_path: Path) -> None:
    for name, problems in (("train", generate_problems("train", 2)), ("test", PROBLEMS)):
        lines = [json.dumps({"question": each.question, "answer": each.answer}) for each in problems]
        (tmp_path / f"{name}.json").write_text("\n".join(lines))
    task = TASK.replace("SHOTS", "0")
    for name in ("train", "test"):
        task = task.replace(name.upper(), str(tmp_path / f"{name}.json"))
    (tmp_path / "sums.yaml").write_text(task)
    environment = {**os.environ, **QUIET, "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-c", EVALUATED, demo, str(tmp_path)]
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-2000:]
    result, samples = json.loads(ended.stdout.rpartition("found:")[2])
    assert len(samples) == 20 and all("\\boxed{" in sample["resps"][0][0] for sample in samples), samples[:2]
    assert result["exact_match,boxed"] >= 0.5
