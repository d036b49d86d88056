"""Finished stores of scripted trees, and every episode that they hold, enumerated without compiled arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from handmade import ScriptedScorer, ScriptedWriter, problem, process

from rollouts.store.shards import KEY, Table
from rollouts.store.store import Store
from rollouts.tasks.answers import final_answer
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL, Step, StopReason
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from rollouts.trees.tree import Node, RolloutTree

PROBLEMS = [problem(f"p{i}", "test" if i == 5 else "train") for i in range(6)]


class HorizonWriter(ScriptedWriter):
    """Never answers in a box: every path goes on until the third step, which states a number."""

    def step(self, prefix, steps):
        made = super().step(prefix, ())
        if len(steps) == 2:
            return Step(f"perhaps {len(steps[0]) + made.tokens}", made.tokens, StopReason.MAX_STEPS, 20)
        return Step(f"{self.role[0]}{made.tokens}\n\n", made.tokens, StopReason.DELIMITER, 20)


class LatexWriter(ScriptedWriter):
    """Writes what real models write: LaTeX, accents, CJK, characters beyond the basic plane."""

    def step(self, prefix, steps):
        made = super().step(prefix, steps)
        extra = (
            r"Então $\frac{\sqrt[3]{x}}{2} \le ∫₀¹ f$, 因此 𝔼[x]≥½ – “ok” " if self.role == LARGE else r"\(x^{2}\) é "
        )
        return Step(extra + made.text, made.tokens, made.stop_reason, made.prompt_tokens)


def writers(kind=ScriptedWriter):
    return {role: kind(role) for role in ROLES}


def grown(path, max_escalations=None, replicas=2, kind=ScriptedWriter, problems=PROBLEMS, **changes) -> Store:
    """Return a store with steps alone."""
    store = Store.create(path, process(max_escalations, **changes))
    store.add_problems(problems)
    trees = load_trees(store, problems, replicas, max_escalations)
    Grower(writers(kind), StepBuffer(store.steps)).run(trees)
    return store


def rows_of(table: Table) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of a table by what they are about; none may be there twice, in whatever shards."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in table.read():
        for row in part.to_pylist():
            key = tuple(row[name] for name in KEY)
            assert key not in found, f"{key} twice"
            found[key] = row
    return found


def finished(path, max_escalations=None, grader="exact", **options) -> Store:
    """Return a store with steps, scores and grades."""
    store = grown(path, max_escalations, **options)
    score_store(store, ScriptedScorer())
    grade_store(store, make_grader(grader))
    return store


@dataclass(frozen=True)
class Outcome:
    """What an episode should give; `actions` are those asked for, masked ones included."""

    actions: tuple[int, ...]
    correct: bool
    large_tokens: int
    small_tokens: int
    escalations: int
    masked: int


def outcomes(tree: RolloutTree, cap: int | None, answer: str = "7") -> Iterator[Outcome]:
    """Yield all episodes of a tree: both actions at every decision, with at most `cap` escalations carried out."""

    def go_on(node: Node, used: int) -> Iterator[tuple[tuple[int, ...], str, int, int, int, int]]:
        for action in (0, 1):
            masked = action == 1 and used == cap
            role = SMALL if action == 0 or masked else LARGE
            step = node.proposals[role]
            up = role == LARGE
            sums = (step.tokens * up, node.proposals[SMALL].tokens, int(up), int(masked))
            if step.terminal:
                yield ((action,), step.text, *sums)
                continue
            child = next(n for n in tree.nodes.values() if n.steps == (*node.steps, step.text))
            for actions, text, *later in go_on(child, used + up):
                yield ((action, *actions), text, *(int(sum(pair)) for pair in zip(sums, later, strict=True)))

    for actions, text, *sums in go_on(tree.root, 0):
        found = final_answer(text) or text.split()[-1]
        yield Outcome(actions, found == answer, *sums)


def same(one, other) -> bool:
    """Whether two nested results of environments are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return np.array_equal(one, other)


def rollout(env, steps, seed=None, start=True):
    """Return everything that a vector environment says under actions drawn from a fixed generator."""
    generator = np.random.default_rng(11)
    seen = [env.reset(seed=seed)] if start else []
    for _ in range(steps):
        seen.append(env.step(generator.integers(0, 2, env.num_envs)))
    return seen
