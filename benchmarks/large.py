"""Training and evaluation on large stores: processor time and memory by number of problems.

    python -m benchmarks.large --problems 1000 10000 100000 --out results/large

Compiled trees are made up: right and wrong steps, scores that tell them apart with noise, trees closed under K = 2 of
some 50 nodes. The commands are those of a user, in processes of their own. *Anonymous* memory is what cannot be given
back to the system as pages of files can; the peak beside it counts these, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from benchmarks import synthetic
from benchmarks.study import heading, write
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.trees.arrays import MISSING, TERMINAL
from rollouts.trees.compile import _TYPES, _cache_folders, _describe

K, LENGTHS, CHUNK = 2, (4, 5, 6, 7, 8), 2000
SPLITS = ("train",) * 8 + ("validation", "test")
TOOLS = Path(__file__).resolve().parents[1]
COMMANDS = {
    "exact": ["train.py", "--agent", "exact", "--lam", "0.005", "0.01", "--tracking", "none"],
    "evaluate": ["evaluate.py"],
    "ppo-agg": ["train.py", "--lam", "0.01", "--ppo.iterations", "10", "--attempts", "1", "--tracking", "none"],
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        problems: Sizes of the stores; 8 in 10 problems are for training, one for validation, one to test.
        commands: Which commands.
        place: Folder for the stores; default: a temporary one.
        out: Report, without suffix; default: print only.
    """

    problems: tuple[int, ...] = (1000, 10_000, 100_000)
    commands: tuple[str, ...] = tuple(COMMANDS)
    place: Path | None = None
    out: Path | None = None


def shape_of(length: int) -> tuple[list[tuple[int, ...]], NDArray[np.int32]]:
    """Return the n nodes of trees with solutions of so many steps, by who wrote them, and (n, 2) where actions lead."""
    words = [word for depth in range(length) for word in product((0, 1), repeat=depth) if sum(word) <= K or all(word)]
    place = {word: number for number, word in enumerate(words)}
    child = np.full((len(words), 2), TERMINAL, np.int32)
    for number, word in enumerate(words):
        for action in (0, 1):
            after = (*word, action)
            if sum(after) > K and not all(after):
                child[number, action] = MISSING
            elif len(after) < length:
                child[number, action] = place[after]
    return words, child


SHAPES = {length: shape_of(length) for length in LENGTHS}


