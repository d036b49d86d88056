"""What a router may see at a proposal: named columns, the same wherever its episodes come from.

A column is a fact of the small model's proposal, ``step`` (its number, from 1), ``max_steps`` (T, the same at all
decisions), or a fold (`FOLDS`): what a fact of the accepted steps has come to. Facts are those that every step has
(`FACTS`) and signals, columns of the store's score tables, ``TABLE.COLUMN``. Compiled trees (`columns_of`), walks that
generate (`rollouts.trees.on_policy.observe`), sessions of a router in use and the service make the same mapping from
these entries, bit for bit.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError
from rollouts.text.steps import Step
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, TERMINAL, Trees, graph_of

_SIGNAL = re.compile(r"[\w.-]+\.\w+")
Columns = Mapping[str, Any]  # by name: float64 arrays of shape (n,), or numbers where there is one decision


@dataclass(frozen=True)
class Fact:
    """What is known of a step from the moment that it is proposed.

    Attributes:
        of_step: From a step, whose tokens are those that features count, and its score to the value.
        of_trees: From compiled trees to the (N, 2) values of both models' proposals.
        checked: From what somebody says of a step to the value; raises `ConfigError` where that is out of range.
    """

    of_step: Callable[[Step, float], float]
    of_trees: Callable[[Trees], NDArray[Any]]
    checked: Callable[[Any], float]


def checked_score(score: Any) -> float:
    """Return a score, rounded as rollouts hold it.

    Raises:
        ConfigError: It is no number from 0 to 1.
    """
    try:
        value = float(np.float32(score))
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"The score of a step is {score!r}, expected a number from 0 to 1.")
    return value


def checked_tokens(tokens: Any) -> int:
    """Return a number of tokens.

    Raises:
        ConfigError: It is no whole number of at least 1.
    """
    try:
        count = operator.index(tokens)
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(f"The tokens of a step are {tokens!r}, expected a whole number of at least 1.")
    return count


FACTS: dict[str, Fact] = {
    # its PRM score, r_t, in [0, 1]
    "score": Fact(lambda _, score: score, lambda trees: trees.score, checked_score),
    # its tokens, c_t; of an accepted step the small model's wherever that wrote the same text
    "tokens": Fact(lambda step, _: step.tokens, lambda trees: trees.accepted_tokens, checked_tokens),
    # whether accepting it ends the solution
    "terminal": Fact(lambda step, _: step.terminal, lambda trees: trees.child == TERMINAL, bool),
    # whether it states a final answer
    "has_answer": Fact(lambda step, _: step.has_answer, lambda trees: trees.has_answer, bool),
}


def is_signal(name: str) -> bool:
    """Whether a fact is a column of a score table; tables' names may hold dots too, columns' do not."""
    return _SIGNAL.fullmatch(name) is not None


def checked_signal(name: str, value: Any) -> float:
    """Return a signal, rounded as rollouts hold it.

    Raises:
        ConfigError: It is no number.
    """
    try:
        checked = float(np.float32(value))
    except (TypeError, ValueError):
        checked = math.nan
    if math.isnan(checked):
        raise ConfigError(f"{name} of a step is {value!r}, expected a number.")
    return checked


def fact_of(trees: Trees, name: str) -> NDArray[Any]:
    """Return the (N, 2) values of a fact for both models' proposals; a signal is NaN where it is not known."""
    return trees.signals[name] if is_signal(name) else FACTS[name].of_trees(trees)


@dataclass(frozen=True)
class Fold:
    """A running value over one fact of the accepted steps, whoever wrote them; steps that lack the fact are skipped.

    It is computed in float64 and told as a float32.

    Attributes:
        name: Name of its column.
        fact: Name of the fact.
        initial: Value before the first step.
        combine: From the value so far and the fact of one more step to the value: of numbers, and elementwise of
            arrays (``operator.add``, ``numpy.maximum``).
    """

    name: str
    fact: str
    initial: float
    combine: Callable[[Any, Any], Any]


def _least(so_far: Any, value: Any) -> Any:
    return np.minimum(so_far, value) if isinstance(value, np.ndarray) else min(so_far, value)


