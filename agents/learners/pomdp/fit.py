"""From trees to routers: estimates with or without labels, then a plan for each λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.learners.pomdp.dynamics import Dynamics, Rate, measure
from agents.learners.pomdp.em import Agreement, agreement, em
from agents.learners.pomdp.latent import CLASSES, labelled
from agents.learners.pomdp.observation import ObservationModel, observations
from agents.learners.pomdp.presets import measured, paper
from agents.learners.pomdp.sample import LEVELS, sample
from agents.learners.pomdp.solver import routers
from agents.routers.pomdp.belief import Floats
from agents.routers.pomdp.model import Kinds, Model
from agents.routers.pomdp.router import PomdpRouter
from rollouts.errors import ConfigError, did_you_mean
from rollouts.trees.arrays import Trees
from trim_env.costs import CostModel, TokenPrices, charges_signals

LABELS = ("auto", "exact", "em")
PRESETS = ("measured", "paper")


@dataclass(frozen=True, eq=False)
class Estimates:
    """Everything that a model is made of.

    Attributes:
        agreement: How EM agrees with exact labels, where it was used and there are any.
    """

    observed: ObservationModel
    dynamics: Dynamics
    kinds: Kinds
    labels: str
    nodes: int
    agreement: Agreement | None = None

    def model(self, name: str = "measured") -> Model:
        """Return the model of a preset.

        Raises:
            ConfigError: There is none of that name.
        """
        if name not in PRESETS:
            raise ConfigError(f"Unknown POMDP preset {name!r}.{did_you_mean(name, PRESETS)}")
        if name == "paper":
            return paper(self.observed, self.dynamics)
        return measured(self.observed, self.dynamics, self.kinds)

    def routers(
        self, lams: Sequence[float] | Floats, name: str = "measured", *, price: float = 1.0
    ) -> list[PomdpRouter]:
        """Return the router of a preset for each λ; see `agents.learners.pomdp.solver.routers`."""
        return routers(self.model(name), lams, price=price)

    def report(self) -> dict[str, Any]:
        """Return rates with counts and intervals, and what else a reader would ask for, as plain values."""
        rates = {name: asdict(value) for name, value in vars(self.dynamics).items() if isinstance(value, Rate)}
        small, large = (dict(zip(CLASSES, counts.tolist(), strict=True)) for counts in self.observed.counts)
        return {
            "labels": self.labels,
            "nodes": self.nodes,
            "scored_steps": {"small": small, "large": large},
            **rates,
            "hazard": [asdict(rate) for rate in self.dynamics.hazard],
            "mean_large_tokens": self.dynamics.mean_large_tokens,
            "agreement": asdict(self.agreement) if self.agreement else None,
        }


def estimate(
    trees: Trees,
    split: str | None = "train",
    *,
    labels: str = "auto",
    indices: NDArray[Any] | None = None,
    levels: int = LEVELS,
) -> Estimates:
    """Estimate what scores tell and how trajectories go on.

    Args:
        trees: Compiled trees.
        split: Split to estimate from; None for all trees.
        labels: ``exact``: step labels of the trees; ``em``: none, only scores and final outcomes; ``auto``: exact
            ones where the trees have any.
        indices: Estimate from these trees instead of from a whole split.
        levels: Levels of the last accepted step's score that the next one is conditioned on; 1: it is not.

    Raises:
        ConfigError: Unknown kind of labels.
        DataError: Too few steps of a class.
        StoreError: The split is empty.
    """
    if labels not in LABELS:
        raise ConfigError(f"Unknown kind of labels {labels!r}.{did_you_mean(labels, LABELS)}")
    rows = trees.rows_of(trees.select(split) if indices is None else np.asarray(indices, np.int64))
    seen = sample(trees, rows, levels=levels)
    exact = labelled(trees, rows)
    if labels == "exact" or (labels == "auto" and (trees.label[rows] >= 0).any()):
        return Estimates(observations(seen, exact), measure(seen, exact), seen.kinds, "exact", len(rows))
    fitted = em(seen)
    found = agreement(fitted.latent, exact)
    return Estimates(fitted.observed, fitted.dynamics, seen.kinds, "em", len(rows), found)


def price_of(cost: CostModel) -> float:
    """Return what a large token costs.

    Raises:
        ConfigError: Other things than large tokens cost something, which the model knows nothing of.
    """
    if not isinstance(cost, TokenPrices) or cost.small_decode or cost.small_prefill or charges_signals(cost):
        raise ConfigError(
            f"The POMDP plans for tokens that the large model decodes; cost model {cost.name!r} prices others as well. "
            "Use --cost decode-only or prefill-20, or another agent."
        )
    return cost.large_decode
