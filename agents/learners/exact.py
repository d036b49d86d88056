"""The exact learner: a quadratic rule, a linear one or a small perceptron by the exact gradient of the return.

One fit gives a whole frontier: the rule is told λ. Entropy of the decisions regularises; it falls from round to
round, and the round at which to stop is chosen by what is returned on problems that the fit has not seen: folds of the
training problems, and the choice half of validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from agents.evaluation.forest import (
    ENTROPIES,
    Forest,
    Polynomial,
    Rule,
    Scale,
    ascend,
    forests,
    layers,
    problems_of,
    reached,
)
from agents.learners.settings import ExactSettings
from agents.routers.base import Floats, Knob
from agents.routers.mlp import MLP, ConditionedMLP, Weights, at_lam
from rollouts.trees.arrays import PART
from trim_env.episodes import Lam
from trim_env.tables import DecisionTables

NAME = "exact"
_PENALTY = 0.01  # of a perceptron's parameters
_APART = 20.0  # times the least λ of a group: its greatest
_LAMS = 5  # of a frontier: a rule that is told λ needs no more
_MOST = 4 * PART  # nodes that are learned from: more problems tell rules of so few parameters nothing
_FOLDS, _HELD_OUT = 4, 500  # folds of the problems; no more of them than make up so many problems


class Perceptron:
    """A rule with one hidden layer of tanh units over the features and λ."""

    def __init__(self, scale: Scale, hidden: int, seed: int) -> None:
        """Draw the first parameters."""
        self.scale, d = scale, scale.size
        self._shapes = ((hidden, d), (hidden,), (hidden,), (hidden,), (1,))  # features, λ, biases, and the last layer
        self._parts = np.cumsum([np.prod(shape) for shape in self._shapes])[:-1]
        draw = np.random.default_rng(seed)
        drawn = [draw.normal(0, size, shape) for size, shape in zip((d**-0.5, 0, 0, 0.1, 0), self._shapes, strict=True)]
        self.start: Floats = np.concatenate([values.reshape(-1) for values in drawn])
        self.penalty: Floats = np.full(len(self.start), _PENALTY)

    def _split(self, parameters: Floats) -> list[Floats]:
        parts = np.split(parameters, self._parts)
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def logits(self, parameters: Floats, part: int = 0) -> tuple[Floats, Callable[[Floats], Floats]]:
        """See `agents.evaluation.forest.Rule`."""
        weight, column, bias, out, offset = self._split(parameters)
        seen = self.scale.seen(part)
        before = seen @ weight.T + bias
        units = [np.tanh(before + told * column) for told in self.scale.told]

        def back(slope: Floats) -> Floats:
            inner = [np.outer(own, out) * (1 - unit**2) for own, unit in zip(slope.T, units, strict=True)]
            total, each = sum(inner), np.stack([own.sum(axis=0) for own in inner])
            last = sum(unit.T @ own for own, unit in zip(slope.T, units, strict=True))
            parts = (total.T @ seen, self.scale.told @ each, each.sum(axis=0), last, slope.sum())
            return np.concatenate([np.reshape(part, -1) for part in parts])

        return np.stack([unit @ out for unit in units], axis=1) + offset, back

    def weights(self, parameters: Floats) -> Weights:
        """See `agents.evaluation.forest.Rule`."""
        weight, column, bias, out, offset = self._split(parameters)
        return layers(self.scale.unscaled(np.concatenate([weight, column[:, None]], axis=1), bias), (out[None], offset))


class _Form(NamedTuple):
    activation: str
    make: Callable[[Scale, ExactSettings, int], Rule]


RULES = {
    "linear": _Form("tanh", lambda scale, *_: Polynomial(scale, quadratic=False)),
    "quadratic": _Form("square", lambda scale, *_: Polynomial(scale, quadratic=True)),
    "mlp": _Form("tanh", lambda scale, settings, seed: Perceptron(scale, settings.hidden, seed)),
}


@dataclass(frozen=True, eq=False)
class Frontier:
    """A rule for all λ that were asked for, and what it was chosen for.

    Attributes:
        rule: Its name, of `RULES`.
        entropy: Weight of the entropy in its last round.
        held_out: Mean return on problems that fits had not seen, by rule and by round.
        weights: A perceptron that is told λ as its last feature.
        least: Least λ that it is told; 0 is as good as that.
        max_large_tokens: Cap M, of which it is told the share left.
    """

    rule: str
    entropy: float
    held_out: dict[str, list[float]]
    weights: Weights
    least: float
    schema: str
    max_large_tokens: int | None

    def router(self, lam: Lam) -> MLP | ConditionedMLP:
        """Return the router for one λ, or for a range."""
        told, activation = (self.schema, self.max_large_tokens), RULES[self.rule].activation
        if isinstance(lam, tuple):
            return ConditionedMLP(NAME, told[0], *lam, self.weights, told[1], activation)
        return MLP(NAME, told[0], Knob("lam", lam), at_lam(self.weights, max(lam, self.least)), told[1], activation)

    def report(self) -> dict[str, Any]:
        """Return what it was chosen for, as JSON holds it."""
        return {"rule": self.rule, "entropy": self.entropy, "entropies": ENTROPIES, "held_out": self.held_out}


def neighbours(lams: Sequence[float]) -> list[list[float]]:
    """Return λ in groups, each for one rule: it learns more from several λ than from one, unless they lie far apart."""
    groups = [[lam for lam in lams if not lam]]
    above = sorted(lam for lam in lams if lam)
    if above:
        count = max(1, int(np.ceil(np.log(above[-1] / above[0]) / np.log(_APART))))
        edges = np.geomspace(above[0], above[-1], count + 1)[1:-1]
        groups += [[lam for lam in above if np.searchsorted(edges, lam) == group] for group in range(count)]
    return [group for group in groups if group]


def fit(
    tables: DecisionTables, choice: DecisionTables, lams: Sequence[float], settings: ExactSettings, seed: int
) -> Frontier:
    """Fit a rule on training trees for some λ (two or more span a range), judged on the choice half of validation.

    Raises:
        StoreError: Proposals that the caps allow were not generated.
    """
    least = min([lam for lam in lams if lam], default=1e-6) / 2
    lams = sorted(max(lam, least) for lam in lams)
    some = [lams[place] for place in np.linspace(0, len(lams) - 1, min(_LAMS, len(lams))).round().astype(int)]
    fitted_on, judges = folded(tables, choice, seed)
    problems = [problems_of(judge) for judge in judges]
    found, rounds = dict[str, list[float]](), dict[str, list[Weights]]()
    for name in RULES if settings.rule == "auto" else (settings.rule,):
        fits = list[list[Weights]]()
        for parts in fitted_on:
            form = RULES[name].make(Scale(parts, some), settings, seed)
            fits.append([form.weights(parameters) for parameters in rounds_of(parts, form, some)])
        each = [
            [reached(_told(name, weights, some), judge) for weights in fit]
            for fit, judge in zip(fits, judges, strict=True)
        ]
        found[name], rounds[name] = np.average(each, axis=0, weights=problems).tolist(), fits[0]
    rule = max(found, key=lambda name: max(found[name]))
    last = int(np.argmax(found[rule]))
    cap = tables.max_large_tokens
    return Frontier(rule, ENTROPIES[last], found, rounds[rule][last], least, tables.schema.id, cap)


def _told(name: str, weights: Weights, lams: Sequence[float]) -> list[MLP]:
    """Return a rule as routers for some λ."""
    activation = RULES[name].activation
    return [MLP(NAME, "", Knob("lam", lam), at_lam(weights, lam), None, activation) for lam in lams]


def folded(
    tables: DecisionTables, choice: DecisionTables, seed: int, ask: str = ""
) -> tuple[list[list[Forest]], list[list[Forest]]]:
    """Return what fits are made on, the training trees first, and what each is judged on, the choice half first.

    Many trees are worked through in parts, and fitted once if the choice half is large: folds are for few problems.
    """
    tables = tables.sample(_MOST, seed)
    fitted_on, judges = [forests(tables, ask=ask)], [forests(choice, ask=ask)]
    if len(tables.parts()) == 1 or problems_of(judges[0]) < _HELD_OUT:
        for kept, left_out in folds(tables, seed):
            fitted_on.append(forests(kept, ask=ask))
            judges.append(forests(left_out, ask=ask))
    return fitted_on, judges


def folds(tables: DecisionTables, seed: int) -> Iterator[tuple[DecisionTables, DecisionTables]]:
    """Yield the trees without a fold of the problems, and those of the fold."""
    problem = tables.trees.problem[tables.indices]
    problems = np.random.default_rng(seed).permutation(np.unique(problem))
    parts = np.array_split(problems, _FOLDS) if len(problems) >= _FOLDS else []
    for fold in parts[: -(-_HELD_OUT // max(1, len(problems) // _FOLDS))]:
        out = np.isin(problem, fold)
        yield replace(tables, indices=tables.indices[~out]), replace(tables, indices=tables.indices[out])


def rounds_of(
    parts: Sequence[Forest], rule: Rule, lams: Sequence[float], entropies: Sequence[float] = ENTROPIES
) -> list[Floats]:
    """Return the parameters of a rule after each round, of less entropy than the one before."""
    parameters, rounds = rule.start, []
    for entropy in entropies:
        parameters = ascend(parts, rule, lams, parameters, entropy)
        rounds.append(parameters)
    return rounds
