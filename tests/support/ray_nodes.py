"""A Ray cluster of two nodes on this machine, and models behind a server that all its workers can ask."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import made_stores
import psutil
from fake_server import FakeServer

from rollouts import tinymath
from rollouts.config import embedded_family
from rollouts.family import Family
from rollouts.store.store import Store
from rollouts.trees.grow import load_trees

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
}


class Nodes:
    """Two nodes, each with two cores as Ray counts them; what a test kills is made up for by `whole`."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
        head = {**options, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.options = options
        self.whole()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def whole(self) -> None:
        """Have a second node."""
        if not self.cluster.worker_nodes:
            self.cluster.add_node(**self.options)

    def kill_node(self) -> None:
        """End the second node's raylet, its workers and whatever else it has, as losing the machine does."""
        (node,) = self.cluster.worker_nodes
        for each in (process for several in node.all_processes.values() for process in several):
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(each.process.pid).children(recursive=True):
                    child.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.cluster.shutdown()


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Start a cluster; starting is tried twice, as Ray's own tests do on busy machines."""
    before, folder = dict(os.environ), tempfile.mkdtemp(prefix="trim-", dir="/tmp")  # names of sockets are short
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=folder)
    os.mkdir(os.path.join(folder, "ray"))
    if "ray" not in sys.modules:  # it reads this when it is imported
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        try:
            nodes = Nodes()
        except Exception:
            time.sleep(1.0)
            nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def workers() -> list[psutil.Process]:
    """Return the processes of workers."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if (each.info["cmdline"] or [""])[0].startswith("ray::Worker")]


class StepServer(FakeServer):
    """Two models, `small` and `large`, whose texts are functions of the prompt: the same whoever asks, and when."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.delay = delay

    @cached_property
    def prompts(self) -> Any:
        return Family(embedded_family("transformers")).prompts("small")

    def good(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": role, "max_model_len": 1024} for role in ("small", "large")]}
        if path != "/v1/completions" or len(body["prompt"]) < 4:
            return super().good(path, body)
        steps, prompt = [], list(body["prompt"])
        while not steps or body["stop"] == [] and not steps[-1].startswith("The"):
            draw = hashlib.blake2b(f"{body['model']}{prompt}".encode(), digest_size=2).digest()
            ends = draw[0] % 5 == 0 or prompt.count(self.blank) > 5
            steps.append(f"The answer is \\boxed{{{draw[1] % 3}}}" if ends else f"a={draw[1] % 2}\n\n")
            prompt += self.prompts.encode(steps[-1])
        ids = prompt[len(body["prompt"]) :]
        stop = "\n\n" if steps[-1].endswith("\n\n") else None
        ids = ids if stop else [*ids, self.prompts.tokenizer.eos_token_id]
        choice = {"text": "".join(steps), "finish_reason": "stop", "stop_reason": stop, "token_ids": ids}
        return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}

    @cached_property
    def blank(self) -> int:
        return int(self.prompts.encode("a\n\n")[-1])

    def asked(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return what steps were asked for: model and prompt."""
        return [
            (body["model"], tuple(body["prompt"]))
            for path, body in self.seen
            if path == "/v1/completions" and len(body["prompt"]) > 3
        ]

    def models(self, folder: Path, scorer: bool = False) -> Path:
        """Write a models file."""
        tokenizer = tinymath.model_dir("small")
        role = f'backend = "server"\nurl = "{self.url}"\ntokenizer = "{tokenizer}"\nsystem_prompt = ""\n'
        text = "".join(f'[{name}]\nmodel = "{name}"\n{role}' for name in ("small", "large"))
        file = folder / "models.toml"
        file.write_text(text + ('[scorer]\nkind = "ray_nodes:LengthScorer"\n' if scorer else ""))
        return file


class LengthScorer:
    """Scores that are a function of the path."""

    tolerance = 0.0

    def __init__(self, name: str) -> None:
        self.name = name

    def submit(self, question: str, steps: Any) -> Future[list[float]]:
        future: Future[list[float]] = Future()
        future.set_result([(len("".join(steps[: end + 1])) * 7 % 100) / 100 for end in range(len(steps))])
        return future

    def process(self) -> Mapping[str, Any]:
        return {"rule": "length"}


def rows_of(path: Path, name: str = "steps") -> dict[Any, Any]:
    """Return the rows of a store's table by key; none if it has no such table."""
    store = Store(path)
    tables = {str(each.directory.relative_to(store.path)): each for each in store.tables()}
    return made_stores.rows_of(tables[name]) if name in tables else {}


def prompts_of(path: Path, server: StepServer) -> set[tuple[str, tuple[int, ...]]]:
    """Return the proposals that a store has as `StepServer.asked` names them."""
    store = Store(path)
    return {
        (role, tuple(server.prompts.ids(tree.problem.question, node.steps)))
        for tree in load_trees(store, store.problems(), None, None)
        for _, node, role in tree.places()
    }
