"""Walking trees with a router and generating, batch by batch, exactly what it reaches and the store lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, StoreError, did_you_mean
from rollouts.models.stepwise import StepWriter
from rollouts.plugins import is_plugin, load_plugin
from rollouts.scoring.base import Scorer
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE, ROLES, SMALL, Step
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, actions_of
from rollouts.trees.columns import FOLDS, Columns, Folded, facts_of
from rollouts.trees.grow import load_trees
from rollouts.trees.live import LiveTrees
from rollouts.trees.tree import Node, Place, RolloutTree

Router = Callable[[Columns], NDArray[Any]]  # (n,) columns by name, as `observe` returns them -> (n,) of 0 and 1


@dataclass(slots=True, eq=False)
class Episode:
    """One walk through a tree.

    Attributes:
        node: Where it stands; None when it has ended.
        last: The proposal that was accepted last, (node, role); None at the start.
        folded: Folds over the accepted steps that `observe` has seen.
        large_tokens: Tokens of the accepted large steps.
    """

    tree: RolloutTree
    node: Node | None
    last: tuple[Node, str] | None = None
    folded: Folded = field(default_factory=lambda: Folded(FOLDS.values()))
    escalations: int = 0
    large_tokens: int = 0


def observe(live: LiveTrees, episodes: Sequence[Episode]) -> dict[str, Any]:
    """Make sure that episodes have a scored small proposal, asking for all misses at once.

    To be called once between two decisions.

    Args:
        live: The trees.
        episodes: n running episodes, at least one, with the same folds.

    Returns:
        What a router sees: arrays of shape (n,) by name (`rollouts.trees.columns`), of score tables' columns NaN where
        they are not known, and ``escalations`` and ``large_tokens`` so far.

    Raises:
        StoreError: A step has no score; a compiled store leaves such trees out (`leave_out_unscored`).
    """
    running = [(episode, episode.node) for episode in episodes if episode.node is not None]
    proposals = [(episode.tree, node, SMALL) for episode, node in running]
    accepted = [(episode.tree, *episode.last) if episode.last else None for episode, _ in running]
    live.propose(proposals)
    places = [*filter(None, accepted), *proposals]
    known = iter(_there(live, places))
    for (episode, _), place in zip(running, accepted, strict=True):
        if place is not None:
            _, before, role = place
            score, signals = next(known)
            episode.folded.add(facts_of(_as_accepted(before, role), score) | signals)
    rows = []
    for (episode, node), (score, signals) in zip(running, known, strict=True):
        row = {**facts_of(_as_accepted(node, SMALL), score), **signals, "step": len(node.steps) + 1}
        episode.folded.tell(row)
        rows.append(row | {"escalations": episode.escalations, "large_tokens": episode.large_tokens})
    columns: dict[str, Any] = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    return columns | {"max_steps": int(live.store.manifest["process"]["limits"]["max_steps"])}


def _there(live: LiveTrees, places: Sequence[Place]) -> list[tuple[float, dict[str, float]]]:
    known = []
    for (tree, node, _), (score, signals) in zip(places, live.signals(places), strict=True):
        if score is None:
            raise StoreError(f"{live.store.path}: step {len(node.steps) + 1} of problem {tree.problem.id!r}, replica "
                             f"{tree.replica}, has no score by {live.scorer.name!r}: its input exceeds the scorer's "
                             "window. Raise max_length of the scorer, or leave the problem out.")  # fmt: skip
        known.append((score, signals))
    return known


def leave_out_unscored(live: LiveTrees, episodes: Sequence[Episode]) -> list[Episode]:
    """Return the running episodes whose last step and small proposal have scores, asking for all misses at once."""
    running = [(episode, episode.node) for episode in episodes if episode.node is not None]
    wanted = {
        episode: [(episode.tree, node, SMALL), *([(episode.tree, *episode.last)] if episode.last else [])]
        for episode, node in running
    }
    live.propose(places[0] for places in wanted.values())
    live.score(chain.from_iterable(wanted.values()))
    return [episode for episode, places in wanted.items() if None not in live.score(places)]


def _as_accepted(node: Node, role: str) -> Step:
    """Return a proposal with its tokens as features count those of accepted steps."""
    return replace(node.proposals[role], tokens=node.accepted_tokens(role))


def act(live: LiveTrees, episodes: Sequence[Episode], actions: NDArray[Any]) -> None:
    """Take one decision, (n,) of 0 and 1, in n running episodes, asking for all large proposals that miss at once."""
    taken = [
        (episode, episode.node, ROLES[action])
        for episode, action in zip(episodes, actions.astype(int).tolist(), strict=True)
        if episode.node is not None
    ]
    live.propose((episode.tree, node, role) for episode, node, role in taken)
    for episode, node, role in taken:
        episode.escalations += role == LARGE
        if role == LARGE or episode.tree.author(node) == LARGE:
            episode.large_tokens += node.proposals[LARGE].tokens
        episode.last = (node, role)
        episode.node = episode.tree.child(node, role)


def expand_on_policy(
    store: Store,
    writers: Mapping[str, StepWriter],
    scorer: Scorer,
    router: Router,
    problems: Sequence[Problem],
    *,
    episodes: int = 1,
    batch: int = 128,
    labeller: Any = None,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Add to a store the nodes that a router reaches, beyond what closure asks for.

    Args:
        store: The store; its write lock must be held.
        writers: Both models.
        scorer: The scorer; its table gets the new scores.
        router: From named columns (see `observe`) to actions; decides by what it could see, never by correctness.
        problems: Problems to walk.
        episodes: Walks per tree; more than 1 for routers that draw at random.
        batch: Trees walked together.
        labeller: Exact labels of steps, where the problems have them.
        on_progress: Called with the number of trees walked since the last call.

    Returns:
        Steps generated.
    """
    live = LiveTrees(store, writers, scorer, labeller=labeller)
    source = iter(load_trees(store, problems, None, store.manifest["process"]["max_escalations"], chunk=batch))
    try:
        while trees := list(islice(source, batch)):
            live.add(trees)
            for _ in range(episodes):
                running = leave_out_unscored(live, [Episode(tree, tree.root) for tree in trees])
                while running:
                    act(live, running, _asked(router(observe(live, running)), len(running)))
                    running = leave_out_unscored(live, running)
            live.score(())  # of last steps
            live.forget(0)
            if on_progress:
                on_progress(len(trees))
    finally:
        live.flush()
    return live.generated.steps


