"""Rows of one table by their key: those of the trees at hand, and new ones on their way to the disk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollouts.store.shards import CONTENT, GRADES, KEY, Table
from rollouts.text.steps import extend_hash

TreeKey = tuple[str, int]  # problem id, replica
RowKey = tuple[Any, ...]  # what joins a row to a proposal: its place (problem id, replica, prefix, role), its content
_FLUSH_SECONDS = 10.0


class Rows:
    """One column of a table for the trees that are at hand (`read`, `forget`), and new rows (`put`, `flush`).

    Of duplicate keys the first wins. Where a table has `CONTENT`, a row is found for a proposal of that text only: one
    that was made for another text at the same place is none.

    Attributes:
        table: The table.
        of_solutions: Whether only terminal proposals have rows.
        added: Rows put so far.
    """

    def __init__(
        self, table: Table, column: str | None = None, *, rows: int = 20_000, seconds: float = _FLUSH_SECONDS
    ) -> None:
        """Name the table.

        Args:
            table: The table.
            column: The column that is looked up; default: the first after the key.
            rows: New rows after which a shard is due.
            seconds: Seconds after which a shard is due.
        """
        self.table = table
        self.column = column or table.schema.names[len(table.key)]
        self.max_rows = rows
        self.max_seconds = seconds
        self.of_solutions = table.schema.equals(GRADES)
        self.added = 0
        self._values: dict[TreeKey, dict[RowKey, Any]] = {}
        self._new: list[dict[str, Any]] = []
        self._counters: Counter[str] = Counter()
        self._begun: tuple[Path, list[dict[str, Any]], Counter[str]] | None = None  # a shard that is being written
        self._last = time.monotonic()

    def read(self, trees: Collection[TreeKey]) -> None:
        """Take trees at hand, with the rows that the table has for them."""
        self._values.update((tree, {}) for tree in trees)
        for part in self.table.read({problem for problem, _ in trees}, [*self.table.key, self.column]):
            *columns, values = (part[name].to_pylist() for name in (*self.table.key, self.column))
            for key, value in zip(zip(*columns, strict=True), values, strict=True):
                if (held := self._values.get(key[:2])) is not None:
                    by_place = self.table.by_place and key[-1] is None
                    held.setdefault(key[: len(KEY)] if by_place else key, value)

    def forget(self, trees: Iterable[TreeKey]) -> None:
        """Let go of trees; their new rows still go to the disk."""
        for tree in trees:
            self._values.pop(tree, None)

    def __contains__(self, key: RowKey) -> bool:
        """Whether a tree at hand has a row for a proposal."""
        return self._found(key) in self._values[key[:2]]

    def __getitem__(self, key: RowKey) -> Any:
        """Return the value of a proposal of a tree at hand."""
        return self._values[key[:2]][self._found(key)]

    def get(self, key: RowKey, default: Any = None) -> Any:
        """Return the value of a proposal of a tree at hand, or a default if there is no row."""
        return self._values[key[:2]].get(self._found(key), default)

    def _found(self, key: RowKey) -> RowKey:
        """Return under what the value of a proposal of a tree at hand would be: its content, or its place alone."""
        return key if key in self._values[key[:2]] else key[: len(KEY)]

    def unclaimed(self, tree: TreeKey, keys: Iterable[RowKey]) -> int:
        """Return how many rows of a tree at hand belong to none of its proposals, whose keys are given."""
        return len(self._values[tree].keys() - {self._found(key) for key in keys})

    def put(self, key: RowKey, **values: Any) -> None:
        """Add a row, with the values of all columns beside its key; where there is one already, that one stays."""
        held = self._values.get(key[:2])
        if held is None or self._found(key) not in held:
            if held is not None:
                held[key] = values[self.column]
            self._new.append({CONTENT: None, **dict(zip((*KEY, CONTENT), key, strict=False)), **values})
            self.added += 1

    def count(self, counters: Mapping[str, int]) -> None:
        """Add to the counters of the next shard."""
        self._counters.update(counters)

    @property
    def due(self) -> bool:
        """Whether there are enough new rows for a shard, or enough time has passed."""
        return len(self._new) >= self.max_rows or time.monotonic() - self._last >= self.max_seconds

    def flush_if_due(self) -> None:
        """Write a shard if it is due."""
        if self.due:
            self.flush()

    def flush(self) -> None:
        """Write a shard if there is anything to write.

        After an interrupt the next call goes on from there: no row is lost, and none is written twice.
        """
        while self._begun or self._new:
            if self._begun is None:
                begun = (self.table.next_shard(), self._new, self._counters), [], Counter()  # type: ignore[var-annotated]
                self._begun, self._new, self._counters = begun
            path, rows, counters = self._begun
            if not path.exists():  # else it was written before the interrupt
                names = self.table.schema.names
                self.table.append({name: [row[name] for row in rows] for name in names}, counters, path)
            self._begun = None
        self._last = time.monotonic()

    def lacking(self, steps: Table, problems: Collection[str]) -> set[str]:
        """Return which of some problems have proposals without a row, orphaned ones included."""
        contents: dict[RowKey, int] = {}
        for part in steps.read(problems, [*KEY, "text", "terminal"]):
            part = part.filter(part["terminal"]) if self.of_solutions else part
            contents_of(part, contents)
        trees = {place[:2] for place in contents}
        self.read(trees)
        found = {place[0] for place, content in contents.items() if (*place, content) not in self}
        self.forget(trees)
        return found


def contents_of(steps: pa.Table, contents: dict[RowKey, int]) -> None:
    """Add the contents of steps by their place; of duplicates the first wins.

    Args:
        steps: Rows of the step table with `KEY` and ``text``.
        contents: Where to.
    """
    for *place, text in zip(*(steps[name].to_pylist() for name in (*KEY, "text")), strict=True):
        contents.setdefault(tuple(place), extend_hash(place[2], text))
