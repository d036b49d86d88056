"""The Gymnasium space of partial solutions as text: alphabet and length are those of the trees at hand."""

from __future__ import annotations

import string

import numpy as np
from gymnasium.spaces import Text

from rollouts.trees.arrays import Trees, iterate_by_depth


def text_space(trees: Trees) -> Text:
    """Return a space that contains every partial solution and proposal of these trees.

    The alphabet is printable ASCII and every other character that occurs in them, LaTeX and CJK included.
    """
    alphabet = set(string.printable)
    for question in trees.questions:
        alphabet.update(question)
    if len(trees.text) and int(trees.text.max()) > 127:
        alphabet.update(bytes(trees.text).decode("utf-8"))
    return Text(min_length=0, max_length=longest_solution(trees), charset="".join(sorted(alphabet)))


def longest_solution(trees: Trees) -> int:
    """Return an upper bound, in characters, of question, accepted steps and proposal together."""
    ends = trees.text_end.reshape(-1)
    sizes = np.diff(ends, prepend=0).reshape(-1, 2)  # bytes: at least as many as characters
    rest = np.zeros(trees.nodes, np.int64)
    for rows in iterate_by_depth(trees):
        child = trees.child[rows]
        rest[rows] = (sizes[rows] + np.where(child >= 0, rest[child], 0)).max(axis=1)
    return int(rest.max(initial=0)) + max(map(len, trees.questions), default=0) + 2
