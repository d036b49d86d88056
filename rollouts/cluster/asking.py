"""A scorer, a grader and step writers whose requests workers answer: whoever asks notices nothing of them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from typing import Any, Self

from rollouts.cluster.pool import Cluster, Hand, Pool, Tell
from rollouts.cluster.worker import GRADER, SCORER, Job, Orders, Report
from rollouts.errors import ConfigError
from rollouts.models.stepwise import Generation
from rollouts.scoring.base import Scores
from rollouts.store.store import Store
from rollouts.tasks.grading import Grade, Grader
from rollouts.text.steps import Prefix
from rollouts.trees.annotate import IN_FLIGHT

_PAIRS = 50  # solutions that are graded as one request


class Asking(Pool):
    """Lends requests to workers from a thread of its own; the requests of a lost worker go to others."""

    def __init__(self, cluster: Cluster, store: Store, job: Job, on_step: Tell) -> None:
        """See `Pool`; `on_step` is called with what workers do, from the start on."""
        super().__init__(cluster, store, job)
        self._on_step = on_step
        self._waiting: deque[tuple[int, str, tuple[Any, ...]]] = deque()
        self._futures: dict[int, Future[Any]] = {}
        self._numbers = count()
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start the workers, and wait for the first."""
        super().__enter__()
        while not self._opened:
            self.step()
        self._thread.start()
        return self

    def step(self) -> None:
        """See `Pool`."""
        super().step()
        self._on_step(self.note())

    def __exit__(self, *exception: object) -> None:
        """End the workers."""
        self._closing = True
        if self._thread.ident is not None:
            self._thread.join()
        super().__exit__(*exception)

    def submit(self, target: str, *arguments: Any) -> Future[Any]:
        """Ask what workers know by that name."""
        number, future = next(self._numbers), Future[Any]()
        self._futures[number] = future
        if self._failure is not None:  # looked at when the thread, which ends with it, may find the future
            raise self._failure
        self._waiting.append((number, target, arguments))
        return future

    def _run(self) -> None:
        try:
            while not self._closing:
                self.step()
        except Exception as error:
            self._failure = error
            for future in list(self._futures.values()):
                future.set_exception(error)

    def orders(self, hand: Hand) -> Orders | None:
        """Lend a fair part of the requests that wait."""
        fair = -(-len(self._waiting) // self.cluster.workers)
        items = [self._waiting.popleft() for _ in range(min(fair, IN_FLIGHT - len(hand.lent)))]
        hand.lent.update((item[0], item) for item in items)
        return Orders(items) if hand.lent else None

    def take(self, hand: Hand, report: Report) -> bool:
        """Pass answers on."""
        for number, answer in report.answers:
            del hand.lent[number]
            future = self._futures.pop(number)
            if not future.set_running_or_notify_cancel():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        return bool(report.answers)

    def lost(self, hand: Hand) -> None:
        """Lend its requests again."""
        self._waiting.extendleft(reversed(hand.lent.values()))


class RemoteScorer:
    """A `rollouts.scoring.base.Scorer`: that of the workers."""

    incremental = True

    def __init__(self, pool: Asking) -> None:
        """Take the workers."""
        self._pool, self._facts = pool, pool.facts["scorer"]
        self.name: str = self._facts["name"]
        self.tolerance: float = self._facts["tolerance"]
        self.columns: tuple[str, ...] = self._facts["columns"]
        self.roles: tuple[str, ...] = self._facts["roles"]

    @property
    def spent(self) -> Counter[str]:
        """What judges have spent."""
        return self._pool.sum_of(lambda report: report.spent)

    def submit(self, question: str, steps: Sequence[str], known: int = 0) -> Future[Scores]:
        """Ask for the scores of a path."""
        return self._pool.submit(SCORER, question, steps, known)

    def process(self) -> Mapping[str, Any]:
        """Return what decides the scores."""
        return dict(self._facts["process"])


class RemoteGrader(AbstractContextManager["RemoteGrader"]):
    """A `rollouts.tasks.grading.Grader`: that of workers, which start when there is something to grade."""

    def __init__(self, cluster: Cluster, store: Store, grader: Grader, made_by: str, on_step: Tell) -> None:
        """Take the grader of this machine, and the name that workers make theirs by."""
        self.name, self.describe = grader.name, grader.describe
        self._pool, self._stack = Asking(cluster, store, cluster.job(store, grader=made_by), on_step), ExitStack()

    def grade_many(self, pairs: Sequence[tuple[str, str]], workers: int = 1) -> list[Grade]:
        """Return the grades of pairs of answer and solution."""
        pool = self._pool
        if not pool.facts:  # not even one worker has said anything yet
            self._stack.enter_context(pool)
        if (there := pool.facts["grader"]) != (here := {"name": self.name, **self.describe()}):
            raise ConfigError(f"Workers have another grader: {there} there, {here} here.")
        portions = [list(pairs[start : start + _PAIRS]) for start in range(0, len(pairs), _PAIRS)]
        return [grade for future in [pool.submit(GRADER, part) for part in portions] for grade in future.result()]

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        self._stack.close()


class RemoteWriter:
    """A `rollouts.models.stepwise.StepWriter`: those of the workers."""

    whole_paths = True

    def __init__(self, pool: Asking, role: str) -> None:
        """Take the workers."""
        self.role, self._pool = role, pool

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """Ask for the next step of `prefix`, or for the whole rest."""
        return self._pool.submit(self.role, prefix, whole)
