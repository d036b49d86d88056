"""What is served becomes rollouts: recorded, grown where nobody went, trained on; and nothing else is kept."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from handmade import ScriptedScorer, process
from made_routers import QUICK
from scripted_store import AbleLarge
from serve_harness import QUESTION, Process, Router, Upstreams
from test_serve_route import TASK, Scripted

import agents
import train as train_command
from agents.deploy.policy import Policy
from agents.routers.base import Constant, Threshold
from agents.serve.metrics import Metrics
from agents.serve.recording import UNANSWERED, Recorder
from agents.serve.route import Route
from rollouts.cli.generate import Expand
from rollouts.config import load_family
from rollouts.errors import StoreError
from rollouts.family import Family
from rollouts.scoring.base import EXAMPLES, self_test_examples
from rollouts.store.rows import Rows
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import ROLES, Prefix, Step
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.verify import verify_store

SCORES = ("scripted", {"kind": "scripted"})


class Drawing(Scripted):
    """Scripted models whose steps and scores are functions of the prefix."""

    def __init__(self, draw: int = 0, **more: Any) -> None:
        super().__init__([], **more)
        self.writers, self.scorer, self.draw = {role: AbleLarge(role) for role in ROLES}, ScriptedScorer(), draw

    async def step(self, role: str, task: Any, steps: Any, used: int, ledger: Any, most: int | None = None) -> Step:
        await super().step(role, task, steps, used, ledger)
        return self.writers[role].step(Prefix(task.question, task.question, self.draw, steps, used), steps)

    async def scores(self, task: Any, steps: Any, ledger: Any) -> list[float]:
        return [self.scorer.of(task.question, steps[: end + 1]) for end in range(len(steps))]


def served(question: str, router: Any = Threshold(0.5), draw: int = 0) -> Route:  # noqa: B008
    route = Route(replace(TASK, question=question), Policy(router, {"max_steps": 30}).session())

    async def run() -> None:
        async for _ in route.steps(Drawing(draw), asyncio.get_running_loop().time() + 60):  # type: ignore[arg-type]
            pass

    asyncio.run(run())
    return route


def recorder(folder: Path, **more: Any) -> Recorder:
    return Recorder(folder, process(1), more.pop("metrics", Metrics()), scorer=SCORES, **more)


def count(metrics: Metrics, what: str) -> float:
    return float(metrics.registry.get_sample_value("trim_recorded_total", {"what": what}) or 0)


def test_recorded_traffic_is_grown_trained_on_and_loads(tmp_path: Path, monkeypatch: Any) -> None:
    taken = recorder(tmp_path / "s")
    routes = [served(f"Question {number}?") for number in range(60)]
    for route in routes:
        taken.take([route], "7")
    taken.close()
    store = Store(tmp_path / "s")
    problems = store.problems()
    assert len(problems) == 60 and {problem.split for problem in problems} == {"train", "validation", "test"}
    assert 40 < len(store.live) < 60  # those of one step may be closed
    steps = {(tree.problem.question): tree for tree in load_trees(store, problems, None, 1)}
    for route in routes:
        tree, node = steps[route.task.question], steps[route.task.question].root
        for written in route.written:  # the path that was taken, proposals thrown away included
            assert node is not None and node.proposals[written.author].text == written.text
            assert node.proposals["small"].text == (written.rejected or written.text)
            node = tree.child(node, written.author)
        assert node is None and not tree.orphans
    decisions = Rows(store.scores("served"))
    decisions.read([tree.key for tree in steps.values()])
    tree = steps[routes[0].task.question]
    first = decisions[tree.row_key(tree.root, "small")]
    assert first == (routes[0].written[0].chance, routes[0].written[0].action)
    before = store.steps.keys().num_rows
    family = SimpleNamespace(open=lambda role, _: contextlib.nullcontext(AbleLarge(role)))
    with store.writing():  # as `rollouts expand` does, with models that cost nothing
        added = Expand._close(Expand(tmp_path / "s"), store, family, problems, None)
        score_store(store, ScriptedScorer())
        grade_store(store, make_grader("exact"))
    assert added > 0 and store.steps.keys().num_rows == before + added and not store.live
    trees = compile_store(store, "scripted")
    assert len(trees.root) == 60 and {"served.probability", "served.action"} <= set(trees.signals)
    out = tmp_path / "run"
    arguments = ["--rollouts", str(store.path), "--scorer", "scripted", "--lam", "0.01", "--out", str(out)]
    assert train_command.main([*arguments, "--tracking", "none", *QUICK]) == 0
    made = agents.load(out / "lam-0.01" / "policy")
    assert made.session().step == 1
    told = made.about["held_out"][0]["decisions"]  # what the service compares its own with
    assert sum(told["scores"]) == pytest.approx(1, abs=1e-3) and 0 <= told["escalated"] <= 1


def test_every_request_is_a_replica_also_after_a_restart(tmp_path: Path) -> None:
    for draw in range(2):
        taken = recorder(tmp_path / "s")
        for _ in range(2):
            taken.take([served("Once?", draw=draw)])
        with pytest.raises(StoreError, match="another process is writing"):
            recorder(tmp_path / "s")
        taken.close()
    store = Store(tmp_path / "s")
    (problem,) = store.problems()
    assert problem.split == UNANSWERED and problem.answer == ""
    assert [tree.replica for tree in load_trees(store, [problem], None, 1)] == [0, 1, 2, 3]
    assert store.repair() == []


def marked(text: str) -> str | None:
    return None if "secret" in text else text.replace("Alice", "N.")


def broken(text: str) -> Any:
    return {"What is x?": 7, "What is y?": "\ud800"}.get(text, text)


def test_what_is_redacted_to_no_text_is_left_out_alone(tmp_path: Path) -> None:
    """Before, one such request kept all that came later from being written."""
    metrics = Metrics()
    taken = recorder(tmp_path / "s", metrics=metrics, redact="test_serve_recording:broken")
    for question in ("What is x?", "What is y?", "What is z?"):
        taken.take([served(question)], "7")
    taken.close()
    assert [problem.question for problem in Store(tmp_path / "s").problems()] == ["What is z?"]
    assert (count(metrics, "kept"), count(metrics, "failed")) == (1, 2)


def test_other_questions_are_other_problems(tmp_path: Path) -> None:
    """Before, what differs in capitals or blanks was one problem, though models were asked something else."""
    taken = recorder(tmp_path / "s")
    questions = ["What is X?", "What is x?", "What is  x?"]
    for question in (*questions, questions[0]):
        taken.take([served(question)], "7")
    taken.close()
    problems = Store(tmp_path / "s").problems()
    assert [problem.question for problem in problems] == questions and len({each.split for each in problems}) == 1
    assert sorted(len(list(load_trees(Store(tmp_path / "s"), [each], None, 1))) for each in problems) == [1, 1, 2]


def test_texts_are_redacted_or_left_out(tmp_path: Path) -> None:
    metrics = Metrics()
    taken = recorder(tmp_path / "s", metrics=metrics, redact="test_serve_recording:marked")
    for question in ("Alice has 3?", "a secret?"):
        taken.take([served(question)])
    taken.close()
    assert [problem.question for problem in Store(tmp_path / "s").problems()] == ["N. has 3?"]
    assert b"Alice" not in b"".join(file.read_bytes() for file in tmp_path.rglob("*.parquet"))
    assert (count(metrics, "kept"), count(metrics, "redacted")) == (1, 1)


def test_what_cannot_be_held_is_dropped_and_counted_and_nobody_waits(tmp_path: Path, monkeypatch: Any) -> None:
    metrics, route = Metrics(), served("Full?")
    taken = recorder(tmp_path / "s", metrics=metrics, waiting=2, seconds=0.1)
    monkeypatch.setattr(Recorder, "_add", lambda self, seen: time.sleep(0.2) or "kept")
    began = time.monotonic()
    for _ in range(6):
        taken.take([route])
    assert time.monotonic() - began < 0.2 and count(metrics, "dropped") >= 3
    taken.close()


def test_a_disk_that_is_full_loses_what_comes_meanwhile_and_no_more(tmp_path: Path, monkeypatch: Any) -> None:
    metrics = Metrics()
    taken = recorder(tmp_path / "s", metrics=metrics, seconds=0.1)
    with monkeypatch.context() as broken:
        broken.setattr(Rows, "flush", lambda self: (_ for _ in ()).throw(OSError("disk full")))
        taken.take([served("One?")])
        end = time.monotonic() + 10
        while not taken._broken and time.monotonic() < end:
            time.sleep(0.02)
        taken.take([served("Two?")])
        while not count(metrics, "dropped") and time.monotonic() < end:
            time.sleep(0.02)
    taken.close()
    store = Store(tmp_path / "s")
    assert [problem.question for problem in store.problems()] == ["One?"] and store.steps.keys().num_rows > 0
    assert (count(metrics, "kept"), count(metrics, "dropped")) == (1, 1)


def test_the_service_records_what_is_of_the_rollouts_process(
    upstreams: Upstreams, folder: Path, tmp_path: Path
) -> None:
    running = Router(folder, upstreams.urls(), record=str(tmp_path / "s"))
    try:
        known = running.chat(QUESTION, metadata={"answer": "1824"}).json()
        running.chat("Let a=2+3. Find a.", stream=False)
        for other in ({"temperature": 0.1}, {"max_tokens": 40}, {"chat_template_kwargs": {"x": 1}}):
            assert running.chat(**other).status_code == 200
        end = time.monotonic() + 20
        while running.metric("trim_recorded_total", what="kept") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert running.metric("trim_recorded_total", what="other") == 3
    finally:
        running.stop()
    store = Store(tmp_path / "s")
    first, second = store.problems()
    assert self_test_examples([first, second]) != EXAMPLES  # `expand` tests the scorer on paths of their kind
    assert (first.answer, second.split) == ("1824", UNANSWERED) and first.split != UNANSWERED
    assert set(store.names("scores")) == {"served", "tinymath-prm"}
    (tree,) = load_trees(store, [first], None, 2)
    assert tree.nodes and known["trim"]["steps"] <= len(tree.nodes)
    # the same process, and the same scores, as if `generate` and `score` had made them
    Store.create(store.path, Family(load_family("tinymath")).process(2))


def test_a_service_that_is_killed_leaves_a_sound_store_and_the_next_one_goes_on(
    upstreams: Upstreams, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    flags = [part for role, url in upstreams.urls().items() for part in (f"--{role}", url)]
    often = "from agents.serve.recording import Recorder; Recorder.__init__.__kwdefaults__['seconds'] = 0.02"
    kept = 0
    for draw in range(2):
        running = Process("--policy", folder, "--port", 0, "--record", store, *flags, first=often)
        url = running.wait()

        def ask(number: int, url: str = url) -> None:
            body = {"messages": [{"role": "user", "content": f"Let a={number % 9}+33. Find a."}]}
            with contextlib.suppress(httpx.HTTPError):
                while True:
                    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask, number) for number in range(6 * draw, 6 * draw + 6)]
            end = time.monotonic() + 60
            while len(list(store.glob("steps/*.parquet"))) < 5 * (draw + 1) and time.monotonic() < end:
                time.sleep(0.01)
            running.process.kill()  # while it writes, as likely as not
            running.process.wait()
        for each in asking:
            each.result()
        found = Store(store)
        problems = found.problems()
        trees = list(load_trees(found, problems, None, 2))
        replicas = {problem.id: [tree.replica for tree in trees if tree.problem == problem] for problem in problems}
        assert all(each == list(range(len(each))) for each in replicas.values())
        assert all(tree.nodes and not tree.orphans for tree in trees) and len(trees) > kept
        assert not [line for line in verify_store(found).problems if "duplicate" in line or "does not have" in line]
        kept = len(trees)
    assert all(done.startswith("removed the unfinished") for done in found.repair())  # what was being written, no more


def test_always_large_is_recorded_too(tmp_path: Path) -> None:
    taken = recorder(tmp_path / "s")
    taken.take([served("Large?", Constant(1))], "7")
    taken.close()
    store = Store(tmp_path / "s")
    (tree,) = load_trees(store, store.problems(), None, 1)
    assert all({"small", "large"} == set(node.proposals) for node in tree.nodes.values() if node.all_large)
