"""A small finished store of scripted trees, for tests of routers where no language model is the point."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from handmade import ScriptedScorer, ScriptedWriter, problem, process

from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import ROLES, prefix_hash
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees


class AbleLarge(ScriptedWriter):
    """A large model whose last steps are mostly right, so that there is something to route for."""

    def step(self, prefix, steps):
        step = super().step(prefix, steps)
        if self.role == "large" and step.terminal and hash_of(prefix, steps) % 5:
            return replace(step, text="so \\boxed{7}")
        return step


def hash_of(prefix, steps):
    return prefix_hash((prefix.problem, str(prefix.replica), "able", *steps)) >> 5


SPLITS = ("train", "validation", "test")


def scripted_store(
    path, problems=60, max_escalations=None, replicas=2, splits=SPLITS, scorer=None, answers=MappingProxyType({})
) -> Store:
    """`answers` has right answers other than 7, by split."""
    names = [(f"p{i}", splits[i % len(splits)]) for i in range(problems)]
    items = [problem(name, split, answers.get(split, "7")) for name, split in names]
    store = Store.create(path, process(max_escalations))
    store.add_problems(items)
    trees = load_trees(store, items, replicas, max_escalations, chunk=16)
    Grower({role: AbleLarge(role) for role in ROLES}, StepBuffer(store.steps)).run(trees)
    score_store(store, scorer or ScriptedScorer())
    grade_store(store, make_grader("exact"))
    return store
