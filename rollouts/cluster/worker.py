"""A worker: opens models, grows the trees that it is lent or answers requests, and hands in what there is.

The driver (`rollouts.cluster.pool`) makes a Ray actor of it; nothing here knows of that. It never writes to a store.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollouts.config import FamilyConfig
from rollouts.errors import BackendError
from rollouts.family import Family
from rollouts.models.stepwise import StepWriter
from rollouts.scoring.base import EXAMPLES, Example, Scorer, columns_of, roles_of, submitted
from rollouts.store.rows import TreeKey
from rollouts.store.shards import STEPS, Table
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import ROLES
from rollouts.trees.grow import Grower, Labeller, StepBuffer, label_of
from rollouts.trees.tree import RolloutTree

SCORER, GRADER = "scorer", "grader"
_HAND_IN_SECONDS = 1.0  # after which new rows are sent
_PATIENCE, _PAUSE = 0.5, 0.1  # seconds that an exchange waits for something to hand in, and for more of it


def package() -> dict[str, str]:
    """Return what another machine must have alike: the release of this package, and a digest of its sources."""
    root, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    try:
        release = metadata.version("trim-routing")
    except metadata.PackageNotFoundError:
        release = "unknown"
    return {"version": release, "sources": digest.hexdigest()}


@dataclass(frozen=True)
class Job:
    """What all workers of a pool are there for.

    Attributes:
        path: The store's directory, for messages; it need not exist on the worker's machine.
        examples: Known paths for a scorer's self-test.
        writes: Whether both generating models are opened.
        grows: How many trees grow at once; 0: requests are answered.
        scores: ``scorer``, or the generating role whose statistics are the score.
        grader: Name of a grader.
    """

    path: str
    manifest: Mapping[str, Any]
    config: FamilyConfig | None = None
    seed: int = 0
    examples: Sequence[Example] = EXAMPLES
    writes: bool = False
    grows: int = 0
    scores: str | None = None
    grader: str | None = None

    @property
    def opens(self) -> list[str]:
        """The models that are loaded, by role: as many starts of engines."""
        scores = [] if self.scores is None or self.writes and self.scores in ROLES else [self.scores]
        return [*(ROLES if self.writes else ()), *scores]

    @property
    def gpus(self) -> int:
        """GPUs of one worker: those that `devices` of its models count from 0."""
        if self.config is None:
            return 0
        scorer = self.config.scorer
        looks = {SCORER: scorer.model or self.config.generator(scorer.under)} if scorer is not None else {}
        models = [looks.get(role) or self.config.generator(role) for role in self.opens]
        return 1 + max((device for model in models for device in model.devices), default=-1)


@dataclass
class Orders:
    """What a worker is told.

    Attributes:
        items: Trees to grow, or requests: (number, of what, arguments).
        large_tokens: Tokens that its large model may have decoded since its start; None: any number.
        raisable: Whether that may become more.
        stop: Whether it is to ask nothing more and hand in what it has.
    """

    items: list[Any] = field(default_factory=list)
    large_tokens: int | None = None
    raisable: bool = False
    stop: bool = False


@dataclass
class Part:
    """Rows on their way to the store, and the trees of which these are the last.

    Attributes:
        rows: Encoded rows of the step table.
        counters: What is counted with them.
        finished: Trees that are finished; all their rows are in this part or in earlier ones.
    """

    rows: list[pa.Table]
    counters: Counter[str]
    finished: list[TreeKey]


@dataclass
class Report:
    """What a worker hands in.

    Attributes:
        parts: Rows of trees.
        answers: Of requests, by number: a result, or the exception that it ended with.
        done: Steps generated, or answers given, since its start.
        tokens: Tokens decoded since its start, by role.
        under_way: Requests to models that are under way.
        spent: What a judge has spent since its start.
        ended: Whether it does nothing more.
        error: Why, if not by order.
    """

    parts: list[Part] = field(default_factory=list)
    answers: list[tuple[int, Any]] = field(default_factory=list)
    done: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    under_way: int = 0
    spent: Counter[str] = field(default_factory=Counter)
    ended: bool = False
    error: Exception | None = None


class Desk(Store):
    """A store as a worker has it: its manifest, and numbers of engine starts that were kept for it."""

    def __init__(self, job: Job, first_start: int) -> None:
        """Take the manifest, with no engine starts but those to come."""
        self.path = Path(job.path)
        self.manifest = {**job.manifest, "engines": []}
        self.steps = Table(self.path / "steps", STEPS)
        self.notes = []
        self._first_start = first_start

    def next_start(self) -> int:
        """Return the number of the next engine start, of those that were kept for this worker."""
        return self._first_start + len(self.manifest["engines"])

    def _save(self) -> None:
        """Keep the manifest to itself."""


class Worker:
    """Opens what a job names, then goes on between two exchanges with the driver."""

    def __init__(self) -> None:
        """Be there; what the driver sends is not read before it has seen that the package is the same."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._stack = ExitStack()
        self._work: _Growing | _Answering

    def about(self) -> dict[str, Any]:
        """Return the package, and how far other processes go first here."""
        return {"package": package(), "niceness": os.nice(0)}

    def open(self, job: Job, first_start: int) -> dict[str, Any]:
        """Open what a job names.

        Returns:
            The starts of engines, what tells the models from others, and what a driver must know of scorer and grader.

        Raises:
            StoreError: The models here are others than the store's.
        """
        desk, scorer, told = Desk(job, first_start), None, dict[str, Any]()
        writers, targets = dict[str, StepWriter](), dict[str, Callable[..., Future[Any]]]()
        if job.config is not None:
            family = Family(job.config, seed=job.seed, examples=job.examples, store=desk)
            if job.writes:
                process = desk.manifest["process"]
                desk.refuse_other(family.process(process["max_escalations"], labels=process["labels"]))
                writers = {role: self._stack.enter_context(family.open(role, desk)) for role in ROLES}
                for role, writer in writers.items():
                    targets[role] = lambda prefix, whole, ask=writer.submit: ask(prefix, whole=whole)
            if job.scores is not None:
                scorer = self._stack.enter_context(family.scoring(job.scores, desk, writers))
                targets[SCORER] = partial(submitted, scorer)
                told = {"scorer": facts_of(scorer)}
        if job.grader is not None:
            grader, executor = make_grader(job.grader), ThreadPoolExecutor(1)
            self._stack.callback(getattr(grader, "close", lambda: None))
            self._stack.callback(partial(executor.shutdown, cancel_futures=True))
            targets[GRADER] = lambda pairs: executor.submit(grader.grade_many, pairs)
            told = {"grader": {"name": grader.name, **grader.describe()}}
        self._work = _Growing(writers, desk, job.grows) if job.grows else _Answering(targets, scorer)
        return {"starts": desk.manifest["engines"], "identities": desk.manifest.get("identities", {}), **told}

    def exchange(self, orders: Orders) -> Report:
        """Take orders, wait a little for something to hand in, and return it."""
        self._work.take(orders)
        if self._work.news.wait(_PATIENCE):
            time.sleep(_PAUSE)
        self._work.news.clear()
        return self._work.report()

    def close(self) -> None:
        """Close what is open, engines included."""
        self._stack.close()


