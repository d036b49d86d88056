"""Feature schemas: named, versioned functions from what a router may see to what it is given.

A checkpoint or an exported policy carries the name of its schema; a policy is never fed another one's features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean

Floats = NDArray[np.float64]
_CLIP = 1e-4  # scores are clipped to [1e-4, 1 - 1e-4] before the logit: PRM scores pile up at 0 and 1
_TYPICAL_TOKENS = 20.0


class Seen(NamedTuple):
    """What a router may see at n decisions; arrays of shape (n,).

    Attributes:
        score: PRM score of the small model's proposal, r_t, in [0, 1].
        min_score: Least score of the accepted steps, min(r_1..r_{t-1}); 1 at the first step.
        product_score: Product of their scores; 1 at the first step.
        tokens: Tokens of the proposal, c_t.
        step: Step number t, from 1.
        terminal: Whether accepting the proposal ends the episode.
        has_answer: Whether the proposal states a final answer.
    """

    score: Floats
    min_score: Floats
    product_score: Floats
    tokens: Floats
    step: Floats
    terminal: Floats
    has_answer: Floats


@dataclass(frozen=True)
class Feature:
    """One column of a schema.

    Attributes:
        name: Its name.
        low: Least value.
        high: Greatest value.
        compute: From `Seen` and max_steps to (n,) values.
    """

    name: str
    low: float
    high: float
    compute: Callable[[Seen, int], Floats]


@dataclass(frozen=True)
class Schema:
    """A named, versioned list of features.

    Attributes:
        name: As on the command line.
        version: Raised whenever a column changes its meaning.
        columns: The features of a decision in order.
        history: How many of them, the first ones, observations also tell of every step that was accepted before. They
            are functions of score and tokens alone.
    """

    name: str
    version: int
    columns: tuple[Feature, ...]
    history: int = 0

    @property
    def size(self) -> int:
        """Number of features of a decision, d."""
        return len(self.columns)

    @property
    def id(self) -> str:
        """Name and version, as written into artefacts."""
        return f"{self.name}/{self.version}"

    def bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (d,) least and (d,) greatest values."""
        low, high = self._bounds
        return low.copy(), high.copy()

    def observed_bounds(self, max_steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return least and greatest values of observations: `bounds`, or of the layout of `observed`."""
        told = self.history
        low, high = (np.concatenate([np.tile(each[:told], max_steps), each[told:]]) for each in self._bounds)
        return (low, high) if told else self.bounds()

    def accepted(self, score: NDArray[Any], tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Return (n, history) what later observations tell of accepted steps, from their (n,) scores and tokens."""
        score, tokens, none = np.asarray(score, np.float64), np.asarray(tokens, np.float64), np.zeros(len(score))
        return self(Seen(score, none, none, tokens, none, none, none), 1)[:, : self.history]

    def observed(
        self, features: NDArray[np.float32], past: NDArray[np.float32], position: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return observations with the history: one step after the other, zeros behind the proposal, other features.

        Args:
            features: (n, d) features of the decisions.
            past: (n, max_steps, history) what is told of the accepted steps; from `position` on it is not read.
            position: (n,) number of accepted steps: where the proposal goes.

        Returns:
            (n, max_steps * history + d - history).
        """
        steps = np.where((np.arange(past.shape[1]) < position[:, None])[:, :, None], past, np.float32(0))
        steps[np.arange(len(steps)), position] = features[:, : self.history]
        flat = steps.reshape(len(steps), past.shape[1] * self.history)
        return np.concatenate([flat, features[:, self.history :]], axis=1)

    @cached_property
    def _bounds(self) -> NDArray[np.float32]:
        return np.array([[each.low for each in self.columns], [each.high for each in self.columns]], np.float32)

    def __call__(self, seen: Seen, max_steps: int) -> NDArray[np.float32]:
        """Return the (n, d) features, within the bounds."""
        values = np.empty((len(seen.score), len(self.columns)), np.float32)
        for place, column in enumerate(self.columns):
            values[:, place] = column.compute(seen, max_steps)
        return self._within_bounds(values)

    def single(self, seen: tuple[float, ...], max_steps: int) -> NDArray[np.float32]:
        """Return the (1, d) features of one decision from the numbers that `Seen` has arrays of: the same, faster."""
        numbers: Any = Seen(*cast(Any, seen))
        return self._within_bounds(np.array([[each.compute(numbers, max_steps) for each in self.columns]], np.float32))

    def _within_bounds(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        low, high = self._bounds
        np.maximum(values, low, out=values)
        np.minimum(values, high, out=values)
        return values


def logit(score: Floats) -> Floats:
    """Return the log-odds of clipped scores, divided by 3: about -3 to 3."""
    clipped = np.minimum(np.maximum(np.asarray(score, np.float64), _CLIP), 1 - _CLIP)
    result: Floats = np.log(clipped / (1 - clipped)) / 3
    return result


_LOGIT_BOUND = float(logit(np.array(1.0)))
_SCORE = Feature("score", 0, 1, lambda seen, _: seen.score)
_MIN = Feature("min_score", 0, 1, lambda seen, _: seen.min_score)
_TOKENS = Feature("tokens / 300", 0, np.inf, lambda seen, _: seen.tokens / 300)
_STEP = Feature("step / max_steps", 0, 1, lambda seen, most: seen.step / most)
_AGG = (_SCORE, _MIN, _TOKENS, _STEP)
_LOGIT = Feature("logit(score) / 3", -_LOGIT_BOUND, _LOGIT_BOUND, lambda seen, _: logit(seen.score))
_LOG_TOKENS = Feature("ln(tokens / 20)", -4, 8, lambda seen, _: np.log(np.maximum(seen.tokens, 1.0) / _TYPICAL_TOKENS))
_ENDS = (
    Feature("terminal", 0, 1, lambda seen, _: seen.terminal),
    Feature("has_answer", 0, 1, lambda seen, _: seen.has_answer),
)
_AGG_PLUS = (
    _LOGIT,
    Feature("logit(min_score) / 3", -_LOGIT_BOUND, _LOGIT_BOUND, lambda seen, _: logit(seen.min_score)),
    _LOG_TOKENS,
    _STEP,
    *_ENDS,
)

SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("agg", 1, _AGG),
        Schema("agg+prod", 1, (*_AGG, Feature("product_score", 0, 1, lambda seen, _: seen.product_score))),
        Schema("agg+", 1, _AGG_PLUS),
        Schema("seq", 1, (_LOGIT, _LOG_TOKENS, _STEP, *_ENDS), history=2),
    )
}
DEFAULT_SCHEMA = "agg+"


def lam_feature(lam: Floats | float) -> NDArray[np.float32]:
    """Return λ as the feature that λ-conditioned policies see after all others: log10(λ) + 3, within -6 to 6."""
    value = np.log10(np.maximum(np.asarray(lam, np.float64), 1e-12)) + 3
    clipped: NDArray[np.float32] = np.clip(value, -LAM_BOUND, LAM_BOUND).astype(np.float32)
    return clipped


LAM_BOUND = 6.0


def left_feature(left: NDArray[np.int64] | int, cap: int) -> NDArray[np.float32]:
    """Return the share of a cap on large tokens that is left, in [0, 1]: a feature after those of the schema."""
    return np.asarray(np.asarray(left) / cap, np.float32)


def schema_named(name: str) -> Schema:
    """Return a schema by its name, or by ``name/version``.

    Raises:
        ConfigError: There is none of that name, or its version is another one.
    """
    plain, _, version = name.partition("/")
    if plain not in SCHEMAS:
        raise ConfigError(f"Unknown feature schema {name!r}.{did_you_mean(plain, SCHEMAS)}")
    schema = SCHEMAS[plain]
    if version and version != str(schema.version):
        raise ConfigError(
            f"Feature schema {plain!r} is at version {schema.version} here; version {version} is asked for. "
            "Train the policy again, or use the package version that it was made with."
        )
    return schema


def seen_of(trees: Any, rows: NDArray[Any] | slice = slice(None)) -> Seen:
    """Return what a router may see at rows of compiled `rollouts.trees.arrays.Trees`."""
    from rollouts.trees.arrays import CONTINUE_SMALL, TERMINAL

    def column(values: NDArray[Any]) -> Floats:
        return np.asarray(values[rows], np.float64)

    return Seen(
        score=column(trees.score[:, CONTINUE_SMALL]),
        min_score=column(trees.min_score),
        product_score=column(trees.product_score),
        tokens=column(trees.tokens[:, CONTINUE_SMALL]),
        step=column(trees.depth) + 1,
        terminal=column(trees.child[:, CONTINUE_SMALL] == TERMINAL),
        has_answer=column(trees.has_answer[:, CONTINUE_SMALL]),
    )
