"""Growing trees: asks models for missing proposals without barriers and appends what comes back to a store."""

from __future__ import annotations

import math
import queue
import shlex
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rollouts.errors import RequestsFailed
from rollouts.models.stepwise import Generation, StepWriter
from rollouts.store.rows import Rows, TreeKey
from rollouts.store.shards import KEY, Table, values_of
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.likelihood import STATISTICS
from rollouts.text.steps import LARGE, ROLES, Step, StopReason
from rollouts.trees.tree import Node, RolloutTree, Want

_FIRST, _JUDGED, _MOST_FAILED = 200, 20, 0.5  # requests of a role that are looked at, from which on, for which share
_FEWEST_FAILURES = 4  # of a run whose requests all failed
_IN_A_ROW = 64  # failures of a role without one answer between them, at any time
_REASON = 300  # characters of the reason of a failure that are kept
_COLUMNS = (*KEY, "text", "tokens", "stop_reason", "prompt_tokens")
_STOP = {str(reason): reason for reason in StopReason}
Labeller = Callable[[str, Sequence[str]], Sequence[bool]]


def label_of(store: Store) -> Labeller | None:
    """Return the function that gives exact labels of steps, for stores of problems that have them."""
    if not store.manifest["process"]["labels"]:
        return None
    from rollouts.tinymath import label_steps

    return label_steps


@dataclass
class Progress:
    """What a run has done so far; handed to progress callbacks.

    Attributes:
        trees: Trees finished in this pass.
        total: Trees in this pass.
        steps: Steps generated in this run.
        tokens: Tokens decoded in this run, by role.
    """

    trees: int = 0
    total: int = 0
    steps: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    under_way: int = 0


class StepBuffer(Rows):
    """Rows of the step table on their way to the disk, shard by shard."""

    def __init__(self, table: Table, labeller: Labeller | None = None, **limits: Any) -> None:
        """Name the table.

        Args:
            table: Where rows go.
            labeller: Exact labels of the steps of a path, where the problems have them.
            limits: When a shard is due; see `Rows`.
        """
        super().__init__(table, *STATISTICS, **limits)
        self.labeller = labeller

    def add(self, tree: RolloutTree, role: str, new: Iterable[tuple[Node, Step]], generation: Generation) -> None:
        """Add the new proposals of one generation; they always land in one shard, as do those that are the other's."""
        for node, step in new:
            both = ROLES if tree.author(node) else (role,)
            label = None
            if self.labeller is not None:
                label = bool(self.labeller(tree.problem.question, [*node.steps, step.text])[-1])
            for same in both:
                own = node.proposals[same]
                self.put(
                    tree.row_key(node, same),
                    text=own.text,
                    tokens=own.tokens,
                    prompt_tokens=own.prompt_tokens,
                    stop_reason=str(own.stop_reason),
                    terminal=own.terminal,
                    label=label,
                    reason=generation.reason[:_REASON] or None if own.stop_reason is StopReason.FAILED else None,
                    **dict(zip(STATISTICS, own.statistics or [None] * len(STATISTICS), strict=True)),
                )
        counts = {
            "requests": 1,
            "decoded": generation.decoded,
            "dropped": generation.dropped,
            "cut_tokens": generation.cut_tokens,
        }
        self.count({f"{name}_{role}": value for name, value in counts.items()})


def replicas_of(problem: Problem, replicas: int | Mapping[str, int]) -> int:
    """Return how many replicas of a problem are wanted: one number for all, or by split (default 1)."""
    return replicas if isinstance(replicas, int) else replicas.get(problem.split, 1)


