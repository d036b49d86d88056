"""What is used of Ray, in threads: actors that can be killed, and what is sent is pickled. For tests of bookkeeping."""

from __future__ import annotations

import pickle
import queue
import threading
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """Root, as Ray has it."""


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"Traceback ...\n{type(cause).__name__}: {cause}")
        self.cause = cause


class Actor:
    """Works off calls in a thread; once killed it answers nothing."""

    def __init__(self, made: Any) -> None:
        self.made, self.dead = made, False
        self.calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.pending: set[Future[Any]] = set()
        threading.Thread(target=self._work, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            self.pending.add(future)
            self.calls.put((future, name, pickle.dumps(arguments)))
            if self.dead:
                self.die()
            return future

        return SimpleNamespace(remote=call)

    def _work(self) -> None:
        while True:
            future, name, arguments = self.calls.get()
            try:
                result = pickle.loads(pickle.dumps(getattr(self.made, name)(*pickle.loads(arguments))))
            except Exception as error:
                self._answer(future.set_exception, RayTaskError(error))
            else:
                self._answer(future.set_result, result)

    def _answer(self, give: Any, result: Any) -> None:
        if not self.dead:
            give(result)

    def die(self) -> None:
        self.dead = True
        for future in self.pending:
            if not future.done():
                future.set_exception(RayError("The actor died."))


class Threads:
    """Stands for the module."""

    __version__ = "threads"
    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.options: list[dict[str, Any]] = []
        self.machines: list[dict[str, float]] = [{"CPU": 8.0}]
        self.taken: dict[str, float] = {}

    def remote(self, made: Any) -> Any:
        def start(**options: Any) -> Any:
            def now() -> Actor:
                self.options.append(options)
                self.actors.append(Actor(made()))
                return self.actors[-1]

            return SimpleNamespace(remote=now)

        return SimpleNamespace(options=start)

    def wait(self, refs: list[Future[Any]], num_returns: int = 1, timeout: float | None = None) -> Any:
        wait(refs, timeout, FIRST_COMPLETED if num_returns == 1 else "ALL_COMPLETED")
        done = [ref for ref in refs if ref.done()]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: Future[Any]) -> Any:
        return ref.result()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": each} for each in self.machines]

    def available_resources(self) -> dict[str, float]:
        return dict(sum(map(Counter, self.machines), Counter()) - Counter(self.taken))

    def kill(self, actor: Actor) -> None:
        actor.die()
