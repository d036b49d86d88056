"""A store with a few problems of the bundled rollouts: real trees of the embedded family, without any model."""

from __future__ import annotations

from rollouts.store.store import Store


def bundled_part(path, scores=True, **counts) -> Store:
    """`counts` are problems by split; without `scores` it is a store of somebody who has no reward model."""
    whole = Store("quickstart")
    part = Store.create(path, whole.manifest["process"])
    problems = [item for split, count in counts.items() for item in whole.problems(split)[:count]]
    part.add_problems(problems)
    pairs = [(whole.steps, part.steps)]
    for kind in ("scores", "grades") if scores else ("grades",):
        for name in whole.names(kind):
            process = whole.table_manifest(kind, name)["process"]
            source = whole.scores(name) if kind == "scores" else whole.grades(name)
            pairs.append((source, part.attach(kind, name, process)))
    for source, target in pairs:
        for table in source.read({item.id for item in problems}):
            rows = {name: table[name].to_pylist() for name in table.schema.names}
            empty = [None] * table.num_rows
            target.append({name: rows.get(name, empty) for name in target.schema.names}, {}, target.next_shard())
    return part
