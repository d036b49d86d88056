"""Workers on a Ray cluster: connecting, starting them, exchanges with them, and going on when one is lost.

Of Ray nothing but core actors is used. The driver is the one process that reads and writes the store.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

from rollouts.cluster.worker import Job, Orders, Report, Worker, package
from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError, RequestsFailed, TrimError, require
from rollouts.family import Family
from rollouts.store.store import Store
from rollouts.text.steps import ROLES

LOCAL, AUTO = "local", "auto"
_CONNECT_SECONDS, STOP_SECONDS, _CLOSE_SECONDS = 180.0, 15.0, 30.0
_PATIENCE = 0.5  # seconds that a step waits for news
_SOON = 5.0  # seconds after which it is said what workers wait for
_LISTED = 8  # workers
_MOST_LOST = 4  # workers that are lost with the same tree or request before it is taken for the cause
_OBJECTS = 80 * 2**20  # bytes: only rows and trees are sent
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own, 15, has engines wait for everything else on the machine
    "OMP_NUM_THREADS": "1",
}
Tell = Callable[[str], None]
_Model = TypeVar("_Model", bound=ModelConfig)


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        ray: The module.
        workers: How many are to work.
        tell: Whom to tell what is lost.
        grows: Whether machines may come that are not there yet, as on Kubernetes.
    """

    ray: Any
    workers: int
    tell: Tell = lambda line: None
    grows: bool = True

    def job(self, store: Store, family: Family | None = None, **what: Any) -> Job:
        """Return the job of workers for a store, with models as they are called on any machine."""
        manifest = {**store.manifest, "engines": []}
        if family is None:
            return Job(str(store.path), manifest, **what)
        config = family.config.model_copy(
            update={role: _anywhere(family.config.generator(role)) for role in ROLES} | {"date": family.date}
        )
        if config.scorer is not None and config.scorer.model is not None:
            scorer = config.scorer.model_copy(update={"model": _anywhere(config.scorer.model)})
            config = config.model_copy(update={"scorer": scorer})
        return Job(str(store.path), manifest, config, family.seed, family.examples, **what)


def _anywhere(model: _Model) -> _Model:
    """Return a model whose folders are named from the root on: workers run in directories of their own."""
    served = model.backend == "server"  # it knows the model by its name, which a folder here may have, too
    named = {
        "model": None if served else model.model,
        "tokenizer": model.tokenizer or (model.model if served else None),
    }
    folders = {name: os.path.abspath(path) for name, path in named.items() if path and Path(path).is_dir()}
    return model.model_copy(update=folders)


@contextmanager
def connected(address: str, workers: int, tell: Tell) -> Iterator[Cluster]:
    """Connect to a cluster; one of this machine is started, and ended with the context.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at that address.
    """
    require("ray", "ray")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    settings: dict[str, Any] = {"address": address}
    if address == LOCAL:
        if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:  # it listens on all interfaces
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        cores = max(os.cpu_count() or 1, workers)
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECTS}
    elif address != AUTO:
        _refuse_absent(address)
    import ray

    failure: list[BaseException] = []
    there, over = threading.Event(), threading.Event()

    def connect() -> None:  # outside of the main thread, where it would take SIGTERM for itself
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
        except BaseException as error:
            failure.append(error)
        there.set()
        over.wait()  # the system ends what a thread has started with that thread, a cluster of this machine too

    threading.Thread(target=connect, daemon=True).start()
    there.wait(_CONNECT_SECONDS)
    try:
        if failure or not there.is_set():
            why = _last_line(failure[0]) if failure else f"no answer within {_CONNECT_SECONDS:.0f} s"
            raise ConfigError(f"--ray {address}: no connection ({why}). Start a cluster with `ray start --head`, "
                              "or use --ray local.")  # fmt: skip
        yield Cluster(ray, workers, tell, grows=address != LOCAL)
    finally:
        if there.is_set():
            ray.shutdown()
        over.set()


