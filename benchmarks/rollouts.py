"""Speed and memory of tree generation with the embedded family: ``python -m benchmarks.rollouts``.

Prints three figures, each a ratio of times measured in this one run, so that a noisy machine does not matter:
growing trees against replaying the same requests in one batch per role; growing trees against live episodes
without a memo, with the break-even number of episodes; and the memory of the orchestrating process with 1x and
8x problems.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from rollouts.config import load_family
from rollouts.family import Family
from rollouts.models.base import CompletionRequest
from rollouts.models.stepwise import StepModel
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem, load_problems
from rollouts.text.steps import LARGE, ROLES, SMALL, Prefix, Step
from rollouts.trees.grow import Grower, StepBuffer, load_trees


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        problems: Problems of the growing-against-replaying comparison.
        live_problems: Problems of the live comparison.
        episodes: Live episodes per problem.
        rate: Escalation rate of the live episodes.
        models: The family; ``tinymath`` runs vLLM.
        memory_only: Only grow this many problems and print the peak memory (used by the program itself).
    """

    problems: int = 300
    live_problems: int = 40
    episodes: int = 64
    rate: float = 0.3
    models: str = "tinymath"
    memory_only: int | None = None


class Recorder:
    """Stands before a backend and keeps every request with the number of tokens that came back."""

    def __init__(self, backend: Any) -> None:
        """Stand before a backend."""
        self._backend = backend
        self.log: list[tuple[CompletionRequest, Any]] = []

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on."""
        return getattr(self._backend, name)

    def submit(self, request: CompletionRequest) -> Any:
        """Pass a request on and keep it."""
        future = self._backend.submit(request)
        self.log.append((request, future))
        return future


def grow(writers: dict[str, StepModel], family: Family, problems: list[Problem], scratch: Path, name: str) -> float:
    """Grow complete trees of some problems; return the wall time in seconds."""
    store = Store.create(scratch / name, family.process(None))
    store.add_problems(problems)
    start = time.perf_counter()
    Grower(writers, StepBuffer(store.steps)).run(load_trees(store, problems, 1, None))
    return time.perf_counter() - start


def replay(writer: StepModel, log: list[tuple[CompletionRequest, Any]]) -> tuple[float, int]:
    """Send one role's recorded requests as one batch, each with room for as many tokens as was recorded."""
    requests = [replace(request, stop=(), max_tokens=future.result().tokens) for request, future in log]
    start = time.perf_counter()
    futures = [writer.backend.submit(request) for request in requests]
    tokens = sum(future.result().tokens for future in futures)
    return time.perf_counter() - start, tokens


def next_steps(writer: StepModel, prefixes: list[Prefix]) -> list[Step]:
    """Return the next step of each prefix, asked for as one batch."""
    futures = [writer.submit(prefix, whole=False) for prefix in prefixes]
    return [future.result().steps[0] for future in futures]


def live(writers: dict[str, StepModel], problems: list[Problem], episodes: int, rate: float) -> float:
    """Run batched stepwise episodes without a memo: what training without trees would have to do."""
    generator = np.random.default_rng(0)
    running = [Prefix(problem.id, problem.question, 0, (), 0) for problem in problems for _ in range(episodes)]
    start = time.perf_counter()
    while running:
        proposals = next_steps(writers[SMALL], running)
        escalate = generator.random(len(running)) < rate
        large = iter(next_steps(writers[LARGE], [item for item, up in zip(running, escalate, strict=True) if up]))
        steps = [next(large) if up else step for step, up in zip(proposals, escalate, strict=True)]
        running = [
            replace(item, steps=(*item.steps, step.text), used_tokens=item.used_tokens + step.tokens)
            for item, step in zip(running, steps, strict=True)
            if not step.terminal
        ]
    return time.perf_counter() - start


def main(settings: Settings) -> None:
    """Run the benchmark."""
    family = Family(load_family(settings.models))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        starts = Store.create(Path(scratch) / "starts", family.process(None))
        writers = {role: stack.enter_context(family.open(role, starts)) for role in ROLES}
        if settings.memory_only is not None:
            problems = list(load_problems("tinymath:train"))[: settings.memory_only]
            grow(writers, family, problems, Path(scratch), "memory")
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            return
        problems = list(load_problems("tinymath:train"))
        grow(writers, family, problems[-20:], Path(scratch), "warm-up")
        recorders = {role: Recorder(writers[role].backend) for role in ROLES}
        for role in ROLES:
            writers[role].backend = recorders[role]
        seconds = grow(writers, family, problems[: settings.problems], Path(scratch), "grown")
        for role in ROLES:
            writers[role].backend = recorders[role]._backend
        replays = {role: replay(writers[role], recorders[role].log) for role in ROLES}
        total = sum(time_ for time_, _ in replays.values())
        print(f"growing {settings.problems} complete trees: {seconds:.1f} s")
        for role, (time_, tokens) in replays.items():
            print(f"  replaying {len(recorders[role].log):,} requests of {role} ({tokens:,} tokens): {time_:.1f} s")
        print(f"  ratio growing / sum of replays: {seconds / total:.2f} (aim: at most 1.25)")
        chosen = problems[settings.problems : settings.problems + settings.live_problems]
        trees = grow(writers, family, chosen, Path(scratch), "few")
        episodes = live(writers, chosen, settings.episodes, settings.rate)
        print(f"{settings.episodes} live episodes for each of {settings.live_problems} problems: {episodes:.1f} s")
        print(f"  trees of the same problems: {trees:.1f} s, share {trees / episodes:.3f} (aim: at most 0.2)")
        print(f"  break-even: {settings.episodes * trees / episodes:.1f} episodes per problem")
    peaks = {}
    for factor in (1, 8):
        count = 200 * factor
        command = [
            sys.executable,
            "-m",
            "benchmarks.rollouts",
            "--memory-only",
            str(count),
            "--models",
            settings.models,
        ]
        peaks[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    print("peak memory of the orchestrating process: " + ", ".join(f"{n} problems {m} MiB" for n, m in peaks.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
