"""What steps are worth, read off trees: how often solutions that begin with them come out right.

Nothing is generated or judged for it. In every replica that has a prefix, the tree goes on from it with the small model
alone, and that solution is graded: each replica is one Monte Carlo rollout of the value of the prefix, of the kind that
Math-Shepherd (Wang et al., 2024, https://arxiv.org/abs/2312.08935) generates for the purpose. Its *soft estimation* is
the share that is right (`Estimate.value`), its *hard estimation* whether any is (`LabelledStep.label`, threshold 0).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any, NamedTuple

from rollouts.errors import StoreError
from rollouts.store.rows import Rows
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.steps import DELIMITER, LARGE, ROLES, ROOT_HASH, SMALL, StopReason, extend_hash
from rollouts.trees.grow import load_trees
from rollouts.trees.tree import RolloutTree


@dataclass(slots=True)
class Estimate:
    """How many of so many rollouts were right."""

    right: int = 0
    count: int = 0

    def add(self, outcome: bool | None) -> None:
        """Take one more rollout; None is none."""
        self.right += outcome is True
        self.count += outcome is not None

    @property
    def value(self) -> float | None:
        """The share that was right; None without rollouts."""
        return self.right / self.count if self.count else None


@dataclass(slots=True, eq=False)
class LabelledStep:
    """A step after one prefix, in all replicas that have it there.

    Attributes:
        text: Its text, with its delimiter if it has one.
        roles: Who wrote it, in the order of `ROLES`.
        small: Its value if the small model goes on alone.
        large: Its value if the large model goes on alone, where trees have that.
        advantage: One-step advantage of escalating: the value of the large model's steps after the same prefix minus
            that of this one, with the small model alone after either. None where the small model did not write it, or
            nothing is known of the large one's.
    """

    text: str
    roles: tuple[str, ...] = ()
    small: Estimate = field(default_factory=Estimate)
    large: Estimate = field(default_factory=Estimate)
    advantage: float | None = None

    def label(self, threshold: float) -> bool:
        """Whether its value, with the small model alone after it, is above a threshold."""
        return (self.small.value or 0.0) > threshold


class Choice(NamedTuple):
    """A step of a solution, among all steps whose value is known after the same prefix."""

    step: LabelledStep
    among: list[LabelledStep]


Solution = tuple[Choice, ...]


@dataclass(eq=False)
class _Prefix:
    """What follows one prefix in all replicas that have it."""

    steps: dict[str, LabelledStep] = field(default_factory=dict)  # by text
    escalated: Estimate = field(default_factory=Estimate)  # value of the large model's steps, always-small after them


def labelled_solutions(
    store: Store, grader: str, problems: Sequence[Problem], on_progress: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[Problem, list[Solution]]]:
    """Yield the problems that have trees, with their distinct solutions.

    A solution is a path through the trees of all replicas, from the root to where it ends or nothing more is known of
    values: a request that failed, or no path of the small model beyond K. Neighbours have most steps in common, and
    those are the same objects.

    Args:
        store: The store.
        grader: Its grade table.
        problems: The problems.
        on_progress: Called with the number of trees read since the last call.

    Raises:
        StoreError: Trees that are not complete, or solutions without a grade.
    """
    grades = Rows(store.grades(grader))
    trees = load_trees(store, problems, None, store.manifest["process"]["max_escalations"], along=[grades])
    for _, replicas in groupby(trees, lambda tree: tree.problem.id):
        after: dict[int, _Prefix] = {}
        for tree in replicas:
            _refuse(store, tree, grader, grades)
            _add(after, tree, grades)
            on_progress(1)
        for prefix in after.values():
            for step in prefix.steps.values():
                if SMALL in step.roles and prefix.escalated.value is not None and step.small.value is not None:
                    step.advantage = prefix.escalated.value - step.small.value
        if solutions := list(_solutions(after)):
            yield tree.problem, solutions


def _refuse(store: Store, tree: RolloutTree, grader: str, grades: Rows) -> None:
    where = f"{store.path}: problem {tree.problem.id!r}, replica {tree.replica}"
    if tree.missing():
        raise StoreError(f"{where} is not complete. Run the same `generate` again.")
    if any(node.proposals[role].terminal and tree.row_key(node, role) not in grades for _, node, role in tree.places()):
        raise StoreError(f"{where} has a solution without a grade by {grader!r}. "
                         f"Run `python -m rollouts grade {shlex.quote(str(store.path))}`.")  # fmt: skip


def outcomes(tree: RolloutTree, grades: Rows, after: str) -> dict[tuple[int, str], bool | None]:
    """Return whether each proposal, by node and role, leads to a right solution if one model alone goes on after it.

    Args:
        tree: A tree at hand.
        grades: Its grades.
        after: Role of the model that goes on.

    Returns:
        None where that model's path is not there, or a request on it failed.
    """
    found: dict[tuple[int, str], bool | None] = {}
    for node in reversed(tree.nodes.values()):
        for role, step in node.proposals.items():
            if (child := tree.child(node, role)) is not None:
                found[node.key, role] = found.get((child.key, after))
            else:
                failed = step.stop_reason is StopReason.FAILED
                found[node.key, role] = None if failed else grades[tree.row_key(node, role)]
    return found


def _add(after: dict[int, _Prefix], tree: RolloutTree, grades: Rows) -> None:
    ends = {role: outcomes(tree, grades, role) for role in ROLES}
    for node in tree.nodes.values():
        prefix = after.setdefault(node.key, _Prefix())
        prefix.escalated.add(ends[SMALL].get((node.key, LARGE)))
        # A replica is one rollout of a text, be it written by both.
        for text, role in {step.text: role for role, step in node.proposals.items()}.items():
            step = prefix.steps.setdefault(text, LabelledStep(text))
            step.small.add(ends[SMALL][node.key, role])
            step.large.add(ends[LARGE][node.key, role])
            step.roles = tuple(each for each in ROLES if each in (*step.roles, *node.twins(role)))


def _solutions(after: Mapping[int, _Prefix]) -> Iterator[Solution]:
    stack: list[tuple[int, Solution]] = [(ROOT_HASH, ())]
    while stack:
        key, path = stack.pop()
        known = [step for step in after[key].steps.values() if step.small.count] if key in after else []
        if path and not known:
            yield path
        stack += [(extend_hash(key, step.text), (*path, Choice(step, known))) for step in reversed(known)]


def rows(problem: Problem, solutions: Sequence[Solution], layout: str, threshold: float) -> Iterator[dict[str, Any]]:
    """Yield a problem's solutions as rows of a data set.

    Args:
        problem: The problem.
        solutions: Its solutions (`labelled_solutions`).
        layout: ``trl`` (``prompt``, ``completions``, ``labels``: the type that TRL calls stepwise supervision) or
            ``prm800k`` (``question``, and under ``label`` every step with its alternatives, rated 1 or -1).
        threshold: Of the value, for labels and ratings.

    Yields:
        Besides the layout's own fields: ``problem`` and ``split``, ``shared`` (how many of the first steps an earlier
        row has too), and of every step what `LabelledStep` holds, values unrounded.
    """
    before: Solution = ()
    for solution in solutions:
        shared = sum(
            1 for _ in takewhile(lambda pair: pair[0].step is pair[1].step, zip(before, solution, strict=False))
        )
        about = {"problem": problem.id, "split": problem.split, "shared": shared}
        yield _LAYOUTS[layout](problem, solution, threshold) | about
        before = solution


def _trl(problem: Problem, solution: Solution, threshold: float) -> dict[str, Any]:
    steps = [choice.step for choice in solution]
    facts = [_facts(step) for step in steps]
    return {
        "prompt": problem.question,
        "completions": [step.text.removesuffix(DELIMITER) for step in steps],
        "labels": [step.label(threshold) for step in steps],
        **{f"{name}s": [each[name] for each in facts] for name in facts[0]},
    }


def _prm800k(problem: Problem, solution: Solution, threshold: float) -> dict[str, Any]:
    steps = [
        {
            "completions": [
                {
                    "text": step.text.removesuffix(DELIMITER),
                    "rating": 1 if step.label(threshold) else -1,
                    "flagged": None,
                    **_facts(step),
                }
                for step in choice.among
            ],
            "human_completion": None,
            "chosen_completion": choice.among.index(choice.step),
        }
        for choice in solution
    ]
    ended = "solution" if solution[-1].step.label(threshold) else "found_error"
    return {
        "question": {"problem": problem.question, "ground_truth_answer": problem.answer},
        "label": {"steps": steps, "finish_reason": ended},
    }


def _facts(step: LabelledStep) -> dict[str, Any]:
    return {
        "value": step.small.value,
        "count": step.small.count,
        "large_value": step.large.value,
        "large_count": step.large.count,
        "advantage": step.advantage,
        "role": "+".join(step.roles),
    }


_LAYOUTS = {"trl": _trl, "prm800k": _prm800k}
