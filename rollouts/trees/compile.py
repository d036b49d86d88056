"""Compiling a rollout store into flat arrays, cached beside it under the hash of its content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rollouts.errors import StoreError
from rollouts.files.sealed import check, checksums, read_sealed, write_sealed
from rollouts.store.rows import Rows
from rollouts.store.store import Store, score_command
from rollouts.tasks.problems import Problem
from rollouts.text.splitting import BLANK_LINE
from rollouts.text.steps import ROLES
from rollouts.trees.arrays import MISSING, STOP_REASONS, TERMINAL, Trees
from rollouts.trees.grow import load_trees
from rollouts.trees.signals import Signals
from rollouts.trees.tree import RolloutTree

_FORMAT = 6  # of the compiled files

_TYPES = {  # of the arrays
    name: get_args(get_args(hint)[1])[0]
    for name, hint in get_type_hints(Trees).items()
    if get_origin(hint) is np.ndarray
}
_HASHED_ALONE: dict[str, Any] = {  # of the accepted steps: in the hash, which artefacts name, and in no array
    "prefix_tokens": np.int32, "min_score": np.float32, "product_score": np.float32,
}  # fmt: skip


def _row_of(names: str) -> np.dtype[np.void]:
    return np.dtype([(name, (_TYPES | _HASHED_ALONE)[name]) for name in names.split()])


_PER_ACTION = _row_of("child tokens accepted_tokens prompt_tokens score correct stop_reason has_answer label text_end")
_ABSENT = (MISSING, 0, 0, 0, np.nan, -1, -1, False, -1)  # all but where its text ends
_PER_NODE = _row_of(f"tree depth {' '.join(_HASHED_ALONE)}")
_PER_TREE = _row_of("root problem replica")
_HASHED = {*_PER_ACTION.names, *_PER_NODE.names, *_PER_TREE.names} - {"text_end"}  # type: ignore[misc]
_REASONS = {reason: place for place, reason in enumerate(STOP_REASONS)}
_PART = 20_000  # nodes that are in memory before they are written


def compile_store(
    store: Store | str | Path,
    scorer: str | None = None,
    grader: str | None = None,
    *,
    split: str | None = None,
    cache: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Trees:
    """Compile a store, or load what was compiled from the same content before.

    Args:
        store: The store or its path.
        scorer: Score table; may be left out if there is one only.
        grader: Grade table; likewise.
        split: The split that is wanted, which may be in a store within the store (`Store.holding`).
        cache: Keep the arrays beside the store (or, where that cannot be written, in the user's cache folder).
        on_progress: Called with the number of trees compiled since the last call.

    Raises:
        StoreError: No scores or grades, some are missing, a damaged shard, or trees that are not closed.
    """
    store = (store if isinstance(store, Store) else Store(store)).holding(split)
    scorer, grader = store.choose("scores", scorer), store.choose("grades", grader)
    folders = _cache_folders(store, scorer, grader) if cache else []
    for folder in folders:
        if (kept := _kept(folder)) is not None:
            return kept
    for folder in folders:
        with suppress(OSError), _scratch(folder.parent) as scratch:
            _compile(store, scorer, grader, scratch / folder.name, on_progress)
            _keep(scratch, folder)
            if (kept := _kept(folder)) is not None:
                return kept
    with tempfile.TemporaryDirectory() as place:
        _compile(store, scorer, grader, Path(place) / "arrays", on_progress)
        return _load(Path(place) / "arrays")


def _cache_folders(store: Store, scorer: str, grader: str) -> list[Path]:
    """Return where compiled arrays may be: ``OWNER-CONTENT``, of which one for each owner is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    content = _cache_key(store, scorer, grader)
    return [
        parent / f"{hashlib.blake2b(owner.encode(), digest_size=6).hexdigest()}-{content}"
        for parent, owner in (
            (store.path / ".compiled", f"{scorer}|{grader}"),
            (home / "trim-routing" / "compiled", f"{store.path.resolve()}|{scorer}|{grader}"),
        )
    ]


def _cache_key(store: Store, scorer: str, grader: str) -> str:
    digest = hashlib.blake2b(f"{_FORMAT}|{scorer}|{grader}".encode(), digest_size=12)
    digest.update(json.dumps(store.manifest["process"], sort_keys=True).encode())
    digest.update("".join(f"{problem}|{replica}\n" for problem, replica in sorted(store.live)).encode())
    with (store.path / "problems.parquet").open("rb") as handle:
        digest.update(hashlib.file_digest(handle, "blake2b").digest())
    for name in store.names("scores"):
        digest.update(f"|{name}|{store.table_manifest('scores', name)}".encode())
    for table in (store.steps, *map(store.scores, store.names("scores")), store.grades(grader)):
        for shard in table.digests():
            digest.update(shard)
    return digest.hexdigest()


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Make a folder to write in, which goes in the end; those go, too, whose process was killed."""
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for old in parent.glob(".scratch-*"):
            with suppress(OSError):  # its process is at work
                held.enter_context(_flocked(old))
                shutil.rmtree(old, ignore_errors=True)
        made = held.enter_context(tempfile.TemporaryDirectory(".tmp", ".scratch-", parent, ignore_cleanup_errors=True))
        held.enter_context(_flocked(Path(made)))
        yield Path(made)


@contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _keep(scratch: Path, folder: Path) -> None:
    """Move what was compiled to its place, and what its owner had there out of it."""
    for old in folder.parent.glob(f"{folder.name.partition('-')[0]}-*"):
        if old != folder or _kept(old) is None:
            with suppress(OSError):  # it goes as a whole, and another process may be removing it too
                old.rename(scratch / f"old-{old.name}")
    with suppress(OSError):  # another process was first
        os.replace(scratch / folder.name, folder)


def _kept(folder: Path) -> Trees | None:
    """Return what a folder holds; None if it is not there, damaged, or being removed."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return _load(folder)
    return None


def _describe(folder: Path, problems: Sequence[Problem], signals: Sequence[str], meta: Mapping[str, Any]) -> None:
    """Write what is no array, with what tells whether a file was damaged."""
    described = {"problem_ids": [item.id for item in problems], "questions": [item.question for item in problems]}
    named = {"signals": signals, "meta": meta, "checksums": checksums(folder)}
    write_sealed(folder / "meta.json", {**described, **named})


def _load(folder: Path) -> Trees:
    described = read_sealed(folder / "meta.json")
    check(folder, described["checksums"])
    arrays: dict[str, Any] = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _TYPES}
    ids, questions = tuple(described["problem_ids"]), tuple(described["questions"])
    signals = {
        name: np.load(folder / f"signal-{number}.npy", mmap_mode="r")
        for number, name in enumerate(described["signals"])
    }
    return Trees(**arrays, problem_ids=ids, questions=questions, meta=described["meta"], signals=signals)


