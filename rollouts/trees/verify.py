"""Checks that a rollout store is what it says it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rollouts.errors import StoreError
from rollouts.store.shards import KEY, Table
from rollouts.store.store import Store
from rollouts.trees.grow import load_trees


@dataclass
class Findings:
    """What was found.

    Attributes:
        facts: Lines to print in any case.
        problems: What is wrong; empty for a sound store.
    """

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_store(store: Store) -> Findings:
    """Check that shards are readable, keys unique, trees closed, steps scored and solutions graded."""
    findings = Findings()
    problems = store.problems()
    known = {problem.id for problem in problems}
    for table in store.tables():
        name = str(table.directory.relative_to(store.path))
        try:
            rows, duplicates, strangers = _keys(table, known)
        except StoreError as error:
            findings.problems.append(str(error))
            continue
        findings.facts.append(f"{name}: {rows:,} rows in {len(table.shards())} shards")
        if duplicates:
            findings.problems.append(f"{name}: {duplicates} duplicate keys.")
        if strangers:
            findings.problems.append(f"{name}: {strangers} rows of problems that problems.parquet does not have.")
        if table.leftovers():
            findings.problems.append(f"{name}: unfinished shards of a crash; `python -m rollouts repair` removes them.")
    if not findings.problems:
        _trees(store, findings)
    return findings


def _keys(table: Table, known: set[str]) -> tuple[int, int, int]:
    seen: set[tuple[object, ...]] = set()
    rows = strangers = 0
    for part in table.read(columns=KEY):
        for key in zip(*(part[name].to_pylist() for name in KEY), strict=True):
            rows += 1
            strangers += key[0] not in known
            seen.add(key)
    return rows, rows - len(seen), strangers


def _trees(store: Store, findings: Findings) -> None:
    counts: Counter[str] = Counter()
    tables = {name: store.scores(name) for name in store.names("scores")}
    have = {name: _key_set(table) for name, table in tables.items()}
    graded = {name: _key_set(store.grades(name)) for name in store.names("grades")}
    for tree in load_trees(store, store.problems(), None, store.manifest["process"]["max_escalations"]):
        counts["trees"] += 1
        counts["nodes"] += len(tree.nodes)
        counts["open"] += tree.missing() > 0
        counts["orphans"] += tree.orphans
        for node in tree.nodes.values():
            for role, step in node.proposals.items():
                key = (tree.problem.id, tree.replica, node.key, role)
                for name, keys in have.items():
                    counts[f"unscored {name}"] += key not in keys
                if step.terminal:
                    for name, keys in graded.items():
                        counts[f"ungraded {name}"] += key not in keys
    findings.facts.append(
        f"{counts['trees']:,} trees, {counts['nodes']:,} decision nodes, {counts['orphans']} orphaned steps"
    )
    if counts["open"]:
        findings.problems.append(f"{counts['open']} trees are not closed; the same `generate` closes them.")
    for kind, names, remedy in (("unscored", have, "score"), ("ungraded", graded, "grade")):
        for name in names:
            if counts[f"{kind} {name}"]:
                findings.problems.append(
                    f"{counts[f'{kind} {name}']} rows {kind} by {name!r}; `python -m rollouts {remedy}` adds them."
                )


def _key_set(table: Table) -> set[tuple[object, ...]]:
    keys: set[tuple[object, ...]] = set()
    for part in table.read(columns=KEY):
        keys.update(zip(*(part[name].to_pylist() for name in KEY), strict=True))
    return keys
