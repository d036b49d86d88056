"""Trees that lack proposals, scores or grades get them from models on demand; what is new goes to the store.

Nothing is known here of who decides: see `rollouts.trees.on_policy` for episodes and routers.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from rollouts.errors import StoreError
from rollouts.models.stepwise import Generation, StepWriter
from rollouts.scoring.base import Scorer, Scores
from rollouts.store.shards import KEY, Table, columns_of
from rollouts.store.store import Store
from rollouts.tasks.grading import Grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE, ROLES, SMALL, solution_text
from rollouts.trees.grow import Grower, Labeller, StepBuffer, load_trees
from rollouts.trees.tree import Node, RolloutTree

TreeKey = tuple[str, int]  # problem id, replica
Place = tuple[RolloutTree, Node, str]  # a proposal: tree, node, role
_Edge = tuple[int, str]  # key of a node, role
_Path = tuple[RolloutTree, list[tuple[Node, str]]]  # consecutive proposals
_FLUSH_SECONDS = 10.0
_What = TypeVar("_What")
_Answer = TypeVar("_Answer")


class LiveTrees:
    """Trees of a store in memory; all misses of a call go out as one batch.

    New rows are kept until `flush`, or for about ten seconds. When a model fails, what the others (or its own
    earlier requests) gave is taken before its error is raised.

    Attributes:
        generated: Steps generated so far.
    """

    def __init__(
        self,
        store: Store,
        writers: Mapping[str, StepWriter],
        scorer: Scorer,
        grader: Grader | None = None,
        *,
        labeller: Labeller | None = None,
    ) -> None:
        """Name the store and the models.

        Args:
            store: The store; its write lock must be held.
            writers: Both models.
            scorer: The scorer; its table gets the new scores.
            grader: The grader; its table gets the new grades. None: new solutions are not graded.
            labeller: Exact labels of steps, where the problems have them.

        Raises:
            StoreError: The score or grade table was made by another process.
        """
        self.store = store
        self.writers = writers
        self.scorer = scorer
        self.grader = grader
        self.buffer = StepBuffer(store.steps, labeller)
        self.generated = 0
        self._max_escalations: int | None = store.manifest["process"]["max_escalations"]
        self._scores = _Annotation(store.attach("scores", scorer.name, scorer.process()), "score")
        self._grades = (
            _Annotation(store.attach("grades", grader.name, grader.describe()), "correct") if grader else None
        )
        self._trees: OrderedDict[TreeKey, RolloutTree] = OrderedDict()
        self._whole: set[TreeKey] = set()  # trees that `complete` has seen
        self._unscored: list[Place] = []
        self._ungraded: list[Place] = []
        self._written = time.monotonic()

    def add(self, trees: Sequence[RolloutTree]) -> None:
        """Take trees, with the scores and grades that the store has for them."""
        for annotation in filter(None, (self._scores, self._grades)):
            annotation.read([key_of(tree) for tree in trees])
        self._trees.update((key_of(tree), tree) for tree in trees)

    def load(self, wanted: Iterable[tuple[Problem, int]]) -> None:
        """Read trees of problems and replicas from the store, those that are not in memory yet; some may be empty."""
        missing = {(problem.id, replica): problem for problem, replica in wanted}
        missing = {key: problem for key, problem in missing.items() if key not in self._trees}
        if not missing:
            return
        problems = list({problem.id: problem for problem in missing.values()}.values())
        found = {
            key_of(tree): tree
            for tree in load_trees(self.store, problems, None, self._max_escalations)
            if key_of(tree) in missing
        }
        for key, problem in missing.items():
            if key not in found:
                found[key] = RolloutTree(problem, key[1], self._max_escalations)
        self.add(list(found.values()))

    def has(self, key: TreeKey) -> bool:
        """Whether a tree is in memory."""
        return key in self._trees

    def tree(self, key: TreeKey) -> RolloutTree:
        """Return a tree that is in memory; it counts as just used."""
        self._trees.move_to_end(key)
        return self._trees[key]

    def forget(self, limit: int, keep: Collection[TreeKey] = ()) -> None:
        """Forget the trees that were used longest ago, down to `limit` of them but none of `keep`."""
        if len(self._trees) <= limit:
            return
        self.flush()
        keep = set(keep)
        for key in [key for key in self._trees if key not in keep][: len(self._trees) - limit]:
            del self._trees[key]
            self._whole.discard(key)
            for annotation in filter(None, (self._scores, self._grades)):
                annotation.forget(key)

    def complete(self, trees: Iterable[RolloutTree]) -> None:
        """Make sure that trees are closed under the store's K, where it has one, and owe no scores and no grades.

        So a store that was sound stays sound, whatever is added to these trees. Scores and grades that are missing
        are noted here and come with the next `score` and `grade`.
        """
        new = {key_of(tree): tree for tree in trees if key_of(tree) not in self._whole}
        if self._max_escalations is not None and (open_trees := [tree for tree in new.values() if tree.missing()]):
            grower = Grower(self.writers, self.buffer)
            try:
                grower.run(open_trees)
            finally:
                self.generated += grower.progress.steps
        for tree in new.values():
            for node in tree.nodes.values():
                for role in node.proposals:
                    self._note_new((tree, node, role))
        self._whole.update(new)

    def _note_new(self, place: Place) -> None:
        tree, node, role = place
        if not self._scores.has(place):
            if scored := [(tree, node, same) for same in _twins(node, role) if self._scores.has((tree, node, same))]:
                self._scores.put(place, {"score": self._scores.of(scored[0])})
            else:
                self._unscored.append(place)
        if self._grades is not None and node.proposals[role].terminal and not self._grades.has(place):
            self._ungraded.append(place)

    def propose(self, places: Iterable[Place]) -> None:
        """Make sure that the proposals at some places exist."""
        asked = {}
        for tree, node, role in places:
            if role not in node.proposals:
                asked[*key_of(tree), node.key, role] = (tree, node, role)

        def ask(place: Place) -> Future[Generation]:
            tree, node, role = place
            return self.writers[role].submit(tree.prefix(node), whole=role == SMALL)

        def take(place: Place, generation: Generation) -> None:
            tree, node, role = place
            new = tree.insert_path(node, role, generation.steps)
            self.buffer.add(tree, role, new, generation)
            self.generated += len(new)
            for found, _ in new:
                self._note_new((tree, found, role))

        _ask_all(list(asked.values()), ask, take)
        self.flush_if_due()

    def score(self, places: Iterable[Place]) -> list[float]:
        """Return the scores of existing proposals; 0 where the scorer has none (its window is exceeded).

        New proposals are scored in the same batch, whether named or not; one forward pass scores a proposal and
        what follows it.
        """
        wanted = list(places)
        covered: set[tuple[Any, ...]] = set()
        paths: list[_Path] = []
        for tree, node, role in (*self._unscored, *wanted):
            if (*key_of(tree), node.key, role) not in covered and not self._scores.has((tree, node, role)):
                edges = self._unscored_chain(tree, node, role)
                covered.update((*key_of(tree), at.key, same) for at, writer in edges for same in _twins(at, writer))
                paths.append((tree, edges))
        _ask_all(paths, self._ask_scores, self._take_scores)
        self._unscored = []
        values = [self._scores.of(place) for place in wanted]
        return [0.0 if value is None else value for value in values]

    def _unscored_chain(self, tree: RolloutTree, node: Node, role: str) -> list[tuple[Node, str]]:
        """Return a proposal and those that follow it without a score: one forward pass scores them all."""
        edges = [(node, role)]
        child = tree.child(node, role)
        while child is not None and child.proposals:
            role = SMALL if SMALL in child.proposals else LARGE
            if self._scores.has((tree, child, role)):
                break
            edges.append((child, role))
            child = tree.child(child, role)
        return edges

    def _ask_scores(self, path: _Path) -> Future[Scores]:
        tree, edges = path
        texts = [*edges[0][0].steps, *(node.proposals[role].text for node, role in edges)]
        return self.scorer.submit(tree.problem.question, texts)

    def _take_scores(self, path: _Path, scores: Scores) -> None:
        tree, edges = path
        for (node, role), score in zip(edges, scores[-len(edges) :], strict=True):
            stored = None if score is None else float(np.float32(score))  # what the table will give back
            for same in _twins(node, role):
                self._scores.put((tree, node, same), {"score": stored})

    def grade(self) -> None:
        """Grade the new solutions."""
        if self.grader is None or self._grades is None or not self._ungraded:
            return
        pairs = [
            (tree.problem.answer, solution_text([*node.steps, node.proposals[role].text]))
            for tree, node, role in self._ungraded
        ]
        for place, grade in zip(self._ungraded, self.grader.grade_many(pairs), strict=True):
            values = {"correct": grade.correct, "extracted": grade.extracted, "error": grade.error}
            self._grades.put(place, values)
        self._ungraded = []

    def correct(self, place: Place) -> bool:
        """Return the grade of the solution that a terminal proposal ends.

        Raises:
            StoreError: There is no grader.
        """
        if self._grades is None:
            raise StoreError("These trees have no grader.")
        self.grade()
        return bool(self._grades.of(place))

    def flush_if_due(self) -> None:
        """Write what is new if the last time is some seconds ago."""
        if time.monotonic() - self._written >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is new to the store: steps first, then what is known of them."""
        self.buffer.flush()
        for annotation in filter(None, (self._scores, self._grades)):
            annotation.flush()
        self._written = time.monotonic()


