"""Checks that a rollout store is what it says it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rollouts.errors import StoreError
from rollouts.store.rows import Rows
from rollouts.store.shards import batched
from rollouts.store.store import Store
from rollouts.trees.annotate import is_left
from rollouts.trees.grow import load_trees
from rollouts.trees.stats import failed_steps

_TOGETHER = 1000  # problems whose keys are compared at once


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
    known = {problem.id for problem in store.problems()}
    for table in store.tables():
        name = str(table.directory.relative_to(store.path))
        try:
            rows = table.problems()
        except StoreError as error:
            findings.problems.append(str(error))
            continue
        findings.facts.append(f"{name}: {rows.total():,} rows in {len(table.shards())} shards")
        keys = map(table.keys, batched(rows, _TOGETHER))
        if duplicates := sum(part.num_rows - part.group_by(table.key).aggregate([]).num_rows for part in keys):
            findings.problems.append(f"{name}: {duplicates} duplicate keys.")
        if strangers := sum(count for problem, count in rows.items() if problem not in known):
            findings.problems.append(f"{name}: {strangers} rows of problems that problems.parquet does not have.")
        if table.leftovers():
            findings.problems.append(f"{name}: unfinished shards of a crash; `python -m rollouts repair` removes them.")
    if not findings.problems:
        _trees(store, findings)
    return findings


def _of_all(store: Store, name: str) -> bool:
    """Whether a score table is of all steps: decisions are of those that were served, verifications of solutions."""
    try:
        return store.table_manifest("scores", name)["process"].get("kind") not in ("decisions", "verification")
    except StoreError:
        return True


def _trees(store: Store, findings: Findings) -> None:
    counts: Counter[str] = Counter()
    live = store.live
    tables = {("unscored", name): store.score_rows(name) for name in store.names("scores") if _of_all(store, name)}
    tables |= {("ungraded", name): Rows(store.grades(name)) for name in store.names("grades")}
    trees = load_trees(
        store, store.problems(), None, store.manifest["process"]["max_escalations"], along=list(tables.values())
    )
    missing: Counter[tuple[str, str]] = Counter()
    for tree in trees:
        lacking = "live" if tree.key in live else "open"
        counts.update({"trees": 1, "nodes": len(tree.nodes), "orphans": tree.orphans, lacking: tree.missing() > 0})
        keys = [tree.row_key(node, role) for _, node, role in tree.places()]
        for which, rows in tables.items():
            missing[which] += sum(is_left(rows, place) for place in tree.places())
            counts["unclaimed"] += rows.unclaimed(tree.key, keys)
    findings.facts.append(
        f"{counts['trees']:,} trees, {counts['nodes']:,} decision nodes, {counts['orphans']} orphaned steps"
    )
    for (role, reason), count in failed_steps(store).most_common():
        findings.facts.append(f"{count:,} failed steps of {role}: {reason}")
    if counts["unclaimed"]:
        findings.facts.append(f"{counts['unclaimed']:,} scores and grades belong to no step that is there; not used")
    if counts["live"]:
        findings.facts.append(f"{counts['live']:,} trees of live episodes are not closed; `generate` closes them")
    if counts["open"]:
        findings.problems.append(f"{counts['open']} trees are not closed; the same `generate` closes them.")
    for (kind, name), count in (+missing).items():
        remedy = "score" if kind == "unscored" else "grade"
        findings.problems.append(f"{count} rows {kind} by {name!r}; `python -m rollouts {remedy}` adds them.")
