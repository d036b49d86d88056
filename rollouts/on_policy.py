"""Walking trees with a router and generating, batch by batch, exactly what it reaches and the store lacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.expand import StepBuffer, load_trees
from rollouts.grading import has_answer
from rollouts.models.stepwise import StepWriter
from rollouts.nodes import LARGE, ROLES, SMALL, Node, RolloutTree
from rollouts.problems import Problem
from rollouts.scoring.base import Scorer
from rollouts.shards import KEY, columns_of
from rollouts.store import Store

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
        scores: Scores of the accepted steps.
        escalations: Escalations so far.
        large_tokens: Tokens of the accepted large steps.
        small_tokens: Tokens of the small model's proposals, accepted or not.
        last: The terminal (node, role) when it has ended.
    """

    tree: RolloutTree
    node: Node | None
    scores: list[float] = field(default_factory=list)
    escalations: int = 0
    large_tokens: int = 0
    small_tokens: int = 0
    last: tuple[Node, str] | None = None


class LiveTrees:
    """Trees that generate and score what they lack; all misses of a call go out as one batch."""

    def __init__(self, writers: Mapping[str, StepWriter], scorer: Scorer, buffer: StepBuffer) -> None:
        """Name the models and where new steps go."""
        self.writers = writers
        self.scorer = scorer
        self.buffer = buffer
        self.generated = 0
        self.new_scores: list[dict[str, Any]] = []
        self._scores: dict[int, dict[tuple[int, str], float | None]] = {}

    def add(self, tree: RolloutTree, scores: Mapping[tuple[int, str], float | None]) -> None:
        """Take a tree, with the scores that the store has for it."""
        self._scores[id(tree)] = dict(scores)

    def drop(self, tree: RolloutTree) -> None:
        """Forget a tree."""
        del self._scores[id(tree)]

    def propose(self, places: Iterable[tuple[RolloutTree, Node, str]]) -> None:
        """Make sure that the proposals at some places exist."""
        asked = {}
        for tree, node, role in places:
            if role not in node.proposals:
                asked[id(tree), node.key, role] = (tree, node, role)
        futures = [
            (tree, node, role, self.writers[role].submit(tree.prefix(node), whole=role == SMALL))
            for tree, node, role in asked.values()
        ]
        for tree, node, role, future in futures:
            generation = future.result()
            new = tree.insert_path(node, role, generation.steps)
            self.buffer.add(tree, role, new, generation)
            self.generated += len(new)
        self.buffer.flush_if_due()

    def score(self, places: Sequence[tuple[RolloutTree, Node, str]]) -> list[float]:
        """Return the scores of existing proposals; 0 where the scorer has none (its window is exceeded)."""
        asked: dict[tuple[int, int, str], tuple[RolloutTree, list[tuple[Node, str]], Any]] = {}
        for tree, node, role in places:
            key = (id(tree), node.key, role)
            if (node.key, role) in self._scores[id(tree)] or key in asked:
                continue
            edges = _chain(tree, node, role)
            path = [*node.steps, *(place.proposals[writer].text for place, writer in edges)]
            asked[key] = (tree, edges, self.scorer.submit(tree.problem.question, path))
        for tree, edges, future in asked.values():
            known = self._scores[id(tree)]
            for (node, role), score in zip(edges, future.result()[-len(edges) :], strict=True):
                text = node.proposals[role].text
                for writer in ROLES:
                    if writer in node.proposals and node.proposals[writer].text == text:
                        self._note(tree, node, writer, score, known)
        values = [self._scores[id(tree)][node.key, role] for tree, node, role in places]
        return [0.0 if value is None else value for value in values]

    def _note(
        self, tree: RolloutTree, node: Node, role: str, score: float | None, known: dict[tuple[int, str], float | None]
    ) -> None:
        if (node.key, role) in known:
            return
        known[node.key, role] = score
        self.new_scores.append(
            {"problem": tree.problem.id, "replica": tree.replica, "prefix": node.key, "role": role, "score": score}
        )


