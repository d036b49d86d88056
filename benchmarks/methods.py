"""The routers that the studies compare, each fitted by one call; shared by the programs in this folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.splits import Validation
from agents.evaluation.walk import references, run
from agents.learners import advantage, arbitrage
from agents.learners.exact import fit as fit_exact
from agents.learners.exact import neighbours
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers.base import AnyRouter, Constant
from agents.routers.mlp import at
from rollouts.errors import DataError
from rollouts.trees.arrays import Trees
from trim_env.tables import DecisionTables, decision_tables

LAMS = (7.5e-4, 1.7e-3, 3.8e-3, 8.5e-3)
RANGE = (4e-4, 1.2e-2)
TOKENS = 134.4
"""Large tokens of a training problem of ``quickstart``, for which the λ of these programs are (`scaled`)."""


def scaled(lams: Sequence[float], trees: Trees) -> tuple[float, ...]:
    """Return λ for other trees: a mean solution of the large model alone costs the same return as in ``quickstart``."""
    mean = references(decision_tables(trees, "train")).large.large_tokens.mean()
    return tuple(float(f"{lam * TOKENS / mean:.2g}") for lam in lams)


@dataclass(frozen=True, eq=False)
class Data:
    """What a router is fitted on.

    Attributes:
        trees: Compiled trees.
        train: (R,) training trees.
        validation: What choices are made on.
        range: Of the λ of one policy for many.
    """

    trees: Trees
    train: NDArray[np.int64]
    validation: Validation
    range: tuple[float, ...] = RANGE

    @classmethod
    def of(cls, trees: Trees, problems: int | None = None, seed: int = 0) -> Data:
        """Return all training and validation trees, or some training problems and a fifth as many of validation."""
        rng = np.random.default_rng(seed)

        def some(split: str, count: int | None) -> NDArray[np.int64]:
            indices = trees.select(split)
            own = np.unique(trees.problem[indices])
            kept = own if count is None or count >= len(own) else rng.choice(own, count, replace=False)
            return indices[np.isin(trees.problem[indices], kept)]

        train = some("train", problems)
        validation = some("validation", None if problems is None else max(20, problems // 5))
        splits = np.array(trees.splits, copy=True)
        chosen = np.unique(trees.problem[np.concatenate([train, validation])])
        splits[np.isin(splits, ["train", "validation"]) & ~np.isin(np.arange(len(splits)), chosen)] = "unused"
        cut = replace(trees, splits=splits)
        return cls(cut, train, Validation(lambda i: decision_tables(cut, indices=i), cut))

    def tables(self) -> DecisionTables:
        """Return the training trees' tables."""
        return decision_tables(self.trees, indices=self.train)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted method: its router for each λ, and the processor time that it took.

    Attributes:
        routers: By λ.
        seconds: For all λ together.
        attempts: Most attempts for a λ.
    """

    routers: dict[float, AnyRouter]
    seconds: float
    attempts: int = 1


Fit = Callable[[Data, int, Sequence[float]], Fitted]


def _threshold(data: Data, seed: int, lams: Sequence[float]) -> Fitted:
    begin = time.process_time()
    return Fitted({lam: data.validation.candidates.best(lam).threshold for lam in lams}, time.process_time() - begin)


def _pomdp(data: Data, seed: int, lams: Sequence[float]) -> Fitted:
    begin = time.process_time()
    found = estimate(data.trees, indices=data.train).routers(lams)
    return Fitted(dict(zip(lams, found, strict=True)), time.process_time() - begin)


def _agg(data: Data, seed: int, lams: Sequence[float]) -> Fitted:
    begin, routers, attempts = time.process_time(), {}, 1
    for lam in lams:
        result = Training(data.tables(), data.validation, lam, PPOSettings(), seed).run()
        routers[lam], attempts = at(result.router, lam), max(attempts, result.attempts)
    return Fitted(routers, time.process_time() - begin, attempts)


def _conditioned(data: Data, seed: int, lams: Sequence[float]) -> Fitted:
    begin = time.process_time()
    result = Training(data.tables(), data.validation, RANGE, PPOSettings(), seed).run()
    return Fitted({lam: at(result.router, lam) for lam in lams}, time.process_time() - begin, result.attempts)


def _exact(data: Data, seed: int, lams: Sequence[float]) -> Fitted:
    begin, routers = time.process_time(), dict[float, AnyRouter]()
    for group in neighbours(lams):
        frontier = fit_exact(data.tables(), data.validation.choice, group, ExactSettings(), seed)
        routers |= {lam: at(frontier.router(lam), lam) for lam in group}
    return Fitted(routers, time.process_time() - begin)


def _predicting(learner: Any) -> Fit:
    def made(data: Data, seed: int, lams: Sequence[float]) -> Fitted:
        begin = time.process_time()
        found = learner.fit(data.tables(), data.validation.choice, seed)
        return Fitted({lam: found.router(lam) for lam in lams}, time.process_time() - begin)

    return made


METHODS: dict[str, Fit] = {
    "exact": _exact,
    "TRIM-Thr": _threshold,
    "TRIM-Agg": _agg,
    "TRIM-Agg, λ range": _conditioned,
    "TRIM-POMDP": _pomdp,
    "Arbitrage": _predicting(arbitrage),
    "one-deviation advantage": _predicting(advantage),
}


def fit(name: str, data: Data, seed: int, lams: Sequence[float] = LAMS) -> Fitted | str:
    """Fit a method; where its data do not suffice, return what it said."""
    try:
        return METHODS[name](data, seed, lams)
    except DataError as error:
        return str(error)


def returns(fitted: Fitted, tables: DecisionTables) -> Floats:
    """Return (P,) returns of problems, averaged over the λ."""
    values: Floats = np.mean([run(router, tables).returns(lam) for lam, router in fitted.routers.items()], axis=0)
    return values


def best_constant(tables: DecisionTables, lams: Sequence[float] = LAMS) -> float:
    """Return the mean over λ of the return of the better constant."""
    both: list[Outcomes] = [run(Constant(action), tables) for action in (0, 1)]
    return float(np.mean([max(each.returns(lam).mean() for each in both) for lam in lams]))
