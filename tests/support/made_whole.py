"""Three problems of which every token is written down: what either model solves by itself, and what a scorer says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from handmade import ScriptedScorer, ScriptedWriter, problem, process

from agents.routers.base import Knob
from rollouts.models.stepwise import Step
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import ROLES, StopReason
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from trim_env.tables import decision_tables

# (answer, tokens of each step), by problem and model; 7 is right.
WRITTEN = {
    "p0": {"small": (7, (3, 4)), "large": (7, (5, 6))},
    "p1": {"small": (8, (2, 3)), "large": (7, (7, 1, 8))},
    "p2": {"small": (8, (4,)), "large": (8, (9,))},
}
SCORES = {"p0": (0.9, 0.8), "p1": (0.9, 0.2), "p2": (0.6,)}  # of the small model's steps
PROMPT = 20


class Writer(ScriptedWriter):
    def step(self, prefix, steps):
        answer, tokens = WRITTEN[prefix.problem.split("#")[0]][self.role]
        place = min(len(steps), len(tokens) - 1)
        if place == len(tokens) - 1:
            return Step(f"so \\boxed{{{answer}}}", tokens[place], StopReason.BOXED, PROMPT + 100 * len(steps))
        return Step(f"{self.role} {place}\n\n", tokens[place], StopReason.DELIMITER, PROMPT + 100 * len(steps))


class Scorer(ScriptedScorer):
    def of(self, question: str, steps) -> float:
        scores = SCORES[question.removeprefix("Question ").split("?")[0].split("#")[0]]
        return scores[min(len(steps), len(scores)) - 1]


def three_problems(path, max_escalations=0, replicas=1, split="test", copies=1):
    """Return the compiled trees; `copies` of each problem are ``p0``, ``p0#1``, .."""
    names = [f"{name}#{i}" if i else name for i in range(copies) for name in WRITTEN]
    items = [problem(name, split) for name in names]
    store = Store.create(path, process(max_escalations))
    store.add_problems(items)
    trees = load_trees(store, items, replicas, max_escalations)
    Grower({role: Writer(role) for role in ROLES}, StepBuffer(store.steps)).run(trees)
    score_store(store, Scorer())
    grade_store(store, make_grader("exact"))
    return compile_store(store, cache=False)


def verified(trees, yes, samples=8.0, split="test"):
    """Return trees whose small solutions were verified so, for 100 tokens read and 10 decoded a sample."""
    last = decision_tables(trees, split).alone.last[:, 0]
    told = {"yes": yes, "samples": samples, "read": 100 * samples, "decoded": 10 * samples}
    signals = {}
    for name, values in told.items():
        unknown = np.full((trees.nodes, 2), np.nan, np.float32)
        column = np.array(trees.signals.get(f"verification.{name}", unknown))
        column[last, 0] = values
        signals[f"verification.{name}"] = column
    return replace(trees, signals={**trees.signals, **signals})


@dataclass(frozen=True)
class Sends:
    """Sends questions to the large model with probabilities that were written down."""

    chances: tuple[float, ...]
    name: str = "sends"
    knob: Knob = Knob("chance", 0.0)

    def sends(self, questions):
        assert all(question.startswith("Question p") for question in questions)
        return np.resize(self.chances, len(questions))


@dataclass(frozen=True)
class Retries:
    """Starts again below a threshold on the first feature."""

    threshold: float
    schema: str = "agg/1"
    name: str = "retries"
    knob: Knob = Knob("threshold", 0.0)

    def retries(self, attempts: Any):
        return (attempts.features[:, 0] < self.threshold).astype(float)
