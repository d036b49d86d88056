"""A run that only its end stops: grows, scores and grades a store of scripted models in a process of its own.

    python tests/support/scripted_run.py STORE SECONDS

writes a shard at least every SECONDS; the same command goes on where it was killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from handmade import ScriptedScorer, ScriptedWriter, problem, process

from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import ROLES
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees

PROBLEMS = [problem(f"p{number}") for number in range(24)]


class SlowWriter(ScriptedWriter):
    """Takes a millisecond, so that there is time for a kill."""

    def submit(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.001)
        return super().submit(*arguments, **options)


class SlowScorer(ScriptedScorer):
    def submit(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.001)
        return super().submit(*arguments, **options)


def run(path: Path, seconds: float) -> None:
    store = Store.create(path, process())
    with store.writing():
        store.add_problems(PROBLEMS)
        buffer = StepBuffer(store.steps, seconds=seconds)
        Grower({role: SlowWriter(role) for role in ROLES}, buffer).run(load_trees(store, PROBLEMS, 2, None))
        score_store(store, SlowScorer())
        grade_store(store, make_grader("exact"))


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]))