FOLDS: dict[str, Fold] = {
    fold.name: fold
    for fold in (
        Fold("min_score", "score", 1.0, _least),  # min(r_1..r_{t-1}); 1 at the first step
        Fold("product_score", "score", 1.0, operator.mul),
    )
}
COLUMNS = (*FACTS, "step", "max_steps", *FOLDS)


def _greatest(so_far: Any, value: Any) -> Any:
    return np.maximum(so_far, value) if isinstance(value, np.ndarray) else max(so_far, value)


FOLDERS = {"least": _least, "greatest": _greatest}
_DOMAINS = {  # of facts, by what they are called in their tables: least and greatest value
    r".*_logprob": (-math.inf, 0.0), r".*_entropy|.*tokens": (0.0, math.inf), "score|terminal|has_answer": (0.0, 1.0),
}  # fmt: skip


def fold_named(name: str) -> Fold | None:
    """Return a fold over a fact by its name, ``least(FACT)`` or ``greatest(FACT)``; None if it is no such name.

    Before the first step it is the greatest value that there is, or the least: of ``least(small.min_logprob)`` 0.
    """
    how, _, fact = name.removesuffix(")").partition("(")
    if how not in FOLDERS or not name.endswith(")"):
        return None
    own = fact.rpartition(".")[2]
    domain = next((ends for called, ends in _DOMAINS.items() if re.fullmatch(called, own)), (-math.inf, math.inf))
    return Fold(name, fact, domain[how == "least"], FOLDERS[how])


class Folded:
    """Folds over the steps that one episode has accepted."""

    __slots__ = ("_folds", "_values")

    def __init__(self, folds: Iterable[Fold]) -> None:
        """Begin before the first step."""
        self._folds = tuple(folds)
        self._values = [fold.initial for fold in self._folds]

    @property
    def facts(self) -> set[str]:
        """The facts of accepted steps that the folds are over."""
        return {fold.fact for fold in self._folds}

    def add(self, facts: Mapping[str, float]) -> None:
        """Go on by one accepted step."""
        for place, fold in enumerate(self._folds):
            value = facts.get(fold.fact, math.nan) if is_signal(fold.fact) else facts[fold.fact]
            if value == value:
                self._values[place] = fold.combine(self._values[place], value)

    def tell(self, columns: dict[str, float]) -> None:
        """Add the columns as they stand now."""
        for place, fold in enumerate(self._folds):
            columns[fold.name] = float(np.float32(self._values[place]))


def facts_of(step: Step, score: float) -> dict[str, float]:
    """Return what is known of a step: every fact by its name."""
    return {name: fact.of_step(step, score) for name, fact in FACTS.items()}


def columns_of(
    trees: Trees, rows: NDArray[Any] | slice = slice(None), folds: Iterable[Fold] = tuple(FOLDS.values())
) -> dict[str, Any]:
    """Return the columns at rows of compiled trees, with the folds that are asked for."""

    def column(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(values[rows], np.float64)

    columns: dict[str, Any] = {
        name: column(fact_of(trees, name)[:, CONTINUE_SMALL]) for name in (*FACTS, *trees.signals)
    }
    columns |= {"step": column(trees.depth) + 1, "max_steps": trees.meta["max_steps"]}
    return columns | {fold.name: column(_folded(trees, fold)) for fold in folds}


def _folded(trees: Trees, fold: Fold) -> NDArray[np.float32]:
    """Return the (N,) values of a fold at all nodes."""
    facts, graph = np.asarray(fact_of(trees, fold.fact), np.float64), graph_of(trees)
    absent = np.isnan(facts)
    values = np.full(trees.nodes + 1, fold.initial, np.float64)  # the last is written at ends, and not read
    for level in graph.levels:
        for action in (ESCALATE_LARGE, CONTINUE_SMALL):  # where both lead to one node, the small model's step counts
            so_far = values[level]
            gone_on = fold.combine(so_far, facts[level, action])
            values[graph.child[level, action]] = np.where(absent[level, action], so_far, gone_on)
    return values[:-1].astype(np.float32)
