"""Scores and grades of proposals: what is left to do, and adding them to a store without any generating model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from rollouts.errors import BackendError, ConfigError, RequestsFailed
from rollouts.scoring.base import Failed, Scorer, Scores, columns_of, roles_of, submitted
from rollouts.store.rows import RowKey, Rows
from rollouts.store.store import Store
from rollouts.tasks.grading import Grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE, SMALL
from rollouts.trees.grow import load_trees
from rollouts.trees.tree import Node, Place, RolloutTree

Path = tuple[RolloutTree, list[tuple[Node, str]]]  # consecutive proposals
_ROWS = 50_000  # of a shard
IN_FLIGHT = 512  # paths that are scored at once
_FIRST, _LAST = 20, 200  # a scorer half of whose first scores fail is none
_What = TypeVar("_What")
_Answer = TypeVar("_Answer")


@dataclass
class Report:
    """What an annotation pass did.

    Attributes:
        skipped: Scores that do not exist because the input exceeds the scorer's window.
        failed: Why scores failed that were asked for, with how often. There are no rows for them, so that they are
            asked for again the next time.
        spent: What a judge has spent (`rollouts.scoring.judge.JudgeScorer`).
        errors: Answers on which the grader failed; they are graded wrong.
    """

    rows: int = 0
    skipped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)
    errors: int = 0


def left(store: Store, rows: Rows, problems: Sequence[Problem] | None = None, chunk: int = 256) -> Iterator[Place]:
    """Yield the proposals (of a grade table: the terminal ones) that have no row yet.

    The table has the rows of a tree at hand until the first proposal of the next is asked for.

    Args:
        store: The store.
        rows: A score or grade table of it.
        problems: Problems to look at; default all.
        chunk: Problems read together.
    """
    chosen = store.problems() if problems is None else problems
    for start in range(0, len(chosen), chunk):
        part = chosen[start : start + chunk]
        lacking = rows.lacking(store.steps, {problem.id for problem in part})
        for tree in load_trees(store, [item for item in part if item.id in lacking], None, None, along=[rows]):
            yield from (place for place in tree.places() if is_left(rows, place))


def is_left(rows: Rows, place: Place) -> bool:
    """Whether a proposal of a tree at hand should have a row and has none, nor was told with the same text's step."""
    tree, node, role = place
    if role not in rows.table.roles or (rows.of_solutions and not node.proposals[role].terminal):
        return False
    same = (role,) if rows.beside is None else node.twins(role)
    return all(tree.row_key(node, each) not in rows for each in same)