class _Arrays:
    """Arrays that grow on the disk, along their first axis: ``.npy`` files, whose headers are completed at the end."""

    def __init__(self, folder: Path) -> None:
        """Make the folder."""
        self._folder = folder
        self._files: dict[str, tuple[BinaryIO, np.dtype[Any], list[int]]] = {}
        folder.mkdir()

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Append to an array, or begin it."""
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.npy").open("wb"), values.dtype, [0, *values.shape[1:]]
            self._header(name)
        file, _, shape = self._files[name]
        file.write(values.tobytes())
        shape[0] += len(values)

    def _header(self, name: str) -> None:
        file, dtype, shape = self._files[name]
        about = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
        npy.write_array_header_1_0(file, about)  # type: ignore[no-untyped-call]  # leaves room for any length

    def close(self) -> None:
        """Complete the files."""
        for name, (file, *_) in self._files.items():
            file.seek(0)
            self._header(name)
            file.close()


@dataclass
class _Counts:
    incomplete: int = 0
    unscored: int = 0
    ungraded: int = 0
    not_numbers: int = 0
    without_score: int = 0  # trees left out because an input exceeded the scorer's window
    orphans: int = 0
    unclaimed: int = 0  # scores and grades that belong to no step


def _compile(store: Store, scorer: str, grader: str, folder: Path, on_progress: Callable[[int], None] | None) -> None:
    """Compile a store into the files of a new folder, a part of the trees at a time."""
    problems, process = store.problems(), store.manifest["process"]
    positions = {problem.id: position for position, problem in enumerate(problems)}
    steps = store.step_statistics()
    signals = Signals([store.score_rows(name, steps) for name in store.signals()], store.scored_by(scorer))
    tables = [Rows(store.grades(grader)), *([Rows(store.steps, "label")] if process.get("labels") else [])]
    counts, arrays, part = _Counts(), _Arrays(folder), _Part()
    live = store.live
    for tree in load_trees(
        store, problems, None, process.get("max_escalations"), chunk=256, along=[*signals.tables.values(), *tables]
    ):
        lacking = tree.missing() > 0
        if lacking and tree.key not in live:
            live = store.live  # live episodes may have begun it just now
        if tree.key not in live:
            counts.incomplete += lacking
            part.add(tree, positions[tree.problem.id], signals, tables, counts)
            if len(part.nodes) >= _PART:
                part.write(arrays, signals.names)
        if on_progress:
            on_progress(1)
    part.write(arrays, signals.names)
    arrays.close()
    _refuse(store, counts, scorer, grader, part.trees)
    np.save(folder / "splits.npy", np.asarray([item.split for item in problems]))
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(_HASHED):
        digest.update(name.encode())
        values = np.load(folder / f"{name}.npy", mmap_mode="r")
        for start in range(0, len(values), _PART):
            digest.update(values[start : start + _PART].tobytes())
    for name in _HASHED_ALONE:
        (folder / f"{name}.npy").unlink()
    for item in problems:
        digest.update(f"{item.id}|{item.split}\n".encode())
    meta = {
        "store": str(store.path),
        "scorer": scorer,
        "grader": grader,
        "max_escalations": process.get("max_escalations"),
        "max_steps": process["limits"]["max_steps"],
        "splitting": process.get("splitting") or BLANK_LINE.described(),
        "small": process["small"]["model"],
        "large": process["large"]["model"],
        "left_out_trees": counts.without_score,
        "orphans": counts.orphans,
        "unclaimed_rows": counts.unclaimed,
        "hash": digest.hexdigest(),
    }
    _describe(folder, problems, signals.names, meta)


def _refuse(store: Store, counts: _Counts, scorer: str, grader: str, trees: int) -> None:
    if counts.unscored:
        remedy = score_command(store.path, store.scored_by(scorer)[0])
        raise StoreError(f"{store.path}: {counts.unscored} proposals have no score by {scorer!r} yet. Run `{remedy}` "
                         "with its --models, and with --give-up if asking about them always fails.")  # fmt: skip
    if counts.not_numbers:
        raise StoreError(f"{store.path}: {counts.not_numbers} scores by {scorer!r} are not in [0, 1] (NaN counts as "
                         "such). Delete that score table and run `python -m rollouts score` again.")  # fmt: skip
    if counts.ungraded:
        raise StoreError(f"{store.path}: {counts.ungraded} solutions have no grade by {grader!r} yet. "
                         f"Run `python -m rollouts grade {shlex.quote(str(store.path))}`.")  # fmt: skip
    if counts.incomplete:
        raise StoreError(
            f"{store.path}: {counts.incomplete} trees are incomplete (not closed under at most "
            f"K = {store.manifest['process'].get('max_escalations')} escalations). Run the same `generate` again."
        )
    if not trees:
        raise StoreError(f"{store.path}: no trees yet. Run `python -m rollouts generate`.")


class _Part:
    """Trees on their way to the disk.

    Attributes:
        trees: Trees so far, those that were written included.
        nodes: Rows of `_PER_NODE` that were not written yet.
    """

    def __init__(self) -> None:
        """Begin before the first tree."""
        self.trees = 0
        self.nodes: list[tuple[Any, ...]] = []
        self._actions: list[tuple[Any, ...]] = []  # rows of `_PER_ACTION`: small, large, small, ...
        self._roots: list[tuple[int, int, int]] = []
        self._told: list[list[float]] = []  # signals of each action
        self._text = bytearray()
        self._rows, self._bytes = 0, 0  # that were written

    def write(self, arrays: _Arrays, signals: Sequence[str]) -> None:
        """Append all to arrays and let go of it."""
        per_action = np.array(self._actions, _PER_ACTION).reshape(-1, len(ROLES))
        for table in (per_action, np.array(self.nodes, _PER_NODE), np.array(self._roots, _PER_TREE)):
            for name in table.dtype.names or ():
                arrays.append(name, table[name])
        told = np.array(self._told, np.float32).reshape(-1, len(ROLES), len(signals))
        for number in range(len(signals)):
            arrays.append(f"signal-{number}", told[..., number])
        arrays.append("text", np.frombuffer(self._text, np.uint8))
        self._rows += len(self.nodes)
        self._bytes += len(self._text)
        self.nodes, self._actions, self._roots, self._told, self._text = [], [], [], [], bytearray()

    def add(self, tree: RolloutTree, problem: int, signals: Signals, tables: Sequence[Rows], counts: _Counts) -> None:
        """Take a tree, unless it cannot be used."""
        grades, *labels = tables
        counts.orphans += tree.orphans
        keys = [tree.row_key(*place[1:]) for place in tree.places()]
        counts.unclaimed += sum(rows.unclaimed(tree.key, keys) for rows in (*signals.tables.values(), grades))
        first, written = self._rows + len(self.nodes), self._bytes + len(self._text)
        row_of = {key: first + offset for offset, key in enumerate(tree.nodes)}
        before = {tree.root.key: (1.0, 1.0)}  # least and product of the scores of the accepted steps
        actions: list[tuple[Any, ...]] = []
        nodes: list[tuple[Any, ...]] = []
        text = bytearray()
        told: list[list[float]] = []
        for node in tree.nodes.values():
            least, product = before[node.key]
            nodes.append((self.trees, len(node.steps), node.used_tokens, least, product))
            for role in ROLES:
                step = node.proposals.get(role)
                if step is None:
                    actions.append((*_ABSENT, written + len(text)))
                    told.append(signals.absent)
                    continue
                key = tree.row_key(node, role)
                score, values = signals.of((tree, node, role))
                told.append(values)
                terminal = step.terminal
                grade = grades.get(key, ...) if terminal else -1
                counts.ungraded += grade is ...
                if score is None:
                    counts.without_score += 1
                    return
                counts.unscored += score is ...
                score, grade = (0.0 if score is ... else score), (0 if grade is ... else grade)
                counts.not_numbers += not 0.0 <= score <= 1.0
                label = labels[0].get(key) if labels else None
                child = TERMINAL
                if not terminal:
                    child_key = node.after[role]
                    child = row_of[child_key]
                    before.setdefault(child_key, (min(least, score), product * score))
                text += step.text.encode("utf-8", "replace")
                actions.append(
                    (
                        child,
                        step.tokens,
                        node.accepted_tokens(role),
                        step.prompt_tokens,
                        score,
                        grade,
                        _REASONS[step.stop_reason],
                        step.has_answer,
                        -1 if label is None else label,
                        written + len(text),
                    )
                )
        self._roots.append((first, problem, tree.replica))
        self.trees += 1
        self.nodes += nodes
        self._actions += actions
        self._told += told
        self._text += text
