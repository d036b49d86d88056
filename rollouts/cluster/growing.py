"""Growing trees on workers: leases of trees out, rows of steps back, one budget for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from rollouts.cluster.pool import STOP_SECONDS, Cluster, Hand, Pool
from rollouts.cluster.worker import Job, Orders, Report
from rollouts.store.rows import TreeKey
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE
from rollouts.trees.grow import Progress, StepBuffer, load_trees
from rollouts.trees.tree import RolloutTree

_AT_HAND = 16  # trees that a worker has beyond those that it grows, so that its engines never run dry
_LEAST_SLICE = 1024  # tokens


class Growing(Pool):
    """Lends trees of a store to workers until none wants anything, and writes the rows that come back.

    Workers hold as many trees as they grow at once, and some more at hand; towards the end each gets fewer, so that
    all end together. The trees of a lost worker are read again from the store and go to others. A worker calls a tree
    finished with the last of its rows, and at the end the store is read again: what still wants something is lent anew.
    """

    unit = "steps"

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        job: Job,
        load: Callable[[], Iterable[RolloutTree]],
        buffer: StepBuffer,
        *,
        max_large_tokens: int | None = None,
        progress: Progress | None = None,
        on_progress: Callable[[Progress, str], None] | None = None,
    ) -> None:
        """Name the trees.

        Args:
            cluster: Where workers run.
            store: The store; its write lock must be held.
            job: What workers open, and how many trees each grows at once.
            load: Reads all trees from the store.
            buffer: Where rows go.
            max_large_tokens: Stop asking the large model after so many of its tokens. Workers have parts of it, which
                count as spent until they are given back; it is exceeded by at most a step per request under way.
            progress: Counts to go on from, with the number of trees, if that is known; default: fresh ones.
            on_progress: Called with every exchange, from the start on, also with what workers do.
        """
        super().__init__(cluster, store, job)
        self.buffer, self.max_large_tokens, self.on_progress = buffer, max_large_tokens, on_progress
        self.progress = progress if progress is not None else Progress()
        self.budget_spent = False
        self._load = load
        self._source: Iterator[RolloutTree] | None = None
        self._lost: dict[TreeKey, Problem] = {}
        self._seen = 0
        self._stopping = False

    def run(self) -> int:
        """Grow the trees; return how many are still not closed (only if the token budget is spent).

        An interrupt has workers hand in what they have; it is in the store when it is raised.

        Raises:
            BackendError: Workers are lost one after the other.
            RequestsFailed: Half of a role's first requests of a worker fail.
        """
        try:
            while True:
                before, self._source, self._seen, self.progress.trees = self.buffer.added, iter(self._load()), 0, 0
                while self._source or self._lost or any(hand.lent for hand in self.hands):
                    self.step()
                    self._tell()
                self.buffer.flush()
                still = sum(tree.missing() > 0 for tree in self._load())
                if not still or self.budget_spent or self.buffer.added == before:
                    return still
        except KeyboardInterrupt:
            self._hand_in()
            raise
        finally:
            self.buffer.flush()

    def _hand_in(self) -> None:
        """Have workers ask nothing more, and take what they have."""
        self._stopping, until = True, time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(hand.state == "working" for hand in self.hands):
            self.step()

    def orders(self, hand: Hand) -> Orders | None:
        """Lend trees, and as much of the budget as they may need."""
        if self._stopping:
            return Orders(stop=True)
        if not hand.lent:
            hand.granted = hand.report.tokens[LARGE]  # what it has not used is there for all
        most, left = self.job.grows + _AT_HAND, self.progress.total - self._seen
        if self.progress.total:
            most = min(most, max(1, left // self.cluster.workers))
        trees = list(self._next(most - len(hand.lent)))
        hand.lent.update((tree.key, tree.problem) for tree in trees)
        if not hand.lent:
            return None
        if self.max_large_tokens is None:
            return Orders(trees)
        self._grant(hand)
        return Orders(trees, hand.granted, raisable=not self.budget_spent)

    def _next(self, most: int) -> Iterator[RolloutTree]:
        """Yield trees that want something, first those of lost workers."""
        if self.budget_spent:
            self._source, self._lost = None, {}
        if self._lost:
            lost, self._lost = self._lost, {}
            self._source = chain(self._again(lost), self._source or ())
        while most > 0 and self._source is not None:
            if (tree := next(self._source, None)) is None:
                self._source = None
                return
            self._seen += 1
            if tree.wants():
                most -= 1
                yield tree
            else:
                self.progress.trees += 1

    def _again(self, lost: dict[TreeKey, Problem]) -> Iterator[RolloutTree]:
        """Yield trees that were lent to a lost worker as the store has them now."""
        self.buffer.flush()
        problems = list({problem.id: problem for problem in lost.values()}.values())
        most = self.store.manifest["process"]["max_escalations"]
        found = load_trees(self.store, problems, 1 + max(replica for _, replica in lost), most)
        yield from (tree for tree in found if tree.key in lost)

    def _grant(self, hand: Hand) -> None:
        """Raise what a worker may use of the budget if it has little left; note when the budget is spent."""
        used = {each.number: each.report.tokens[LARGE] for each in self.hands}
        assert self.max_large_tokens is not None
        left = self.max_large_tokens - self.gone.tokens[LARGE]
        left -= sum(max(each.granted, used[each.number]) for each in self.hands)
        part = max(left // (4 * self.cluster.workers), _LEAST_SLICE)
        if left > 0 and hand.granted - used[hand.number] < part // 2:
            hand.granted = max(hand.granted, used[hand.number]) + min(left, part)
        elif left <= 0 and all(used[each.number] >= each.granted for each in self.hands):
            self.budget_spent = True

    def take(self, hand: Hand, report: Report) -> bool:
        """Take rows, and note the trees that they finish."""
        finished = 0
        for part in report.parts:
            self.buffer.receive(part.rows, part.counters)
            for key in part.finished:
                finished += hand.lent.pop(key, None) is not None
        self.progress.trees += finished
        self.buffer.flush_if_due()
        if report.ended and report.error is None:
            hand.lent.clear()  # the budget is spent, or it was stopped
        return finished > 0

    def lost(self, hand: Hand) -> None:
        """Lend its trees again; what it was granted of the budget counts as spent, as nobody knows."""
        self.gone.tokens[LARGE] += max(0, hand.granted - hand.report.tokens[LARGE])
        self._lost.update(hand.lent)
        self._seen -= len(hand.lent)

    def _tell(self) -> None:
        now = self.progress
        now.steps = self.gone.done + sum(hand.report.done for hand in self.hands)
        now.tokens = self.sum_of(lambda report: report.tokens)
        now.under_way = sum(hand.report.under_way for hand in self.hands)
        if self.on_progress:
            self.on_progress(now, self.note())
