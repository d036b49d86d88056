"""The family's table of results: measures the three models on held-out problems and writes RESULTS.md."""

from __future__ import annotations

import datetime
from collections import defaultdict
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
from rollouts.tinymath.problems import Definition, generate_problems, parse_question, solution_steps
from rollouts.tinymath.training.batches import Encoder
from rollouts.tinymath.training.folders import load_model
from rollouts.tinymath.training.sampling import MAX_NEW_TOKENS, Solved, sample_solutions, score_solutions


@dataclass(frozen=True)
class Measurement:
    """Figures of one model on one set of problems, one solution each; shares are between 0 and 1."""

    count: int
    accuracy: float
    by_definitions: dict[int, float]
    step_errors: dict[str, float]
    mean_tokens: float


def _is_correct(question: str, steps: Sequence[str]) -> bool:
    return bool(steps) and steps[-1] == solution_steps(question)[-1]


def _kind_of(definition: Definition) -> str:
    """The kind of an operation, by what makes it easy or hard."""
    if definition.operator == "*":
        return "times digit" if isinstance(definition.right, int) and definition.right < 10 else "times two digits"
    return {"+": "add", "-": "subtract", "%": "remainder"}[definition.operator]


def _means(groups: Mapping[Any, Sequence[bool]]) -> dict[Any, float]:
    return {key: float(np.mean(group)) for key, group in sorted(groups.items())}


def measure_solutions(solved: Sequence[Solved]) -> Measurement:
    """Figures of a model's solutions, one for each problem."""
    encoder = Encoder()
    wrong: dict[str, list[bool]] = defaultdict(list)
    correct: dict[int, list[bool]] = defaultdict(list)
    for program, steps in solved:
        kinds = [*map(_kind_of, program.definitions), "answer"]
        for kind, right in zip(kinds, label_steps(program.question, steps), strict=False):
            wrong[kind].append(not right)
        correct[len(program.definitions)].append(_is_correct(program.question, steps))
    return Measurement(
        count=len(solved),
        accuracy=float(np.mean(list(chain(*correct.values())))),
        by_definitions=_means(correct),
        step_errors=_means(wrong),
        mean_tokens=float(np.mean([sum(len(encoder.text(step)) for step in steps) + 1 for _, steps in solved])),
    )


def _area(scores: Iterable[float], labels: Iterable[bool]) -> float:
    """The area under the ROC curve; nan where one kind lacks."""
    values, truth = np.array(list(scores)), np.array(list(labels), dtype=bool)
    pairs = truth.sum() * (~truth).sum()
    return float(mannwhitneyu(values[truth], values[~truth]).statistic / pairs) if pairs else float("nan")


def measure_scores(solved: Sequence[Solved], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """How well the scores of solutions' steps rank, as areas under the ROC curve.

    Returns:
        ``minimum score``: over a solution's steps against whether its answer is right; ``step``: each score against
        whether all steps so far are right; ``up to first wrong step``: the same up to there, which is where a router
        has to decide.
    """
    labels = [list(accumulate(label_steps(program.question, steps), and_)) for program, steps in solved]
    until = [row.index(False) + 1 if False in row else len(row) for row in labels]
    until_wrong = [[row[:end] for row, end in zip(rows, until, strict=True)] for rows in (scores, labels)]
    return {
        "minimum score": _area(
            (min(row, default=0.0) for row in scores),
            (_is_correct(program.question, steps) for program, steps in solved),
        ),
        "step": _area(chain(*scores), chain(*labels)),
        "up to first wrong step": _area(*map(chain.from_iterable, until_wrong)),
    }


def measure_family(
    weights: Path,
    *,
    splits: Sequence[str] = ("test", "ood"),
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> tuple[dict[tuple[str, str], Measurement], dict[str, dict[str, float]]]:
    """Sample one solution at temperature 0.7 for each problem and model; score the small model's.

    Args:
        weights: Folder with the three models' folders.
        splits: Splits to measure on.
        limit: Number of problems of each split; the default counts where None.
        seed: Seed of sampling.
        max_new_tokens: Where a solution that does not end is cut.

    Returns:
        By role and split the figures of each language model; by split those of the scores.
    """
    judge = load_model("prm", weights / "prm")
    assert isinstance(judge, ProcessRewardModel)
    models: dict[tuple[str, str], Measurement] = {}
    scores: dict[str, dict[str, float]] = {}
    for role in ("small", "large"):
        model = load_model(role, weights / role)
        assert isinstance(model, Qwen2ForCausalLM)
        for split in splits:
            programs = [parse_question(problem.question) for problem in generate_problems(split, limit)]
            solved = sample_solutions(model, list(filter(None, programs)), seed=seed, max_new_tokens=max_new_tokens)
            models[role, split] = measure_solutions(solved)
            if role == "small":
                scores[split] = measure_scores(solved, score_solutions(judge, solved))
    return models, scores


def _row(*cells: object) -> str:
    return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def _by_model(name: str, figures: Mapping[tuple[str, str], Mapping[Any, float]]) -> str:
    """A table with a column for each model and split, empty where it has no figure."""
    rows = sorted({key for column in figures.values() for key in column})
    cells = ([key, *(column.get(key, "") for column in figures.values())] for key in rows)
    return _table([name, *map(" ".join, figures)], cells)


def render_results(
    models: Mapping[tuple[str, str], Measurement], scores: Mapping[str, Mapping[str, float]], minutes: float
) -> str:
    """The results as Markdown."""
    accuracy = [
        [*key, m.count, f"{m.accuracy:.3f} ± {1.96 * (m.accuracy * (1 - m.accuracy) / m.count) ** 0.5:.3f}",
         f"{m.mean_tokens:.1f}"]
        for key, m in models.items()
    ]  # fmt: skip
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
        _table(["split", *next(iter(scores.values()))], [[split, *areas.values()] for split, areas in scores.items()]),
        "## Share of wrong steps, by kind of step",
        "A step is wrong if it is wrong given what was written before it.",
        _by_model("kind", {key: m.step_errors for key, m in models.items()}),
        "## Share of right solutions, by number of definitions",
        "One step for each definition, and the answer.",
        _by_model("definitions", {key: m.by_definitions for key, m in models.items()}),
    ]
    return "\n\n".join(blocks) + "\n"
