"""Adding scores and grades to an existing store, without any generating model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rollouts.scoring.base import Scorer, Scores
from rollouts.store.shards import KEY, Table, columns_of
from rollouts.store.store import Store
from rollouts.tasks.grading import Grade, Grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import ROLES, solution_text
from rollouts.trees.grow import load_trees
from rollouts.trees.tree import Node, RolloutTree

Edge = tuple[Node, str]
_SHARD_ROWS = 50_000


@dataclass
class Report:
    """What an annotation pass did.

    Attributes:
        rows: Rows added.
        skipped: Scores that do not exist because the input exceeds the scorer's window.
        errors: Answers on which the grader failed; they are graded wrong.
    """

    rows: int = 0
    skipped: int = 0
    errors: int = 0


@dataclass
class _Rows:
    """Rows of one table on their way to the disk."""

    table: Table
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tree: RolloutTree, edge: Edge, values: Mapping[str, Any]) -> None:
        node, role = edge
        key = {"problem": tree.problem.id, "replica": tree.replica, "prefix": node.key, "role": role}
        self.rows.append({**key, **values})
        if len(self.rows) >= _SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.table.append(columns_of(self.rows, self.table.schema))
            self.rows = []


def score_store(
    store: Store,
    scorer: Scorer,
    problems: Sequence[Problem] | None = None,
    *,
    in_flight: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Score every proposal that has no score in the scorer's table yet.

    Paths that share a prefix share its scores; identical texts of both models get one score. Resumable: what
    is there is kept.

    Args:
        store: The store; its write lock must be held.
        scorer: The scorer.
        problems: Problems to score; default all.
        in_flight: Paths under way at once.
        on_progress: Called with the number of proposals scored since the last call.

    Raises:
        BackendError: The scorer is gone; what came back before is kept.
    """
    table = store.attach("scores", scorer.name, scorer.process())
    report, rows = Report(), _Rows(table)
    pending: deque[tuple[RolloutTree, list[list[Edge]], Future[Scores]]] = deque()

    def drain(limit: int) -> None:
        while len(pending) > limit:
            tree, edges, future = pending.popleft()
            for same, score in zip(edges, future.result(), strict=True):
                report.skipped += score is None
                for edge in same:
                    rows.add(tree, edge, {"score": score})
                    report.rows += 1
            if on_progress:
                on_progress(sum(len(same) for same in edges))

    try:
        for tree, done in _trees_with_done(store, table, problems):
            for path, edges in _unscored_paths(tree, done):
                pending.append((tree, edges, scorer.submit(tree.problem.question, path)))
                drain(in_flight)
        drain(0)
    finally:
        rows.flush()
    return report


def _trees_with_done(
    store: Store, table: Table, problems: Sequence[Problem] | None
) -> Iterator[tuple[RolloutTree, set[tuple[int, str]]]]:
    """Yield every tree with the (prefix, role) keys that a table has for it."""
    chosen = list(problems) if problems is not None else store.problems()
    chunk = 128
    for start in range(0, len(chosen), chunk):
        part = chosen[start : start + chunk]
        done: dict[tuple[str, int], set[tuple[int, str]]] = {}
        for rows in table.read({problem.id for problem in part}, KEY):
            for problem, replica, prefix, role in zip(*(rows[name].to_pylist() for name in KEY), strict=True):
                done.setdefault((problem, replica), set()).add((prefix, role))
        for tree in load_trees(store, part, None, None, chunk=chunk):
            yield tree, done.get((tree.problem.id, tree.replica), set())


def _unscored_paths(tree: RolloutTree, done: set[tuple[int, str]]) -> Iterator[tuple[list[str], list[list[Edge]]]]:
    """Yield paths that together cover the proposals without a score, and the proposals that each step stands for.

    A proposal appears once: under the first path that reaches it; positions already covered have no edges.
    """
    for leaf, role in tree.leaf_edges():
        steps = [*leaf.steps, leaf.proposals[role].text]
        edges: list[list[Edge]] = []
        node: Node | None = tree.root
        for text in steps:
            assert node is not None
            same = [
                (node, writer)
                for writer in ROLES
                if writer in node.proposals and node.proposals[writer].text == text and (node.key, writer) not in done
            ]
            done.update((node.key, writer) for _, writer in same)
            edges.append(same)
            node = next(
                (tree.child(node, writer) for writer in ROLES if writer in node.proposals
                 and node.proposals[writer].text == text and not node.proposals[writer].terminal),
                None,
            )  # fmt: skip
        if any(edges):
            yield steps, edges


def grade_store(
    store: Store,
    grader: Grader,
    problems: Sequence[Problem] | None = None,
    *,
    workers: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Grade every solution (terminal proposal) that has no grade in the grader's table yet.

    Args:
        store: The store; its write lock must be held.
        grader: The grader.
        problems: Problems to grade; default all.
        workers: Processes.
        on_progress: Called with the number of solutions graded since the last call.
    """
    table = store.attach("grades", grader.name, grader.describe())
    report, rows = Report(), _Rows(table)
    batch: list[tuple[RolloutTree, Edge]] = []

    def drain() -> None:
        pairs = [
            (tree.problem.answer, solution_text([*node.steps, node.proposals[role].text]))
            for tree, (node, role) in batch
        ]
        for (tree, edge), grade in zip(batch, grader.grade_many(pairs, workers), strict=True):
            rows.add(tree, edge, _grade_values(grade))
            report.rows += 1
            report.errors += grade.error is not None
        if on_progress:
            on_progress(len(batch))
        batch.clear()

    try:
        for tree, done in _trees_with_done(store, table, problems):
            batch.extend((tree, edge) for edge in _solutions(tree) if (edge[0].key, edge[1]) not in done)
            if len(batch) >= 10_000:
                drain()
        drain()
    finally:
        rows.flush()
    return report


def _solutions(tree: RolloutTree) -> Iterable[Edge]:
    for node in tree.nodes.values():
        for role, step in node.proposals.items():
            if step.terminal:
                yield node, role


def _grade_values(grade: Grade) -> dict[str, Any]:
    return {"correct": grade.correct, "extracted": grade.extracted, "error": grade.error}
