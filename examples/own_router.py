"""A router of one's own, from training to a session: escalate where the proposal scores low and nothing did before.

    python train.py --agent examples.own_router:TwoNumbers --lam 3e-3 --out runs/two
    python evaluate.py runs/two --import examples.own_router
    python -m agents export runs/two --out two-router --import examples.own_router

Once an earlier step is wrong, writing the next one well helps little: hence the second number. `agents.routers.base`
says what is asked of a router, of one that is stored, and of one that ``--agent`` trains.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.walk import run
from agents.routers.base import Knob
from trim_env.tables import DecisionTables


@dataclass(frozen=True)
class TwoNumbers:
    """Escalates where the score is below `below` and the least score of the accepted steps is at least `least`."""

    below: float
    least: float
    lam: float
    name: str = "two-numbers"
    schema: str = "agg/1"  # features: score, min_score, tokens / 300, step / max_steps

    @property
    def knob(self) -> Knob:
        """What it was made for."""
        return Knob("lam", self.lam)

    def probability(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the (n,) probabilities of escalating."""
        return ((features[:, 0] < self.below) & (features[:, 1] >= self.least)).astype(np.float64)

    @classmethod
    def fit(cls, tables: DecisionTables, lam: float, seed: int) -> TwoNumbers:
        """Return the pair with the greatest return on the training split, of 19 times 19."""
        grid = np.linspace(0.05, 0.95, 19).tolist()
        pairs = [cls(below, least, lam) for below, least in product(grid, grid)]
        return max(pairs, key=lambda router: float(run(router, tables).returns(lam).mean()))

    def to_plain(self) -> dict[str, Any]:
        """Return what an artefact holds."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> TwoNumbers:
        """Return the router from what an artefact holds."""
        return cls(**plain)
