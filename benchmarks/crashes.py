"""Kills and repairs: is what a store holds still right? ``python -m benchmarks.crashes``.

A process generates, scores, grades and compacts; it is killed (SIGKILL) at random moments of each and goes on, every
time with models that write something else. Then shards are damaged, `repair` sets them aside, and other draws fill the
gaps. After each kill and repair: nothing that was committed (in a shard that was not damaged) is lost, no row is there
twice, and every score and grade that belongs to a step is that of its own text, computed anew.
"""

from __future__ import annotations

import contextlib
import io
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import synthetic
from rollouts.__main__ import main as command
from rollouts.store.rows import Rows
from rollouts.store.shards import Table
from rollouts.store.store import Store
from rollouts.text.steps import solution_text
from rollouts.trees import annotate
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.verify import verify_store

STAGES = ("generate", "score", "grade", "compact")
REPLICAS, MAX_ESCALATIONS, SHARD_ROWS = 2, 1, 25


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        kills: Processes that are killed.
        repairs: Times that shards are damaged and repaired.
        problems: Problems at first; some more each time that a process is done before it is killed.
        seed: Of the moments and of the damage.
        run: Work on this store (used by the program itself).
        draws: Seed of the models, likewise.
        stop_before: Leave out this stage and those after it, likewise.
    """

    kills: int = 100
    repairs: int = 20
    problems: int = 8
    seed: int = 0
    run: Path | None = None
    draws: int = 0
    stop_before: str | None = None


@dataclass
class Figures:
    """What was seen.

    Attributes:
        kills: Kills by the stage that they hit.
        finished: Processes that were done before their kill.
        repairs: Repairs.
        rows: Rows at the end, by table.
        compared: Scores and grades that were computed anew, over all checks.
        wrong: Of them those that differed.
        lost: Rows that were committed and are gone, though nobody damaged their shard.
        twice: Rows that are there twice.
        unclaimed: Scores and grades at the end that belong to no step: their texts were lost with a damaged shard.
        unsound: What `verify` said at the end.
    """

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    repairs: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    wrong: int = 0
    lost: int = 0
    twice: int = 0
    unclaimed: int = 0
    unsound: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """How much is not as it should be."""
        return self.wrong + self.lost + self.twice + len(self.unsound)


def work(path: Path, problems: int, draws: int, stop_before: str | None = None) -> None:
    """Generate, score, grade and compact a store, in small shards; say which stage begins."""
    store, items = synthetic.make(path, problems, REPLICAS, MAX_ESCALATIONS)
    annotate._ROWS = SHARD_ROWS
    stages = {
        "generate": lambda: synthetic.grow(store, items, REPLICAS, draws, SHARD_ROWS, pause=1e-3),
        "score": lambda: annotate.score_store(store, synthetic.Scorer(pause=1e-3)),
        "grade": lambda: annotate.grade_store(store, synthetic.Grader(pause=1e-3)),
        "compact": lambda: [table.compact() for table in store.tables()],
    }
    with store.writing():
        store.add_problems(items)
        for name, stage in stages.items():
            if name == stop_before:
                return
            print(name, flush=True)
            stage()


class Trial:
    """One store through kills and repairs."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Begin with nothing."""
        self.path = path
        self.settings = settings
        self.figures = Figures()
        self.problems = settings.problems
        self.generator = random.Random(settings.seed)
        self.started = 0
        self.committed: dict[str, dict[Any, Any]] = {}

    def start(self, stop_before: str | None = None) -> subprocess.Popen[str]:
        """Start a process that works on the store with draws of its own."""
        self.started += 1
        options = {"--run": self.path, "--problems": self.problems, "--draws": self.started}
        options |= {"--stop-before": stop_before} if stop_before else {}
        arguments = [str(part) for option in options.items() for part in option]
        line = [sys.executable, "-m", "benchmarks.crashes", *arguments]
        return subprocess.Popen(line, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)

    def kill(self, stage: str) -> None:
        """Let a process work and kill it at a random moment of a stage."""
        with self.start() as process:
            reached = ""
            assert process.stdout is not None
            while reached != stage and (line := process.stdout.readline()):
                reached = line.strip()
            time.sleep(self.generator.uniform(0.0, 0.12))
            while select.select([process.stdout], [], [], 0)[0] and (line := process.stdout.readline()):
                reached = line.strip()
            if process.poll() is None:
                process.kill()
                self.figures.kills[reached] += 1
            else:
                self.finish(process)
        self.check()

    def finish(self, process: subprocess.Popen[str]) -> None:
        """Note that a process was done; there is more to do from now on."""
        if process.wait():
            raise SystemExit(f"a process ended with exit code {process.returncode}")
        self.figures.finished += 1
        self.problems += 4

    def repair(self) -> None:
        """Damage shards, repair, and have models of other draws fill the gaps."""
        with self.start("compact" if self.generator.random() < 0.8 else None) as process:
            self.finish(process)
        self.check()
        store = Store(self.path)
        tables = [store.steps, *(table for table in store.tables()[1:] if self.generator.random() < 0.3)]
        for table in tables:
            shard = self.generator.choice(table.shards())
            for key in keyed(table, [shard]):
                self.committed[str(table.directory)].pop(key, None)
            content = bytearray(shard.read_bytes())
            if self.generator.random() < 0.5:
                content = content[: -self.generator.randrange(1, 100)]
            else:
                content[self.generator.randrange(4, len(content))] ^= 0xFF
            shard.write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()):
            if command(["repair", str(self.path)]):
                raise SystemExit("repair failed")
        self.figures.repairs += 1
        with self.start("compact") as process:
            self.finish(process)
        self.check()

    def check(self) -> None:
        """Compare the store with what was committed before, and scores and grades with those of the texts."""
        if not (self.path / "manifest.json").exists():
            return
        store, figures = Store(self.path), self.figures
        for table in store.tables():
            keys = table.keys()
            figures.twice += keys.num_rows - keys.group_by(table.key).aggregate([]).num_rows
            now = keyed(table)
            before = self.committed.get(str(table.directory), {})
            figures.lost += sum(now.get(key, ...) != row for key, row in before.items())
            self.committed[str(table.directory)] = now
        scores, grades = Rows(store.scores(synthetic.Scorer.name)), Rows(store.grades(synthetic.Grader.name))
        figures.unclaimed = 0
        for tree in load_trees(store, store.problems(), None, MAX_ESCALATIONS, along=(scores, grades)):
            for _, node, role in tree.places():
                key, steps = tree.row_key(node, role), [*node.steps, node.proposals[role].text]
                score = float(np.float32(synthetic.score_of(tree.problem.question, steps)))
                for rows, right in ((scores, score), (grades, synthetic.is_right(solution_text(steps)))):
                    if key in rows:
                        figures.compared += 1
                        figures.wrong += rows[key] != right
            keys = [tree.row_key(*place[1:]) for place in tree.places()]
            figures.unclaimed += sum(rows.unclaimed(tree.key, keys) for rows in (scores, grades))