def drawn(count: int, length: int, draw: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Return the arrays of so many trees, (count, n) or (count, n, 2)."""
    words, child = SHAPES[length]
    shape, there = (count, len(words), 2), child != MISSING
    skill = np.stack([draw.uniform(0.7, 0.95, count), np.full(count, 0.97)], axis=1)
    step = draw.random(shape) < skill[:, None, :]
    tokens = np.where(there, draw.poisson([18, 24], shape) + 2, 0)
    right, prefix = np.ones(shape[:2], bool), np.zeros(shape[:2], np.int32)
    score = np.full(shape, np.nan)
    for number in range(len(words)):
        for action in (0, 1):
            if not there[number, action]:
                continue
            good = right[:, number] & step[:, number, action]
            told = 1 / (1 + np.exp(-draw.normal(np.where(good, 2, -2), 2)))
            score[:, number, action] = told
            if (after := child[number, action]) >= 0:
                right[:, after], prefix[:, after] = good, prefix[:, number] + tokens[:, number, action]
    ends = np.broadcast_to(child == TERMINAL, shape)
    return {
        "child": np.broadcast_to(child, shape), "tokens": tokens, "accepted_tokens": tokens,
        "prompt_tokens": prefix[:, :, None] + np.array([60, 60]), "score": score,
        "correct": np.where(ends, right[:, :, None] & step, -1),
        "stop_reason": np.broadcast_to(np.where(there, 0, -1), shape),
        "has_answer": ends, "label": np.where(there, step, -1),
        "depth": np.broadcast_to([len(word) for word in words], shape[:2]),
    }  # fmt: skip


def make(path: Path, problems: int) -> int:
    """Make a store whose compiled trees are there, and nothing else; return its nodes."""
    store, _ = synthetic.make(path, 0, 1, K)
    splits = [SPLITS[i % len(SPLITS)] for i in range(problems)]
    questions = (Problem(f"p-{i:07d}", split, f"{i}?", "7", "synthetic", "MIT") for i, split in enumerate(splits))
    store.add_problems(list(questions))
    for kind in ("scores", "grades"):
        store.attach(kind, "made-up", {"kind": "made-up"})
    folder = _cache_folders(Store(path), "made-up", "made-up")[0]
    folder.mkdir(parents=True)
    lengths = np.resize(LENGTHS, problems)
    sizes = np.array([len(SHAPES[length][0]) for length in lengths])
    root, nodes = np.cumsum(sizes) - sizes, int(sizes.sum())
    of_nodes = drawn(1, LENGTHS[0], np.random.default_rng(0))
    arrays = {name: open_memmap(folder / f"{name}.npy", "w+", _TYPES[name], (nodes, *each.shape[2:]))
              for name, each in of_nodes.items()}  # fmt: skip
    for start in range(0, problems, CHUNK):
        draw = np.random.default_rng(start)
        for length in LENGTHS:
            own = start + np.flatnonzero(lengths[start : start + CHUNK] == length)
            rows = root[own, None] + np.arange(len(SHAPES[length][0]))
            for name, each in drawn(len(own), length, draw).items():
                arrays[name][rows] = each
            linked = arrays["child"][rows]
            arrays["child"][rows] = np.where(linked >= 0, linked + root[own, None, None], linked)
    others = {
        "tree": np.repeat(np.arange(problems), sizes), "root": root, "problem": np.arange(problems),
        "replica": np.zeros(problems), "text": np.zeros(1), "text_end": np.zeros((nodes, 2)),
    }  # fmt: skip
    for name, each in others.items():
        np.save(folder / f"{name}.npy", each.astype(_TYPES[name]))
    np.save(folder / "splits.npy", np.array(splits))
    named = dict.fromkeys(("scorer", "grader", "small", "large"), "made-up")
    meta = named | {"store": str(path), "max_escalations": K, "max_steps": 30, "hash": f"made-up-{problems}"}
    for array in arrays.values():
        array.flush()
    _describe(folder, store.problems(), [], meta)
    return nodes


def measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its processor time, s, its peak memory and how much of it was anonymous, MiB."""
    environment = {**os.environ, "PYTHONPATH": str(TOOLS), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=TOOLS, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    anonymous = 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        told = Path(f"/proc/{process.pid}/status").read_text().partition("RssAnon:")[2].split()
        anonymous = max(anonymous, int(told[0]) / 1024 if told else 0.0)
        time.sleep(0.1)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}.")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, anonymous


def main(settings: Settings) -> None:
    """Make the stores, run the commands and report."""
    lines = heading("Training and evaluation on large stores", "large")
    lines += ["| problems | nodes | command | processor, s | peak memory, MiB | of it anonymous, MiB |"]
    lines += ["|---:|---:|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(dir=settings.place) as scratch:
        for problems in settings.problems:
            store = Path(scratch) / str(problems)
            nodes, trained = make(store, problems), store.with_suffix(".exact")
            for name in settings.commands:
                about = ["--rollouts", str(store)]
                about += [str(trained)] if name == "evaluate" else ["--out", str(store.with_suffix(f".{name}"))]
                seconds, peak, anonymous = measured([*COMMANDS[name], *about])
                lines += [f"| {problems:,} | {nodes:,} | {name} | {seconds:.1f} | {peak:.0f} | {anonymous:.0f} |"]
                print(lines[-1], flush=True)
    write("\n".join(lines) + "\n", settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
