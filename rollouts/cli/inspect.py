"""The commands of ``python -m rollouts`` that look at a store and keep it well."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from rollouts.cli.progress import progress_bar
from rollouts.config import Count, settings
from rollouts.errors import StoreError, did_you_mean
from rollouts.files.atomic import write_text
from rollouts.store.rows import Rows
from rollouts.store.store import Store
from rollouts.trees.grow import load_trees
from rollouts.trees.signals import Signals

StorePath = Annotated[Path, tyro.conf.Positional]


@settings
class Stats:
    """Print what a store holds: trees, tokens, stop reasons, accuracies with intervals, oracle headroom.

    Attributes:
        store: Directory of the store.
        scorer: Score table, if there are several.
        grader: Grade table, if there are several.
        json_out: Also write the numbers to this file.
    """

    store: StorePath
    scorer: str | None = None
    grader: str | None = None
    json_out: Path | None = None

    def run(self) -> None:
        """Run the command."""
        from rollouts.cli.view import counts_table, failure_lines, special_token_lines, statistics_table
        from rollouts.trees.compile import compile_store
        from rollouts.trees.stats import split_statistics, store_statistics

        store = Store(self.store)
        out = Console(highlight=False)
        counts = store_statistics(store)
        out.print(counts_table(counts))
        for line in (*failure_lines(counts["failures"]), *special_token_lines(counts["neutralised"])):
            out.print(line, markup=False)
        with progress_bar("Compiling", None, "trees") as advance:
            trees = compile_store(store, self.scorer, self.grader, on_progress=advance)
        present = dict.fromkeys(trees.splits[trees.problem].tolist())
        rows = {split: split_statistics(trees, split) for split in present}
        out.print(statistics_table(rows))
        out.print(
            f"K = {trees.meta['max_escalations']}, scorer {trees.meta['scorer']}, grader {trees.meta['grader']}; "
            f"left out {trees.meta['left_out_trees']} trees, {trees.meta['orphans']} orphaned steps"
        )
        if live := store.live:
            out.print(f"Left out {len(live):,} trees of live episodes; `generate` closes them.")
        if self.json_out:
            values = {"generated": counts, "splits": {split: asdict(row) for split, row in rows.items()}}
            text = json.dumps({**values, "meta": trees.meta}, indent=1)
            self.json_out.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.json_out, text)


@settings
class Show:
    """Print one problem's tree: both proposals at every node, scores, tokens, correctness.

    Attributes:
        store: Directory of the store.
        problem: Id of the problem; default the first.
        replica: Which sample.
        scorer: Score table, if there are several.
        grader: Grade table, if there are several.
        most: Most nodes to print.
    """

    store: StorePath
    problem: str | None = None
    replica: int = 0
    scorer: str | None = None
    grader: str | None = None
    most: Count = 60

    def run(self) -> None:
        """Run the command."""
        from rollouts.cli.view import show_tree

        store = Store(self.store)
        problems = {problem.id: problem for problem in store.problems()}
        name = self.problem or next(iter(problems), "")
        if name not in problems:
            close = [item for item in problems if name[:12] in item][:20] or list(problems)[:20]
            raise StoreError(f"{self.store}: no problem {name!r}.{did_you_mean(name, close)}")
        trees = load_trees(store, [problems[name]], None, store.manifest["process"]["max_escalations"])
        found = {tree.replica: tree for tree in trees}
        if self.replica not in found:
            raise StoreError(f"{self.store}: {name!r} has replicas {sorted(found)}, not {self.replica}.")
        tree = found[self.replica]
        scores = None
        if store.signals():
            chosen = store.scored_by(store.choose("scores", self.scorer))
            scores = Signals([store.score_rows(each) for each in store.signals()], chosen)
        grades = Rows(store.grades(store.choose("grades", self.grader) if store.names("grades") else "none"))
        for rows in (grades, *(scores.tables.values() if scores else ())):
            rows.read([tree.key])
        reasons = Rows(store.steps, "reason")
        reasons.read([tree.key])
        show_tree(Console(highlight=False), tree, scores, grades, reasons, self.most)


@settings
class Verify:
    """Check a store: shards readable, keys unique, trees closed, every step scored and every solution graded.

    Attributes:
        store: Directory of the store.
    """

    store: StorePath

    def run(self) -> None:
        """Run the command; problems make the exit code 2."""
        from rollouts.trees.verify import verify_store

        findings = verify_store(Store(self.store))
        out = Console(highlight=False)
        for fact in findings.facts:
            out.print(fact, markup=False)
        if findings.problems:
            raise StoreError(f"{self.store}: " + " ".join(findings.problems))
        out.print("The store is sound.")


@settings
class Merge:
    """Add to a store what another store of the same process holds, such as one made on another machine.

    Problems, steps, scores and grades are added; where both have a row of one key, that of the first stays. After an
    interrupt the same command goes on. Splits in folders within stores are stores of their own.

    Attributes:
        store: Directory of the store.
        other: Directory of the other one, which is only read.
        into: Make a new store of both here, and change neither.
    """

    store: StorePath
    other: StorePath
    into: Path | None = None

    def run(self) -> None:
        """Run the command."""
        from rollouts.store.merge import merge

        target, others = Store(self.store), [Store(self.other)]
        if self.into is not None:
            if self.into.resolve() in (target.path.resolve(), others[0].path.resolve()):
                raise StoreError(f"--into {self.into} is one of the two; leave it out to add to the first.")
            target.refuse_unlike(others[0])
            others = [target, *others]
            target = Store.create(self.into, others[0].process, others[0].date)
        out = Console(highlight=False)
        with target.writing():
            for other in others:
                for name, rows in merge(target, other).items():
                    out.print(f"{name}: {rows:,} rows added from {other.path}", markup=False)
        dates = {str(store.date): str(store.path) for store in (target, *others)}
        if len(dates) > 1:
            told = ", ".join(f"{date} ({path})" for date, path in dates.items())
            out.print(f"The dates of their prompts differ: {told}. Chat templates that print one made other prompts.")


@settings
class Repair:
    """Set unreadable shards aside and remove leftovers of crashes; `generate` then fills the gaps.

    Attributes:
        store: Directory of the store.
        compact: Also merge all shards of each table into one, sorted, which is smaller and faster to read.
        drop_failed: Also drop the steps whose requests failed, so that `generate` asks for them again.
    """

    store: StorePath
    compact: bool = False
    drop_failed: bool = False

    def run(self) -> None:
        """Run the command."""
        store = Store(self.store)
        out = Console(highlight=False)
        with store.writing():
            done = store.repair(drop_failed=self.drop_failed)
            if self.compact:
                for table in store.tables():
                    before = len(table.shards())
                    table.compact()
                    done.append(f"{table.directory}: {before} shards became {len(table.shards())}")
        for line in done or ["Nothing to repair."]:
            out.print(line)
