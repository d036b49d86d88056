"""What every router is: features in, probability of escalating out, with a name, a schema and a knob.

Routers of your own go everywhere that ours go. A class that satisfies `Router` or `StatefulRouter` is evaluated; one
that is a `PlainRouter` besides is stored, exported and served; one with a class method `Learner.fit` besides that is
trained, ``train.py --agent my_module:MyRouter``. Commands that read its artefacts import its module where you name it,
``--import my_module``; files import nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ArtefactError, ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scores = NDArray[np.floating[Any]]
Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Knob:
    """The setting by which a router trades accuracy for cost.

    Attributes:
        name: ``lam``, ``threshold``, ``rate`` or ``action``.
        value: Its value.
    """

    name: str
    value: float

    def __str__(self) -> str:
        """Return it as name=value."""
        return f"{self.name}={self.value:g}"


class Named(Protocol):
    """What all routers tell of themselves.

    Attributes:
        name: As in tables and plots.
        schema: Name of its feature schema (`trim_env.features.SCHEMAS`), with version.
        knob: What was set to trade accuracy for cost.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def schema(self) -> str: ...  # noqa: D102

    @property
    def knob(self) -> Knob: ...  # noqa: D102


@runtime_checkable
class Router(Named, Protocol):
    """Decides at every step who writes it, from the features of that step alone."""

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return the (n,) probabilities of `ESCALATE_LARGE` given (n, d) features: 0 or 1 unless the router draws."""


@runtime_checkable
class StatefulRouter(Named, Protocol):
    """Decides from what it has seen of the path as well; what it remembers is an array that its caller keeps.

    The router itself stays as it is: the same state and features give the same decision. Rows of a state are
    episodes; a caller may take, repeat and reorder them.
    """

    def start(self, n: int) -> Floats:
        """Return the (n, s) state of n episodes that begin."""

    def decide(self, features: NDArray[np.float32], state: Floats) -> tuple[Floats, Floats]:
        """Return the (n,) probabilities of `ESCALATE_LARGE` given (n, d) features, and the (n, s) state after them."""

    def accept(self, state: Floats, actions: Ints, scores: Scores, tokens: Tokens) -> Floats:
        """Return the (n, s) state once steps were accepted.

        Args:
            state: As `decide` returned it.
            actions: (n,) 0 where the proposal was accepted, 1 where the large model wrote the step instead.
            scores: (n,) scores of the accepted steps, whoever wrote them.
            tokens: (n,) their tokens.
        """


AnyRouter = Router | StatefulRouter


@runtime_checkable
class Undrafted(Named, Protocol):
    """A router, of either kind, that lets the large model write some steps before the small one has proposed any.

    Those are evaluated without the small model's tokens and without what reading them costs. It is compared on trees;
    it is not stored or served, where decisions are on proposals.

    Attributes:
        goes_on: Whether the large model then goes on in its request of the step before, and reads no prefix anew.
    """

    @property
    def goes_on(self) -> bool: ...  # noqa: D102

    def undrafted(self, features: NDArray[np.float32], state: Floats) -> NDArray[np.bool_]:
        """Return (n,) where a step that the large model writes has no proposal before it.

        Args:
            features: (n, d) features of the proposals that there would be.
            state: As `StatefulRouter.decide` is given it; not to be read by a router without one.
        """


def refuse_undrafted(router: Any) -> None:
    """Raise `ArtefactError` for a router that decides before there is a proposal."""
    if isinstance(router, Undrafted):
        raise ArtefactError(
            f"{router.name} cannot be stored or served: it lets the large model write steps before the small one has "
            "proposed any, and what is in use decides on proposals. Compare it on rollouts: agents.evaluation.walk.run."
        )


@runtime_checkable
class PlainRouter(Protocol):
    """A router of your own that can be stored: as JSON and, if it has ``weights``, arrays beside it.

    Attributes that it may have besides:
        weights: Named float32 arrays; they go into ``policy.safetensors``.
        max_large_tokens: Cap M on large tokens; then the share of M that is left is told after the schema's features.
    """

    def to_plain(self) -> dict[str, Any]:
        """Return what `from_plain` needs, as JSON holds it."""

    @classmethod
    def from_plain(cls, plain: dict[str, Any], *weights: dict[str, NDArray[np.float32]]) -> Any:
        """Return the router again, from what `to_plain` gave and, if it has them, its ``weights``."""


class Learner(Protocol):
    """What ``train.py --agent module:Class`` names: who makes a router for each λ."""

    @classmethod
    def fit(cls, tables: Any, lam: float, seed: int) -> Any:
        """Return a router for λ that was fitted on the training split.

        Args:
            tables: `trim_env.tables.DecisionTables` of the split: features, costs and correctness by node.
            lam: λ, reward lost per unit of cost.
            seed: Seed of everything that is drawn.
        """


def checked(router: Any, source: str) -> Any:
    """Return what others' code has made if it is a router.

    Raises:
        ConfigError: It is not; the message names what it lacks.
    """
    if not isinstance(router, Router | StatefulRouter):
        lacks = [name for name in ("name", "schema", "knob", "probability") if not hasattr(router, name)]
        raise ConfigError(f"{source} made a {type(router).__name__}, which is no router: it has no {', '.join(lacks)}.")
    return router


@dataclass(frozen=True)
class Mixture:
    """Two settings of one router: each problem as a whole goes to one of them at random.

    Attributes:
        first: The one, an `AnyRouter`, or like `second` one of whole problems.
        second: The other.
        share: Probability that a problem goes to `second`.
        knob: What it was mixed for: ``budget`` or ``accuracy``.
    """

    first: Any
    second: Any
    share: float
    knob: Knob

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share <= 1:
            raise ConfigError(f"The share of a mixture is {self.share}, expected a probability.")

    @property
    def name(self) -> str:
        """The name of the second: the first may be always-small."""
        return str((self.second if is_end(self.first) else self.first).name)

    @property
    def schema(self) -> str:
        """The schema of the first; the second may have another."""
        return str(self.first.schema)

    def pick(self, uniform: float) -> Any:
        """Return the router of one problem, given a number that was drawn uniformly from [0, 1) for it."""
        return self.second if uniform < self.share else self.first


def parts_of(router: Any) -> tuple[Any, ...]:
    """Return both parts of a mixture, or the router itself."""
    return (router.first, router.second) if isinstance(router, Mixture) else (router,)


def schemas_of(router: Any) -> set[str]:
    """Return the schemas of a router, of a mixture those of both parts."""
    return {part.schema for part in parts_of(router)}


def is_end(router: Any) -> bool:
    """Whether a router is one end of what routing can do: one model all the time."""
    return bool(router.knob.name == "action")


def is_blind(router: Any) -> bool:
    """Whether a router decides without reading anything of the steps, whatever schema it names."""
    return isinstance(router, Constant | RandomRate) or hasattr(router, "sends")


def told_cap(router: Any) -> int | None:
    """Return M if a router takes the share of M large tokens that is left as its last feature, None if it does not."""
    if isinstance(router, Mixture):
        return told_cap(router.first) or told_cap(router.second)
    return getattr(router, "max_large_tokens", None)


@dataclass(frozen=True)
class Constant:
    """Always the same action: 0 is always-small, 1 always-large."""

    action: int
    schema: str = "agg/1"

    @property
    def name(self) -> str:
        """The reference point's name."""
        return "always-large" if self.action else "always-small"

    @property
    def knob(self) -> Knob:
        """The action."""
        return Knob("action", self.action)

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) zeros or ones."""
        return np.full(len(features), float(self.action))


@dataclass(frozen=True)
class RandomRate:
    """Escalates each step with the same probability, whatever it sees: the line that a router must beat."""

    rate: float
    name: str = "random"
    schema: str = "agg/1"

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"The rate of a random router is {self.rate}, expected a probability.")

    @property
    def knob(self) -> Knob:
        """The rate."""
        return Knob("rate", self.rate)

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) times the rate."""
        return np.full(len(features), self.rate)


@dataclass(frozen=True)
class Threshold:
    """TRIM-Thr: escalates if and only if the score of the proposal is below a threshold.

    In another schema it is the first feature that is compared, such as ``small.min_logprob`` (all standard features of
    score tables are higher where a step is surer).
    """

    threshold: float
    name: str = "trim-thr"
    schema: str = "agg/1"

    @property
    def knob(self) -> Knob:
        """The threshold."""
        return Knob("threshold", self.threshold)

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) of 0 and 1."""
        return (features[:, 0] < np.float32(self.threshold)).astype(np.float64)
