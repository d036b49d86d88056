"""Commands in fresh processes that are forked from one which has imported the large libraries, and nothing of ours."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

LARGE = [
    "torch",
    "torch._dynamo",
    "stable_baselines3",
    "gymnasium",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "scipy.stats",
    "rich",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(LARGE)


class Command:
    """``python ARGUMENTS`` that has begun, where an argument -c, -m or a script comes first as there.

    Attributes:
        process: The process.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Start it in a folder."""
        self._files = [Path(tempfile.mkstemp(prefix="forked-")[1]) for _ in range(2)]
        given = (list(arguments), str(folder), dict(environment), [str(file) for file in self._files])
        self.process: ForkServerProcess = _CONTEXT.Process(target=_run, args=given)
        self.process.start()

    def wait(self, seconds: float) -> int:
        """Wait until it has ended; return its exit code."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise TimeoutError(f"not done after {seconds} s")
        return code

    @property
    def output(self) -> str:
        """What it printed, and after that its errors."""
        return "".join(file.read_text() for file in self._files)


def _run(arguments: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    first = arguments.pop(0)
    own = [place for place in sys.path if place.startswith((sys.prefix, sys.base_prefix))]  # without those of the tests
    sys.path[:] = [*environment.get("PYTHONPATH", "").split(os.pathsep), *own]
    try:
        if first == "-c":
            sys.argv = ["-c", *arguments[1:]]
            sys.path.insert(0, "")
            exec(arguments[0], {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = arguments
            sys.path.insert(0, folder)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *arguments]
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
