"""TRIM-POMDP as a router: filters every episode's scores and takes the action that planning says is worth more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Ints, Knob, Scores, Tokens
from agents.routers.pomdp.backup import after_score, backup
from agents.routers.pomdp.belief import S0, Floats, after_large, corrected, predicted, scored
from agents.routers.pomdp.model import SCHEMA, SCORE, Model, as_feature, expected_tokens, to_bins, tokens_in
from rollouts.trees.arrays import ESCALATE_LARGE

_STEP, _G, _CONTEXT, _KIND, _BIN, _CLASSES = 0, 1, 2, 3, 4, slice(5, 8)  # columns of the state


@dataclass(frozen=True, eq=False)
class PomdpRouter:
    """Deterministic; the state of an episode is a row of eight numbers.

    Attributes:
        model: The decision process that was planned for.
        lam: λ that it was solved for.
        value: (T + 1, C, n) greatest expected return before the proposal of a step is seen
            (`agents.learners.pomdp.solver`).
        price: Cost of a large token: λ times this is what it costs in return.
    """

    model: Model
    lam: float
    value: Floats
    price: float = 1.0
    name: str = "trim-pomdp"
    schema: str = SCHEMA
    _scored: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare what every decision needs."""
        wanted = (self.model.steps + 1, self.model.contexts)
        if self.value.ndim != 3 or self.value.shape[:2] != wanted or not np.isfinite(self.value).all():
            raise ValueError(f"values of shape {self.value.shape}, expected numbers of shape {(*wanted, 'n')}")
        scored = [after_score(self.model, v[None], self.model.contexts_at(t))[0] for t, v in enumerate(self.value[1:])]
        object.__setattr__(self, "_scored", np.stack(scored))

    @property
    def knob(self) -> Knob:
        """λ."""
        return Knob("lam", self.lam)

    def start(self, n: int) -> Floats:
        """Return the (n, 8) state of n episodes.

        Step number minus 1, P(prefix right), context; of the proposal, once it is seen: kind, bin of its score,
        P(S0), P(S1), P(S2).
        """
        state = np.zeros((n, 8))
        state[:, _G], state[:, _CONTEXT] = 1.0, self.model.contexts - 1
        return state

    def decide(self, features: NDArray[np.float32], state: Floats) -> tuple[Floats, Floats]:
        """Return the (n,) probabilities of escalating, 0 or 1, and the state with the proposal's score taken in."""
        step, kind, context = self._step(state), self.model.kinds.of(features), state[:, _CONTEXT].astype(np.int64)
        bins = to_bins(self.model.edges, features[:, SCORE])
        ahead = predicted(state[:, _G], self.model.p_small[step, kind])
        classes, _ = corrected(ahead, self.model.small[context, kind, :, bins])
        price = self.lam * self.price * expected_tokens(self.model.token_line[step, kind], tokens_in(features))
        escalate = np.zeros(len(features))
        groups, member = np.unique(step * self.model.kinds.count + kind, return_inverse=True)
        for number, group in enumerate(groups):
            own = np.flatnonzero(member == number)
            at, which = divmod(int(group), self.model.kinds.count)
            leads = backup(self.model, at, which, context[own], bins[own], classes[own], self.value.shape[-1])
            small, large = leads.worth(self.value[None, at + 1], self._scored[None, at])
            escalate[own] = large[0] - price[own] > small[0]
        after = state.copy()
        after[:, _KIND], after[:, _BIN], after[:, _CLASSES] = kind, bins, classes
        return escalate, after

    def accept(self, state: Floats, actions: Ints, scores: Scores, tokens: Tokens) -> Floats:
        """Return the state before the next proposal: the score of a step of the large model is taken in."""
        kind, context = state[:, _KIND].astype(np.int64), state[:, _CONTEXT].astype(np.int64)
        classes, large = state[:, _CLASSES], actions == ESCALATE_LARGE
        bins = np.where(large, to_bins(self.model.edges, as_feature(scores)), state[:, _BIN].astype(np.int64))
        mended = after_large(classes, self.model.p_large[:, kind], self.model.repair)
        mended = scored(mended, self.model.large[context, :, bins])
        after = np.zeros_like(state)
        after[:, _STEP] = state[:, _STEP] + 1
        after[:, _G] = np.where(large, mended, classes[..., S0])  # accepted, what is wrong stays wrong
        after[:, _CONTEXT] = self.model.level[bins]
        return after

    def _step(self, state: Floats) -> NDArray[np.int64]:
        return np.minimum(state[:, _STEP].astype(np.int64), self.model.steps - 1)

    def to_plain(self) -> dict[str, Any]:
        """Return it as lists and numbers."""
        return {
            "model": self.model.to_plain(),
            "lam": self.lam,
            "value": self.value.tolist(),
            "price": self.price,
            "name": self.name,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> PomdpRouter:
        """Return the router from what `to_plain` gave.

        Raises:
            KeyError, TypeError, ValueError: It is not that.
        """
        model, value = Model.from_plain(plain["model"]), np.array(plain["value"], np.float64)
        return cls(model, float(plain["lam"]), value, float(plain["price"]), str(plain["name"]))
