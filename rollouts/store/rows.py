"""Rows of one table by their key: those of the trees at hand, and new ones on their way to the disk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollouts.store.shards import CONTENT, GRADES, KEY, Table, values_of
from rollouts.text.steps import extend_hash

TreeKey = tuple[str, int]  # problem id, replica
_New = tuple[list[pa.Table], list[dict[str, Any]], Counter[str]]  # encoded rows, others, counters
RowKey = tuple[Any, ...]  # what joins a row to a proposal: its place (problem id, replica, prefix, role), its content
_FLUSH_SECONDS = 10.0


class Rows:
    """Values of a table for the trees that are at hand (`read`, `forget`), and new rows (`put`, `flush`).

    A value is that of one column, or a tuple of several, None where all are null. Of duplicate keys the first wins.
    Where a table has `CONTENT`, a row is found for a proposal of that text only: one that was made for another text at
    the same place is none.

    Attributes:
        columns: The columns that values are of.
        of_solutions: Whether only terminal proposals have rows.
        beside: Where the values of the steps of the role that the table is named after are looked up besides.
    """

    def __init__(
        self,
        table: Table,
        *columns: str,
        rows: int = 20_000,
        seconds: float = _FLUSH_SECONDS,
        beside: Rows | None = None,
    ) -> None:
        """Name the table.

        Args:
            table: The table.
            columns: The columns that values are of; default: those of the table.
            rows: New rows after which a shard is due.
            seconds: Seconds after which a shard is due.
            beside: See above.
        """
        self.table = table
        self.columns = columns or table.values
        self.beside = beside
        self.max_rows = rows
        self.max_seconds = seconds
        self.of_solutions = table.schema.equals(GRADES)
        self.added = 0
        self._values: dict[TreeKey, dict[RowKey, Any]] = {}
        self._new: list[dict[str, Any]] = []
        self._parts: list[pa.Table] = []  # new rows that came encoded
        self._counters: Counter[str] = Counter()
        self._begun: tuple[Path, _New] | None = None  # a shard that is being written
        self._last = time.monotonic()

    def read(self, trees: Collection[TreeKey]) -> None:
        """Take trees at hand, with the rows that the table has for them."""
        if self.beside is not None and (new := [tree for tree in trees if tree not in self.beside._values]):
            self.beside.read(new)
        self._values.update((tree, {}) for tree in trees)
        for part in self.table.read({problem for problem, _ in trees}, [*self.table.key, *self.columns]):
            values = map(self._plain, values_of(part, self.columns))
            for key, value in zip(values_of(part, self.table.key), values, strict=True):
                if (held := self._values.get(key[:2])) is not None:
                    by_place = self.table.by_place and key[-1] is None
                    held.setdefault(key[: len(KEY)] if by_place else key, value)

    def forget(self, trees: Iterable[TreeKey]) -> None:
        """Let go of trees; their new rows still go to the disk."""
        trees = tuple(trees)
        if self.beside is not None:
            self.beside.forget(trees)
        for tree in trees:
            self._values.pop(tree, None)

    def __contains__(self, key: RowKey) -> bool:
        """Whether a tree at hand has a row for a proposal."""
        return self._found(key) in self._values[key[:2]] or self._beside(key) is not None

    def __getitem__(self, key: RowKey) -> Any:
        """Return the value of a proposal of a tree at hand."""
        found = self.get(key, ...)
        if found is ...:
            raise KeyError(key)
        return found

    def get(self, key: RowKey, default: Any = None) -> Any:
        """Return the value of a proposal of a tree at hand, or a default if there is no row."""
        found = self._values[key[:2]].get(self._found(key), ...)
        if found is ...:
            found = self._beside(key)
            return default if found is None else found
        return found

    def _beside(self, key: RowKey) -> Any:
        own = self.beside is not None and key[3] == self.table.directory.name
        return self.beside.get(key) if own else None  # type: ignore[union-attr]

    def _found(self, key: RowKey) -> RowKey:
        """Return under what the value of a proposal of a tree at hand would be: its content, or its place alone."""
        return key if key in self._values[key[:2]] else key[: len(KEY)]

    def unclaimed(self, tree: TreeKey, keys: Iterable[RowKey]) -> int:
        """Return how many rows of a tree at hand belong to none of its proposals, whose keys are given."""
        return len(self._values[tree].keys() - {self._found(key) for key in keys})

    @staticmethod
    def _plain(values: tuple[Any, ...]) -> Any:
        return values[0] if len(values) == 1 else None if all(value is None for value in values) else values

    def put_value(self, key: RowKey, value: Any) -> None:
        """Add a row whose columns are those that values are of; where there is one already, that one stays."""
        values = value if isinstance(value, tuple) else (value,) * len(self.columns)
        self.put(key, **dict(zip(self.columns, values, strict=True)))

    def put(self, key: RowKey, **values: Any) -> None:
        """Add a row, with the values of all columns beside its key; where there is one already, that one stays."""
        held = self._values.get(key[:2])
        if held is None or self._found(key) not in held:
            if held is not None:
                held[key] = self._plain(tuple(values[name] for name in self.columns))
            self._new.append({CONTENT: None, **dict(zip((*KEY, CONTENT), key, strict=False)), **values})
            self.added += 1

    def receive(self, parts: Iterable[pa.Table], counters: Mapping[str, int]) -> None:
        """Add rows that somebody else has put and encoded (`taken`); they are not looked up."""
        for part in parts:
            self._parts.append(part)
            self.added += part.num_rows
        self.count(counters)

    def taken(self) -> tuple[list[pa.Table], Counter[str]]:
        """Return the new rows, encoded, and the counters, for whoever writes them."""
        new, self._parts, self._new, self._counters = self._unwritten, [], [], Counter()
        self._last = time.monotonic()
        return self._encoded(new), new[2]

    def count(self, counters: Mapping[str, int]) -> None:
        """Add to the counters of the next shard."""
        self._counters.update(counters)

    @property
    def due(self) -> bool:
        """Whether there are enough new rows for a shard, or enough time has passed."""
        rows = len(self._new) + sum(part.num_rows for part in self._parts)
        return rows >= self.max_rows or time.monotonic() - self._last >= self.max_seconds

    @property
    def _unwritten(self) -> _New:
        return self._parts, self._new, self._counters

    def _encoded(self, new: _New) -> list[pa.Table]:
        """Return new rows as one table, or none."""
        parts, rows, _ = new
        if rows:
            names = self.table.schema.names
            parts = [*parts, self.table.encode({name: [row[name] for row in rows] for name in names})]
        return [pa.concat_tables(parts).unify_dictionaries().combine_chunks()] if parts else []

    def flush_if_due(self) -> None:
        """Write a shard if it is due."""
        if self.due:
            self.flush()

    def flush(self) -> None:
        """Write a shard if there is anything to write.

        After an interrupt the next call goes on from there: no row is lost, and none is written twice.
        """
        while self._begun or self._new or self._parts:
            if self._begun is None:
                self._begun = self.table.next_shard(), self._unwritten
            path, new = self._begun
            if self._new is new[1]:  # else they were let go of before the interrupt
                self._parts, self._counters, self._new = [], Counter(), []
            if not path.exists():  # else it was written before the interrupt
                self.table.write(self._encoded(new), new[2], path)
            self._begun = None
        self._last = time.monotonic()

    def lacking(self, steps: Table, problems: Collection[str]) -> set[str]:
        """Return which of some problems have proposals without a row, orphaned ones included."""
        contents: dict[RowKey, int] = {}
        for part in steps.read(problems, [*KEY, "text", "terminal"]):
            part = part.filter(part["terminal"]) if self.of_solutions else part
            contents_of(part, contents)
        contents = {place: content for place, content in contents.items() if place[-1] in self.table.roles}
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
    for *place, text in values_of(steps, (*KEY, "text")):
        contents.setdefault(tuple(place), extend_hash(place[2], text))
