"""A scorer of one's own: recomputes every equality that a step states, and needs no model at all.

    cp -r rollouts/datasets/quickstart my-trees
    python -m rollouts score my-trees --models examples/own_scorer.toml
    python -m rollouts stats my-trees --scorer arithmetic
    python train.py --rollouts my-trees --scorer arithmetic --agent threshold --lam 3e-3 --out runs/arithmetic

The models file says ``kind = "examples.own_scorer:Arithmetic"``; `rollouts.scoring.base.Scorer` says what is asked of a
scorer. This one cannot see that a number was copied wrongly.
"""

import ast
import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod}


class Arithmetic:
    """Scores a step `right` if its equalities hold, else `wrong`."""

    tolerance = 0.0  # the same path always gets the same scores

    def __init__(self, name: str, right: float = 0.99, wrong: float = 0.01) -> None:
        """Take the name of the score table, and what ``[scorer.options]`` says."""
        self.name, self.right, self.wrong = name, right, wrong

    def submit(self, question: str, steps: Sequence[str]) -> Future[list[float | None]]:
        """Return a future of one score for each step."""
        scores: Future[list[float | None]] = Future()
        scores.set_result([self.right if holds(step) else self.wrong for step in steps])
        return scores

    def process(self) -> Mapping[str, Any]:
        """Return all that decides the scores."""
        return {"kind": "arithmetic", "version": 1, "right": self.right, "wrong": self.wrong}


def holds(step: str) -> bool:
    """Whether all parts of a step between equality signs that can be computed are the same number."""
    values = [value for part in step.split("=") if (value := compute(part)) is not None]
    return len(set(values)) <= 1


def compute(text: str) -> int | None:
    """Return the value of a sum, difference, product or remainder of numbers, None for anything else."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right):
                return int(OPERATORS[type(op)](value(left), value(right)))
        raise ValueError(text)

    try:
        return value(ast.parse(text.strip(), mode="eval"))
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None