def load_trees(
    store: Store,
    problems: Sequence[Problem],
    replicas: int | Mapping[str, int] | None,
    max_escalations: int | None,
    chunk: int = 128,
    along: Sequence[Rows] = (),
) -> Iterator[RolloutTree]:
    """Yield the trees of problems as the store has them, reading a chunk of problems at a time.

    Args:
        store: The store.
        problems: In the order wanted.
        replicas: Replicas per problem, one number or by split; None: those that the store has.
        max_escalations: K of the trees.
        chunk: Problems read together; memory grows with it, not with the number of problems.
        along: Rows to have at hand for a tree until the next is asked for.
    """
    splitting = store.splitting
    for start in range(0, len(problems), chunk):
        part = problems[start : start + chunk]
        found: dict[TreeKey, list[tuple[int, str, Step]]] = {}
        for table in store.steps.read({problem.id for problem in part}, _COLUMNS):
            for name, replica, prefix, role, text, tokens, reason, prompt in values_of(table, _COLUMNS):
                step = Step(text, tokens, _STOP[reason], prompt)
                found.setdefault((name, replica), []).append((prefix, role, step))
        wanted = [
            (problem, replica)
            for problem in part
            for replica in (
                sorted(replica for name, replica in found if name == problem.id)
                if replicas is None
                else range(replicas_of(problem, replicas))
            )
        ]
        keys = [(problem.id, replica) for problem, replica in wanted]
        for rows in along:
            rows.read(keys)
        for problem, replica in wanted:
            rows_of = found.pop((problem.id, replica), ())
            yield RolloutTree.from_rows(problem, replica, max_escalations, rows_of, splitting)
        for rows in along:
            rows.forget(keys)


class Failures:
    """Counts the requests of each role, to refuse a run in which many of the first, or many in a row, have failed."""

    def __init__(self, table: Table) -> None:
        """Name the step table."""
        self._store = table.directory.parent
        self._answered: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._reason: dict[str, str] = {}  # of the last failure by role

    def count(self, role: str, generation: Generation) -> None:
        """Count an answer."""
        self._answered[role] += 1
        if generation.steps[-1].stop_reason is StopReason.FAILED:
            self._failed[role] += 1
            self._in_a_row[role] += 1
            self._reason[role] = generation.reason[:_REASON] or "no reason given"
        else:
            self._in_a_row[role] = 0

    def refuse(self, role: str, least: int = _JUDGED, share: float = _MOST_FAILED) -> None:
        """Raise RequestsFailed if this share of a role's first requests has failed, or many in a row have."""
        answered, failed, words = self._answered[role], self._failed[role], ""
        if least <= answered <= _FIRST and failed >= share * answered:
            words = f"{failed} of its first {answered} requests"
        elif self._in_a_row[role] >= _IN_A_ROW:
            words = f"{self._in_a_row[role]} requests in a row"
        if words:
            raise RequestsFailed(
                f"{role}: {words} failed and are stored as failed steps (the last: {self._reason[role]}). Mend the "
                f"cause; after `python -m rollouts repair {shlex.quote(str(self._store))} --drop-failed` the same "
                "command asks again."
            )


