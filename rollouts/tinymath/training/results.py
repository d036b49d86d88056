"""The family's table of results: measures the three models on held-out problems and writes RESULTS.md."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu
from transformers import Qwen2ForCausalLM

from rollouts.models.hf.reward_model import ProcessRewardModel
from rollouts.tinymath.labels import label_steps
from rollouts.tinymath.problems import Definition, TinyProblem, answer_step, generate_problems, parse_question
from rollouts.tinymath.training.batches import Encoder
from rollouts.tinymath.training.folders import load_model
from rollouts.tinymath.training.sampling import MAX_NEW_TOKENS, sample_solutions, score_solutions


@dataclass(frozen=True)
class Measurement:
    """Figures of one model on one set of problems, one solution each; shares are between 0 and 1."""

    count: int
    accuracy: float
    by_definitions: dict[int, float]
    step_errors: dict[str, float]
    mean_tokens: float


@dataclass(frozen=True)
class ScoreQuality:
    """How well scores rank, as areas under the ROC curve.

    ``solution``: the minimum over a solution's steps against whether its answer is right; ``step``: each
    score against whether all steps so far are right; ``first_error``: the same up to a solution's first
    wrong step, which is where a router has to decide.
    """

    solution: float
    step: float
    first_error: float


@dataclass(frozen=True)
class FamilyResults:
    """Figures of each language model and of the scores of the small model's solutions, by split."""

    models: dict[tuple[str, str], Measurement]
    scores: dict[str, ScoreQuality]


def _is_correct(problem: TinyProblem, steps: Sequence[str]) -> bool:
    return bool(steps) and steps[-1] == answer_step(int(problem.answer))


def _kind_of(definition: Definition) -> str:
    """The kind of an operation, by what makes it easy or hard."""
    if definition.operator == "*":
        return "times digit" if isinstance(definition.right, int) and definition.right < 10 else "times two digits"
    return {"+": "add", "-": "subtract", "%": "remainder"}[definition.operator]


def _area(scores: Iterable[float], labels: Iterable[bool]) -> float:
    """The area under the ROC curve; nan where one kind lacks."""
    values, truth = np.array(list(scores)), np.array(list(labels), dtype=bool)
    pairs = truth.sum() * (~truth).sum()
    return float(mannwhitneyu(values[truth], values[~truth]).statistic / pairs) if pairs else float("nan")


def measure_solutions(problems: Sequence[TinyProblem], solutions: Sequence[Sequence[str]]) -> Measurement:
    """Figures of a model's solutions, one for each problem."""
    encoder = Encoder()
    tried: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    lengths: dict[int, list[bool]] = {}
    for problem, steps in zip(problems, solutions, strict=True):
        program = parse_question(problem.question)
        assert program is not None
        kinds = [*map(_kind_of, program.definitions), "answer"]
        for kind, right in zip(kinds, label_steps(problem.question, steps), strict=False):
            tried[kind] += 1
            wrong[kind] += not right
        lengths.setdefault(len(program.definitions), []).append(_is_correct(problem, steps))
    return Measurement(
        count=len(problems),
        accuracy=float(np.mean(list(chain(*lengths.values())))),
        by_definitions={length: float(np.mean(each)) for length, each in sorted(lengths.items())},
        step_errors={kind: wrong[kind] / tried[kind] for kind in sorted(tried)},
        mean_tokens=float(np.mean([sum(len(encoder.text(step)) for step in steps) + 1 for steps in solutions])),
    )


def measure_scores(
    problems: Sequence[TinyProblem], solutions: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> ScoreQuality:
    """How well the scores of solutions' steps tell right from wrong."""
    right = [_is_correct(*each) for each in zip(problems, solutions, strict=True)]
    # What the process reward model predicts: whether a step and all before it are right.
    labels = [list(accumulate(label_steps(p.question, s), and_)) for p, s in zip(problems, solutions, strict=True)]
    until = [row.index(False) + 1 if False in row else len(row) for row in labels]
    return ScoreQuality(
        solution=_area((min(row, default=0.0) for row in scores), right),
        step=_area(chain(*scores), chain(*labels)),
        first_error=_area(
            chain(*(row[:end] for row, end in zip(scores, until, strict=True))),
            chain(*(row[:end] for row, end in zip(labels, until, strict=True))),
        ),
    )


def measure_family(
    weights: Path,
    *,
    splits: Sequence[str] = ("test", "ood"),
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> FamilyResults:
    """Sample one solution at temperature 0.7 for each problem and model; score the small model's.

    Args:
        weights: Folder with the three models' folders.
        splits: Splits to measure on.
        limit: Number of problems of each split; the default counts where None.
        seed: Seed of sampling.
        max_new_tokens: Where a solution that does not end is cut.
    """
    judge = load_model("prm", weights / "prm")
    assert isinstance(judge, ProcessRewardModel)
    models: dict[tuple[str, str], Measurement] = {}
    scores: dict[str, ScoreQuality] = {}
    for role in ("small", "large"):
        model = load_model(role, weights / role)
        assert isinstance(model, Qwen2ForCausalLM)
        for split in splits:
            problems = generate_problems(split, limit)
            questions = [problem.question for problem in problems]
            solutions = sample_solutions(model, questions, seed=seed, max_new_tokens=max_new_tokens)
            models[role, split] = measure_solutions(problems, solutions)
            if role == "small":
                scores[split] = measure_scores(problems, solutions, score_solutions(judge, questions, solutions))
    return FamilyResults(models, scores)


def _row(*cells: object) -> str:
    return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def _by_model(name: str, figures: Mapping[tuple[str, str], Mapping[Any, float]]) -> str:
    """A table with a column for each model and split, empty where it has no figure."""
    rows = sorted({key for column in figures.values() for key in column})
    cells = ([key, *(column.get(key, "") for column in figures.values())] for key in rows)
    return _table([name, *map(" ".join, figures)], cells)


def render_results(figures: FamilyResults, minutes: float) -> str:
    """The results as Markdown."""
    accuracy = [
        [*key, m.count, f"{m.accuracy:.3f} ± {1.96 * (m.accuracy * (1 - m.accuracy) / m.count) ** 0.5:.3f}",
         f"{m.mean_tokens:.1f}"]
        for key, m in figures.models.items()
    ]  # fmt: skip
    scores = [[split, q.solution, q.step, q.first_error] for split, q in figures.scores.items()]
    blocks = [
        "# Results of the embedded family",
        f"{datetime.date.today().isoformat()}; 2 cores, CPU; `python -m rollouts.tinymath.training.train`, "
        f"{minutes:.1f} minutes of training; "
        "one solution for each problem at temperature 0.7, neither top-k nor top-p, float32.",
        "## Accuracy",
        _table(["model", "split", "problems", "right (95 % interval)", "tokens a solution"], accuracy),
        "## Process reward model, on the small model's solutions",
        "Areas under the ROC curve: minimum score against a right answer; score against all steps so far "
        "being right; the same up to the first wrong step.",
        _table(["split", "minimum score", "step", "up to first wrong step"], scores),
        "## Share of wrong steps, by kind of step",
        "A step is wrong if it is wrong given what was written before it.",
        _by_model("kind", {key: m.step_errors for key, m in figures.models.items()}),
        "## Share of right solutions, by number of definitions",
        "One step for each definition, and the answer.",
        _by_model("definitions", {key: m.by_definitions for key, m in figures.models.items()}),
    ]
    return "\n\n".join(blocks) + "\n"