def keyed(table: Table, shards: Any = None) -> dict[Any, Any]:
    """Return the rows of a table, or of some shards, by key."""
    parts = table.read() if shards is None else map(table.read_shard, shards)
    return {tuple(row[name] for name in table.key): row for part in parts for row in part.to_pylist()}


def crash(settings: Settings, path: Path) -> Figures:
    """Go through all kills and repairs and return what was seen."""
    trial = Trial(path, settings)
    while trial.figures.kills.total() < settings.kills:
        trial.kill(STAGES[trial.figures.kills.total() % len(STAGES)])
    with trial.start() as process:
        trial.finish(process)
    for _ in range(settings.repairs):
        trial.repair()
    with trial.start() as process:
        trial.finish(process)
    trial.check()
    if command(["repair", str(path)]):  # what kills left
        raise SystemExit("repair failed")
    store, figures = Store(path), trial.figures
    compile_store(store, cache=False)
    figures.unsound = verify_store(store).problems
    figures.rows = {str(table.directory.relative_to(path)): table.keys().num_rows for table in store.tables()}
    return figures


def main(settings: Settings) -> None:
    """Run the benchmark."""
    if settings.run is not None:
        work(settings.run, settings.problems, settings.draws, settings.stop_before)
        return
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        figures = crash(settings, Path(scratch) / "store")
    killed = ", ".join(f"{count} in {stage or 'the start'}" for stage, count in sorted(figures.kills.items()))
    print(f"{figures.kills.total()} kills ({killed}), {figures.repairs} repairs, {figures.finished} runs to the end")
    print("rows at the end: " + ", ".join(f"{name} {count:,}" for name, count in figures.rows.items()))
    print(f"scores and grades computed anew, over all checks: {figures.compared:,}; wrong: {figures.wrong}")
    print(f"committed rows lost: {figures.lost}; rows twice: {figures.twice}; unsound: {figures.unsound or 'nothing'}")
    print(f"scores and grades of texts that were lost, not used: {figures.unclaimed}")
    sys.exit(1 if figures.faults else 0)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
