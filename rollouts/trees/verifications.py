"""A store's table of verifications: what the small model, asked several times, makes of what it wrote by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from rollouts.scoring.base import Failed
from rollouts.scoring.verification import UNSAMPLED, Verifier
from rollouts.store.rows import Rows
from rollouts.store.store import Store
from rollouts.text.steps import SMALL
from rollouts.trees.annotate import Report, ask_all
from rollouts.trees.grow import load_trees
from rollouts.trees.tree import Place, RolloutTree


def unverified(store: Store, rows: Rows) -> Iterator[Place]:
    """Yield the last small proposal of each tree's always-small path, where it has no row yet."""
    for tree in load_trees(store, store.problems(), None, None, along=[rows]):
        last = last_alone(tree)
        if last is not None and tree.row_key(*last[1:]) not in rows:
            yield last


def last_alone(tree: RolloutTree) -> Place | None:
    """Return the proposal that ends what the small model writes alone; None while that is not there."""
    node = tree.root
    while SMALL in node.proposals:
        if (child := tree.child(node, SMALL)) is None:
            return (tree, node, SMALL) if node.proposals[SMALL].terminal else None
        node = child
    return None


def verify_solutions(
    store: Store,
    verifier: Verifier,
    *,
    in_flight: int = 64,
    give_up: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Have every always-small solution verified that has not been yet; what is there is kept.

    Args:
        store: The store; its write lock must be held.
        verifier: Whom to ask.
        in_flight: Solutions under way at once.
        give_up: Put down no samples where asking fails, instead of nothing.
        on_progress: Called with 1 for every solution.

    Raises:
        BackendError: The model is gone; what came back before is kept.
    """
    table = store.attach("scores", verifier.name, verifier.process(), verifier.columns, verifier.roles)
    rows, report = Rows(table), Report()

    def ask(place: Place) -> Future[Any]:
        tree, node, role = place
        said = [tree.splitting.said(text) for text in (*node.steps, node.proposals[role].text)]
        return verifier.submit(tree.problem.question, "".join(said))

    def take(place: Place, found: Any) -> None:
        tree, node, role = place
        if isinstance(found, Failed):
            report.failed[found.reason] += 1
            found = UNSAMPLED if give_up else None
        if found is not None:
            rows.put_value(tree.row_key(node, role), tuple(map(float, found)))
            rows.flush_if_due()
        if on_progress:
            on_progress(1)

    try:
        ask_all(unverified(store, rows), ask, take, in_flight)
    finally:
        rows.flush()
    report.rows = rows.added
    return report