def _asked(given: Any, count: int) -> NDArray[np.int64]:
    """Return what a router of somebody's own gave if that is an action for each episode."""
    actions = actions_of(given)
    if actions.shape != (count,) or not np.isin(actions, (CONTINUE_SMALL, ESCALATE_LARGE)).all():
        raise ConfigError(f"The router gave {given!r:.80} for {count} decisions, expected 0 or 1 for each.")
    return actions


def load_router(spec: str, seed: int = 0) -> Router:
    """Return a router by name: ``threshold:0.5``, ``random:0.3``, or ``module:function`` of your own.

    Raises:
        ConfigError: No such router.
    """
    kind, _, argument = spec.partition(":")
    if kind not in ("threshold", "random"):
        if not is_plugin(spec):
            raise ConfigError(
                f"Unknown --router {spec!r}.{did_you_mean(kind, ['threshold', 'random', 'module:function'])}"
            )
        router: Router = load_plugin(spec, "--router")
        return router
    try:
        level = float(argument)
    except ValueError:
        level = np.nan
    if not np.isfinite(level) or (kind == "random" and not 0 <= level <= 1):
        raise ConfigError(f"--router {spec!r}: expected a number after the colon, of random a probability.")
    if kind == "threshold":
        return lambda columns: columns["score"] < level
    generator = np.random.default_rng(seed)
    return lambda columns: generator.random(len(columns["score"])) < level
