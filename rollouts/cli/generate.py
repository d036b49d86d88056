"""The commands of ``python -m rollouts`` that make stores: each field is a flag."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from rollouts.cli.inspect import Merge, Repair, Show, Stats, StorePath, Verify
from rollouts.cli.machines import Machines
from rollouts.cli.prm import Labels, TrainPrm
from rollouts.cli.progress import console, progress_bar
from rollouts.cli.view import reason_lines, special_token_lines, spending_line
from rollouts.config import Count, NotNegative, load_family, settings
from rollouts.errors import ConfigError, DataError, did_you_mean
from rollouts.family import Family
from rollouts.scoring.base import Scorer, self_test_examples
from rollouts.scoring.verification import Verifier
from rollouts.store.store import Store, score_command
from rollouts.tasks.grading import Grader, make_grader, unreadable_answers
from rollouts.tasks.problems import EMBEDDED, SPLITS, Problem, combined, load_problems
from rollouts.text.steps import ROLES, SMALL
from rollouts.tinymath.problems import parse_question
from rollouts.trees.annotate import IN_FLIGHT, grade_store, left, score_store
from rollouts.trees.grow import Grower, StepBuffer, grow_sequentially, label_of, load_trees, replicas_of
from rollouts.trees.grow import Progress as Counts
from rollouts.trees.tree import RolloutTree
from rollouts.trees.verifications import unverified, verify_solutions

if TYPE_CHECKING:
    from rollouts.cluster.pool import Cluster
    from rollouts.trees.on_policy import Router

On = Annotated[Machines, tyro.conf.arg(name="")]
FREE_TEXT_ESCALATIONS = 2  # K by default where models write free text
_MOST_WORKERS = 16
_GROWN, _WALKED = 256, 128  # trees at once, of each worker
SCORER = "scorer"
ANY_ROLE = (*ROLES, SCORER)


def parse_replicas(text: str) -> int | dict[str, int]:
    """Read ``2`` or ``train=1,test=2``.

    Raises:
        ConfigError: Neither.
    """
    try:
        if "=" not in text:
            value: int | dict[str, int] = int(text)
        else:
            value = {name.strip(): int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--replicas {text!r}: expected a number, or split=number pairs.") from error
    if min(value.values()) < 0 if isinstance(value, dict) else value < 1:
        raise ConfigError(f"--replicas {text!r}: at least 1, or of a split 0.")
    return value


@settings
class Generate:
    """Generate rollout trees; scores and grades follow. The same command goes on where it stopped.

    Attributes:
        out: Directory of the store.
        problems: ``tinymath``, ``tinymath:test`` or files: JSON lines, CSV or Parquet.
        models: TOML file of the roles, or ``tinymath`` / ``tinymath:transformers`` for the embedded family.
        limit: Most problems of each split.
        split: Put all problems of files into this split instead of splitting them by hash.
        max_escalations: K: every path with at most K escalations; ``none``: complete trees. ``auto``: the K of the
            store where there is one, else complete trees for tinymath and 2 for other problems, as free text
            hardly ever merges.
        replicas: Independent samples of every tree: a number, or by split, such as ``train=1,test=2``; with 0 a split's
            problems are added, and no trees (for `train.py --live`).
        seed: Run seed.
        grader: ``exact``, ``numeric`` or ``module:object`` (`rollouts.tasks.grading.Grader`).
        sequential: One model in memory at a time, alternating over the whole frontier.
        in_flight: Trees grown at once, by each worker.
        max_large_tokens: Stop after the large model has decoded so many tokens in this run; resumable.
        dry_run: Generate nothing for the store; estimate tokens, time and money from a few problems.
        flush_seconds: Longest time between two shards, seconds: what a crash can lose.
        score: Score the trees at the end.
        grade: Grade the solutions at the end.
        on: Where it runs.
    """

    out: StorePath
    problems: tuple[str, ...] = ("tinymath",)
    models: str = "tinymath"
    limit: Count | None = None
    split: str | None = None
    max_escalations: int | Literal["auto", "none"] | None = "auto"
    replicas: str = "1"
    seed: int = 0
    grader: str = "exact"
    sequential: bool = False
    in_flight: Count = 256
    max_large_tokens: Count | None = None
    dry_run: bool = False
    flush_seconds: NotNegative = 10.0
    score: bool = True
    grade: bool = True
    on: On = Machines()

    def run(self) -> None:
        """Run the command."""
        screen = console()
        if self.dry_run and self.on.ray is not None:
            raise ConfigError("--dry-run generates a few problems in this process: leave out --ray.")
        if self.sequential and self.on.ray is not None:
            raise ConfigError("--sequential is for one machine; a worker of --ray has both models in memory.")
        problems = self._load_problems(screen)
        grader = make_grader(self.grader)
        there = Store(self.out) if (Path(self.out) / "manifest.json").is_file() else None
        examples = self_test_examples(problems)
        family = Family(load_family(self.models), seed=self.seed, examples=examples, store=there)
        replicas = parse_replicas(self.replicas)
        if isinstance(replicas, dict):
            splits = [*SPLITS, *(problem.split for problem in problems)]
            if unknown := [split for split in replicas if split not in splits]:
                raise ConfigError(f"--replicas {self.replicas!r}: no split {unknown[0]!r}."
                                  + did_you_mean(unknown[0], splits))  # fmt: skip
        most = max(replicas.values()) if isinstance(replicas, dict) else replicas
        greedy = [role for role in ROLES if family.config.generator(role).sampling.temperature == 0]
        if most > 1 and greedy:
            raise ConfigError(f"Temperature 0 ({greedy[0]}) makes all replicas the same; use --replicas 1.")
        problems = self._that_fit(screen, family, problems)
        self._warn_of_unreadable_answers(screen, grader, problems)
        labelled = all(problem.source == EMBEDDED and parse_question(problem.question) for problem in problems)
        most_escalations = self._most_escalations(screen, there, complete=labelled)
        if dated := [role for role, prompts in family.formats.items() if prompts.dated]:
            screen.print(f"The chat templates of {', '.join(dated)} print a date; in every prompt it is {family.date}.")
        if self.dry_run:
            from rollouts.cli.estimate import estimate

            estimate(screen, family, problems, replicas, most_escalations, self.in_flight, sequential=self.sequential)
            return
        store = Store.create(self.out, family.process(most_escalations, labels=labelled), family.date)
        tell_notes(store)
        family.refuse_other_scores(store)
        with store.writing(), self.on.cluster() as cluster:
            store.add_problems(problems)
            note_special_tokens(screen, store, family)
            closed = self._grow(screen, store, family, problems, replicas, cluster)
            if closed:
                grown = {(each.id, number) for each in problems for number in range(replicas_of(each, replicas))}
                store.note_live((), closed=grown)
            if self.score and family.config.scorer is not None:
                run_scoring(store, family, problems, cluster=cluster)
            if self.grade:
                run_grading(store, grader, problems, cluster, self.grader)
            store.tidy()
        if not closed:
            screen.print("The token budget is spent; the same command with a new budget goes on.")
        elif self.score and self.grade and store.signals():
            Stats(self.out).run()

    def _most_escalations(self, screen: Console, there: Store | None, complete: bool) -> int | None:
        if isinstance(self.max_escalations, str) and self.max_escalations == "auto":
            if there is not None:
                found: int | None = there.manifest["process"]["max_escalations"]
                return found
            if complete:
                return None
            screen.print(f"Trees hold every path with at most {FREE_TEXT_ESCALATIONS} escalations (--max-escalations).")
            return FREE_TEXT_ESCALATIONS
        return None if self.max_escalations == "none" else self.max_escalations

    def _load_problems(self, screen: Console) -> list[Problem]:
        found: list[Problem] = []
        for spec in self.problems:
            loaded = load_problems(spec, split=self.split)
            found.extend(loaded)
            if loaded.skipped or loaded.repeated:
                screen.print(f"{spec}: {loaded.skipped} identical rows left out, {loaded.repeated} repeated questions.")
        stores = [path for path in (self.out, self.out.parent) if (path / "manifest.json").is_file()]
        found = combined(found, [problem for path in stores for problem in Store(path).problems()])
        if self.limit is not None:
            numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
            found = [problem for problem in found if next(numbers[problem.split]) < self.limit]
        if not found:
            raise DataError(f"{', '.join(self.problems)}: no problems.")
        return found

    def _that_fit(self, screen: Console, family: Family, problems: list[Problem]) -> list[Problem]:
        fitting = [problem for problem in problems if family.fits(problem.question, ())]
        if len(fitting) < len(problems):
            screen.print(f"{len(problems) - len(fitting)} problems are longer than a model's window and are left out.")
        if not fitting:
            raise DataError("Every problem is longer than some model's window; raise max_length.")
        return fitting

    def _warn_of_unreadable_answers(self, screen: Console, grader: Grader, problems: Sequence[Problem]) -> None:
        if unreadable := unreadable_answers(grader, [problem.answer for problem in problems]):
            some = ", ".join(repr(answer) for answer in unreadable[:5])
            screen.print(f"{len(unreadable)} answers cannot be read by the grader and count as wrong: {some} ...")

    def _grow(
        self,
        screen: Console,
        store: Store,
        family: Family,
        problems: Sequence[Problem],
        replicas: int | dict[str, int],
        cluster: Cluster | None,
    ) -> bool:
        def load() -> Iterator[RolloutTree]:
            return load_trees(store, problems, replicas, store.manifest["process"]["max_escalations"])

        total = sum(replicas_of(problem, replicas) for problem in problems)
        if not any(tree.wants() for tree in load()):
            screen.print(f"All {total:,} trees are there.")
            return True
        return grow_trees(
            store, family, load, Counts(total=total), cluster,
            in_flight=self.in_flight, max_large_tokens=self.max_large_tokens,
            sequential=self.sequential, flush_seconds=self.flush_seconds,
        )  # fmt: skip


def grow_trees(
    store: Store,
    family: Family,
    load: Callable[[], Iterator[RolloutTree]],
    counts: Counts,
    cluster: Cluster | None,
    *,
    in_flight: int = _GROWN,
    max_large_tokens: int | None = None,
    sequential: bool = False,
    flush_seconds: float = 10.0,
    open_writer: Callable[[str, Store], Any] | None = None,
) -> bool:
    """Grow the trees that `load` reads, with a bar; return whether all are closed now.

    Models are opened by `open_writer`, by default by the family.
    """
    buffer = StepBuffer(store.steps, label_of(store), seconds=flush_seconds)
    with progress_bar("Growing", counts.total or None, "trees") as advance, ExitStack() as stack:

        def show(now: Counts, workers: str = "") -> None:
            tokens = ", ".join(f"{now.tokens[role]:,} {role}" for role in ROLES)
            note = f"{now.steps:,} steps; tokens {tokens}; {now.under_way:,} requests under way"
            advance(completed=now.trees, note=f"{note}; {workers}" if workers else note)

        limits: dict[str, Any] = {"max_large_tokens": max_large_tokens, "progress": counts, "on_progress": show}
        if cluster is not None:
            from rollouts.cluster.growing import Growing

            job = cluster.job(store, family, writes=True, grows=in_flight)
            return stack.enter_context(Growing(cluster, store, job, load, buffer, **limits)).run() == 0

        def opened(role: str) -> Any:
            advance(0, note=f"loading the {role} model")
            return (open_writer or family.open)(role, store)

        def grower(writers: Any) -> Grower:
            counts.trees = 0
            return Grower(writers, buffer, in_flight=in_flight, **limits)

        if sequential:
            return grow_sequentially(opened, load, grower) == 0
        return grower({role: stack.enter_context(opened(role)) for role in ROLES}).run(load()) == 0


def note_special_tokens(screen: Console, store: Store, family: Family, roles: Sequence[str] = ANY_ROLE) -> None:
    """Say which questions of a store hold special tokens, which are read as text, and keep it in its manifest."""
    found = {role: marks for role, marks in family.neutralised(store.problems()).items() if role in roles}
    for line in special_token_lines(found):
        screen.print(line, markup=False)
    noted = store.manifest.get("neutralised", {})
    if noted | found != noted:
        store.note(neutralised=noted | found)


def run_scoring(
    store: Store,
    family: Family,
    problems: Sequence[Problem] | None,
    role: str | None = None,
    cluster: Cluster | None = None,
    *,
    give_up: bool = False,
) -> None:
    """Score what is unscored, with a bar; the scorer, or a generating role's model, is loaded if there is anything."""
    total = sum(1 for _ in left(store, store.score_rows(role or family.scorer_name), problems))
    if total == 0:
        return
    with progress_bar("Scoring", total, "steps") as advance, ExitStack() as stack:
        in_flight = IN_FLIGHT * (cluster.workers if cluster is not None else 1)
        if cluster is not None:
            from rollouts.cluster.asking import Asking, RemoteScorer

            job = cluster.job(store, family, scores=role or SCORER)
            scorer: Scorer = RemoteScorer(stack.enter_context(Asking(cluster, store, job, partial(advance, 0))))
        else:
            opened: Any = family.open_statistics(role, store) if role else family.open_scorer(store)
            scorer = stack.enter_context(opened)
        report = score_store(store, scorer, problems, in_flight=in_flight, give_up=give_up, on_progress=advance)
    tell_notes(store)
    if report.spent:
        console().print(spending_line(report.spent, family.config.scorer))
    if report.failed:
        what = (
            "remain without a score, and their trees are left out"
            if give_up
            else f"have no score yet; `{score_command(store.path, role or '')}` with the same --models asks about them "
            "again, with --give-up for the last time"
        )
        console().print(f"{report.failed.total():,} steps {what}:")
    for line in reason_lines(report.failed):
        console().print(line, markup=False)
    if report.skipped:
        console().print(
            f"{report.skipped} steps cannot be scored, as those that exceed the scorer's window; their trees are left "
            "out."
        )