def _chain(tree: RolloutTree, node: Node, role: str) -> list[tuple[Node, str]]:
    """Return the proposal and the small proposals that follow it: one forward pass scores them all."""
    edges = [(node, role)]
    child = tree.child(node, role)
    while child is not None and SMALL in child.proposals:
        edges.append((child, SMALL))
        child = tree.child(child, SMALL)
    return edges


def features(episodes: Sequence[Episode], scores: Sequence[float]) -> NDArray[np.float64]:
    """Return what a router sees, (n, len(FEATURES)), for episodes whose small proposal exists and is scored."""
    rows = []
    for episode, score in zip(episodes, scores, strict=True):
        assert episode.node is not None
        step = episode.node.proposals[SMALL]
        rows.append(
            (
                score,
                min(episode.scores, default=1.0),
                float(np.prod(episode.scores)) if episode.scores else 1.0,
                step.tokens,
                len(episode.node.steps) + 1,
                step.terminal,
                has_answer(step.text),
                episode.escalations,
                episode.large_tokens,
            )
        )
    return np.asarray(rows, np.float64).reshape(len(rows), len(FEATURES))


def advance(live: LiveTrees, episodes: Sequence[Episode], router: Router) -> list[Episode]:
    """Take one decision in every running episode; return those that still run."""
    running = [(episode, episode.node) for episode in episodes if episode.node is not None]
    live.propose((episode.tree, node, SMALL) for episode, node in running)
    scores = live.score([(episode.tree, node, SMALL) for episode, node in running])
    actions = np.asarray(router(features([episode for episode, _ in running], scores))).astype(int)
    roles = [ROLES[action] for action in actions]
    live.propose((episode.tree, node, role) for (episode, node), role in zip(running, roles, strict=True))
    places = [(episode.tree, node, role) for (episode, node), role in zip(running, roles, strict=True)]
    accepted = live.score(places)
    for (episode, node), role, score in zip(running, roles, accepted, strict=True):
        episode.small_tokens += node.proposals[SMALL].tokens
        episode.scores.append(score)
        if role == LARGE:
            episode.escalations += 1
            episode.large_tokens += node.proposals[LARGE].tokens
        if node.proposals[role].terminal:
            episode.last = (node, role)
        episode.node = episode.tree.child(node, role)
    return [episode for episode, _ in running if episode.node is not None]


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
    table = store.attach("scores", scorer.name, scorer.process())
    buffer = StepBuffer(store.steps, labeller)
    live = LiveTrees(writers, scorer, buffer)
    source = iter(load_trees(store, problems, replicas, store.manifest["process"]["max_escalations"], chunk=batch))

    def flush() -> None:
        buffer.flush()
        if live.new_scores:
            table.append(columns_of(live.new_scores, table.schema))
            live.new_scores = []

    try:
        while trees := list(islice(source, batch)):
            known = _known_scores(table, {tree.problem.id for tree in trees})
            for tree in trees:
                live.add(tree, known.get((tree.problem.id, tree.replica), {}))
            for _ in range(episodes):
                running = [Episode(tree, tree.root) for tree in trees]
                while running:
                    running = advance(live, running, router)
            flush()
            for tree in trees:
                live.drop(tree)
            if on_progress:
                on_progress(len(trees))
    finally:
        flush()
    return live.generated


def _known_scores(table: Any, problems: set[str]) -> dict[tuple[str, int], dict[tuple[int, str], float | None]]:
    known: dict[tuple[str, int], dict[tuple[int, str], float | None]] = {}
    for part in table.read(problems):
        columns = (part[name].to_pylist() for name in (*KEY, "score"))
        for problem, replica, prefix, role, score in zip(*columns, strict=True):
            known.setdefault((problem, replica), {}).setdefault((prefix, role), score)
    return known


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