def score_store(
    store: Store,
    scorer: Scorer,
    problems: Sequence[Problem] | None = None,
    *,
    in_flight: int = IN_FLIGHT,
    give_up: bool = False,
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
        give_up: Put down that steps whose question fails have no score, as if they exceeded the scorer's window.
        on_progress: Called with the number of proposals scored since the last call.

    Raises:
        BackendError: The scorer is gone; what came back before is kept.
        RequestsFailed: Half of the first scores of the table fail, and nobody has said to give up on them.
    """
    attach(store, scorer)
    rows = store.score_rows(scorer.name, rows=_ROWS)
    report, tried = Report(), rows.table.counts("role").total()
    by_tree = (places for _, places in groupby(left(store, rows, problems), lambda place: place[0]))

    def charge() -> None:
        """Put down what was spent since the last time, with the rows that it was spent on."""
        now = Counter(getattr(scorer, "spent", {}))
        rows.count(now - report.spent)
        report.spent = now

    def took(scores: Scores) -> None:
        nonlocal tried
        tried += len(scores)
        report.skipped += scores.count(None)
        if rows.due:
            charge()
            rows.flush()
        if on_progress:
            on_progress(rows.added - report.rows)
        report.rows = rows.added
        failed = report.failed.total()
        if not give_up and _FIRST <= tried <= _LAST and 2 * failed >= tried:
            why = [*report.failed][-1]
            raise RequestsFailed(f"scorer: {failed} of the first {tried} questions failed, the last one so: {why}.")

    try:
        found = chain.from_iterable(paths(rows, places) for places in by_tree)
        score_paths(scorer, rows, found, in_flight, took, report.failed, give_up=give_up)
    finally:
        charge()
        rows.flush()
    report.rows = rows.added
    return report


def attach(store: Store, scorer: Scorer) -> None:
    """Make the table of a scorer, if it is not there yet; raise `StoreError` if another one has made it."""
    store.attach("scores", scorer.name, scorer.process(), columns_of(scorer), roles_of(scorer))


def paths(rows: Rows, places: Iterable[Place]) -> Iterator[Path]:
    """Yield paths without a score that together cover some proposals; one forward pass scores all of a path.

    A proposal appears once, under the first path that reaches it. Where the other model wrote the same text and has
    a score, that is put down and nothing is asked.
    """
    covered: set[RowKey] = set()

    def scored(tree: RolloutTree, node: Node, role: str) -> bool:
        key = tree.row_key(node, role)
        for same in node.twins(role):
            if (twin := tree.row_key(node, same)) in rows:
                rows.put_value(key, rows[twin])
        return key in covered or key in rows

    for tree, node, role in places:
        edges: list[tuple[Node, str]] = []
        at: Node | None = node
        while at is not None and role in at.proposals and role in rows.table.roles and not scored(tree, at, role):
            edges.append((at, role))
            covered.update(tree.row_key(at, same) for same in at.twins(role))
            at = tree.child(at, role)
            role = SMALL if at is not None and SMALL in at.proposals else LARGE
        if edges:
            yield tree, edges


def score_paths(
    scorer: Scorer,
    rows: Rows,
    wanted: Iterable[Path],
    in_flight: int | None = None,
    on_scores: Callable[[Scores], None] | None = None,
    failed: Counter[str] | None = None,
    *,
    give_up: bool = False,
) -> None:
    """Put down the scores of paths (`paths`), each for all proposals of that text.

    Args:
        scorer: The scorer.
        rows: Its table.
        wanted: The paths.
        in_flight: Paths under way at once; None: all.
        on_scores: Called with the new scores of every path.
        failed: Where scores that failed are counted by their reason. None: the first is an error.
        give_up: Whether those that are counted are put down as none.

    Raises:
        BackendError: A score failed, or the scorer is gone; what came back before is kept.
    """

    def ask(path: Path) -> Future[Scores]:
        tree, edges = path
        texts = [*edges[0][0].steps, *(node.proposals[role].text for node, role in edges)]
        return submitted(scorer, tree.problem.question, texts, len(edges[0][0].steps))

    def take(path: Path, scores: Scores) -> None:
        tree, edges = path
        before = len(edges[0][0].steps)
        what = f"the steps of a path of {tree.problem.id!r}"
        new = _one_for_each(f"Scorer {scorer.name!r}", scores, before + len(edges), what)[before:]
        for (node, role), score in zip(edges, new, strict=True):
            if isinstance(score, Failed):
                if failed is None:
                    raise BackendError(
                        f"Scorer {scorer.name!r}: no score for a step of {what}: {score.reason}. `python -m rollouts "
                        "score` asks again; with --give-up it puts down that there is none."
                    )
                failed[score.reason] += 1
                if not give_up:
                    continue
                score = None
            stored = np.asarray(score, np.float32).tolist() if score is not None else None  # as the table gives it back
            for same in (each for each in node.twins(role) if each in rows.table.roles):
                rows.put_value(tree.row_key(node, same), tuple(stored) if isinstance(stored, list) else stored)
        if on_scores:
            on_scores(new)

    ask_all(wanted, ask, take, in_flight)


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
    rows = Rows(store.attach("grades", grader.name, grader.describe()), rows=_ROWS)
    report = Report()
    places = left(store, rows, problems)
    try:
        while batch := list(islice(places, 10_000)):
            report.errors += grade_places(grader, rows, batch, workers)
            rows.flush_if_due()
            if on_progress:
                on_progress(len(batch))
    finally:
        rows.flush()
    report.rows = rows.added
    return report


def grade_places(grader: Grader, rows: Rows, places: Sequence[Place], workers: int = 1) -> int:
    """Put down the grades of solutions; return on how many the grader failed."""
    pairs = [
        (tree.problem.answer, tree.splitting.answer([*node.steps, node.proposals[role].text]))
        for tree, node, role in places
    ]
    some = ", ".join(dict.fromkeys(repr(tree.problem.id) for tree, *_ in places[:3]))
    what = f"solutions of {some}{' ...' if len(places) > 3 else ''}"
    grades = _one_for_each(f"Grader {grader.name!r}", grader.grade_many(pairs, workers), len(pairs), what)
    for (tree, node, role), grade in zip(places, grades, strict=True):
        rows.put(tree.row_key(node, role), correct=grade.correct, extracted=grade.extracted, error=grade.error)
    return sum(grade.error is not None for grade in grades)


def _one_for_each(who: str, results: Any, wanted: int, what: str) -> list[Any]:
    """Return what a scorer or grader of somebody's own gave; raise ConfigError if it is not one result for each."""
    try:
        found = list(results)
    except TypeError:
        raise ConfigError(f"{who} gave {results!r:.80}, expected a list with one for each of {what}.") from None
    if len(found) != wanted:
        raise ConfigError(f"{who} gave {len(found)} results, expected {wanted}: one for each of {what}.")
    return found


def ask_all(
    items: Iterable[_What],
    ask: Callable[[_What], Future[_Answer]],
    take: Callable[[_What, _Answer], None],
    in_flight: int | None = None,
) -> None:
    """Send requests; take every answer that comes, then raise the first error.

    An interrupt does not wait for answers; those that are there are taken.

    Args:
        items: What is asked about.
        ask: Sends a request.
        take: Called with every answer, as they come.
        in_flight: Most that are under way. None: all, and answers are taken in the order of the items.
    """
    error: Exception | None = None
    under_way: dict[int, tuple[_What, Future[_Answer]]] = {}
    come: SimpleQueue[int] = SimpleQueue()

    def came(number: int, _: object) -> None:
        come.put(number)

    def settle(most: float) -> None:
        nonlocal error
        while len(under_way) > most:
            number = next(iter(under_way)) if in_flight is None else come.get()
            with suppress(Exception):
                under_way[number][1].result()  # an interrupt finds it still among those that are under way
            item, future = under_way.pop(number)
            try:
                take(item, future.result())
            except Exception as caught:
                error = error or caught

    try:
        try:
            for number, item in enumerate(items):
                under_way[number] = item, ask(item)
                under_way[number][1].add_done_callback(partial(came, number))
                settle(math.inf if in_flight is None else in_flight)
                if error:
                    break
        except Exception as caught:
            error = error or caught
        settle(0)
    except BaseException:
        for item, future in under_way.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                take(item, future.result())
        raise
    if error is not None:
        raise error
