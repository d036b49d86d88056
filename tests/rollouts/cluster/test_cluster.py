"""A real cluster of two nodes: what workers make is what one process makes, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_nodes import ROOT, StepServer, prompts_of, rows_of, two_nodes, workers
from thread_engine import in_threads

from rollouts.__main__ import main
from rollouts.store.store import Store

pytestmark = pytest.mark.timeout(300)
FEW = ["--in-flight", "2"]  # so that it takes some seconds
PROBLEMS = ["--problems", "tinymath:test", "--max-escalations", "1", "--flush-seconds", "0.5"]


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as found:
        yield found


@pytest.fixture
def whole(nodes):
    nodes.whole()
    return ["--ray", nodes.address, "--workers", "2"]


@pytest.fixture(scope="module")
def server():
    made = StepServer()
    yield made
    made.die()


@pytest.fixture(scope="module")
def models(server, tmp_path_factory):
    return server.models(tmp_path_factory.mktemp("models"), scorer=True)


def command(folder: Path, models: object, *flags: str, limit: int = 40) -> list[str]:
    return ["generate", str(folder), *PROBLEMS, "--models", str(models), "--limit", str(limit), *flags]


@pytest.fixture(scope="module")
def one(server, models, tmp_path_factory):
    """What one process makes of the models behind the server."""
    folder = tmp_path_factory.mktemp("one") / "s"
    assert main(command(folder, models)) == 0
    return folder


def same(many: Path, one: Path) -> None:
    tables = [str(table.directory.relative_to(one)) for table in Store(one).tables()]
    assert len(tables) == 3
    for table in tables:
        assert rows_of(many, table) == rows_of(one, table)


@contextmanager
def meanwhile(folder: Path, rows: int, act: Callable[[], Any]) -> Iterator[None]:
    """Do something when there are so many rows."""

    def watch() -> None:
        while not over.wait(0.05):
            if (folder / "steps").is_dir() and len(rows_of(folder)) >= rows:
                act()
                return

    over = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.fixture
def slow(server):
    server.delay = 0.1
    yield
    server.delay = 0.0


def kept(folder: Path, server: StepServer) -> tuple[dict[Any, Any], set[Any]]:
    """Return what is committed, and have the server forget what it was asked."""
    server.seen.clear()
    return rows_of(folder), prompts_of(folder, server)


def test_embedded_models_give_the_store_of_one_process_though_a_worker_is_killed(whole, tmp_path):
    """In float64, where the same prompt and seed have the same text, in a thread, too."""
    steps = ["--no-score", "--no-grade"]
    with in_threads():
        assert main(command(tmp_path / "one", "tinymath:transformers", *steps)) == 0
    engines: list[psutil.Process] = []

    def kill() -> None:
        """Kill one; the other stands still until a third has models, which else might have nothing left to do."""
        victim, *others = workers()
        engines.extend(victim.children(recursive=True))
        for other in others:
            other.suspend()
        victim.kill()
        until = time.monotonic() + 60
        try:
            while len(Store(tmp_path / "many").manifest["engines"]) < 6 and time.monotonic() < until:
                time.sleep(0.1)
        finally:
            for other in others:
                other.resume()

    with meanwhile(tmp_path / "many", 50, kill):
        assert main(command(tmp_path / "many", "tinymath:transformers", *whole, *FEW, *steps)) == 0
    assert engines and not psutil.wait_procs(engines, timeout=10)[1]  # models do not stay in memory
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one")
    starts = [start["start"] for start in Store(tmp_path / "many").manifest["engines"]]
    assert len(set(starts)) == len(starts) >= 6
    seeds = [start["seed"] for start in Store(tmp_path / "many").manifest["engines"]]
    assert len(set(seeds)) == len(seeds)


def test_workers_make_the_store_of_one_process(whole, models, one, tmp_path):
    many = tmp_path / "many"
    assert main(command(many, models, *whole)) == 0
    same(many, one)
    assert Store(many).steps.counters() == Store(one).steps.counters()
    text = (many / "manifest.json").read_text()
    assert json.loads(text)["distributed"]["workers"] == 2
    assert socket.gethostname() not in text and socket.gethostbyname(socket.gethostname()) not in text


def test_scores_grades_and_expansion_on_workers(whole, models, one, tmp_path):
    many = tmp_path / "many"
    assert main(command(many, models, "--no-score", "--no-grade")) == 0
    assert main(["score", str(many), "--models", str(models), *whole]) == 0
    assert main(["grade", str(many), *whole]) == 0
    same(many, one)
    here = Path(shutil.copytree(one, tmp_path / "here"))
    for folder, where in ((here, []), (many, whole)):
        assert main(["expand", str(folder), "--models", str(models), "--router", "threshold:0.5", *where]) == 0
    same(many, here)
    assert len(rows_of(many)) > len(rows_of(one))


def test_a_cluster_of_this_machine_is_there_as_long_as_the_command(one, tmp_path):
    many = Path(shutil.copytree(one, tmp_path / "many"))
    shutil.rmtree(many / "grades")
    graded = subprocess.run(
        [sys.executable, "-m", "rollouts", "grade", str(many), "--ray", "local"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert graded.returncode == 0, graded.stderr
    same(many, one)


@pytest.mark.usefixtures("slow")
def test_a_node_dies_and_the_run_goes_on(nodes, whole, models, one, tmp_path):
    many = tmp_path / "many"
    with meanwhile(many, 60, nodes.kill_node):
        assert main(command(many, models, *whole, *FEW)) == 0
    same(many, one)
    assert not nodes.cluster.worker_nodes


@pytest.mark.usefixtures("slow")
def test_the_driver_dies_or_is_interrupted_and_the_same_command_goes_on(whole, server, models, one, tmp_path):
    many = tmp_path / "many"
    line = [sys.executable, "-m", "rollouts", *command(many, models, *whole, *FEW)]
    driver = subprocess.Popen(line, cwd=ROOT, start_new_session=True)
    with meanwhile(many, 60, lambda: os.kill(driver.pid, signal.SIGKILL)):
        driver.wait()
    assert driver.returncode == -signal.SIGKILL
    until = time.monotonic() + 60
    while workers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not workers()
    first, prompts = kept(many, server)
    assert 60 <= len(first) < len(rows_of(one))

    with meanwhile(many, len(first) + 60, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert main(command(many, models, *whole, *FEW)) == 130
    assert prompts.isdisjoint(server.asked())
    second, prompts = kept(many, server)
    assert first.items() <= second.items() and len(first) + 60 <= len(second) < len(rows_of(one))

    server.delay = 0.0
    assert main(command(many, models, *whole)) == 0
    assert prompts.isdisjoint(server.asked())
    same(many, one)


def test_the_budget_is_kept_and_the_same_command_goes_on(whole, server, models, one, tmp_path):
    many, longest = tmp_path / "many", max(row["tokens"] for row in rows_of(one).values())
    budget = sum(row["tokens"] for key, row in rows_of(one).items() if key[-1] == "large") // 3
    assert main(command(many, models, *whole, "--max-large-tokens", str(budget))) == 0
    spent = Store(many).steps.counters()["decoded_large"]
    assert budget <= spent <= budget + 2 * longest
    _, prompts = kept(many, server)
    assert main(command(many, models, *whole)) == 0
    assert prompts.isdisjoint(server.asked())
    same(many, one)
