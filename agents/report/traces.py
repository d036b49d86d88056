"""Solved problems step by step: who wrote what, what was rejected, what it cost, and whether it was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.report.walks import ANSWERED, CUT_OFF, Paths
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, STOP_REASONS, Trees

FLAGS = {
    "wrong": "The routed solution is wrong.",
    "rescued": "Always-small is wrong in this tree; the routed solution has an escalation and is right.",
    "wasted": "There were escalations although always-small is right in this tree, or the solution is wrong still.",
    "spoiled": "Always-small is right in this tree; the routed solution is wrong.",
}
"""What a solution may be, and what that means."""


def flags(paths: Paths, small: Paths) -> dict[str, NDArray[np.bool_]]:
    """Return for each of `FLAGS` an (R,) array, given a router's paths and those of always-small in the same trees."""
    helped = np.isin(paths.actions, (ESCALATE_LARGE, CUT_OFF)).any(axis=1)
    return {
        "wrong": ~paths.correct,
        "rescued": ~small.correct & paths.correct & helped,
        "wasted": helped & (small.correct | ~paths.correct),
        "spoiled": small.correct & ~paths.correct,
    }


@dataclass(frozen=True, eq=False)
class Traced:
    """The paths of some routers through the same R trees."""

    trees: Trees
    indices: NDArray[np.integer[Any]]
    paths: Sequence[Paths]
    marks: Sequence[Mapping[str, NDArray[np.bool_]]]
    small: Paths
    large: Paths


def choose(trees: Trees, indices: NDArray[np.integer[Any]], count: int, seed: int) -> list[int]:
    """Draw positions of trees: of at most `count` problems, the first replica of each, in the order of the trees."""
    _, first = np.unique(trees.problem[indices], return_index=True)
    drawn = np.random.default_rng(seed).permutation(len(first))[: max(count, 0)]
    return sorted(first[drawn].tolist())


def problem_record(traced: Traced, position: int, answers: Mapping[str, str]) -> dict[str, Any]:
    """Return one problem with every step that one of the routers accepted or rejected."""
    trees, tree = traced.trees, int(traced.indices[position])
    order: dict[int, int] = {}
    shown: set[tuple[int, int]] = set()
    for paths in traced.paths:
        going = paths.rows[position] >= 0
        pairs = zip(paths.rows[position][going].tolist(), paths.actions[position][going].tolist(), strict=True)
        for row, action in pairs:
            order.setdefault(row, len(order))
            shown |= {(row, CONTINUE_SMALL), (row, int(action in (ESCALATE_LARGE, ANSWERED)))}
    problem = int(trees.problem[tree])
    return {
        "id": trees.problem_ids[problem],
        "replica": int(trees.replica[tree]),
        "question": trees.questions[problem],
        "answer": answers.get(trees.problem_ids[problem]),  # None where unknown
        "small": _end(traced.small, position),
        "large": _end(traced.large, position),
        "nodes": [  # proposals of the small and the large model; None where no router saw one
            [
                _proposal(trees, row, action, order) if (row, action) in shown else None
                for action in (CONTINUE_SMALL, ESCALATE_LARGE)
            ]
            for row in order
        ],
        "runs": [  # each router's path
            {
                # a digit for each step from node 0 on, as in `Paths.actions`
                "actions": "".join(map(str, paths.actions[position][paths.actions[position] >= 0].tolist())),
                **_end(paths, position),
                "flags": [name for name, which in marks.items() if which[position]],
            }
            for paths, marks in zip(traced.paths, traced.marks, strict=True)
        ],
    }


def _end(paths: Paths, position: int) -> dict[str, Any]:
    return {"right": bool(paths.correct[position]), "large_tokens": int(paths.large_tokens[position])}


def _proposal(trees: Trees, row: int, action: int, order: Mapping[int, int]) -> dict[str, Any] | None:
    child, label = int(trees.child[row, action]), int(trees.label[row, action])
    if child == MISSING:
        return None
    record: dict[str, Any] = {
        "text": trees.proposal(row, action).strip("\n"),
        "score": round(float(trees.score[row, action]), 4),
        "tokens": int(trees.tokens[row, action]),
        "label": None if label < 0 else bool(label),  # None without exact labels
    }
    if child >= 0:
        record["next"] = order.get(child)  # the node after it; None where no router went
    else:
        record["stop"] = STOP_REASONS[trees.stop_reason[row, action]].value
        record["right"] = bool(trees.correct[row, action] == 1)
    return record