def facts_of(scorer: Scorer) -> dict[str, Any]:
    """Return what stands for a scorer on another machine."""
    return {
        "name": scorer.name,
        "tolerance": scorer.tolerance,
        "columns": columns_of(scorer),
        "roles": roles_of(scorer),
        "process": dict(scorer.process()),
    }


class _Outbox(StepBuffer):
    """Rows of the step table on their way to the driver, with the trees that they finish."""

    def __init__(self, table: Table, labeller: Labeller | None, news: threading.Event) -> None:
        super().__init__(table, labeller, seconds=_HAND_IN_SECONDS)
        self.finished: list[TreeKey] = []
        self.sent: queue.SimpleQueue[Part] = queue.SimpleQueue()
        self.news = news

    def finish(self, tree: RolloutTree) -> None:
        self.finished.append(tree.key)

    def flush(self) -> None:
        part = Part(*self.taken(), self.finished)
        self.finished = []
        if part.rows or part.counters or part.finished:
            self.sent.put(part)
            self.news.set()


class _Growing:
    """Grows the trees that come in a thread of its own, until it is told to stop."""

    def __init__(self, writers: Mapping[str, StepWriter], desk: Desk, in_flight: int) -> None:
        self.news = threading.Event()
        self._trees: queue.SimpleQueue[RolloutTree] = queue.SimpleQueue()
        self._outbox = _Outbox(desk.steps, label_of(desk), self.news)
        finished = self._outbox.finish
        self._grower = Grower(writers, self._outbox, in_flight=in_flight, on_finished=finished)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._grower.run(self._lent())
        except Exception as error:
            self._error = error
        finally:
            self.news.set()

    def _lent(self) -> Iterator[RolloutTree | None]:
        while True:
            yield None if self._trees.empty() else self._trees.get()

    def take(self, orders: Orders) -> None:
        if orders.stop:
            self._grower.stop()
            self._thread.join(_PATIENCE)
            return
        self._grower.max_large_tokens, self._grower.raisable = orders.large_tokens, orders.raisable
        for tree in orders.items:  # not before they have a budget
            self._trees.put(tree)
        self._grower.wake()

    def report(self) -> Report:
        ended, now = not self._thread.is_alive(), self._grower.progress  # in this order: nothing comes after the end
        parts = []
        while not self._outbox.sent.empty():
            parts.append(self._outbox.sent.get())
        return Report(
            parts=parts,
            done=now.steps,
            tokens=Counter(now.tokens),
            under_way=now.under_way,
            ended=ended,
            error=self._error if ended else None,
        )


class _Answering:
    """Answers requests: each goes to a target and comes back when its future is done."""

    def __init__(self, targets: Mapping[str, Callable[..., Future[Any]]], scorer: Scorer | None) -> None:
        self.news = threading.Event()
        self._targets, self._scorer = targets, scorer
        self._came: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
        self._asked = self._answered = 0

    def take(self, orders: Orders) -> None:
        for number, target, arguments in orders.items:
            self._asked += 1
            try:
                future = self._targets[target](*arguments)
            except Exception as error:
                future = Future()
                future.set_exception(error)
            future.add_done_callback(partial(self._take, number))

    def _take(self, number: int, future: Future[Any]) -> None:
        self._came.put((number, future))
        self.news.set()

    def report(self) -> Report:
        found = Report(spent=Counter(getattr(self._scorer, "spent", {})))
        while not self._came.empty():
            number, future = self._came.get()
            dropped = BackendError("a request was dropped")
            result = dropped if future.cancelled() else future.exception() or future.result()
            if isinstance(result, BackendError):
                found.error = result  # others can answer it
            else:
                found.answers.append((number, result))
                self._answered += 1
        found.done, found.under_way, found.ended = self._answered, self._asked - self._answered, bool(found.error)
        return found
