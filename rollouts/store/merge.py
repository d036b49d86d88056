"""Two stores of one process become one: what one lacks of the other is copied, a part at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollouts.errors import StoreError
from rollouts.store.rows import RowKey, contents_of
from rollouts.store.shards import CONTENT, KEY, Table, batched, plain, values_of, with_contents
from rollouts.store.store import Store

_TOGETHER = 1000  # problems that are compared at once
_TAKEN = "merged"  # in the manifest, by store: how many of its engine starts were taken, and of each table its counters


def merge(store: Store, other: Store) -> dict[str, int]:
    """Add to a store what another one holds; where both have a row of one key, the former's stays.

    Of every table all new rows are one shard, with what the other's counters have become since it was merged last, so
    that the same call goes on after an interrupt. Engine starts come with numbers above those that are there. Splits in
    folders within stores are left out.

    Args:
        store: The store; its write lock must be held.
        other: The other; it is not changed.

    Returns:
        Rows added, by table.

    Raises:
        StoreError: They, or tables of one name, were made by different processes, or problems of one id differ; what
            differs is named, and nothing was changed.
    """
    if store.path.resolve() == other.path.resolve():
        raise StoreError(f"{store.path}: a store cannot be merged into itself.")
    store.refuse_unlike(other)
    tables = {(kind, name): name in store.names(kind) for kind in ("scores", "grades") for name in other.names(kind)}
    _attach(store, other, [table for table, there in tables.items() if there])
    store.add_problems(other.problems())
    for role, model in other.manifest.get("identities", {}).items():
        store.identify(role, model)
    _attach(store, other, [table for table, there in tables.items() if not there])
    trees = store.steps.keys({problem for problem, _ in other.live})
    closed = set(values_of(trees, KEY[:2])) - store.live
    store.note_live(other.live - closed)
    which = f"{other.manifest.get('id', '')} {other.path.resolve()}"  # copies have one id; earlier versions gave none
    taken = store.manifest.setdefault(_TAKEN, {}).setdefault(which, {})
    own, theirs = ({_name(table, each): table for table in each.tables()} for each in (store, other))
    added = {name: _add(store, own[name], other, table, taken) for name, table in theirs.items()}  # steps first
    store.note()
    return added


def _name(table: Table, store: Store) -> str:
    return table.directory.relative_to(store.path).as_posix()


def _attach(store: Store, other: Store, tables: Iterable[tuple[str, str]]) -> None:
    for kind, name in tables:
        manifest = other.table_manifest(kind, name)
        shape = {part: manifest[part] for part in ("columns", "roles") if part in manifest}
        store.attach(kind, name, {**manifest["process"], "identities": manifest.get("identities", {})}, **shape)


def _add(store: Store, own: Table, other: Store, theirs: Table, taken: dict[str, Any]) -> int:
    """Add the rows of a table that lack there, as one shard; return how many."""
    parts = (part for part in _lacking(own, other, theirs) if part.num_rows)
    name, counters, rows = _name(own, store), theirs.counters(), 0

    def counted() -> Iterator[pa.Table]:
        nonlocal rows
        for part in chain([first], parts):
            rows += part.num_rows
            yield from own.in_groups(part)

    if (first := next(parts, None)) is not None:
        if own is store.steps:
            _take_engines(store, other, taken)
        before = taken.get(name, {})
        grown = {each: max(0, count - before.get(each, 0)) for each, count in counters.items()}
        own.write(counted(), grown, own.next_shard())
    taken[name] = counters
    return rows


def _take_engines(store: Store, other: Store, taken: dict[str, Any]) -> None:
    """Add the engine starts of another store that were not taken yet; no two share a number."""
    engines = other.manifest["engines"]
    if new := engines[taken.get("engines", 0) :]:
        taken["engines"] = len(engines)
        numbered = [{**each, "start": start} for start, each in enumerate(new, store.next_start())]
        store.note(engines=[*store.manifest["engines"], *numbered])


def _lacking(own: Table, other: Store, theirs: Table) -> Iterator[pa.Table]:
    """Yield the rows that a table has and the other's own lacks, each once, with `CONTENT`."""
    for problems in batched(theirs.problems(), _TOGETHER):
        table = pa.concat_tables(plain(part) for part in theirs.read(problems))
        if CONTENT in theirs.key:
            contents: dict[RowKey, int] = {}
            for part in other.steps.read(problems, (*KEY, "text")) if theirs.by_place else ():
                contents_of(part, contents)
            table = with_contents(table, contents)
            table = table.filter(pc.is_valid(table[CONTENT]))
        held = set(values_of(own.keys(problems), own.key))
        new = []
        for key in values_of(table, own.key):
            new.append(held.isdisjoint((key, (*key[: len(KEY)], None))))
            held.add(key)
        yield table.filter(pa.array(new, pa.bool_()))
