"""Walking trees with a router and generating, batch by batch, exactly what it reaches and the store lacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.models.stepwise import StepWriter
from rollouts.scoring.base import Scorer
from rollouts.store.store import Store
from rollouts.tasks.answers import has_answer
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.grow import load_trees
from rollouts.trees.live import LiveTrees
from rollouts.trees.tree import Node, RolloutTree

FEATURES = (
    "score",  # of the small model's proposal
    "min_score",  # least score of the accepted steps, 1 at the start
    "product_score",  # product of the scores of the accepted steps, 1 at the start
    "tokens",  # of the proposal
    "step",  # 1 for the first
    "terminal",  # whether accepting the proposal would end the episode
    "has_answer",  # whether the proposal states a final answer
    "escalations",  # so far in this episode
    "large_tokens",  # so far in this episode
)
Router = Callable[[NDArray[np.float64]], NDArray[Any]]  # (n, len(FEATURES)) -> (n,) of 0 and 1


@dataclass(slots=True, eq=False)
class Episode:
    """One walk through a tree.

    Attributes:
        tree: The tree.
        node: Where it stands; None when it has ended.
        last: The proposal that was accepted last, (node, role); None at the start.
        min_score: Least score of the accepted steps that `observe` has seen.
        product_score: Product of their scores.
        escalations: Escalations so far.
        large_tokens: Tokens of the accepted large steps.
    """

    tree: RolloutTree
    node: Node | None
    last: tuple[Node, str] | None = None
    min_score: float = 1.0
    product_score: float = 1.0
    escalations: int = 0
    large_tokens: int = 0


def observe(live: LiveTrees, episodes: Sequence[Episode]) -> NDArray[np.float64]:
    """Make sure that episodes have a scored small proposal, asking for all misses at once.

    To be called once between two decisions.

    Args:
        live: The trees.
        episodes: n running episodes.

    Returns:
        What a router sees, (n, len(FEATURES)).
    """
    running = [(episode, episode.node) for episode in episodes if episode.node is not None]
    proposals = [(episode.tree, node, SMALL) for episode, node in running]
    accepted = [(episode.tree, *episode.last) if episode.last else None for episode, _ in running]
    live.propose(proposals)
    scores = live.score([*filter(None, accepted), *proposals])
    before = iter(scores)
    for (episode, _), place in zip(running, accepted, strict=True):
        if place is not None:
            score = next(before)
            episode.min_score = min(episode.min_score, score)
            episode.product_score *= score
    rows = []
    for (episode, node), score in zip(running, before, strict=True):
        step = node.proposals[SMALL]
        rows.append(
            (
                score,
                episode.min_score,
                episode.product_score,
                step.tokens,
                len(node.steps) + 1,
                step.terminal,
                has_answer(step.text),
                episode.escalations,
                episode.large_tokens,
            )
        )
    return np.asarray(rows, np.float64).reshape(len(rows), len(FEATURES))


def act(live: LiveTrees, episodes: Sequence[Episode], actions: NDArray[Any]) -> None:
    """Take one decision, (n,) of 0 and 1, in n running episodes, asking for all large proposals that miss at once."""
    taken = [
        (episode, episode.node, ROLES[action])
        for episode, action in zip(episodes, actions.astype(int).tolist(), strict=True)
        if episode.node is not None
    ]
    live.propose((episode.tree, node, role) for episode, node, role in taken)
    for episode, node, role in taken:
        if role == LARGE:
            episode.escalations += 1
            episode.large_tokens += node.proposals[LARGE].tokens
        episode.last = (node, role)
        episode.node = episode.tree.child(node, role)


def expand_on_policy(
    store: Store,
    writers: Mapping[str, StepWriter],
    scorer: Scorer,
    router: Router,
    problems: Sequence[Problem],
    replicas: int | Mapping[str, int] | None = None,
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
        router: From features (`FEATURES`) to actions; decides by what it could see, never by correctness.
        problems: Problems to walk.
        replicas: Replicas to walk; default those that the store has.
        episodes: Walks per tree; more than 1 for routers that draw at random.
        batch: Trees walked together.
        labeller: Exact labels of steps, where the problems have them.
        on_progress: Called with the number of trees walked since the last call.

    Returns:
        Steps generated.
    """
    live = LiveTrees(store, writers, scorer, labeller=labeller)
    source = iter(load_trees(store, problems, replicas, store.manifest["process"]["max_escalations"], chunk=batch))
    try:
        while trees := list(islice(source, batch)):
            live.add(trees)
            for _ in range(episodes):
                running = [Episode(tree, tree.root) for tree in trees]
                while running:
                    act(live, running, np.asarray(router(observe(live, running))))
                    running = [episode for episode in running if episode.node is not None]
            live.score(())  # of last steps
            live.forget(0)
            if on_progress:
                on_progress(len(trees))
    finally:
        live.flush()
    return live.generated


def load_router(spec: str, seed: int = 0) -> Router:
    """Return a router by name: ``threshold:0.5``, ``random:0.3``, or ``module:function`` of your own.

    Raises:
        ConfigError: No such router.
    """
    kind, _, argument = spec.partition(":")
    try:
        if kind == "threshold":
            level = float(argument)
            return lambda rows: rows[:, 0] < level
        if kind == "random":
            rate, generator = float(argument), np.random.default_rng(seed)
            return lambda rows: generator.random(len(rows)) < rate
    except ValueError as error:
        raise ConfigError(f"--router {spec!r}: expected a number after the colon.") from error
    try:
        router = getattr(importlib.import_module(kind), argument)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--router {spec!r}: {error}.{did_you_mean(kind, ['threshold', 'random'])}") from error
    return router  # type: ignore[no-any-return]
