"""Trees that lack proposals, scores or grades get them from models on demand; what is new goes to the store.

Nothing is known here of who decides: see `rollouts.trees.on_policy` for episodes and routers.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rollouts.errors import BudgetSpent, StoreError
from rollouts.models.stepwise import Generation, StepWriter
from rollouts.scoring.base import Scorer
from rollouts.store.rows import Rows, TreeKey
from rollouts.store.store import Store
from rollouts.tasks.grading import Grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.annotate import ask_all, attach, grade_places, is_left, paths, score_paths
from rollouts.trees.grow import Failures, Labeller, StepBuffer, load_trees
from rollouts.trees.signals import Signals
from rollouts.trees.tree import Place, RolloutTree


@dataclass
class Generated:
    """What live episodes have had generated so far.

    Attributes:
        requests: Requests that they took.
        tokens: Tokens decoded, by role.
        needed: Proposals that episodes needed, whether they were there or not.
    """

    steps: int = 0
    requests: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    needed: int = 0

    @property
    def found(self) -> float:
        """Share of the proposals needed for which nothing was asked."""
        return 1 - self.requests / max(1, self.needed, self.requests)


def keep_open(store: Store, trees: Iterable[RolloutTree]) -> None:
    """Note trees that are not closed as such that live episodes grow: they stay as they are, and none is compiled."""
    if lacking := [tree.key for tree in trees if tree.missing()]:
        store.note_live(lacking)


class LiveTrees:
    """Trees of a store in memory; all misses of a call go out as one batch.

    New rows are kept until `flush`, or for about ten seconds. When a model fails, what the others (or its own
    earlier requests) gave is taken before its error is raised.
    """

    def __init__(
        self,
        store: Store,
        writers: Mapping[str, StepWriter],
        scorer: Scorer,
        grader: Grader | None = None,
        *,
        labeller: Labeller | None = None,
        others: Sequence[Scorer] = (),
        max_large_tokens: int | None = None,
        generated: Generated | None = None,
        on_progress: Callable[[Generated], None] | None = None,
    ) -> None:
        """Name the store and the models.

        Args:
            store: The store; its write lock must be held.
            writers: Both models.
            scorer: The scorer; its table gets the new scores.
            grader: The grader; its table gets the new grades. None: new solutions are not graded.
            labeller: Exact labels of steps, where the problems have them.
            others: Further scorers; each fills its table, too.
            max_large_tokens: Ask the large model no more after so many of its tokens in `generated`, as
                `rollouts.trees.grow.Grower` does.
            generated: Counts to go on from; default: fresh ones.
            on_progress: Called about once a second while episodes run.

        Raises:
            StoreError: The score or grade table was made by another process.
        """
        self.store = store
        self.writers = writers
        self.scorer = scorer
        self.grader = grader
        self.buffer = StepBuffer(store.steps, labeller)
        self.generated = generated if generated is not None else Generated()
        self.max_large_tokens = max_large_tokens
        self.on_progress = on_progress
        self._failures = Failures(store.steps)
        self._told = -math.inf
        self._longest = math.inf  # large step so far
        self._max_escalations: int | None = store.manifest["process"]["max_escalations"]
        self._scorers = {each.name: each for each in (scorer, *others)}
        for each in self._scorers.values():
            attach(store, each)
        tables = [store.score_rows(name, self.buffer) for name in sorted({*self._scorers, *store.signals(), *ROLES})]
        self._signals = Signals(tables, store.scored_by(scorer.name))
        self._scores = [self._signals.tables[name] for name in self._scorers]
        self._grades = Rows(store.attach("grades", grader.name, grader.describe())) if grader else None
        self._annotations = [*self._signals.tables.values(), *([self._grades] if self._grades else [])]
        self._trees: OrderedDict[TreeKey, RolloutTree] = OrderedDict()
        self._whole: set[TreeKey] = set()  # trees that `begin` has seen
        self._unscored: dict[str, list[Place]] = {name: [] for name in self._scorers}
        self._ungraded: list[Place] = []

    def add(self, trees: Sequence[RolloutTree]) -> None:
        """Take trees, with the scores and grades that the store has for them."""
        for rows in self._annotations:
            rows.read([tree.key for tree in trees])
        self._trees.update((tree.key, tree) for tree in trees)

    def load(self, wanted: Iterable[tuple[Problem, int]]) -> None:
        """Read trees of problems and replicas from the store, those that are not in memory yet; some may be empty."""
        missing = {(problem.id, replica): problem for problem, replica in wanted}
        missing = {key: problem for key, problem in missing.items() if key not in self._trees}
        if not missing:
            return
        problems = list({problem.id: problem for problem in missing.values()}.values())
        found = {tree.key: tree for tree in load_trees(self.store, problems, None, self._max_escalations)}
        self.add(
            [
                found.get(key) or RolloutTree(problem, key[1], self._max_escalations, self.store.splitting)
                for key, problem in missing.items()
            ]
        )

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
        oldest = [key for key in self._trees if key not in keep][: len(self._trees) - limit + limit // 8]
        for key in oldest:
            del self._trees[key]
        self._whole.difference_update(oldest)
        for rows in self._annotations:
            rows.forget(oldest)

    def begin(self, trees: Iterable[RolloutTree]) -> None:
        """Take trees that episodes begin in; those that are not closed are noted in the store (`keep_open`).

        Scores and grades that are missing are noted here and come with the next `score` and `grade`.
        """
        new = {tree.key: tree for tree in trees if tree.key not in self._whole}
        keep_open(self.store, new.values())
        for tree in new.values():
            self._note(tree.places())
        self._whole.update(new)

    def _note(self, places: Iterable[Place]) -> None:
        """Keep in mind what of some proposals is to be scored and graded."""
        for place in places:
            for rows in self._scores:
                if is_left(rows, place):
                    self._unscored[rows.table.directory.name].append(place)
            if self._grades is not None and is_left(self._grades, place):
                self._ungraded.append(place)

    def propose(self, places: Iterable[Place]) -> None:
        """Make sure that the proposals at some places exist.

        Raises:
            BudgetSpent: The large model would have to be asked, and has decoded its tokens.
            BackendError: A model is gone, or half of a role's first requests fail.
        """
        lacking = ((tree, node, tree.author(node) or role) for tree, node, role in places if role not in node.proposals)
        asked = {(tree.key, node.key, role): (tree, node, role) for tree, node, role in lacking}

        def ask(place: Place) -> Future[Generation]:
            tree, node, role = place
            return self.writers[role].submit(tree.prefix(node), whole=role == SMALL or tree.author(node) is not None)

        def take(place: Place, generation: Generation) -> None:
            tree, node, role = place
            new = tree.insert_path(node, role, generation.steps)
            self.buffer.add(tree, role, new, generation)
            self.generated.steps += len(new)
            self.generated.requests += 1
            self.generated.tokens[role] += generation.decoded
            if role == LARGE:
                self._longest = max(generation.decoded, 1 if self._longest == math.inf else self._longest)
            self._tell()
            both = ((tree, found, same) for found, _ in new for same in (ROLES if tree.author(found) else (role,)))
            self._note(tree.places() if tree.relaxed else both)
            tree.relaxed = False
            self._failures.count(role, generation)
            self._failures.refuse(role)

        for portion in self._portions(list(asked.values())):
            ask_all(portion, ask, take)
        self._tell()
        self.flush_if_due()

    def _portions(self, places: list[Place]) -> Iterator[list[Place]]:
        """Yield what may be asked at once: of the large model what the rest of the budget holds, or one step."""
        large = [] if self.max_large_tokens is None else [place for place in places if place[2] == LARGE]
        yield [place for place in places if not large or place[2] != LARGE]
        while large and self.max_large_tokens is not None:
            left = self.max_large_tokens - self.generated.tokens[LARGE]
            if left <= 0:
                raise BudgetSpent(f"The large model has decoded {self.generated.tokens[LARGE]:,} tokens, its budget.")
            most = max(1, int(left // self._longest))
            yield large[:most]
            large = large[most:]

    def _tell(self) -> None:
        if self.on_progress and time.monotonic() - self._told > 1.0:
            self._told = time.monotonic()
            self.on_progress(self.generated)

    def score(self, places: Iterable[Place]) -> list[float | None]:
        """Return the scores of existing proposals; None where the scorer has none (its window is exceeded).

        New proposals are scored in the same batch, whether named or not; one forward pass scores a proposal and
        what follows it.
        """
        return [score for score, _ in self.signals(places)]

    def signals(self, places: Iterable[Place]) -> list[tuple[float | None, dict[str, float]]]:
        """Do as `score` does; return with the scores the columns of all score tables by name, NaN if not known."""
        wanted = list(places)
        for rows, (name, scorer) in zip(self._scores, self._scorers.items(), strict=True):
            left = [*self._unscored[name], *(place for place in wanted if is_left(rows, place))]
            score_paths(scorer, rows, paths(rows, left))
            self._unscored[name] = []
        names = self._signals.names
        return [(score, dict(zip(names, values, strict=True))) for score, values in map(self._signals.of, wanted)]

    def grade(self) -> None:
        """Grade the new solutions."""
        if self.grader is not None and self._grades is not None and self._ungraded:
            grade_places(self.grader, self._grades, self._ungraded)
        self._ungraded = []

    def correct(self, place: Place) -> bool:
        """Return the grade of the solution that a terminal proposal ends.

        Raises:
            StoreError: There is no grader.
        """
        if self._grades is None:
            raise StoreError("These trees have no grader.")
        self.grade()
        tree, node, role = place
        return bool(self._grades[tree.row_key(node, role)])

    def flush_if_due(self) -> None:
        """Write what is new if the last time is some seconds ago."""
        if any(rows.due for rows in (self.buffer, *self._annotations)):
            self.flush()

    def flush(self) -> None:
        """Write what is new to the store: steps first, then what is known of them."""
        for rows in (self.buffer, *self._annotations):
            rows.flush()
