"""Live stepwise episodes: the process that cached trees stand for, written a second time without any tree or memo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rollouts.family import Family
from rollouts.models.stepwise import StepWriter
from rollouts.scoring.base import Scorer, score_paths
from rollouts.store.store import Store
from rollouts.tasks.grading import Grader, make_grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import Prefix, Step
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees


def fill(
    path: Path,
    family: Family,
    problems: Sequence[Problem],
    writers: Mapping[str, StepWriter],
    scorer: Scorer,
    replicas: int,
    cap: int | None,
) -> Store:
    """Make a store of what models write, with scores and grades: what live episodes are compared with."""
    store = Store.create(path, family.process(cap))
    store.add_problems(problems)
    Grower(writers, StepBuffer(store.steps)).run(load_trees(store, problems, replicas, cap))
    score_store(store, scorer)
    grade_store(store, make_grader("exact"))
    return store


def next_steps(writer: StepWriter, prefixes: Sequence[Prefix]) -> list[Step]:
    """Return the next step of each prefix, asked for as one batch."""
    futures = [writer.submit(prefix, whole=False) for prefix in prefixes]
    return [future.result().steps[0] for future in futures]


@dataclass
class LiveEpisode:
    problem: Problem
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    large_tokens: int = 0
    steps: int = 0
    done: bool = False

    def prefix(self) -> Prefix:
        return Prefix(self.problem.id, self.problem.question, 0, tuple(self.texts), self.tokens)


def run_live(
    problems: Sequence[Problem],
    writers: dict[str, StepWriter],
    decide: Callable[[np.ndarray], np.ndarray],
    grader: Grader,
    scorer: Scorer | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run one episode per problem given (repeats allowed); return correctness, large tokens and steps.

    `decide` maps the scores of the small proposals (NaN without a scorer) to escalations.
    """
    episodes = [LiveEpisode(problem) for problem in problems]
    while running := [episode for episode in episodes if not episode.done]:
        proposals = next_steps(writers["small"], [episode.prefix() for episode in running])
        scores = np.full(len(running), np.nan)
        if scorer is not None:
            paths = [(e.problem.question, [*e.texts, step.text]) for e, step in zip(running, proposals, strict=True)]
            scores = np.array([given[-1] for given in score_paths(scorer, paths)], float)
        escalate = np.asarray(decide(scores), bool)
        chosen = [episode for episode, up in zip(running, escalate, strict=True) if up]
        large = iter(next_steps(writers["large"], [episode.prefix() for episode in chosen]))
        for episode, up, proposal in zip(running, escalate, proposals, strict=True):
            step = next(large) if up else proposal
            episode.texts.append(step.text)
            episode.tokens += step.tokens
            episode.large_tokens += step.tokens * bool(up)
            episode.steps += 1
            episode.done = step.terminal
    grades = grader.grade_many([(e.problem.answer, "".join(e.texts)) for e in episodes])
    return (
        np.array([grade.correct for grade in grades], float),
        np.array([episode.large_tokens for episode in episodes], float),
        np.array([episode.steps for episode in episodes], float),
    )