class Grower:
    """Grows many trees at once: as soon as an answer makes a proposal askable, it is asked for.

    There are no rounds to wait for: engines batch whatever is under way, so a batch never runs dry because one
    long solution is still being written.
    """

    def __init__(
        self,
        writers: Mapping[str, StepWriter],
        buffer: StepBuffer,
        *,
        in_flight: int = 256,
        max_large_tokens: int | None = None,
        progress: Progress | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_finished: Callable[[RolloutTree], None] | None = None,
    ) -> None:
        """Name the models.

        Args:
            writers: The roles that can be asked now; a missing role's proposals are left for another pass.
            buffer: Where new rows go.
            in_flight: Trees grown at once.
            max_large_tokens: Stop asking the large model after so many of its tokens in `progress`; the store
                stays resumable. Every request reserves what the longest so far took, and asks for one step, so that
                not more than the excess of those under way over that goes beyond.
            progress: Counts to go on from; default: fresh ones.
            on_progress: Called about once a second, from the first request on.
            on_finished: Called with every tree of which nothing more is asked; its rows are in the buffer.
        """
        self.writers = writers
        self.buffer = buffer
        self.in_flight = in_flight
        self.max_large_tokens = max_large_tokens
        self.on_progress = on_progress
        self.on_finished = on_finished
        self.progress = progress if progress is not None else Progress()
        self.budget_spent = False
        self.raisable = False  # whether `max_large_tokens` may be raised: requests then wait instead of being given up
        self._stopped = False
        self._answers: queue.SimpleQueue[tuple[RolloutTree, Want, Future[Generation]] | None] = queue.SimpleQueue()
        self._pending: Counter[int] = Counter()
        self._waiting: deque[tuple[RolloutTree, Want]] = deque()  # for what the budget has left
        self._failures = Failures(buffer.table)
        self._large_under_way = 0
        self._longest: float = math.inf  # large step so far; before the first one there is one request at a time

    def run(self, trees: Iterable[RolloutTree | None]) -> int:
        """Grow trees until nothing more can be asked of the roles at hand.

        Everything that came back before an error or an interrupt is written to the store.

        Args:
            trees: The trees; None: the next is not at hand yet (`wake` says when). Once the token budget is spent no
                further one is begun.

        Returns:
            Trees that are still not closed (their missing proposals belong to another role, or the token
            budget is spent).

        Raises:
            BackendError: A model is gone; the message names it.
            RequestsFailed: Half of a role's first requests fail.
        """
        source = iter(trees)
        active: dict[int, RolloutTree] = {}
        open_trees = 0
        told = -math.inf
        self.progress.under_way = 0
        try:
            while not self._stopped:
                taken, pausing = 0, False
                for tree in islice(source, 0 if self.budget_spent else self.in_flight - len(active)):
                    taken += 1
                    if tree is None:
                        pausing = True
                        break
                    active[id(tree)] = tree
                    self._ask(tree, tree.wants(self.writers))
                    if not self._pending[id(tree)]:
                        open_trees += self._finish(active, tree)
                if not active and not taken:
                    for role in self.writers:
                        self._failures.refuse(role, least=_FEWEST_FAILURES, share=1.0)
                    break
                if self.on_progress and time.monotonic() - told > 1.0:
                    told = time.monotonic()
                    self.on_progress(self.progress)
                # where none is active and none is awaited, all of these were closed already; there may be more
                answered = self._next_answer() if active or pausing else []
                for touched in dict.fromkeys((*answered, *self._give_up())):
                    if not self._pending[id(touched)]:
                        open_trees += self._finish(active, touched)
                self._ask_waiting()
                self.buffer.flush_if_due()
            return max(open_trees, int(self.budget_spent))
        finally:
            self._salvage()
            self.buffer.flush()
            if self.on_progress:
                self.on_progress(self.progress)

    def wake(self) -> None:
        """Have `run` look at once for trees and at its budget; from any thread."""
        self._answers.put(None)

    def stop(self) -> None:
        """Have `run` ask nothing more, record what is there already and return; from any thread."""
        self._stopped = True
        self.wake()

    def _next_answer(self) -> list[RolloutTree]:
        """Take an answer, and wait a second for it; return the tree that it is of, if one came."""
        with suppress(queue.Empty):
            if (answer := self._answers.get(timeout=1.0)) is not None:
                tree, want, future = answer
                self._take(tree, want, future.result())
                self._failures.refuse(want.role)
                return [tree]
        return []

    def _salvage(self) -> None:
        """Record the answers that are there already when the run breaks off."""
        while True:
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                return
            if answer is not None and not answer[2].cancelled() and answer[2].exception() is None:
                self._record(*answer[:2], answer[2].result())

    def _finish(self, active: dict[int, RolloutTree], tree: RolloutTree) -> int:
        del active[id(tree)]
        del self._pending[id(tree)]
        self.progress.trees += 1
        if self.on_finished:
            self.on_finished(tree)
        return int(tree.missing() > 0)

    def _ask(self, tree: RolloutTree, wants: Iterable[Want]) -> None:
        for want in wants:
            bounded = want.role == LARGE and self.max_large_tokens is not None
            if bounded and self._is_spent():
                self.budget_spent = True
                continue
            want.node.asked.add(want.role)
            self._pending[id(tree)] += 1
            if bounded:
                self._waiting.append((tree, want._replace(whole=False)))
            else:
                self._submit(tree, want)
        self._ask_waiting()

    def _submit(self, tree: RolloutTree, want: Want) -> None:
        future = self.writers[want.role].submit(tree.prefix(want.node), whole=want.whole)
        self.progress.under_way += 1
        self._large_under_way += want.role == LARGE
        future.add_done_callback(lambda done: self._answers.put((tree, want, done)))

    def _budget_left(self) -> float:
        return math.inf if self.max_large_tokens is None else self.max_large_tokens - self.progress.tokens[LARGE]

    def _is_spent(self) -> bool:
        return self._budget_left() <= 0 and not self.raisable

    def _give_up(self) -> list[RolloutTree]:
        """Return the trees that wait for a budget that is spent; they wait no longer."""
        given_up = []
        while self._waiting and self._is_spent():
            self.budget_spent = True
            tree, want = self._waiting.popleft()
            want.node.asked.discard(want.role)
            self._pending[id(tree)] -= 1
            given_up.append(tree)
        return given_up

    def _ask_waiting(self) -> None:
        """Ask the large model for what the budget has room for."""
        while self._waiting and (left := self._budget_left()) > 0:
            if self._large_under_way and self._longest * (self._large_under_way + 1) > left:
                break
            self._submit(*self._waiting.popleft())

    def _take(self, tree: RolloutTree, want: Want, generation: Generation) -> None:
        touched = self._record(tree, want, generation)
        roles: Collection[str] = self.writers
        self._ask(tree, [item for node in touched for item in tree.wants_at(node, roles)])

    def _record(self, tree: RolloutTree, want: Want, generation: Generation) -> list[Node]:
        """Insert an answer; return the nodes at which something may have become askable."""
        self._pending[id(tree)] -= 1
        self.progress.under_way -= 1
        self._failures.count(want.role, generation)
        if want.role == LARGE:
            self._large_under_way -= 1
            self._longest = max(generation.decoded, 0 if self._longest == math.inf else self._longest)
        want.node.asked.discard(want.role)
        new = tree.insert_path(want.node, want.role, generation.steps)
        self.buffer.add(tree, want.role, new, generation)
        self.progress.steps += len(new)
        self.progress.tokens[want.role] += generation.decoded
        touched = {node.key: node for node in (want.node, *(node for node, _ in new))}
        if new and (child := tree.child(new[-1][0], want.role)) is not None:
            touched[child.key] = child
        if tree.relaxed:
            tree.relaxed = False
            return list(tree.nodes.values())
        return list(touched.values())


def grow_sequentially(
    open_writer: Callable[[str], Any],
    load: Callable[[], Iterable[RolloutTree]],
    make_grower: Callable[[Mapping[str, StepWriter]], Grower],
) -> int:
    """Grow trees with one model in memory at a time, alternating over the whole frontier on disk.

    Args:
        open_writer: Context manager that loads the model of a role.
        load: Reads all trees again from the store.
        make_grower: Makes a grower for the writers at hand.

    Returns:
        Trees that are still not closed (only if the token budget is spent).
    """
    before: int | None = None
    while True:
        for role in ROLES:
            if not any(tree.wants((role,)) for tree in load()):
                continue
            with open_writer(role) as writer:
                grower = make_grower({role: writer})
                still_open = grower.run(load())
            if grower.budget_spent:
                return still_open
        still_open = sum(tree.missing() > 0 for tree in load())
        if still_open == 0 or still_open == before and not any(tree.wants() for tree in load()):
            return still_open
        before = still_open
