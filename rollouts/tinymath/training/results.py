"""The family's table of results: measures the three models on held-out problems and writes RESULTS.md."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import Qwen2ForCausalLM

from rollouts.tinymath.problems import TinyProblem, generate_problems
from rollouts.tinymath.training.folders import ProcessRewardModel, load_model
from rollouts.tinymath.training.measure import (
    Measurement,
    area_under_curve,
    is_correct,
    measure_solutions,
    prefix_labels,
)
from rollouts.tinymath.training.sampling import MAX_NEW_TOKENS, sample_solutions, score_solutions

_COMMAND = "python -m rollouts.tinymath.training.train"


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


def measure_scores(
    problems: Sequence[TinyProblem], solutions: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> ScoreQuality:
    """How well the scores of solutions' steps tell right from wrong."""
    labels = [prefix_labels(p.question, s) for p, s in zip(problems, solutions, strict=True)]
    until = [row.index(False) + 1 if False in row else len(row) for row in labels]
    return ScoreQuality(
        solution=area_under_curve(
            [min(row) for row in scores], [is_correct(p, s) for p, s in zip(problems, solutions, strict=True)]
        ),
        step=area_under_curve(list(chain(*scores)), list(chain(*labels))),
        first_error=area_under_curve(
            list(chain(*(row[:end] for row, end in zip(scores, until, strict=True)))),
            list(chain(*(row[:end] for row, end in zip(labels, until, strict=True)))),
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


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def render_results(figures: FamilyResults, minutes: float) -> str:
    """The results as Markdown."""
    models, scores = figures.models, figures.scores
    half_width = {key: 1.96 * float(np.sqrt(m.accuracy * (1 - m.accuracy) / m.count)) for key, m in models.items()}
    accuracy = [
        [role, split, m.count, f"{m.accuracy:.3f} ± {half_width[role, split]:.3f}", f"{m.mean_tokens:.1f}"]
        for (role, split), m in models.items()
    ]
    kinds = sorted({kind for m in models.values() for kind in m.step_errors})
    columns = list(models)
    names = [" ".join(key) for key in columns]
    lengths = sorted({length for m in models.values() for length in m.by_definitions})
    return "\n\n".join(
        [
            "# Results of the embedded family",
            f"{datetime.date.today().isoformat()}; 2 cores, CPU; `{_COMMAND}`, "
            f"{minutes:.1f} minutes of training; "
            "one solution for each problem at temperature 0.7, neither top-k nor top-p, float32.",
            "## Accuracy",
            _table(["model", "split", "problems", "right (95 % interval)", "tokens a solution"], accuracy),
            "## Process reward model, on the small model's solutions",
            "Areas under the ROC curve: minimum score against a right answer; score against all steps so far "
            "being right; the same up to the first wrong step.",
            _table(
                ["split", "minimum score", "step", "up to first wrong step"],
                [[split, q.solution, q.step, q.first_error] for split, q in scores.items()],
            ),
            "## Share of wrong steps, by kind of step",
            "A step is wrong if it is wrong given what was written before it.",
            _table(["kind", *names], [[k, *(models[c].step_errors.get(k, "") for c in columns)] for k in kinds]),
            "## Share of right solutions, by number of definitions",
            "One step for each definition, and the answer.",
            _table(
                ["definitions", *names],
                [[n, *(models[c].by_definitions.get(n, (0, ""))[1] for c in columns)] for n in lengths],
            ),
        ]
    )


def write_results(figures: FamilyResults, path: Path | None, minutes: float) -> str:
    """Render the results and, where a path is given, write them there."""
    text = render_results(figures, minutes) + "\n"
    if path is not None:
        path.write_text(text)
    return text
