"""How a store grows: time and memory against the number of problems: ``python -m benchmarks.store``.

Makes synthetic stores of several sizes and measures on each, in processes of their own, what reads all of it (the scan
of a run that goes on, scoring and grading with nothing left, compiling, `verify`), one tree, and `repair --compact`,
before and after compaction. Seconds are processor time, so that a busy machine matters less. ``--against`` measures
another checkout beside this one, on copies of the same stores. The trees of ``--grown`` problems are grown, and
repeated for the others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

sys.path.append(str(Path(__file__).parents[1]))  # what is measured comes first

from benchmarks import synthetic  # noqa: E402
from rollouts.store.rows import Rows  # noqa: E402
from rollouts.store.shards import Table  # noqa: E402
from rollouts.store.store import Store  # noqa: E402
from rollouts.tasks.problems import Problem  # noqa: E402
from rollouts.trees.annotate import grade_store, left, score_store  # noqa: E402
from rollouts.trees.compile import compile_store  # noqa: E402
from rollouts.trees.grow import load_trees  # noqa: E402
from rollouts.trees.live import LiveTrees  # noqa: E402
from rollouts.trees.stats import store_statistics  # noqa: E402
from rollouts.trees.verify import verify_store  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        problems: Sizes of the stores.
        grown: Problems whose trees are grown.
        replicas: Trees of each problem.
        depth: Most steps of a path.
        max_escalations: K.
        shard_rows: Rows of a shard of steps.
        filler: Characters of text in each step.
        against: Another checkout, to be measured in the same run.
        only: Measure these things alone.
        out: Where stores are made and left (default: a temporary place); a finished one that is there is measured.
        measure: Measure this one thing on a store and print it (used by the program itself).
        store: The store to measure it on.
    """

    problems: tuple[int, ...] = (1000, 10_000)
    grown: int = 1000
    replicas: int = 1
    depth: int = 6
    max_escalations: int = 2
    shard_rows: int = 2000
    filler: int = 60
    against: Path | None = None
    only: tuple[str, ...] = ()
    out: Path | None = None
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
    "statistics": lambda store: store_statistics(store)["steps"],
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
    if not store.names("grades"):
        store.add_problems(items)
        grown = items[: settings.grown]
        options = {"depth": settings.depth, "filler": "x" * settings.filler}
        synthetic.grow(store, grown, settings.replicas, 0, settings.shard_rows, **options)
        score_store(store, synthetic.Scorer(), grown)
        grade_store(store, synthetic.Grader(), grown)
        for table in store.tables():
            repeat(table, items, len(grown))
    return sum(pq.read_metadata(path).num_rows for path in store.steps.shards()), len(store.steps.shards())


def repeat(table: Table, items: Sequence[Problem], grown: int) -> None:
    """Give the other problems the rows of the first ones: neither keys nor contents depend on the problem."""
    parts = [table.read_shard(path) for path in table.shards()]
    place = {item.id: number for number, item in enumerate(items[:grown])}
    for copy, start in enumerate(range(grown, len(items), grown), start=1):
        for number, part in enumerate(parts):
            column = part["problem"].combine_chunks()
            names = [items[start + place[name]].id for name in column.dictionary.to_pylist()]
            renamed = pa.DictionaryArray.from_arrays(column.indices, pa.array(names))
            rows = part.set_column(0, table.schema.field("problem"), renamed)
            table.write([rows], {}, table.directory / f"part-{copy * len(parts) + number:06d}.parquet")


def measured(settings: Settings, checkout: Path, path: Path) -> Iterator[tuple[str, float, float]]:
    """Yield what was measured of one checkout: name, seconds, MiB."""

    def one(name: str) -> tuple[float, float]:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--store", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=checkout)
        seconds, memory = json.loads(ended.stdout.splitlines()[-1])
        return seconds, memory

    wanted = settings.only or (*MEASURED, "compact", *(f"{name}, compacted" for name in MEASURED))
    for name in wanted:
        yield (name, *one(name.removesuffix(", compacted")))


def main(settings: Settings) -> None:
    """Run the benchmark."""
    if settings.measure is not None and settings.store is not None:
        measure(settings.measure, settings.store)
        return
    here = Path(__file__).resolve().parents[1]
    checkouts = [*([settings.against.resolve()] if settings.against else []), here]
    found: dict[tuple[str, Path], list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        scratch = settings.out or stack.enter_context(tempfile.TemporaryDirectory())
        for problems in settings.problems:
            made = Path(scratch) / f"{problems}"
            steps, shards = make(settings, made, problems)
            print(f"{problems:,} problems: {steps:,} steps in {shards} shards", flush=True)
            for checkout in checkouts:
                shutil.rmtree(Path(scratch) / "copy", ignore_errors=True)
                copy = shutil.copytree(made, Path(scratch) / "copy")
                for name, seconds, memory in measured(settings, checkout, copy):
                    print(f"{problems:,}: {name}, {checkout.name}: {seconds:.2f} s, {memory:.0f} MiB", flush=True)
                    found.setdefault((name, checkout), []).append((seconds, memory))
                shutil.rmtree(copy)
    for (name, checkout), values in found.items():
        where = "" if len(checkouts) == 1 else (" (against)" if checkout != here else " (here)")
        times = " -> ".join(f"{seconds:.2f} s" for seconds, _ in values)
        print(f"{name + where:36} {times:28} {' -> '.join(f'{memory:.0f} MiB' for _, memory in values)}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