class _Annotation:
    """One score or grade table: the values of the trees in memory, and rows on their way to the disk."""

    def __init__(self, table: Table, column: str) -> None:
        self.table = table
        self.column = column
        self._values: dict[TreeKey, dict[_Edge, Any]] = {}
        self._new: list[dict[str, Any]] = []

    def read(self, keys: Collection[TreeKey]) -> None:
        """Read the values of some trees; of duplicate keys the first wins."""
        for key in keys:
            self._values[key] = {}
        for part in self.table.read({problem for problem, _ in keys}, [*KEY, self.column]):
            columns = (part[name].to_pylist() for name in (*KEY, self.column))
            for problem, replica, prefix, role, value in zip(*columns, strict=True):
                if (problem, replica) in self._values:
                    self._values[problem, replica].setdefault((prefix, role), value)

    def forget(self, key: TreeKey) -> None:
        del self._values[key]

    def has(self, place: Place) -> bool:
        tree, node, role = place
        return (node.key, role) in self._values[key_of(tree)]

    def of(self, place: Place) -> Any:
        tree, node, role = place
        return self._values[key_of(tree)][node.key, role]

    def put(self, place: Place, values: Mapping[str, Any]) -> None:
        """Record the values of a new row; what is there already stays."""
        if self.has(place):
            return
        tree, node, role = place
        problem, replica = key_of(tree)
        row = {"problem": problem, "replica": replica, "prefix": node.key, "role": role, **values}
        self._new.append(row)
        self._values[problem, replica][node.key, role] = row[self.column]

    def flush(self) -> None:
        if self._new:
            self.table.append(columns_of(self._new, self.table.schema))
        self._new = []


def key_of(tree: RolloutTree) -> TreeKey:
    """Return what names a tree: its problem's id and its replica."""
    return tree.problem.id, tree.replica


def _twins(node: Node, role: str) -> Iterator[str]:
    """Yield the roles whose proposal at a node has the text of `role`'s: `role` itself and perhaps the other."""
    text = node.proposals[role].text
    return (same for same in ROLES if same in node.proposals and node.proposals[same].text == text)


def _ask_all(
    items: Sequence[_What], ask: Callable[[_What], Future[_Answer]], take: Callable[[_What, _Answer], None]
) -> None:
    """Send all requests, take every answer that comes, then raise the first error."""
    error: Exception | None = None
    under_way: list[tuple[_What, Future[_Answer]]] = []
    for item in items:
        try:
            under_way.append((item, ask(item)))
        except Exception as caught:
            error = caught
            break
    for item, future in under_way:
        try:
            answer = future.result()
        except Exception as caught:
            error = error or caught
        else:
            take(item, answer)
    if error is not None:
        raise error
