"""AutoMix (Aggarwal et al., arXiv 2310.12963): the small model's solution is verified, then kept or written anew.

The verifier tells a number v in [0, 1]. Of AutoMix itself that is the share of samples in which the small model finds
its solution correct (`rollouts.scoring.verification`, the store's table of that name); of AutoMix-PRM, as in the paper
on TRIM, the reward model's, from the scores of all steps. What is made of v is a threshold, or the rule of a POMDP with
one decision: of each bin of v the training problems tell how many are needy (the large model alone is right), good (the
small one is) and hopeless (neither is).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.walk import attempts_of
from agents.routers.base import Floats, Knob
from agents.routers.whole import Attempts
from rollouts.errors import DataError, StoreError, did_you_mean
from trim_env.features import schema_named
from trim_env.tables import DecisionTables

SCHEMA = schema_named("agg+prod").id
_LAST, _LEAST, _PRODUCT = 0, 1, 4  # features of that schema: of the last step, and of those before
RULES: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "min": lambda scores: np.minimum(scores[:, _LAST], scores[:, _LEAST]),
    "last": lambda scores: scores[:, _LAST],
    "product": lambda scores: scores[:, _LAST] * scores[:, _PRODUCT],
}
"""What is made of the scores of a solution's steps."""
SELF = "self-verification"
BINS = 10


@dataclass(frozen=True, eq=False)
class Bins:
    """What the large model gains over the small one where v is in a bin.

    Attributes:
        edges: (b - 1,) edges between the bins, ascending; v on an edge is in the upper bin.
        gain: (b,) share of needy problems, less that of problems which the small model alone solves.
    """

    edges: Floats
    gain: Floats

    @classmethod
    def fit(cls, v: Floats, small: Floats, large: Floats, bins: int = BINS) -> Bins:
        """Measure the gain in bins of about as many problems.

        Args:
            v: (n,) verifications of solutions.
            small: (n,) whether they are right.
            large: (n,) whether the large model's are.
            bins: Bins at most; where many v are the same there are fewer.

        Raises:
            DataError: There are no solutions.
        """
        if not len(v):
            raise DataError("AutoMix: there are no solutions to measure the verifier on.")
        edges = np.unique(np.quantile(v, np.arange(1, bins) / bins, method="higher"))
        edges = edges[edges > v.min()]
        member = np.searchsorted(edges, v, side="right")
        count = np.bincount(member, minlength=len(edges) + 1)
        return cls(edges, np.bincount(member, large - small, len(edges) + 1) / count)

    def __call__(self, v: Floats) -> Floats:
        """Return (n,) gains."""
        return self.gain[np.searchsorted(self.edges, v, side="right")]


@dataclass(frozen=True, eq=False)
class AutoMix:
    """Starts again where a verification says so: below a threshold, or with bins where the gain exceeds a price.

    Attributes:
        rule: What v is made of the reward model's scores (`RULES`), or `SELF`.
        knob: ``threshold`` on v, or ``price``, the gain that a retry must exceed.
        bins: Gain by v; None: a threshold.
    """

    rule: str
    knob: Knob
    bins: Bins | None = None

    def __post_init__(self) -> None:
        """Check that there is such a rule."""
        if self.rule not in (known := (*RULES, SELF)):
            raise DataError(f"AutoMix: unknown rule {self.rule!r}.{did_you_mean(self.rule, known)}")

    @property
    def name(self) -> str:
        """As in tables and plots."""
        return f"AutoMix{'' if self.rule == SELF else '-PRM'} ({self.rule}{', POMDP' if self.bins else ''})"

    @property
    def schema(self) -> str:
        """That of the scores; of no features where the small model verifies."""
        return "step/1" if self.rule == SELF else SCHEMA

    def verified(self, attempts: Attempts) -> Floats:
        """Return (R,) v.

        Raises:
            StoreError: Solutions are not verified.
        """
        if self.rule != SELF:
            return RULES[self.rule](attempts.features).astype(np.float64)
        yes, samples = attempts.told("verification.yes"), attempts.told("verification.samples")
        if lacking := int(np.isnan(yes).sum()):
            raise StoreError(
                f"{lacking} of {len(yes)} solutions of the small model are not verified by itself. Run "
                "`python -m rollouts score STORE --models FILE --scorer verification`."
            )
        share: Floats = yes / np.maximum(samples, 1)
        return share

    def verifying(self, attempts: Attempts) -> Floats:
        """Return (R, 3) samples, and tokens read and decoded for them; zeros where a reward model verifies."""
        if self.rule != SELF:
            return np.zeros((len(attempts.problems), 3))
        return np.stack([attempts.told(f"verification.{name}") for name in ("samples", "read", "decoded")], axis=1)

    def retries(self, attempts: Attempts) -> Floats:
        """Return (R,) of 0 and 1."""
        v = self.verified(attempts)
        again = v < self.knob.value if self.bins is None else self.bins(v) > self.knob.value
        return again.astype(np.float64)


def thresholds(rule: str, tables: DecisionTables, count: int = 64) -> list[AutoMix]:
    """Return cascades at quantiles of v on some problems, and one above all."""
    v = _verified(rule, tables)
    levels = [*np.unique(np.quantile(v, np.linspace(0, 1, count), method="higher")), np.nextafter(v.max(), np.inf)]
    return [AutoMix(rule, Knob("threshold", float(level))) for level in levels]


def pomdp(rule: str, train: DecisionTables) -> list[AutoMix]:
    """Return the cascades of all prices that differ, fitted on training problems."""
    v = _verified(rule, train)
    bins = Bins.fit(v, *train.alone.correct.T)
    prices = [*np.unique(bins.gain), bins.gain.min() - 1]
    return [AutoMix(rule, Knob("price", float(price)), bins) for price in prices]


def _verified(rule: str, tables: DecisionTables) -> Floats:
    any_setting = AutoMix(rule, Knob("threshold", 0.0))
    return any_setting.verified(attempts_of(tables, any_setting.schema))
