"""The score tables of a store side by side: which columns there are, and what they say of a proposal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rollouts.store.rows import Rows
from rollouts.text.likelihood import STATISTICS, UNSCORED, WORTHLESS, as_score
from rollouts.trees.tree import Node, Place, RolloutTree


class Signals:
    """Score tables for the trees that are at hand, one of which gives the score.

    Attributes:
        names: ``TABLE.COLUMN`` of all columns.
        tables: The tables' rows, by name.
        place: Of the score's column among the names.
    """

    def __init__(self, tables: Sequence[Rows], scorer: tuple[str, str]) -> None:
        """Take tables, and the names of table and column that the score comes from (`Store.scored_by`)."""
        self.tables = {rows.table.directory.name: rows for rows in tables}
        self.names = [f"{name}.{column}" for name, rows in self.tables.items() for column in rows.columns]
        self.absent = [math.nan] * len(self.names)
        main, self._column = scorer
        self.place, self._main = self.names.index(f"{main}.{self._column}"), self.tables[main]

    def of(self, place: Place) -> tuple[Any, list[float]]:
        """Return the score of a proposal, None if it can have none, ``...`` if it lacks one, and its columns' values.

        Values that are not known are NaN.
        """
        tree, node, role = place
        key = tree.row_key(node, role)
        found: list[float] = []
        for rows in self.tables.values():
            if (value := rows.get(key)) is None:
                value = _from_text(rows, tree, node, role)
            if isinstance(value, tuple):
                found += [math.nan if each is None else each for each in value]
            else:
                found += [math.nan if value is None else value] * len(rows.columns)
        if math.isnan(found[self.place]) and (row := self._main.get(key, ...)) in (None, ...):
            return row if role in self._main.table.roles else UNSCORED, found
        score = as_score(self._column, found[self.place])
        assert score is not None  # `Store.scored_by` sees to it
        return float(np.float32(score)), found


def _from_text(rows: Rows, tree: RolloutTree, node: Node, role: str) -> Any:
    """Return the value of a proposal by its text: where the other model wrote the same, or there is none at all."""
    if rows.columns == STATISTICS and role in rows.table.roles and not node.proposals[role].text:
        return WORTHLESS
    values = (rows.get(tree.row_key(node, same)) for same in node.twins(role) if same != role)
    return next(values, None)
