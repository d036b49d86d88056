"""Hand-made trees and scripted models for tests of bookkeeping, where no language model is the point."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from rollouts.models.stepwise import Generation
from rollouts.tasks.problems import Problem
from rollouts.text.likelihood import LOOKED_AT, STATISTICS, Likelihood
from rollouts.text.steps import DELIMITER, Prefix, Step, StopReason, prefix_hash


def problem(name: str = "p0", split: str = "train", answer: str = "7") -> Problem:
    return Problem(name, split, f"Question {name}?", answer, "handmade", "MIT")


def process(max_escalations=None, **changes):
    value = {
        "mode": "continue",
        "delimiter": DELIMITER,
        "limits": {"step_tokens": 512, "solution_tokens": 2048, "max_steps": 30},
        "max_escalations": max_escalations,
        "seed": 0,
        "labels": False,
        "windows": {"small": 64, "large": 64},
        "small": {"model": "s", "sampling": {"temperature": 0.7}},
        "large": {"model": "l", "sampling": {"temperature": 0.7}},
    }
    return {**value, **changes}


class ScriptedWriter:
    """Writes steps that are a function of (problem, replica, prefix, role): a random tree that never changes."""

    whole_paths = True

    def __init__(self, role: str, depth: int = 4, merge: int = 3, asked: list | None = None) -> None:
        self.role = role
        self.depth = depth
        self.merge = merge
        self.asked = asked if asked is not None else []

    def step(self, prefix: Prefix, steps: tuple[str, ...]) -> Step:
        draw = prefix_hash((prefix.problem, str(prefix.replica), *steps)) >> 7
        mine = draw % self.merge if self.role == "small" else draw % self.merge + (draw >> 5) % 2
        end = len(steps) + 1 >= self.depth or (draw >> 9) % 7 == 0
        if end:
            return Step(f"so \\boxed{{{7 if mine % 2 == 0 else 8}}}", 5 + mine, StopReason.BOXED, 20)
        return Step(f"step {len(steps)} says {mine}\n\n", 3 + mine, StopReason.DELIMITER, 20)

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        self.asked.append((prefix.problem, prefix.replica, prefix.steps, self.role, whole))
        steps, texts = [], prefix.steps
        while True:
            steps.append(self.step(prefix, texts))
            texts = (*texts, steps[-1].text)
            if steps[-1].terminal or not whole:
                break
        future: Future[Generation] = Future()
        future.set_result(Generation(tuple(steps), sum(step.tokens for step in steps)))
        return future


class ShuffledWriter(ScriptedWriter):
    """Answers as servers do: later, and in any order."""

    def __init__(self, role: str, seed: int) -> None:
        super().__init__(role, merge=2)
        self.waiting: list[tuple[Future[Generation], Generation]] = []
        self.generator = random.Random(f"{role}{seed}")

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        answer = super().submit(prefix, whole=whole).result()
        future: Future[Generation] = Future()
        self.waiting.append((future, answer))
        threading.Timer(self.generator.uniform(0.0, 0.01), self._answer).start()
        return future

    def _answer(self) -> None:
        future, answer = self.waiting.pop(self.generator.randrange(len(self.waiting)))
        future.set_result(answer)


class ScriptedScorer:
    """Scores that are a function of the path."""

    name = "scripted"
    tolerance = 0.0

    def __init__(self) -> None:
        self.paths = 0

    def process(self):
        return {"kind": "scripted"}

    def of(self, question: str, steps) -> float:
        return (prefix_hash((question, *steps)) % 1000) / 1000

    def submit(self, question, steps):
        self.paths += 1
        future = Future()
        future.set_result([self.of(question, steps[: i + 1]) for i in range(len(steps))])
        return future


def known(role: str, question: str, steps) -> tuple[float, ...]:
    """Return scripted statistics of the last step, as tables hold them."""
    draw = prefix_hash((role, question, *steps))
    logprobs = [-((draw >> shift) % 97 + 1) / 50 for shift in (3, 13, 23)]
    entropies = [((draw >> shift) % 89) / 40 for shift in (5, 15, 25)]
    return tuple(np.float32(Likelihood(tuple(logprobs), tuple(entropies)).statistics()).tolist())


class Statistician(ScriptedScorer):
    """A scorer with the columns that generating models' statistics have."""

    def __init__(self, role: str, roles=None) -> None:
        super().__init__()
        self.name, self.columns, self.roles = role, STATISTICS, LOOKED_AT[role] if roles is None else roles

    def of(self, question, steps):
        return known(self.name, question, steps)


class TellingWriter(ScriptedWriter):
    """Tells the statistics of its steps, those of a `Statistician`."""

    def step(self, prefix, steps):
        made = super().step(prefix, steps)
        return replace(made, statistics=known(self.role, prefix.question, (*steps, made.text)))
