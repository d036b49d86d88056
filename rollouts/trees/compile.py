"""Compiling a rollout store into flat arrays, cached beside it under the hash of its content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollouts.errors import StoreError
from rollouts.store.shards import KEY, Table
from rollouts.store.store import Store
from rollouts.tasks.answers import has_answer
from rollouts.tasks.problems import Problem
from rollouts.text.steps import ROLES
from rollouts.trees.arrays import MISSING, STOP_REASONS, TERMINAL, Trees
from rollouts.trees.grow import load_trees
from rollouts.trees.tree import Node, RolloutTree

_FORMAT = 2  # of the compiled files

_PER_ACTION: dict[str, Any] = {
    "child": np.int32,
    "tokens": np.int32,
    "accepted_tokens": np.int32,
    "prompt_tokens": np.int32,
    "score": np.float32,
    "correct": np.int8,
    "stop_reason": np.int8,
    "has_answer": np.bool_,
    "label": np.int8,
}
_PER_NODE: dict[str, Any] = {
    "tree": np.int32,
    "depth": np.int16,
    "prefix_tokens": np.int32,
    "min_score": np.float32,
    "product_score": np.float32,
}
_ARRAYS = (*_PER_ACTION, *_PER_NODE, "root", "problem", "replica", "splits", "text", "text_end")


def compile_store(
    store: Store | str | Path,
    scorer: str | None = None,
    grader: str | None = None,
    *,
    cache: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> Trees:
    """Compile a store, or load what was compiled from the same content before.

    Args:
        store: The store or its path.
        scorer: Score table; may be left out if there is one only.
        grader: Grade table; likewise.
        cache: Keep the arrays beside the store (or, where that cannot be written, in the user's cache folder).
        on_progress: Called with the number of trees compiled since the last call.

    Raises:
        StoreError: No scores or grades, some are missing, a damaged shard, or trees that are not closed.
    """
    store = store if isinstance(store, Store) else Store(store)
    scorer, grader = store.choose("scores", scorer), store.choose("grades", grader)
    key = _cache_key(store, scorer, grader)
    if cache:
        for parent in _cache_parents(store):
            if (parent / key / "meta.json").is_file():
                return _load(parent / key)
    trees = _compile(store, scorer, grader, on_progress)
    if cache:
        for parent in _cache_parents(store):
            try:
                _save(trees, parent, key)
            except OSError:
                continue
            return _load(parent / key)
    return trees


def _cache_parents(store: Store) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return [store.path / ".compiled", home / "trim-routing" / "compiled"]


def _cache_key(store: Store, scorer: str, grader: str) -> str:
    digest = hashlib.blake2b(f"{_FORMAT}|{scorer}|{grader}".encode(), digest_size=12)
    digest.update(json.dumps(store.manifest["process"], sort_keys=True).encode())
    files = [store.path / "problems.parquet", *store.steps.shards()]
    files += [*store.scores(scorer).shards(), *store.grades(grader).shards()]
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()


def _save(trees: Trees, parent: Path, key: str) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=parent))
    try:
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(trees, name))
        text = json.dumps({"problem_ids": trees.problem_ids, "questions": trees.questions, "meta": trees.meta})
        (temporary / "meta.json").write_text(text, encoding="utf-8")
        if (parent / key).exists():
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, parent / key)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (parent / key / "meta.json").is_file():  # another process may have been first
            raise
    for old in parent.iterdir():
        if old.name != key and not old.name.startswith("."):
            shutil.rmtree(old, ignore_errors=True)


def _load(directory: Path) -> Trees:
    described = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    arrays: dict[str, Any] = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    ids, questions = tuple(described["problem_ids"]), tuple(described["questions"])
    return Trees(**arrays, problem_ids=ids, questions=questions, meta=described["meta"])


class _Annotations:
    """Scores and grades of a chunk of problems, by (problem, replica, prefix, role)."""

    def __init__(self, table: Table, column: str, problems: Iterable[str]) -> None:
        self._values: dict[tuple[Any, ...], Any] = {}
        for part in table.read(set(problems), [*KEY, column]):
            keys = zip(*(part[name].to_pylist() for name in KEY), strict=True)
            for key, value in zip(keys, part[column].to_pylist(), strict=True):
                self._values.setdefault(key, value)

    def of(self, tree: RolloutTree, node: Node, role: str) -> Any:
        """Return the value, or Ellipsis if there is no row."""
        return self._values.get((tree.problem.id, tree.replica, node.key, role), ...)


@dataclass
class _Counts:
    incomplete: int = 0
    unscored: int = 0
    ungraded: int = 0
    not_numbers: int = 0
    without_score: int = 0  # trees left out because an input exceeded the scorer's window
    orphans: int = 0


def _compile(store: Store, scorer: str, grader: str, on_progress: Callable[[int], None] | None) -> Trees:
    problems = store.problems()
    counts = _Counts()
    columns: dict[str, list[Any]] = {name: [] for name in (*_PER_ACTION, *_PER_NODE)}
    texts = _Texts()
    roots: list[tuple[int, int, int]] = []
    labels = _labels(store)
    for start in range(0, len(problems), 256):
        part = problems[start : start + 256]
        ids = [problem.id for problem in part]
        scores = _Annotations(store.scores(scorer), "score", ids)
        grades = _Annotations(store.grades(grader), "correct", ids)
        positions = {problem.id: start + offset for offset, problem in enumerate(part)}
        chunk_labels = _Annotations(store.steps, "label", ids) if labels else None
        for tree in load_trees(store, part, None, store.manifest["process"].get("max_escalations"), chunk=256):
            first = len(columns["tree"])
            if _append_tree(columns, len(roots), first, tree, scores, grades, chunk_labels, counts):
                texts.add(tree)
                roots.append((first, positions[tree.problem.id], tree.replica))
            if on_progress:
                on_progress(1)
    _refuse(store, counts, scorer, grader, len(roots))
    return _assemble(store, scorer, grader, columns, texts, roots, problems, counts)


class _Texts:
    """The proposals of trees one after another, and where each ends."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends: list[tuple[int, ...]] = []

    def add(self, tree: RolloutTree) -> None:
        for node in tree.nodes.values():
            ends = []
            for role in ROLES:
                if role in node.proposals:
                    self.data += node.proposals[role].text.encode("utf-8", "replace")
                ends.append(len(self.data))
            self.ends.append(tuple(ends))


def _labels(store: Store) -> bool:
    return bool(store.manifest["process"].get("labels"))


def _refuse(store: Store, counts: _Counts, scorer: str, grader: str, trees: int) -> None:
    if counts.unscored:
        raise StoreError(f"{store.path}: {counts.unscored} proposals have no score by {scorer!r} yet. "
                         f"Run `python -m rollouts score {store.path}`.")  # fmt: skip
    if counts.not_numbers:
        raise StoreError(f"{store.path}: {counts.not_numbers} scores by {scorer!r} are not in [0, 1] (NaN counts as "
                         "such). Delete that score table and run `python -m rollouts score` again.")  # fmt: skip
    if counts.ungraded:
        raise StoreError(f"{store.path}: {counts.ungraded} solutions have no grade by {grader!r} yet. "
                         f"Run `python -m rollouts grade {store.path}`.")  # fmt: skip
    if counts.incomplete:
        raise StoreError(
            f"{store.path}: {counts.incomplete} trees are incomplete (not closed under at most "
            f"K = {store.manifest['process'].get('max_escalations')} escalations). Run the same `generate` again."
        )
    if not trees:
        raise StoreError(f"{store.path}: no trees yet. Run `python -m rollouts generate`.")


def _append_tree(
    columns: dict[str, list[Any]],
    index: int,
    first: int,
    tree: RolloutTree,
    scores: _Annotations,
    grades: _Annotations,
    labels: _Annotations | None,
    counts: _Counts,
) -> bool:
    """Append a tree's nodes to the columns; return False, leaving them as they were, if it cannot be used."""
    counts.orphans += tree.orphans
    counts.incomplete += tree.missing() > 0
    order = list(tree.nodes.values())  # insertion order: parents before children
    row_of = {node.key: first + offset for offset, node in enumerate(order)}
    prefix_scores: dict[int, tuple[float, float]] = {tree.root.key: (1.0, 1.0)}
    rows: dict[str, list[Any]] = {name: [] for name in columns}
    for node in order:
        cells: dict[str, list[Any]] = {name: [] for name in _PER_ACTION}
        for role in ROLES:
            step = node.proposals.get(role)
            if step is None:
                for name, value in _ABSENT.items():
                    cells[name].append(value)
                continue
            score, grade = scores.of(tree, node, role), grades.of(tree, node, role)
            if score is ... or (step.terminal and grade is ...):
                counts.unscored += score is ...
                counts.ungraded += step.terminal and grade is ...
                score, grade = (0.0 if score is ... else score), (False if grade is ... else grade)
            if score is not None and not 0.0 <= score <= 1.0:
                counts.not_numbers += 1
            if score is None:
                counts.without_score += 1
                return False
            label = labels.of(tree, node, role) if labels else None
            cells["child"].append(TERMINAL if step.terminal else row_of[node.child_key(step)])
            cells["tokens"].append(step.tokens)
            cells["accepted_tokens"].append(node.accepted_tokens(role))
            cells["prompt_tokens"].append(step.prompt_tokens)
            cells["score"].append(score)
            cells["correct"].append(int(grade) if step.terminal else -1)
            cells["stop_reason"].append(STOP_REASONS.index(step.stop_reason))
            cells["has_answer"].append(has_answer(step.text))
            cells["label"].append(-1 if label is None or label is ... else int(label))
            if not step.terminal:
                least, product = prefix_scores[node.key]
                child = node.child_key(step)
                prefix_scores.setdefault(child, (min(least, score), product * score))
        for name, values in cells.items():
            rows[name].append(values)
        least, product = prefix_scores[node.key]
        for name, value in zip(_PER_NODE, (index, len(node.steps), node.used_tokens, least, product), strict=True):
            rows[name].append(value)
    for name, values in rows.items():
        columns[name].extend(values)
    return True


_ABSENT: dict[str, Any] = {
    "child": MISSING,
    "tokens": 0,
    "accepted_tokens": 0,
    "prompt_tokens": 0,
    "score": np.nan,
    "correct": -1,
    "stop_reason": -1,
    "has_answer": False,
    "label": -1,
}


def _assemble(
    store: Store,
    scorer: str,
    grader: str,
    columns: dict[str, list[Any]],
    texts: _Texts,
    roots: Sequence[tuple[int, int, int]],
    problems: Sequence[Problem],
    counts: _Counts,
) -> Trees:
    arrays: dict[str, Any] = {name: np.asarray(columns[name], kind) for name, kind in _PER_ACTION.items()}
    arrays |= {name: np.asarray(columns[name], kind) for name, kind in _PER_NODE.items()}
    root, problem, replica = (np.asarray(column) for column in zip(*roots, strict=True))
    arrays |= {"root": root.astype(np.int32), "problem": problem.astype(np.int32), "replica": replica.astype(np.int16)}
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    for item in problems:
        digest.update(f"{item.id}|{item.split}\n".encode())
    process = store.manifest["process"]
    meta = {
        "store": str(store.path),
        "scorer": scorer,
        "grader": grader,
        "max_escalations": process.get("max_escalations"),
        "max_steps": process["limits"]["max_steps"],
        "small": process["small"]["model"],
        "large": process["large"]["model"],
        "left_out_trees": counts.without_score,
        "orphans": counts.orphans,
        "hash": digest.hexdigest(),
    }
    return Trees(
        **arrays,
        text=np.frombuffer(bytes(texts.data), np.uint8),
        text_end=np.asarray(texts.ends, np.int64),
        problem_ids=tuple(item.id for item in problems),
        questions=tuple(item.question for item in problems),
        splits=np.asarray([item.split for item in problems]),
        meta=meta,
    )