def _refuse_absent(address: str) -> None:
    """Raise a ConfigError if nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(f"--ray {address!r}: expected `local`, `auto` or HOST:PORT, as `ray start --head` prints it.")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"--ray {address}: nobody answers there ({error}).") from error


@dataclass(eq=False)
class Hand:
    """A worker, as the driver knows it.

    Attributes:
        state: ``starting`` until it said who it is, ``opening`` until its models are loaded, ``working``, ``ended``.
        pending: What it was asked last, if the answer is not there yet.
        lent: What it has, by key: trees or requests.
        granted: Tokens that its large model may decode.
        since: When its models were loaded.
    """

    number: int
    actor: Any
    state: str = "starting"
    pending: Any = None
    lent: dict[Any, Any] = field(default_factory=dict)
    granted: int = 0
    report: Report = field(default_factory=Report)
    since: float = 0.0

    @property
    def rate(self) -> float:
        """What it does in a second."""
        return self.report.done / max(time.monotonic() - self.since, 1e-9)


class Pool(ABC):
    """Workers of one job, each with at most one exchange under way; who is lost is replaced.

    Attributes:
        hands: The workers.
        gone: Sum of what lost workers had reported.
    """

    unit = "answers"

    def __init__(self, cluster: Cluster, store: Store, job: Job) -> None:
        """Name the job; workers start with the context.

        Args:
            cluster: Where they run.
            store: The store; its write lock must be held.
            job: What they do.
        """
        self.cluster, self.store, self.job = cluster, store, job
        self.hands: list[Hand] = []
        self.gone = Report()
        self.facts: dict[str, Any] = {}  # what the first worker said of its scorer and grader
        self._opened = False
        self._losses = 0  # without anything done in between
        self._lost_with: Counter[Any] = Counter()  # workers, by the key of what they had been lent
        self._numbers = count()
        self._next_start = store.next_start()
        self._began = 0.0

    @abstractmethod
    def orders(self, hand: Hand) -> Orders | None:
        """Return what a worker is told next; None: nothing yet."""

    @abstractmethod
    def take(self, hand: Hand, report: Report) -> bool:
        """Take what a worker hands in; return whether anything that it was lent is done."""

    @abstractmethod
    def lost(self, hand: Hand) -> None:
        """Lend to others what a lost worker had."""

    def __enter__(self) -> Self:
        """Start the workers.

        Raises:
            ConfigError: This machine, the only one, has not the GPUs that each takes.
        """
        self._refuse_small_machines()
        self._began = time.monotonic()
        self.store.note(distributed={"ray": self.cluster.ray.__version__, "workers": self.cluster.workers})
        for _ in range(self.cluster.workers):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers, engines first, so that their memory is free for whoever comes next."""
        closing = [hand.actor.close.remote() for hand in self.hands if hand.state in ("working", "ended")]
        with suppress(self.cluster.ray.exceptions.RayError):
            self.cluster.ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS) if closing else None
        for hand in self.hands:
            self.cluster.ray.kill(hand.actor)
        self.hands.clear()

    def _refuse_small_machines(self) -> None:
        if self.cluster.grows or not (needed := self.job.gpus):
            return
        machines = [node["Resources"] for node in self.cluster.ray.nodes() if node["Alive"]]
        if (most := max((each.get("GPU", 0.0) for each in machines), default=0.0)) < needed:
            raise ConfigError(f"Each worker takes {_counted(needed, 'GPU')} of one machine, as `devices` in the models "
                              f"file says; this one has {most:g}. Name fewer, or a larger cluster.")  # fmt: skip

    def _start(self) -> None:
        # Never `max_restarts`: Ray would construct it again with the seeds that it had.
        options = {"num_cpus": 1, "num_gpus": self.job.gpus, "max_restarts": 0, "max_task_retries": 0}
        made = self.cluster.ray.remote(Worker).options(scheduling_strategy="SPREAD", **options).remote()
        self.hands.append(Hand(next(self._numbers), made, pending=made.about.remote()))

    def step(self) -> None:
        """Send orders to whoever has none, wait a little for news, and take them.

        Raises:
            TrimError: A worker cannot do the job, so that no other could.
            BackendError: Workers are lost one after the other.
        """
        for hand in self.hands:
            if hand.pending is None and hand.state == "working" and (orders := self.orders(hand)) is not None:
                hand.pending = hand.actor.exchange.remote(orders)
        pending = {hand.pending: hand for hand in self.hands if hand.pending is not None}
        if not pending:
            time.sleep(_PATIENCE / 10)
            return
        wait, refs = self.cluster.ray.wait, list(pending)
        ready, _ = wait(refs, timeout=_PATIENCE)
        if ready:
            ready, _ = wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            self._answered(pending[ref], ref)

    def _answered(self, hand: Hand, ref: Any) -> None:
        try:
            answer = self.cluster.ray.get(ref)
        except self.cluster.ray.exceptions.RayError as error:
            self._failed(hand, error)
            return
        hand.pending = None
        if hand.state == "starting":
            self._introduced(hand, answer)
        elif hand.state == "opening":
            self._ready(hand, answer)
        else:
            hand.report = answer
            if answer.ended:
                hand.state = "ended"
            if self.take(hand, answer):
                self._losses = 0
            if answer.error is not None:
                if isinstance(answer.error, RequestsFailed) or not isinstance(answer.error, BackendError):
                    raise answer.error
                self._lose(hand, str(answer.error))

    def _introduced(self, hand: Hand, about: Mapping[str, Any]) -> None:
        if about["package"] != (here := package()):
            there, here_is = map("{version} ({sources})".format_map, (about["package"], here))
            raise ConfigError(f"Worker {hand.number} has another trim-routing: {there} there, {here_is} here. Install "
                              "the same on all machines.")  # fmt: skip
        if about["niceness"] > os.nice(0) and not self._opened:
            self.cluster.tell(f"Workers run with niceness {about['niceness']}: engines there wait for whatever else "
                              "runs. Start Ray with RAY_worker_niceness=0 in its environment.")  # fmt: skip
        first, self._next_start = self._next_start, self._next_start + len(self.job.opens)
        hand.state, hand.pending = "opening", hand.actor.open.remote(self.job, first)

    def _ready(self, hand: Hand, told: Mapping[str, Any]) -> None:
        for role, model in told["identities"].items():
            self.store.identify(role, model)
        for start in told["starts"]:
            self.store.record_engine(start)
        facts = {name: told[name] for name in ("scorer", "grader") if name in told}
        if self._opened and facts != self.facts:
            raise ConfigError(f"Worker {hand.number} would write another table: {facts} there, {self.facts} elsewhere.")
        self.facts, self._opened = facts, True
        hand.state, hand.since = "working", time.monotonic()

    def _failed(self, hand: Hand, error: Exception) -> None:
        cause = getattr(error, "cause", None)  # of what was raised there; None: it died
        why = str(cause) if isinstance(cause, TrimError) else _last_line(error)
        if isinstance(cause, TrimError) and (not isinstance(cause, BackendError) or isinstance(cause, RequestsFailed)):
            raise type(cause)(f"Worker {hand.number}: {why}") from None
        if not self._opened and (cause is not None or getattr(error, "actor_init_failed", False)):
            raise BackendError(f"Worker {hand.number} cannot start: {why}") from None
        self._lose(hand, why if cause is not None else type(error).__name__)

    def _lose(self, hand: Hand, why: str) -> None:
        self._losses += 1
        self.hands.remove(hand)
        self.cluster.ray.kill(hand.actor)
        self.gone.done += hand.report.done
        self.gone.tokens.update(hand.report.tokens)
        self.gone.spent.update(hand.report.spent)
        self._lost_with.update(hand.lent.keys())
        often = max((self._lost_with[key] for key in hand.lent), default=0)
        self.lost(hand)
        if often > _MOST_LOST:
            raise BackendError(f"{often} workers were lost with the same work, the last: {why}")
        if self._losses > 2 * self.cluster.workers + 1:
            raise BackendError(f"{self._losses} workers were lost one after the other, the last: {why}")
        self.cluster.tell(f"Worker {hand.number} is lost ({why}); another one goes on.")
        self._start()

    def sum_of(self, of: Callable[[Report], Counter[str]]) -> Counter[str]:
        """Return the sum of what all workers have reported, lost ones included."""
        return sum((of(hand.report) for hand in self.hands), Counter(of(self.gone)))

    def note(self) -> str:
        """Say how many workers there are and what each does in a second."""
        rates = sorted((hand.rate for hand in self.hands if hand.state in ("working", "ended")), reverse=True)
        said = f"{len(rates)} of {self.cluster.workers} workers"
        if not rates:
            needed = f"{said}: each takes a core" + (f" and {_counted(gpus, 'GPU')}" if (gpus := self.job.gpus) else "")
            if time.monotonic() < self._began + _SOON or any(hand.state == "opening" for hand in self.hands):
                return needed
            free = self.cluster.ray.available_resources()
            cores, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
            return f"{needed}; free are {_counted(cores, 'core')} and {_counted(gpus, 'GPU')}"
        shown = [f"{rate:.1f}" for rate in rates]
        listed = ", ".join(shown) if len(shown) <= _LISTED else f"{shown[-1]} to {shown[0]}"
        return f"{said}: {listed} {self.unit} a second"


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
