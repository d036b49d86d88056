"""Feature schemas: named, versioned lists of functions from what a router may see to what it is given.

What may be seen are named columns (`rollouts.trees.columns`). A checkpoint or an exported policy carries the name of
its schema; a policy is never fed another one's features. Own features need no change here:

    # my_module.py
    from trim_env.features import Feature
    doubtful = Feature("score below 0.1", 0, 1, ("score",), lambda score: score < 0.1)

    python train.py --schema agg+,my_module:doubtful

Columns of score tables, such as what the models make of a step, are features by name, each with a transform of its
own (`standard`), and so is the least or greatest value among the accepted steps:

    python train.py --schema "free,least(large.min_logprob)"
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.plugins import is_plugin, load_plugin, loaded_plugin
from rollouts.trees.columns import COLUMNS, FACTS, FOLDS, Columns, Fold, fold_named, is_signal

Floats = NDArray[np.float64]
_CLIP = 1e-4  # scores are clipped to [1e-4, 1 - 1e-4] before the logit: PRM scores pile up at 0 and 1
_TYPICAL_TOKENS = 20.0
_ROUNDED = 1e-6  # by which float32 probabilities may lie beyond 0 and 1
_TOLD = ("score", "tokens")  # of accepted steps, in schemas with a history
_NATS = (1e-4, 1e3)  # log-probabilities and entropies are clipped to this size before their logarithm


@dataclass(frozen=True)
class Feature:
    """One number that a router is given.

    Attributes:
        low: Least value; what falls below is raised to it.
        high: Greatest value, likewise.
        columns: What it is computed from: names of columns, or folds of one's own over the accepted steps.
        compute: From these columns, in this order, to the values. Elementwise: the columns are float64 arrays of shape
            (n,), or plain numbers where a session decides once (``max_steps`` always is a number).
        version: Raised whenever it changes its meaning.
    """

    name: str
    low: float
    high: float
    columns: tuple[str | Fold, ...]
    compute: Callable[..., Any]
    version: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(column.name if isinstance(column, Fold) else column for column in self.columns)


@dataclass(frozen=True)
class Schema:
    """A named, versioned list of features.

    Attributes:
        name: As on the command line.
        version: Raised whenever a feature changes its meaning.
        features: The features of a decision in order.
        history: How many of them, the first ones, observations also tell of every step that was accepted before. They
            are functions of score and tokens alone.
    """

    name: str
    version: int
    features: tuple[Feature, ...]
    history: int = 0

    def __post_init__(self) -> None:
        """Check that all columns are there.

        Raises:
            ConfigError: A feature reads a column that there is not, or two folds have one name.
        """
        folds: dict[str, Fold | None] = {**dict.fromkeys(COLUMNS), **FOLDS}
        for feature in self.features:
            for column in feature.columns:
                if isinstance(column, Fold) and folds.setdefault(column.name, column) != column:
                    raise ConfigError(f"Feature {feature.name!r}: another column is called {column.name!r}.")
                name, known = (column.fact, FACTS) if isinstance(column, Fold) else (column, folds)
                if name not in known and not is_signal(name):
                    raise ConfigError(f"Feature {feature.name!r}: no column {name!r}.{did_you_mean(name, known)}")
        for feature in self.features[: self.history]:
            if beyond := [name for name in feature.names if name not in _TOLD]:
                raise ConfigError(
                    f"Feature {feature.name!r} is told of accepted steps (history), of which only "
                    f"{' and '.join(_TOLD)} are kept; it reads {', '.join(beyond)}."
                )

    def __reduce__(self) -> Any:
        """Pickle by name where that leads back here, so that features may be lambdas."""
        try:
            named = schema_named(self.id) == self
        except ConfigError:
            named = False
        again = partial(schema_named, imports=True)
        return (again, (self.id,)) if named else (Schema, (self.name, self.version, self.features, self.history))

    @property
    def size(self) -> int:
        """Number of features of a decision, d."""
        return len(self.features)

    @property
    def id(self) -> str:
        """Name and version, as written into artefacts."""
        return f"{self.name}/{self.version}"

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """The folds that the features read."""
        columns = dict.fromkeys(column for feature in self.features for column in feature.columns)
        read = (FOLDS.get(column) if isinstance(column, str) else column for column in columns)
        return tuple(fold for fold in read if fold is not None)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of the columns that the features read, and ``step``."""
        return tuple(dict.fromkeys([*(name for feature in self.features for name in feature.names), "step"]))

    @cached_property
    def facts(self) -> frozenset[str]:
        """Names of the facts of a step that the features or their folds read (`rollouts.trees.columns`)."""
        read = {*self.reads, *(fold.fact for fold in self.folds)} - {fold.name for fold in self.folds}
        return frozenset(name for name in read if name in FACTS or is_signal(name))

    @cached_property
    def signals(self) -> tuple[str, ...]:
        """Names of the columns of score tables that the features or their folds read."""
        return tuple(sorted(filter(is_signal, self.facts)))

    def reading(self, facts: Collection[str]) -> NDArray[np.bool_]:
        """Return (d,) whether each feature reads one of some facts, or a fold over one."""
        of = {fold.name: fold.fact for fold in self.folds}
        return np.array([any(of.get(name, name) in facts for name in each.names) for each in self.features])

    @cached_property
    def _computed(self) -> list[tuple[Callable[[Any], Any], Callable[[Columns], Any]]]:
        """Functions of what the getter beside each returns: of one column, or of a tuple."""
        return [
            (each.compute if len(each.names) == 1 else partial(_spread, each.compute), itemgetter(*each.names))
            for each in self.features
        ]

    def bounds(self, max_steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return least and greatest values of observations, in the layout of `observed` where there is a history."""
        told = self.history
        beyond = np.minimum, np.maximum  # where no step is there are zeros
        low, high = (
            np.concatenate([np.tile(further(each[:told], 0), max_steps), each[told:]])
            for each, further in zip(self._bounds, beyond, strict=True)
        )
        return low, high

    def accepted(self, score: NDArray[Any], tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Return (n, history) what later observations tell of accepted steps, from their (n,) scores and tokens."""
        columns = {"score": np.asarray(score, np.float64), "tokens": np.asarray(tokens, np.float64)}
        return self._values(columns, len(columns["score"]), self.history)

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
        return np.array([[each.low for each in self.features], [each.high for each in self.features]], np.float32)

    def __call__(self, columns: Columns, there: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Return the (n, d) features, within the bounds.

        Args:
            columns: What they are computed from.
            there: (n,) where there is a proposal; others' features may be NaN. None: everywhere.

        Raises:
            ConfigError: A feature is no number at some decision.
        """
        return self._numbers(self._values(columns, len(columns["step"]), self.size), there)

    def _numbers(self, values: NDArray[np.float32], there: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        odd = np.isnan(values if there is None else values[there])
        if odd.any():
            name = self.features[int(odd.any(axis=0).argmax())].name
            raise ConfigError(f"Feature {name!r} is not a number at some decisions.")
        return values

    def _values(self, columns: Columns, count: int, size: int) -> NDArray[np.float32]:
        values = np.empty((count, size), np.float32)
        for place, (compute, read) in enumerate(self._computed[:size]):
            values[:, place] = compute(read(columns))
        return _within(self._bounds[:, :size], values)

    def single(self, columns: Columns) -> NDArray[np.float32]:
        """Return the (1, d) features of one decision from columns that are plain numbers: the same, faster."""
        values = np.array([[compute(read(columns)) for compute, read in self._computed]], np.float32)
        return self._numbers(_within(self._bounds, values))

    def together(self, decisions: Sequence[Columns]) -> NDArray[np.float32]:
        """Return the (n, d) features of n decisions from the columns of each, plain numbers; all have one max_steps."""
        names = [name for name in self.reads if name != "max_steps"]
        rows = np.array(list(map(itemgetter(*names), decisions)), np.float64)
        columns: dict[str, Any] = dict(zip(names, np.atleast_2d(rows.T), strict=True))
        return self(columns | {"max_steps": decisions[0].get("max_steps")})


def _spread(compute: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    return compute(*values)


def _within(bounds: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = bounds
    np.maximum(values, low, out=values)
    np.minimum(values, high, out=values)
    return values


def logit(score: Floats) -> Floats:
    """Return the log-odds of clipped scores, divided by 3: about -3 to 3."""
    clipped = np.minimum(np.maximum(np.asarray(score, np.float64), _CLIP), 1 - _CLIP)
    result: Floats = np.log(clipped / (1 - clipped)) / 3
    return result


def nats(value: Floats) -> Floats:
    """Return how sure a log-probability or an entropy is: -ln of its size, clipped, divided by 3; about -2.3 to 3."""
    size = np.minimum(np.maximum(np.abs(np.asarray(value, np.float64)), _NATS[0]), _NATS[1])
    result: Floats = -np.log(size) / 3
    return result


def _plain(name: str) -> Feature:
    return Feature(name, 0, 1, (name,), lambda column: column)


_LOGIT_BOUND = float(logit(np.array(1.0)))
_TOKENS = Feature("tokens / 300", 0, np.inf, ("tokens",), lambda tokens: tokens / 300)
_STEP = Feature("step / max_steps", 0, 1, ("step", "max_steps"), lambda step, most: step / most)
_LOGIT = Feature("logit(score) / 3", -_LOGIT_BOUND, _LOGIT_BOUND, ("score",), logit)
_LOGIT_MIN = Feature("logit(min_score) / 3", -_LOGIT_BOUND, _LOGIT_BOUND, ("min_score",), logit)
_LOG_TOKENS = Feature(
    "ln(tokens / 20)", -4, 8, ("tokens",), lambda tokens: np.log(np.maximum(tokens, 1.0) / _TYPICAL_TOKENS)
)
_AGG = (_plain("score"), _plain("min_score"), _TOKENS, _STEP)
_ENDS = (_plain("terminal"), _plain("has_answer"))

_SURE, _UNSURE = (float(nats(np.array(size))) for size in _NATS)


def standard(column: str) -> Feature | None:
    """Return the feature of a column by its name; None if there is no such column.

    Scores become log-odds, log-probabilities and entropies the logarithm of their size, higher is surer; others'
    columns are compressed as arcsinh does. A fold is ``least(COLUMN)`` or ``greatest(COLUMN)``.
    """
    if column in _STANDARD:
        return _STANDARD[column]
    fold = fold_named(column)
    fact = fold.fact if fold else column
    if not (is_signal(fact) or (fold and fact in FACTS)):
        return None
    read, own = (fold or column,), fact.rpartition(".")[2]
    if own.endswith(("_logprob", "_entropy")):
        return Feature(column, _UNSURE, _SURE, read, nats)
    if own == "score":
        return Feature(column, -_LOGIT_BOUND, _LOGIT_BOUND, read, logit)
    return Feature(column, -12, 12, read, np.arcsinh)


_STANDARD = {
    "score": _LOGIT, "min_score": _LOGIT_MIN, "product_score": _plain("product_score"), "tokens": _LOG_TOKENS,
    "step": _STEP, "terminal": _ENDS[0], "has_answer": _ENDS[1],
}  # fmt: skip


def _of(*columns: str) -> tuple[Feature, ...]:
    return tuple(feature for feature in map(standard, columns) if feature)


_SHAPE = ("tokens", "step", "terminal", "has_answer")
_FREE = ("small.min_logprob", "small.mean_logprob", "small.max_entropy", "least(small.min_logprob)")

SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("agg", 1, _AGG),
        Schema("agg+prod", 1, (*_AGG, _plain("product_score"))),
        Schema("agg+", 1, (_LOGIT, _LOGIT_MIN, _LOG_TOKENS, _STEP, *_ENDS)),
        Schema("seq", 1, (_LOGIT, _LOG_TOKENS, _STEP, *_ENDS), history=2),
        Schema("free", 1, _of(*_FREE, *_SHAPE)),
        Schema("prefill", 1, _of(*_FREE, "large.min_logprob", *_SHAPE)),
        Schema("all", 1, _of(*_FREE, "large.min_logprob", *_SHAPE, "score", "min_score")),
    )
}
DEFAULT_SCHEMA = "agg+"


def lam_feature(lam: Floats | float) -> NDArray[np.float32]:
    """Return λ as the feature that λ-conditioned policies see after all others: log10(λ) + 3, within -6 to 6."""
    value = np.log10(np.maximum(np.asarray(lam, np.float64), 1e-12)) + 3
    clipped: NDArray[np.float32] = np.clip(value, -LAM_BOUND, LAM_BOUND).astype(np.float32)
    return clipped


LAM_BOUND = 6.0


def probabilities(given: Any, count: int) -> NDArray[np.float64]:
    """Return what a router gave for so many decisions: (count,) probabilities of escalating.

    Raises:
        ConfigError: It is something else.
    """
    found = np.asarray(given, np.float64)
    if found.shape != (count,) or not ((found >= -_ROUNDED) & (found <= 1 + _ROUNDED)).all():
        told = f", with values from {found.min():g} to {found.max():g}" if found.size else ""
        raise ConfigError(
            f"A router gave an array of shape {found.shape} for {count} decisions{told}; expected the probability of "
            "escalating for each."
        )
    return np.clip(found, 0, 1)


def left_feature(left: NDArray[np.int64] | int, cap: int) -> NDArray[np.float32]:
    """Return the share of a cap on large tokens that is left, in [0, 1]: a feature after those of the schema."""
    return np.asarray(np.asarray(left) / cap, np.float32)


def schema_named(name: str | Schema, *, imports: bool = False) -> Schema:
    """Return a schema by its name, or as it is: ``agg+``, or ``module:object`` of a `Schema` of one's own.

    ``agg+,module:object,...`` adds `Feature` objects to a schema, ``agg+,small.min_logprob,...`` columns (`standard`),
    of which it may also consist altogether. Every part may name its version, ``agg+/1``: so does the `Schema.id` that
    artefacts hold.

    Args:
        name: The name.
        imports: Import the modules that it names, as is right where a user has typed it. Names that come out of files
            are looked up among the modules that are imported already.

    Raises:
        ConfigError: There is none of that name, or its version is another one.
    """
    if isinstance(name, Schema):
        return name
    first, *added = name.split(",")
    plain, version = _versioned(first)
    schema = SCHEMAS.get(plain)
    if schema is None and (alone := standard(plain)):
        schema = Schema(plain, alone.version, (alone,))
    if schema is None:
        if not is_plugin(plain):
            raise ConfigError(f"Unknown feature schema {first!r}.{did_you_mean(plain, SCHEMAS)}")
        own = _own(plain, Schema, imports)
        schema = Schema(plain, own.version, own.features, own.history)
    _check_version("Feature schema", plain, schema.version, version)
    for part in added:
        plain, version = _versioned(part)
        feature = standard(plain) or _own(plain, Feature, imports)
        _check_version("Feature", plain, feature.version, version)
        schema = Schema(f"{schema.id},{plain}", feature.version, (*schema.features, feature), schema.history)
    return schema


def _versioned(part: str) -> tuple[str, str]:
    plain, _, version = part.partition("/")
    return plain, version


def _own(name: str, kind: type, imports: bool) -> Any:
    found = (load_plugin if imports else loaded_plugin)(name, "Feature schema")
    if not isinstance(found, kind):
        raise ConfigError(
            f"Feature schema: {name} is a {type(found).__name__}, expected a trim_env.features.{kind.__name__}. A "
            "schema comes first, features follow after commas: agg+,my_module:my_feature."
        )
    return found


def _check_version(what: str, name: str, here: int, wanted: str) -> None:
    if wanted and wanted != str(here):
        raise ConfigError(
            f"{what} {name!r} is at version {here} here; version {wanted} is asked for. "
            "Train the policy again, or use the package version that it was made with."
        )
