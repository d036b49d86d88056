"""Step-level methods to compare, each with all settings that validation may choose among; one place lists them.

`RIVALS` has them by name; `fitted` fits one and chooses its 16 operating points on validation. Shared by the programs
in this folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from agents.evaluation.budgets import SETTINGS
from agents.evaluation.curves import Method, References
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import halves, spread, thresholds
from agents.evaluation.walk import measured, references, run
from agents.learners import advantage, arbitrage
from agents.learners.exact import fit as fit_exact
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers.base import AnyRouter, Threshold
from agents.routers.first_token import FirstToken
from agents.routers.mlp import ConditionedMLP
from agents.routers.modes import Modes
from agents.routers.takeover import Takeover
from benchmarks.methods import Data
from rollouts.trees.arrays import CONTINUE_SMALL, Trees
from trim_env.features import schema_named
from trim_env.tables import DecisionTables, decision_tables

PRICES = (1e-4, 5e-2)  # λ of advantages: wider, as they overstate gains
ENTROPY = "small.first_entropy"


@dataclass(frozen=True)
class Rival:
    """A method.

    Attributes:
        settings: From data and a seed to routers, one for each setting.
        reads: What it reads, in words.
        cost: Cost model that charges what it needs besides decoded tokens.
    """

    settings: Callable[[Data, int], Sequence[AnyRouter]]
    reads: str = "score"
    cost: str = "decode-only"


def _tables(data: Data, split: str = "validation", schema: str = "agg+") -> DecisionTables:
    return decision_tables(data.trees, split, schema=schema)


def _levels(data: Data, schema: str = Threshold.schema) -> list[float]:
    return thresholds(_tables(data), schema=schema)


def _threshold(data: Data, seed: int, schema: str = Threshold.schema) -> list[AnyRouter]:
    return [Threshold(level, schema=schema_named(schema).id) for level in _levels(data, schema)]


def _first_token(data: Data, seed: int) -> list[AnyRouter]:
    inside = np.isin(data.trees.tree, data.trees.select("validation"))
    found = np.quantile(data.trees.signals[ENTROPY][inside, CONTINUE_SMALL], np.linspace(0, 1, SETTINGS))
    return [FirstToken(float(entropy)) for entropy in np.unique(found)]


def _modes(data: Data, seed: int) -> list[AnyRouter]:
    """Return modes with one knob, in the proportions of PATS: at 0.75 its own settings."""
    return [Modes(bad, bad + 0.4 * (1 - bad), bad * 0.4 / 0.75) for bad in _levels(data)]


def _arbitrage(data: Data, seed: int, schema: str = "agg+") -> list[AnyRouter]:
    choice = decision_tables(data.trees, schema=schema, indices=halves(data.trees)[0])
    found = arbitrage.fit(_tables(data, "train", schema), choice, seed)
    return [found.cut(float(cut)) for cut in found.cuts[:: -(-len(found.cuts) // SETTINGS)]]


def _advantage(data: Data, seed: int, schema: str = "agg+") -> list[AnyRouter]:
    choice = decision_tables(data.trees, schema=schema, indices=halves(data.trees)[0])
    found = advantage.fit(_tables(data, "train", schema), choice, seed)
    return [found.router(float(lam)) for lam in np.geomspace(*PRICES, SETTINGS)]


def _in_range(policy: object) -> list[AnyRouter]:
    assert isinstance(policy, ConditionedMLP)
    return [policy.at(float(lam)) for lam in np.geomspace(policy.low, policy.high, SETTINGS)]


def _exact(data: Data, seed: int) -> list[AnyRouter]:
    low, high = data.range
    lams = np.geomspace(low, high, 5).tolist()
    return _in_range(fit_exact(data.tables(), data.validation.choice, lams, ExactSettings(), seed).router((low, high)))


def _agg(data: Data, seed: int) -> list[AnyRouter]:
    low, high = data.range
    return _in_range(Training(data.tables(), data.validation, (low, high), PPOSettings(), seed).run().router)


def _pomdp(data: Data, seed: int) -> list[AnyRouter]:
    return list(estimate(data.trees, indices=data.train).routers(np.geomspace(1e-5, 0.1, SETTINGS).tolist()))


def _taken_over(by: Callable[[Data, int], Sequence[AnyRouter]], data: Data, seed: int) -> list[AnyRouter]:
    return [Takeover(each) for each in by(data, seed)]


RIVALS: dict[str, Rival] = {
    "TRIM-Thr (RSD)": Rival(_threshold),
    "takeover": Rival(partial(_taken_over, _threshold)),
    "takeover by exact": Rival(partial(_taken_over, _exact), "agg+"),
    "PATS-like": Rival(_modes, "score, mode"),
    "SpecReason-like": Rival(partial(_threshold, schema="large.min_logprob"), "large.min_logprob", "calls:1"),
    "GlimpRouter": Rival(_first_token, f"{ENTROPY}, terminal"),
    "Arbitrage": Rival(_arbitrage, "agg+"),
    "Arbitrage, free": Rival(partial(_arbitrage, schema="free"), "free"),
    "one-deviation advantage": Rival(_advantage, "agg+"),
    "one-deviation advantage, free": Rival(partial(_advantage, schema="free"), "free"),
    "TRIM-POMDP": Rival(_pomdp, "score, tokens, step"),
    "TRIM-Agg": Rival(_agg, "agg+"),
    "exact": Rival(_exact, "agg+"),
}
"""By name. *SpecReason-like* has the large model's least log-probability of the step stand for the digit that it would
be asked for, one token paid at every step, where a store has no self-evaluation."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """A fitted method with the operating points that validation chose.

    Attributes:
        name: The method.
        points: 16 routers or fewer, with their outcomes on validation.
        choosing: Always-small and always-large there.
        seconds: Processor time, choosing included.
    """

    name: str
    points: Sequence[tuple[AnyRouter, Outcomes]]
    choosing: References
    seconds: float

    def on(self, trees: Trees, split: str) -> Method:
        """Return the points on a split, on the hull that validation chose."""
        tables = decision_tables(trees, split, cost=RIVALS[self.name].cost)
        return measured(self.points, self.choosing, tables)


def fitted(name: str, data: Data, seed: int = 0) -> Chosen:
    """Fit a method and choose its operating points."""
    begin = time.process_time()
    validation = decision_tables(data.trees, "validation", cost=RIVALS[name].cost)
    choosing = references(validation)
    candidates = [(each, run(each, validation)) for each in RIVALS[name].settings(data, seed)]
    return Chosen(name, spread(candidates, choosing.large), choosing, time.process_time() - begin)


def with_splits(trees: Trees, splits: dict[str, np.ndarray]) -> Trees:
    """Return trees whose problems, by boolean masks, are in other splits; what is in none is ``unused``."""
    named = np.full(len(trees.splits), "unused", dtype="<U20")
    for split, mask in splits.items():
        named[mask] = split
    return replace(trees, splits=named)
