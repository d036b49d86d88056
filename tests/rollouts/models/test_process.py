"""The process of an engine: what is pending when it ends, whoever ends it, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import toy_engine

from rollouts.config import Sampling
from rollouts.errors import BackendError
from rollouts.models.base import CompletionRequest
from rollouts.models.process import EngineProcess


def start(pause: float = 0.0, role: str = "large") -> EngineProcess:
    return EngineProcess(role, toy_engine.echo, {}, pause=pause)


def submit(backend: EngineProcess, *requests: Any) -> list[Any]:
    return [backend.submit(request) for request in requests]


def test_answers_find_their_requests() -> None:
    with start() as backend:
        assert (backend.role, backend.window, backend.describe()) == ("large", 7, {"engine": "echo"})
        assert [future.result(30) for future in submit(backend, *range(100))] == list(range(100))


def test_closing_cancels_what_is_pending_and_tolerates_callers_that_cancel() -> None:
    with start(0.1) as backend:
        given_up, served = submit(backend, 1, 2)
        given_up.cancel()
        assert served.result(30) == 2
        futures = submit(backend, *range(300))
    with pytest.raises(CancelledError):
        futures[-1].result(timeout=30)
    assert not backend._process.is_alive()
    with pytest.raises(BackendError, match="^large: its process"):
        submit(backend, 1)
    backend.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_fails_what_is_pending_and_names_the_role(number: signal.Signals) -> None:
    backend = start(0.1)
    futures = submit(backend, *range(300))
    os.kill(backend._process.pid, number)
    with pytest.raises(BackendError, match=f"^large: .*exit code -{number.value}"):
        futures[-1].result(timeout=30)
    assert all(future.done() for future in futures)
    with pytest.raises(BackendError, match="^large: "):
        submit(backend, 1)
    backend.close()
    backend.close()


def test_an_engine_that_fails_says_why_and_ctrl_c_is_not_its_business() -> None:
    with start() as backend:
        os.kill(backend._process.pid, signal.SIGINT)
        assert submit(backend, 1)[0].result(30) == 1
        with pytest.raises(BackendError, match="^large: its engine failed. ZeroDivisionError: by zero"):
            submit(backend, ZeroDivisionError("by zero"))[0].result(30)
    with pytest.raises(BackendError, match="^small: the model could not be loaded. ValueError: pause is -1"):
        start(-1, "small")


def test_an_end_that_nobody_asked_for_has_a_reason() -> None:
    with start() as backend:
        with pytest.raises(BackendError, match="^large: its engine failed. EOFError: lost"):
            submit(backend, EOFError("lost"))[0].result(30)
        backend._process.join(30)
        assert backend._process.exitcode == 1


def test_refusals_are_answers_and_cost_the_others_nothing() -> None:
    with start() as backend:
        asked = ("refused", 1, CompletionRequest((), 1, Sampling()))
        refused, answered, failed = submit(backend, *asked)
        with pytest.raises(BackendError, match="^large: the engine refused a request. refused$"):
            refused.result(30)
        assert answered.result(30) == 1
        assert (failed.result(30).finish, failed.result(30).detail) == ("failed", "nothing to say")


def test_a_closed_process_writes_nothing_into_the_pipe_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = start()
    os.kill(backend._process.pid or 0, signal.SIGKILL)
    backend._reader.join(30)
    send, written = backend._connection._send, threading.Event()  # type: ignore[attr-defined]

    def late(data: bytes) -> None:  # the descriptor is another pipe's if `close` does not wait
        time.sleep(0.5)
        written.set()
        send(data)

    monkeypatch.setattr(backend._connection, "_send", late)
    backend.close()
    assert written.is_set() and not backend._writer.is_alive()


PROGRAM = """
import sys, time
import toy_engine
from rollouts.models.process import EngineProcess
if __name__ == "__main__":
    backend = EngineProcess("small", toy_engine.echo, {}, pause=0.0)
    print(backend._process.pid, flush=True)
    time.sleep(float(sys.argv[1]))
"""


def start_program(folder: Path, seconds: float) -> tuple[subprocess.Popen[str], int]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests' / 'support'}"}
    command = [sys.executable, str(program), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def gone(pid: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True  # ended; whoever adopted it has not noticed yet
        time.sleep(0.1)
    return False


def test_a_killed_program_leaves_no_engine_behind(tmp_path: Path) -> None:
    process, engine = start_program(tmp_path, 600)
    process.kill()
    process.wait()
    assert gone(engine)


def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path: Path) -> None:
    process, engine = start_program(tmp_path, 0)
    assert process.wait(timeout=60) == 0
    assert gone(engine)
