"""What a cluster costs and how far its one writer goes: ``python -m benchmarks.cluster``.

Trees of the embedded family are grown in this process, then by one worker of a Ray cluster on this machine; compared is
the processor time of all processes from the moment at which models are loaded to the last row on the disk. Then parts
of rows as workers send them are taken and written as fast as the driver can; an H100 makes some 217 rows a second
(computed: 2.8 million steps of 60 tokens in 3.6 hours).
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

from rollouts.cluster.growing import Growing
from rollouts.cluster.pool import LOCAL, connected
from rollouts.config import load_family
from rollouts.family import Family
from rollouts.store.store import Store
from rollouts.tasks.problems import load_problems
from rollouts.text.steps import ROLES
from rollouts.trees.grow import Grower, StepBuffer, label_of, load_trees

H100_ROWS = 217  # a second


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        problems: Problems whose trees are grown.
        max_escalations: K of the trees.
        rows: Rows that the writer takes.
        part: Rows of a part.
    """

    problems: int = 60
    max_escalations: int | None = 1
    rows: int = 1_000_000
    part: int = 500


def processor_seconds() -> float:
    """Return the processor time of this process and of all that it has started and still run."""
    every = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(each.cpu_times()[:2]) for each in every)


def grow(folder: Path, settings: Settings) -> dict[str, tuple[float, float]]:
    """Grow the same trees both ways; return the processor and wall seconds of each."""
    problems = list(load_problems("tinymath:test", limit=settings.problems))
    family, found = Family(load_family("tinymath:transformers")), {}
    with connected(LOCAL, 1, print) as cluster:
        for name in ("one process", "one worker"):
            store = Store.create(folder / name, family.process(settings.max_escalations, labels=True))
            buffer = StepBuffer(store.steps, label_of(store))

            def load(store: Store = store) -> Any:
                return load_trees(store, problems, 1, settings.max_escalations)

            with store.writing(), ExitStack() as stack:
                store.add_problems(problems)
                run: Any
                if name == "one process":
                    writers = {role: stack.enter_context(family.open(role, store)) for role in ROLES}
                    run = lambda: Grower(writers, buffer).run(load())  # noqa: B023, E731
                else:
                    job = cluster.job(store, family, writes=True, grows=256)
                    pool = stack.enter_context(Growing(cluster, store, job, load, buffer))
                    while not any(hand.state == "working" for hand in pool.hands):
                        pool.step()
                    run = pool.run
                before, began = processor_seconds(), time.monotonic()
                run()
                found[name] = processor_seconds() - before, time.monotonic() - began
    one, many = (Store(folder / name).steps.keys().num_rows for name in found)
    if one != many:
        raise SystemExit(f"{one} rows in one process, {many} on a worker")
    print(f"{one:,} rows each")
    return found


def write(folder: Path, grown: Path, settings: Settings) -> float:
    """Return how many rows the driver takes and writes in a second of processor time."""
    table = Store(grown).steps
    rows = table.encode(table.read_shard(table.shards()[0]).to_pydict())
    sent = pickle.dumps((rows.slice(0, settings.part), Counter(requests_small=100)))
    store = Store.create(folder / "written", Store(grown).manifest["process"])
    buffer, taken, before = StepBuffer(store.steps), 0, time.process_time()
    while taken < settings.rows:
        part, counters = pickle.loads(sent)
        buffer.receive([part], counters)
        buffer.flush_if_due()
        taken += part.num_rows
    buffer.flush()
    return taken / (time.process_time() - before)


def main(settings: Settings) -> None:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        found = grow(Path(scratch), settings)
        for name, (processor, wall) in found.items():
            print(f"{name}: {processor:.1f} s of processor time, {wall:.1f} s")
        print(f"ratio {found['one worker'][0] / found['one process'][0]:.2f}")
        rate = write(Path(scratch), Path(scratch) / "one process", settings)
        print(f"one writer: {rate:,.0f} rows a second of processor time, as many as {rate / H100_ROWS:,.0f} H100s make")


if __name__ == "__main__":
    main(tyro.cli(Settings))