def run_verifying(store: Store, family: Family, *, give_up: bool = False) -> None:
    """Have the small model verify what it wrote by itself, with a bar; it is loaded if there is anything."""
    total = sum(1 for _ in unverified(store, store.score_rows(Verifier.name)))
    if total == 0:
        return
    with family.open_verifier(store) as verifier, progress_bar("Verifying", total, "solutions") as advance:
        report = verify_solutions(store, verifier, give_up=give_up, on_progress=advance)
    tell_notes(store)
    if report.failed:
        then = "they count as not found correct" if give_up else "the same command asks again"
        console().print(f"{report.failed.total():,} solutions are not verified; {then}:")
    for line in reason_lines(report.failed):
        console().print(line, markup=False)


def tell_notes(store: Store) -> None:
    """Print what whoever goes on with a store should be told, once."""
    while store.notes:
        console().print(store.notes.pop(0))


def run_grading(
    store: Store,
    grader: Grader,
    problems: Sequence[Problem] | None,
    cluster: Cluster | None = None,
    name: str = "",
) -> None:
    """Grade what is ungraded, with a bar; workers of a cluster make the grader by its name."""
    with progress_bar("Grading", None, "solutions") as advance, ExitStack() as stack:
        if cluster is not None:
            from rollouts.cluster.asking import RemoteGrader

            grader = stack.enter_context(RemoteGrader(cluster, store, grader, name, partial(advance, 0)))
        report = grade_store(store, grader, problems, workers=_workers(), on_progress=advance)
    if report.errors:
        console().print(f"The grader failed on {report.errors} answers; they are graded wrong.")


