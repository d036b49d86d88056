"""Measures the trained family: accuracy, lengths, mistakes by kind of operation, scores against the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rollouts.tinymath.labels import label_steps
from rollouts.tinymath.problems import Definition, TinyProblem, answer_step, parse_question
from rollouts.tinymath.training.batches import Encoder


def is_correct(problem: TinyProblem, steps: Sequence[str]) -> bool:
    """Whether a solution ends in the right answer."""
    return bool(steps) and steps[-1] == answer_step(int(problem.answer))


def prefix_labels(question: str, steps: Sequence[str]) -> list[bool]:
    """For each step whether it and all before it are right: what the process reward model predicts."""
    return list(accumulate(label_steps(question, steps), lambda before, now: before and now))


def area_under_curve(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Probability that a right one scores above a wrong one, ties counting half; nan where one kind lacks.

    The Mann-Whitney form of the area under the ROC curve.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    wrong = np.sort(values[~truth])
    if truth.all() or not truth.any():
        return float("nan")
    below = np.searchsorted(wrong, values[truth], "left") + np.searchsorted(wrong, values[truth], "right")
    return float(below.mean() / (2 * len(wrong)))


def kind_of(definition: Definition) -> str:
    """The kind of an operation, by what makes it easy or hard."""
    if definition.operator == "*":
        return "times digit" if isinstance(definition.right, int) and definition.right < 10 else "times two digits"
    return {"+": "add", "-": "subtract", "%": "remainder"}[definition.operator]


@dataclass(frozen=True)
class Measurement:
    """Figures of one model on one set of problems, one solution each; shares are between 0 and 1."""

    count: int
    accuracy: float
    by_definitions: dict[int, tuple[int, float]]
    step_errors: dict[str, float]
    step_counts: dict[int, int]
    mean_tokens: float


def measure_solutions(problems: Sequence[TinyProblem], solutions: Sequence[Sequence[str]]) -> Measurement:
    """Figures of a model's solutions, one for each problem."""
    encoder = Encoder()
    tokens = [sum(len(encoder.text(step)) for step in steps) + 1 for steps in solutions]
    tried: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    lengths: dict[int, list[bool]] = {}
    for problem, steps in zip(problems, solutions, strict=True):
        program = parse_question(problem.question)
        assert program is not None
        kinds = [*map(kind_of, program.definitions), "answer"]
        for kind, right in zip(kinds, label_steps(problem.question, steps), strict=False):
            tried[kind] += 1
            wrong[kind] += not right
        lengths.setdefault(len(program.definitions), []).append(is_correct(problem, steps))
    return Measurement(
        count=len(problems),
        accuracy=float(np.mean([is_correct(p, s) for p, s in zip(problems, solutions, strict=True)])),
        by_definitions={key: (len(v), float(np.mean(v))) for key, v in sorted(lengths.items())},
        step_errors={kind: wrong[kind] / tried[kind] for kind in sorted(tried)},
        step_counts=dict(sorted(Counter(map(len, solutions)).items())),
        mean_tokens=float(np.mean(tokens)),
    )
