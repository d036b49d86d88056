"""Models that are none, for measurements of stores: random steps, and scores and grades that their texts decide."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rollouts.models.stepwise import Generation
from rollouts.scoring.base import Scores
from rollouts.store.store import Store
from rollouts.tasks.grading import Grade
from rollouts.tasks.problems import Problem
from rollouts.text.steps import DELIMITER, ROLES, Prefix, Step, StopReason
from rollouts.trees.grow import Grower, StepBuffer, load_trees


class Writer:
    """Writes steps at random: other ones after each start, and at times what the other model writes too.

    Attributes:
        role: ``small`` or ``large``.
        whole_paths: It can write the whole rest.
    """

    whole_paths = True

    def __init__(self, role: str, seed: object, depth: int = 4, filler: str = "", pause: float = 0.0) -> None:
        """Seed the draws; paths have at most `depth` steps, with `filler` in each; a request takes `pause` seconds."""
        self.role = role
        self._draws = random.Random(f"{role} {seed}")
        self._depth = depth
        self._filler = filler
        self._pause = pause

    def _step(self, depth: int) -> Step:
        draw = self._draws.randrange(4)
        if depth >= self._depth or self._draws.random() < 0.1:
            return Step(f"{self._filler}so \\boxed{{{7 + draw % 2}}}", 5 + draw, StopReason.BOXED, 20)
        return Step(f"{self._filler}step {depth} says {draw}{DELIMITER}", 3 + draw, StopReason.DELIMITER, 20)

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """Write the next step, or the whole rest."""
        time.sleep(self._pause)
        steps = [self._step(len(prefix.steps) + 1)]
        while whole and not steps[-1].terminal:
            steps.append(self._step(len(prefix.steps) + len(steps) + 1))
        return _settled(Generation(tuple(steps), sum(step.tokens for step in steps)))


class Scorer:
    """A step's score is a hash of the question and all steps up to it: it tells what it was made for."""

    name = "hash"
    tolerance = 0.0

    def __init__(self, pause: float = 0.0) -> None:
        """Take `pause` seconds for each path."""
        self._pause = pause

    def process(self) -> Mapping[str, Any]:
        """Return that there is nothing to set."""
        return {"kind": "hash"}

    def submit(self, question: str, steps: Sequence[str]) -> Future[Scores]:
        """Score one path."""
        time.sleep(self._pause)
        return _settled([score_of(question, steps[: end + 1]) for end in range(len(steps))])


class Grader:
    """A solution is right if its hash is even: a grade tells what it was made for."""

    name = "hash"

    def __init__(self, pause: float = 0.0) -> None:
        """Take `pause` seconds for each solution."""
        self._pause = pause

    def describe(self) -> Mapping[str, Any]:
        """Return that there is nothing to set."""
        return {"kind": "hash"}

    def grade_many(self, pairs: Sequence[tuple[str, str]], workers: int = 1) -> list[Grade]:
        """Grade pairs of answer and solution."""
        time.sleep(self._pause * len(pairs))
        return [Grade(is_right(solution), "") for _, solution in pairs]


def score_of(question: str, steps: Sequence[str]) -> float:
    """Return the score of the last of some steps."""
    return _hash("\0".join((question, *steps))) % 65536 / 65536


def is_right(solution: str) -> bool:
    """Return the grade of a solution."""
    return _hash(solution) % 2 == 0


def make(path: Any, problems: int, replicas: int, max_escalations: int | None) -> tuple[Store, list[Problem]]:
    """Make a store of some problems, or open the one that is there."""
    process = {
        "mode": "continue",
        "limits": {"step_tokens": 512, "solution_tokens": 2048, "max_steps": 30},
        "max_escalations": max_escalations,
        "replicas": replicas,
        "labels": False,
        **{role: {"model": role} for role in ROLES},
    }
    items = [Problem(f"synthetic-{i:06d}", "train", f"Question {i}?", "7", "synthetic", "MIT") for i in range(problems)]
    return Store.create(path, process), items


def grow(store: Store, items: Sequence[Problem], replicas: int, seed: object, rows: int, **options: Any) -> None:
    """Grow all trees of a store, with a shard for at most so many rows."""
    writers = {role: Writer(role, seed, **options) for role in ROLES}
    trees = load_trees(store, items, replicas, store.manifest["process"]["max_escalations"])
    Grower(writers, StepBuffer(store.steps, rows=rows, seconds=1e9)).run(trees)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _settled(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future
