"""How a store grows: time and memory against the number of problems: ``python -m benchmarks.store``.

Makes synthetic stores of several sizes and measures on each, in processes of their own, what reads all of it (the scan
of a run that goes on, scoring and grading with nothing left, compiling, `verify`), one tree, and `repair --compact`,
before and after compaction. Seconds are processor time, so that a busy machine does not matter. ``--against`` measures
another checkout beside this one, on copies of the same stores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).parents[1]))  # what is measured comes first

from benchmarks import synthetic  # noqa: E402
from rollouts.store.rows import Rows  # noqa: E402
from rollouts.store.store import Store  # noqa: E402
from rollouts.trees.annotate import grade_store, left, score_store  # noqa: E402
from rollouts.trees.compile import compile_store  # noqa: E402
from rollouts.trees.grow import load_trees  # noqa: E402
from rollouts.trees.live import LiveTrees  # noqa: E402
from rollouts.trees.verify import verify_store  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        problems: Sizes of the stores.
        replicas: Trees of each problem.
        depth: Most steps of a path.
        max_escalations: K.
        shard_rows: Rows of a shard of steps.
        filler: Characters of text in each step.
        against: Another checkout, to be measured in the same run.
        measure: Measure this one thing on a store and print it (used by the program itself).
        store: The store to measure it on.
    """

    problems: tuple[int, ...] = (1000, 8000)
    replicas: int = 1
    depth: int = 6
    max_escalations: int = 1
    shard_rows: int = 2000
    filler: int = 60
    against: Path | None = None
    measure: str | None = None
    store: Path | None = None


def _resume(store: Store) -> object:
    process = store.manifest["process"]
    trees = load_trees(store, store.problems(), process["replicas"], process["max_escalations"])
    return sum(len(tree.wants()) for tree in trees)


def _left(store: Store) -> object:
    tables = (Rows(store.scores(synthetic.Scorer.name)), Rows(store.grades(synthetic.Grader.name)))
    return sum(1 for rows in tables for _ in left(store, rows))


def _one_tree(store: Store) -> object:
    trees = LiveTrees(store, {}, synthetic.Scorer(), synthetic.Grader())
    return trees.load([(store.problems()[-1], 0)])


def _verify(store: Store) -> object:
    return verify_store(store).problems


def _compact(store: Store) -> object:
    for table in store.tables():
        table.compact()
    return None


MEASURED: dict[str, Callable[[Store], object]] = {
    "resume scan": _resume,
    "nothing left": _left,
    "compile": lambda store: compile_store(store, cache=False).nodes,
    "one tree": _one_tree,
    "verify": _verify,
}


def measure(name: str, path: Path) -> None:
    """Measure one thing; print seconds of processor time and the peak memory beyond the imports, MiB."""
    store = Store(path)
    before = _peak()
    begun = time.process_time()
    ({**MEASURED, "compact": _compact}[name])(store)
    seconds = time.process_time() - begun
    print(json.dumps([seconds, _peak() - before]))


def _peak() -> float:
    """Return the most memory that this program has used, MiB; `getrusage` counts the parent too."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def make(settings: Settings, path: Path, problems: int) -> tuple[int, int]:
    """Make a finished store; return its steps and shards."""
    store, items = synthetic.make(path, problems, settings.replicas, settings.max_escalations)
    store.add_problems(items)
    options = {"depth": settings.depth, "filler": "x" * settings.filler}
    synthetic.grow(store, items, settings.replicas, 0, settings.shard_rows, **options)
    score_store(store, synthetic.Scorer())
    grade_store(store, synthetic.Grader())
    return store.steps.keys().num_rows, len(store.steps.shards())


def measured(settings: Settings, checkout: Path, path: Path) -> Iterator[tuple[str, float, float]]:
    """Yield what was measured of one checkout: name, seconds, MiB."""

    def one(name: str) -> tuple[float, float]:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--store", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=checkout)
        seconds, memory = json.loads(ended.stdout.splitlines()[-1])
        return seconds, memory

    for name in MEASURED:
        yield (name, *one(name))
    yield ("compact", *one("compact"))
    for name in MEASURED:
        yield (f"{name}, compacted", *one(name))


def main(settings: Settings) -> None:
    """Run the benchmark."""
    if settings.measure is not None and settings.store is not None:
        measure(settings.measure, settings.store)
        return
    here = Path(__file__).resolve().parents[1]
    checkouts = [*([settings.against.resolve()] if settings.against else []), here]
    found: dict[tuple[str, Path], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for problems in settings.problems:
            made = Path(scratch) / f"{problems}"
            steps, shards = make(settings, made, problems)
            print(f"{problems:,} problems: {steps:,} steps in {shards} shards", flush=True)
            for checkout in checkouts:
                copy = shutil.copytree(made, Path(scratch) / "copy")
                for name, seconds, memory in measured(settings, checkout, copy):
                    found.setdefault((name, checkout), []).append((seconds, memory))
                shutil.rmtree(copy)
    for (name, checkout), values in found.items():
        where = "" if len(checkouts) == 1 else (" (against)" if checkout != here else " (here)")
        times = " -> ".join(f"{seconds:.2f} s" for seconds, _ in values)
        print(f"{name + where:36} {times:28} {' -> '.join(f'{memory:.0f} MiB' for _, memory in values)}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
