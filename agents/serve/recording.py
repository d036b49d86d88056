"""What the service saw, as a rollout store (``serve --record DIR``): one replica of a problem's tree for each request.

Everything is written by a thread of its own, from a queue that drops what it cannot hold; a crash loses what was not
written within some seconds. Only requests whose steps are draws of the rollouts' own process are recorded: prompts,
sampling and limits as configured.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from agents.serve.metrics import Metrics
from agents.serve.route import Route
from rollouts.family import Family
from rollouts.models.stepwise import Generation
from rollouts.plugins import load_plugin
from rollouts.scoring.prm import process_of
from rollouts.store.rows import Rows, TreeKey
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem, split_of
from rollouts.text.steps import SMALL, Step, prefix_hash
from rollouts.trees.grow import StepBuffer
from rollouts.trees.tree import RolloutTree

TABLE, COLUMNS = "served", ("probability", "action")
"""Score table of the decisions: the probability of escalating, and what was done (0, 1), for each small proposal."""
UNANSWERED = "unanswered"
"""Split of problems whose answer nobody told: nothing is trained or evaluated on them."""
SOURCE, ESCALATIONS = "served", 2  # K of the trees to be grown, where the policy has no cap
_WAITING = 1024  # requests that wait to be written
_MOST_REPLICAS = 1 << 15
_log = logging.getLogger("trim.serve")
Redact = Callable[[str], str | None]


@dataclass(frozen=True)
class Seen:
    """One request as it is written.

    Attributes:
        answer: Its right answer, if the request told one.
        paths: Of each route through its tree the accepted texts, and the draws: place, author, step, score, and of
            small ones with a decision its probability of escalating and the action.
    """

    question: str
    answer: str
    paths: tuple[tuple[tuple[str, ...], tuple[tuple[int, str, Step, float | None, tuple[float, int] | None], ...]], ...]


def seen_of(routes: Iterable[Route], answer: str = "") -> Seen:
    """Return what routes of one request have drawn."""
    paths = []
    for route in routes:
        draws = []
        for place, role, step in route.drawn:
            written = route.written[place] if place < len(route.written) else None
            score, decided = None, None
            if written is not None:
                score = written.score if role == SMALL else written.large_score
                if role == SMALL and written.chance is not None and written.action is not None:
                    decided = written.chance, written.action
            draws.append((place, role, step, score, decided))
        paths.append((tuple(step.text for step in route.accepted), tuple(draws)))
        question = route.task.question
    return Seen(question, answer, tuple(paths))


class Recorder:
    """Writes what it is given into a store, beside the event loop."""

    def __init__(
        self,
        folder: str | Path,
        process: Mapping[str, Any],
        metrics: Metrics,
        *,
        date: Any = None,
        scorer: tuple[str, Mapping[str, Any]] | None = None,
        redact: str | None = None,
        seconds: float = 10.0,
        waiting: int = _WAITING,
    ) -> None:
        """Make or open the store, hold its write lock, and begin.

        Args:
            folder: Its directory.
            process: What its steps are draws of (`rollouts.family.Family.process`).
            metrics: What counts requests.
            date: Date that the prompts have.
            scorer: Name and process of the table for scores; None: they are not recorded.
            redact: ``module:object`` that is called with every text and returns what is to be written instead, or None
                for a request that is not to be recorded.
            seconds: Longest time between two shards.
            waiting: Requests that may wait.

        Raises:
            StoreError: It was made by another process, or another one is writing.
            ConfigError: There is no such object.
        """
        self._redact: Redact | None = load_plugin(redact, "--redact") if redact else None
        self.store, self._count = Store.create(folder, process, date), metrics.recorded
        self._held = ExitStack()
        self._held.enter_context(self.store.writing())
        self._steps = StepBuffer(self.store.steps, seconds=seconds)
        tables = {TABLE: self.store.attach("scores", TABLE, {"kind": "decisions"}, COLUMNS, (SMALL,))}
        if scorer is not None:
            tables[scorer[0]] = self.store.attach("scores", *scorer)
        self._rows = {name: Rows(table) for name, table in tables.items()}
        self._scores = scorer[0] if scorer else None
        keys = self.store.steps.keys().group_by("problem").aggregate([("replica", "max")])
        self._replicas = Counter(
            dict(zip(keys["problem"].to_pylist(), pc.add(pc.cast(keys["replica_max"], "int32"), 1).to_pylist(),
                     strict=True))
        )  # fmt: skip
        self._problems: dict[str, Problem] = {}
        self._open: list[TreeKey] = []
        self._broken, self._again = False, 0.0  # whether the last shard could not be written; when to try again
        self._queue: queue.Queue[Seen | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def take(self, routes: Iterable[Route], answer: str = "") -> None:
        """Have what the routes of one request have drawn written; never waits."""
        try:
            self._queue.put_nowait(seen_of(routes, answer))
        except queue.Full:
            self._count.labels("dropped").inc()

    def close(self) -> None:
        """Write what is waiting, and let go of the store."""
        self._queue.put(None)
        self._thread.join()
        self._held.close()

    def _run(self) -> None:
        while True:
            try:
                seen = self._queue.get(timeout=max(self._steps.max_seconds / 4, 0.05))
                if seen is None:
                    return self._flush()
                self._count.labels(self._add(seen)).inc()
            except queue.Empty:
                pass
            except Exception:
                _log.exception("a request could not be recorded")
                self._count.labels("failed").inc()
            if time.monotonic() >= self._again if self._broken else self._steps.due:
                self._flush()

    def _texts(self, seen: Seen) -> dict[str, Any] | None:
        """Return what is written instead of each text; None if it is not to be recorded."""
        drawn = (step.text for _, draws in seen.paths for _, _, step, *_ in draws)
        texts = {seen.question, seen.answer, *drawn, *(text for path, _ in seen.paths for text in path)} - {""}
        kept: dict[str, Any] = {text: text if self._redact is None else self._redact(text) for text in texts}
        if None in kept.values():
            return None
        "".join(kept.values()).encode()  # fails now, if it must: what is no text would be in the way of all that comes
        return kept | {"": ""}

    def _add(self, seen: Seen) -> str:
        if self._broken:  # what there is could not be written: memory does not grow with what comes meanwhile
            return "dropped"
        if (kept := self._texts(seen)) is None:
            return "redacted"
        problem = _problem(kept[seen.question], kept[seen.answer])
        replica = self._replicas[problem.id]
        if replica >= _MOST_REPLICAS:
            return "dropped"
        process = self.store.manifest["process"]
        tree = RolloutTree(problem, replica, process["max_escalations"], self.store.splitting)
        for path, draws in seen.paths:
            texts = [kept[text] for text in path]
            for place, role, drawn, score, decided in draws:
                node, step = tree.nodes.get(prefix_hash(texts[:place])), replace(drawn, text=kept[drawn.text])
                new = [] if node is None else tree.insert_path(node, role, [step])
                self._steps.add(tree, role, new, Generation((step,), step.tokens))
                for at, _ in new:
                    key = tree.row_key(at, role)
                    if score is not None and self._scores:
                        self._rows[self._scores].put_value(key, score)
                    if decided is not None:
                        self._rows[TABLE].put_value(key, decided)
        self._replicas[problem.id] += 1
        self._problems[problem.id] = problem
        if tree.missing():
            self._open.append(tree.key)
        return "kept"

    def _flush(self) -> None:
        """Write a shard of everything; what an error leaves is written the next time."""
        try:
            if self._problems:
                known = {problem.id for problem in self.store.problems()}
                self.store.add_problems([each for name, each in self._problems.items() if name not in known])
                self._problems = {}
            if self._open:
                self.store.note_live(self._open)  # before their first row, so that none is compiled as it is
                self._open = []
            for rows in (self._steps, *self._rows.values()):
                rows.flush()
            self._broken = False
        except Exception:
            self._broken = True
            self._again = time.monotonic() + self._steps.max_seconds
            _log.exception(
                "%s: what was recorded cannot be written; nothing more is taken until it can", self.store.path
            )


def _problem(question: str, answer: str) -> Problem:
    text = question + ("\x00" + answer if answer else "")
    name = f"{SOURCE}/q-{sha256(text.encode()).hexdigest()[:16]}"
    split = split_of(question) if answer else UNANSWERED
    return Problem(name, split, question, answer, SOURCE, "unknown")


def recorder_of(
    folder: str, family: Family, metrics: Metrics, max_escalations: int | None, redact: str | None
) -> Recorder:
    """Return what records the steps of a family; the policy's cap is K of the trees that are grown from it, or 2."""
    process = family.process(ESCALATIONS if max_escalations is None else max_escalations)
    scorer, prompts, scored = family.config.scorer, family.reward_prompts, None
    if scorer is not None and scorer.model is not None and prompts is not None:
        scored = family.scorer_name, process_of(prompts, scorer.model.display_name)
    return Recorder(folder, process, metrics, date=family.date, scorer=scored, redact=redact)
