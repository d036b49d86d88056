"""What studies share: settings, fits that are kept, and what their reports are made of."""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.bootstrap import Estimate, curve_estimates
from agents.evaluation.curves import CPT_TARGETS, Curve, Method, References
from agents.evaluation.outcomes import Floats, Outcomes, combined
from agents.evaluation.table import MIXING_MARK

_CHECKSUM = b"\ncrc-32 "  # between what is kept and its checksum


@dataclass(frozen=True)
class Study:
    """Settings of a study whose fits are kept.

    Attributes:
        rollouts: The store.
        kept: Folder in which what was fitted is kept, and looked up.
        minutes: Begin nothing more after so many; the same command goes on.
        processes: Fits side by side.
        out: Report and picture, without suffix; default: print only.
    """

    rollouts: str = "quickstart"
    kept: Path = Path("runs/kept")
    minutes: float = float("inf")
    processes: int = 2
    out: Path | None = None


def all_kept(make: Callable[[Any, Any], Any], tasks: Mapping[str, Any], settings: Study) -> list[Any]:
    """Return what ``make(task, settings)`` gives for all tasks, side by side; what is kept by a task's name is read.

    Names say all that decides what a task gives, besides the store.

    Raises:
        SystemExit: ``settings.minutes`` were over before all were begun; what is kept is there the next time.
    """
    from rich.progress import track

    end = time.time() + 60 * settings.minutes
    folder = settings.kept / _plain(settings.rollouts)
    each = [(make, folder / f"{_plain(name)}.pickle", task, settings, end) for name, task in tasks.items()]
    if settings.processes == 1:
        found = [_keep(*one) for one in track(each, "fitting")]
    else:
        with ProcessPoolExecutor(settings.processes, get_context("spawn")) as pool:
            begun = [pool.submit(_keep, *one) for one in each]
            found = [one.result() for one in track(begun, "fitting")]
    if left := sum(one is None for one in found):
        raise SystemExit(f"{left} of {len(tasks)} are left; say the same again.")
    return found


def _plain(name: str) -> str:
    """Return a name as that of a file."""
    return name.replace(" ", "-").replace("/", "_")


def _keep(make: Callable[[Any, Any], Any], file: Path, task: Any, settings: Study, end: float) -> Any:
    return kept(file, lambda: make(task, settings), end)


def kept(file: Path, make: Callable[[], Any], end: float = float("inf")) -> Any:
    """Return what a file keeps; if it is not there or damaged make and keep it, or after `end` return None."""
    with suppress(Exception):  # pickles raise anything
        data, _, told = file.read_bytes().rpartition(_CHECKSUM)
        if zlib.crc32(data) == int.from_bytes(told):
            return pickle.loads(data)
    if time.time() > end:
        return None
    found = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(found)
    file.write_bytes(data + _CHECKSUM + zlib.crc32(data).to_bytes(4))
    return found


def average(outcomes: Sequence[Outcomes]) -> Outcomes:
    """Average the outcomes of several routers problem by problem."""
    return combined(outcomes, lambda *columns: np.mean(columns, axis=0))


def heading(title: str, command: str) -> list[str]:
    """Return a report's first lines: title, command, date, commit, machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cores = f"{os.cpu_count()} shared cores without a GPU"
    stamp = f"`python -m benchmarks.{command}`, {datetime.date.today()}, commit {commit.stdout.strip()}, {cores}."
    return [f"# {title}", "", stamp, ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table in Markdown, whose first `left` columns hold words and the others figures."""
    rule = "|---" * left + "|---:" * (len(head) - left) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def shown(each: Estimate, form: str = "+.4f", scale: float = 1.0) -> str:
    """Return a value with its interval; a dash where it is undefined."""
    if not np.isfinite(each.value):
        return "–"
    return "{} [{}, {}]".format(*(f"{scale * value:{form}}" for value in (each.value, each.low, each.high)))


def percent(each: Estimate) -> str:
    """Return a share with its interval, in %."""
    return shown(each, ".1f", 100)


CURVE = (*(f"CPT({x} %)" for x in CPT_TARGETS), "ΔIBC")
"""Heads of `curve_cells`."""


def curve_cells(method: Method, both: References, weights: Floats) -> list[str]:
    """Return what is read off a curve, with intervals: CPTs in %, marked where reached by mixing alone, and ΔIBC."""
    metrics, curve = curve_estimates(method, both, weights), Curve.of(method, both)
    marks = (f" {MIXING_MARK}" if curve.by_mixing(x) else "" for x in CPT_TARGETS)
    cells = [percent(metrics[f"cpt_{x}"]) + mark for x, mark in zip(CPT_TARGETS, marks, strict=True)]
    return [*cells, shown(metrics["delta_ibc"], ".2f")]


def write(text: str, out: Path | None) -> None:
    """Print a report, and write it where wanted, as ``.md``."""
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text, encoding="utf-8")