def _workers() -> int:
    """Return how many processes grade: one for each core that this process may use."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@settings
class Expand:
    """Add the nodes that a router reaches to a bounded store, then grade the new solutions.

    Without a router the trees that are there are closed: branches that were not taken when live episodes or a service
    (``serve --record``) wrote them are grown, up to the K of the store, and everything is scored and graded.

    Attributes:
        store: Directory of the store.
        router: Left out, or ``threshold:0.5``, ``random:0.3``, or ``module:function`` of your own: from a mapping of
            named columns, arrays of shape (n,) such as ``columns["score"]`` (`rollouts.trees.on_policy.observe`), to
            (n,) of 0 and 1.
        models: The models that made the store.
        split: Only this split.
        episodes: Walks per tree, for routers that draw at random.
        seed: Seed of a random router.
        grader: ``exact``, ``numeric`` or ``module:object`` (`rollouts.tasks.grading.Grader`).
        on: Where it runs.
    """

    store: StorePath
    router: str | None = None
    models: str = "tinymath"
    split: str | None = None
    episodes: Count = 1
    seed: int = 0
    grader: str = "exact"
    on: On = Machines()

    def run(self) -> None:
        """Run the command."""
        from rollouts.trees.on_policy import load_router

        store = Store(self.store)
        problems, grader = store.problems(self.split), make_grader(self.grader)
        router = load_router(self.router, self.seed) if self.router is not None else None
        process = store.manifest["process"]
        examples = self_test_examples(problems)
        family = Family(load_family(self.models), seed=process["seed"], examples=examples, store=store)
        tell_notes(Store.create(self.store, family.process(process["max_escalations"], labels=process["labels"])))
        with store.writing(), self.on.cluster() as cluster:
            if router is not None:
                added = self._walk(store, family, router, problems, cluster)
            else:
                added = self._close(store, family, problems, cluster)
                if family.config.scorer is not None:
                    run_scoring(store, family, problems, cluster=cluster)
            run_grading(store, grader, problems, cluster, self.grader)
            store.tidy()
        console().print(f"{added:,} steps added.")

    def _walk(
        self, store: Store, family: Family, router: Router, problems: Sequence[Problem], cluster: Cluster | None
    ) -> int:
        """Generate and score what a router reaches; return the number of steps."""
        from rollouts.trees.on_policy import expand_on_policy

        scores = SCORER if family.config.scorer is not None else SMALL  # whose statistics are the score, as of trees
        with progress_bar("Expanding", None, "trees") as advance, ExitStack() as stack:
            writers: Mapping[str, Any]
            scorer: Scorer
            if cluster is not None:
                from rollouts.cluster.asking import Asking, RemoteScorer, RemoteWriter

                job = cluster.job(store, family, writes=True, scores=scores)
                pool = stack.enter_context(Asking(cluster, store, job, partial(advance, 0)))
                writers, scorer = {role: RemoteWriter(pool, role) for role in ROLES}, RemoteScorer(pool)
            else:
                writers = {role: stack.enter_context(family.open(role, store)) for role in ROLES}
                scorer = stack.enter_context(family.scoring(scores, store, writers))
            return expand_on_policy(
                store, writers, scorer, router, problems,
                episodes=self.episodes, batch=_WALKED * (cluster.workers if cluster is not None else 1),
                labeller=label_of(store), on_progress=advance,
            )  # fmt: skip

    def _close(self, store: Store, family: Family, problems: Sequence[Problem], cluster: Cluster | None) -> int:
        """Grow what closure asks for in the trees that are there; return the number of steps."""
        counts = Counts()

        def load() -> Iterator[RolloutTree]:
            return load_trees(store, problems, None, store.manifest["process"]["max_escalations"])

        if grow_trees(store, family, load, counts, cluster):
            names = {problem.id for problem in problems}
            store.note_live((), closed={key for key in store.live if key[0] in names})
        return counts.steps


@settings
class Score:
    """Add a scorer's table to a store, without any generating model (but the one that scores).

    Attributes:
        store: Directory of the store.
        models: TOML file with the [scorer] section, or ``tinymath``.
        scorer: ``small`` or ``large``: instead of the [scorer], what this model makes of the tokens of steps, by one
            prefill pass per path (`rollouts.text.likelihood.STATISTICS`); small of its own steps, large of all.
            ``verification``: whether the small model, asked eight times, finds correct what it wrote by itself.
        give_up: Do not ask again about steps whose question fails this time too (a judge's): put down that they have no
            score. Their trees are left out of training and evaluation.
        on: Where it runs.
    """

    store: StorePath
    models: str = "tinymath"
    scorer: Literal["small", "large", "verification"] | None = None
    give_up: bool = False
    on: On = Machines()

    def run(self) -> None:
        """Run the command."""
        store = Store(self.store)
        problems = store.problems()
        family = Family(load_family(self.models), examples=self_test_examples(problems), store=store)
        family.refuse_other_scores(store)
        verifies = self.scorer == Verifier.name
        if verifies and self.on.ray is not None:
            raise ConfigError("--scorer verification asks one small model from here: leave out --ray.")
        with store.writing(), self.on.cluster() as cluster:
            note_special_tokens(console(), store, family, roles=[SMALL if verifies else self.scorer or SCORER])
            if verifies:
                run_verifying(store, family, give_up=self.give_up)
            else:
                run_scoring(store, family, None, self.scorer, cluster, give_up=self.give_up)
            store.tidy()


@settings
class Grade:
    """Add a grader's table to a store.

    Attributes:
        store: Directory of the store.
        grader: ``exact``, ``numeric`` or ``module:object`` (`rollouts.tasks.grading.Grader`).
        on: Where it runs.
    """

    store: StorePath
    grader: str = "exact"
    on: On = Machines()

    def run(self) -> None:
        """Run the command."""
        store = Store(self.store)
        grader = make_grader(self.grader)
        with store.writing(), self.on.cluster() as cluster:
            run_grading(store, grader, None, cluster, self.grader)
            store.tidy()


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": Generate,
    "expand": Expand,
    "score": Score,
    "grade": Grade,
    "labels": Labels,
    "train-prm": TrainPrm,
    "stats": Stats,
    "show": Show,
    "verify": Verify,
    "merge": Merge,
    "repair": Repair,
}
