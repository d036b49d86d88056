"""What every scorer is, and the self-test that finds a wrong one before a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from rollouts.errors import ConfigError, RequestFailed
from rollouts.models.base import Backend, Request
from rollouts.models.futures import forward
from rollouts.tasks.problems import Problem
from rollouts.text.likelihood import first_of
from rollouts.text.steps import ROLES

Scores = list[Any]  # for each step a number, of several columns a tuple of them, None or `Failed`


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for the score of a step that has none because asking for it failed; it can be asked for again."""

    reason: str


class Scorer(Protocol):
    """Scores paths; the interface that stores are scored through.

    For a scorer of one's own the models file says ``kind = "my_module:MyScorer"`` in its section ``[scorer]``. The
    class, or function, is called as ``MyScorer(name, **options)`` with the name of the score table and the table
    ``[scorer.options]``. A ``close`` method, if there is one, is called when the scorer is no longer needed. Before
    a run it is tried on known paths (`self_test`), without asking that it prefers right steps.

    Attributes:
        name: Name of the score table, as it was given.
        tolerance: Largest difference between two scorings of one path, such as the rounding that batching brings; 0
            where the same path always gets the same scores.

    What a scorer may have besides:
        columns: Names of the columns of its table, ``("score",)`` if left out. With several, each step gets a tuple of
            as many numbers; those of ``score`` are in [0, 1], the others need not be.
        roles: Whose steps are scored, ``("small", "large")`` if left out.
        incremental: Whether `submit` takes a third argument: how many of the first steps are scored already. Nobody
            reads what it gives for these. False if left out: whole paths are scored again for their new steps.
    """

    name: str
    tolerance: float

    def submit(self, question: str, steps: Sequence[str]) -> Future[Scores]:
        r"""Start scoring one path; must not block, as many paths are under way at once.

        Args:
            question: The problem's text.
            steps: S steps from the first on; all but the last end with ``"\n\n"``, where more could follow.

        Returns:
            A future of S scores in [0, 1], higher is better. Score i depends on the question and on steps 0 to i alone
            (paths that share a prefix share its scores), and is the same each time, within `tolerance`. It is None
            for steps that cannot be scored, such as those beyond the scorer's window: inputs are never truncated and
            scores never padded. Trees with such steps are left out of compiled arrays. It is `Failed` for steps that
            are to be asked about again in another run. An exception ends the run; what was scored before is kept.
        """

    def process(self) -> Mapping[str, Any]:
        """Return all that decides the scores, such as model, revision and options, as JSON takes it.

        It goes into the table's manifest. A scorer that says something else is refused for that table. Under
        ``identities`` it may say by role what tells the models that it uses from others (`rollouts.models.identity`).
        """


def described(kind: str, scorer: Any, **more: Any) -> dict[str, Any]:
    """Return what decides the scores of a scorer that asks one model: that, its prompts, and more."""
    backend, told = scorer.backend, {"model": scorer.model, "template_hash": scorer.prompts.template_hash}
    return {"kind": kind, **told, **more, "identities": {backend.role: dict(backend.identity)}}


def columns_of(scorer: Scorer) -> tuple[str, ...]:
    """Return the columns of a scorer's table."""
    return tuple(getattr(scorer, "columns", ("score",)))


def roles_of(scorer: Scorer) -> tuple[str, ...]:
    """Return whose steps a scorer is asked about."""
    return tuple(getattr(scorer, "roles", ROLES))


def submitted(scorer: Scorer, question: str, steps: Sequence[str], known: int) -> Future[Scores]:
    """Start scoring one path whose first `known` steps are scored already."""
    arguments: tuple[Any, ...] = (
        (question, steps, known) if getattr(scorer, "incremental", False) else (question, steps)
    )
    return scorer.submit(*arguments)


def asked(
    backend: Backend, request: Request, read: Callable[[Any], Scores], known: int, kept: int, steps: int
) -> Future[Scores]:
    """Ask a backend about the steps of a path that are not known and fit into its window.

    Args:
        backend: What is asked.
        request: About them; if it fails on its own, so do their scores.
        read: From its answer to their scores.
        known: How many of the first steps are known.
        kept: How many of them fit.
        steps: How many there are.
    """
    result: Future[Scores] = Future()

    def put(scores: Scores) -> None:
        result.set_result([*[None] * known, *scores, *[None] * (steps - kept)])

    def refused(error: RequestFailed) -> None:
        put([Failed(str(error))] * (kept - known))

    forward(backend.submit(request), lambda answer: put(read(answer)), result, refused)
    return result


def score_paths(scorer: Scorer, paths: Sequence[tuple[str, Sequence[str]]]) -> list[Scores]:
    """Return the scores of (question, steps) paths, asked for as one batch."""
    futures = [scorer.submit(question, steps) for question, steps in paths]
    return [future.result() for future in futures]


@dataclass(frozen=True, slots=True)
class Example:
    """A problem with a right path and one that goes wrong at its last step."""

    question: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


EXAMPLES = (
    Example(
        "A box holds 6 rows of 7 eggs. 5 eggs are broken. How many eggs are whole?",
        ("The box holds 6 * 7 = 42 eggs in all.\n\n", "Of these 42 - 5 = 37 are whole, so the answer is \\boxed{37}."),
        ("The box holds 6 * 7 = 42 eggs in all.\n\n", "Of these 42 + 5 = 91 are whole, so the answer is \\boxed{91}."),
    ),
    Example(
        "Tom has 3 bags with 12 marbles each and gives away 10 marbles. How many are left?",
        (
            "3 bags with 12 marbles are 3 * 12 = 36 marbles.\n\n",
            "After giving 10 away, 36 - 10 = \\boxed{26} are left.",
        ),
        (
            "3 bags with 12 marbles are 3 * 12 = 36 marbles.\n\n",
            "After giving 10 away, 36 - 10 = \\boxed{62} are left.",
        ),
    ),
)


def self_test_examples(problems: Sequence[Problem]) -> Sequence[Example]:
    """Return known paths of the kind of text that the problems need."""
    from rollouts.tinymath import generate_problems, solution_steps
    from rollouts.tinymath.problems import parse_question

    if problems and all(parse_question(problem.question) for problem in problems):  # wherever they come from
        examples = []
        for problem in generate_problems("validation", 16):
            right = tuple(solution_steps(problem.question)[:2])
            value = right[1].rstrip().rpartition("=")[2]
            wrong = (right[0], right[1].replace(f"={value}", f"={int(value) + 10}"))
            examples.append(Example(problem.question, right, wrong))
        return examples
    return EXAMPLES


def _fits(columns: tuple[str, ...], score: Any) -> bool:
    """Whether what a scorer gave for a step are numbers for its columns."""
    values = score if isinstance(score, tuple) else (score,)
    return len(values) == len(columns) and all(
        isinstance(value, int | float | np.number) and math.isfinite(value) and (name != "score" or 0.0 <= value <= 1.0)
        for name, value in zip(columns, values, strict=True)
    )


def self_test(scorer: Scorer, examples: Sequence[Example] = EXAMPLES, *, informed: bool = True) -> float:
    """Score known paths before a run.

    Args:
        scorer: The scorer.
        examples: The paths.
        informed: Whether it must prefer right steps to wrong ones, as a reward model does.

    Returns:
        Mean score of the right last steps minus that of the wrong ones.

    Raises:
        ConfigError: Not one score per step, scores outside [0, 1], scores that depend on later steps, or, of an
            informed scorer, wrong steps that score higher than right ones (swapped labels).
    """
    columns, margins = columns_of(scorer), []
    main = columns.index(first_of(columns))
    for example in examples:
        paths = (example.right, example.wrong, example.right[:1])
        found = score_paths(scorer, [(example.question, steps) for steps in paths])
        for steps, scores in zip(paths, found, strict=True):
            if len(scores) != len(steps):
                raise ConfigError(
                    f"Scorer {scorer.name!r} gave {len(scores)} scores for {len(steps)} steps: wrong step tag?"
                )
            if not all(map(partial(_fits, columns), scores)):
                expected = "numbers in [0, 1]" if columns == ("score",) else f"numbers for {', '.join(columns)}"
                raise ConfigError(f"Scorer {scorer.name!r} gave {scores}; expected {expected}.")
        right, wrong, alone = (np.array(scores, np.float64).reshape(len(scores), -1) for scores in found)
        if (np.abs(right[0] - alone[0]) > max(scorer.tolerance, 1e-6)).any():
            raise ConfigError(
                f"Scorer {scorer.name!r}: the first step scores {found[0][0]} with a second step and {found[2][0]} "
                "without; step scores must not depend on later steps (wrong step tag, or a model that looks ahead)."
            )
        margins.append(float(right[-1, main] - wrong[-1, main]))
    margin = sum(margins) / len(margins)
    if informed and margin <= 0.0:
        raise ConfigError(
            f"Scorer {scorer.name!r} prefers wrong steps (right minus wrong: {margin:+.3f} on {len(examples)} known "
            "examples): swapped labels, a wrong step tag, or a model that is no reward model for this kind of text. "
            "If it was made to tell something else, say `informed = false` in [scorer]."
        )
    return margin
