"""Cost models: what a decision costs, as a sum over the edges of a tree (docs/design.md, section 5).

Only costs that are sums over edges can be optimised by a policy that sees one decision at a time; prices that
depend on what is in a server's cache may be reported, not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees


@dataclass(frozen=True)
class CostModel:
    """Weights of the kinds of tokens; a cost is their weighted sum.

    Attributes:
        name: As on the command line.
        large_decode: Per token that the large model decodes.
        large_prefill: Per token of the prefix that it reads, at every escalation (no cache).
        small_decode: Per token that the small model decodes, accepted or not.
        small_prefill: Per token of the prefix that it reads, at every step (no cache).
        unit: What a cost of 1 is.
    """

    name: str
    large_decode: float = 1.0
    large_prefill: float = 0.0
    small_decode: float = 0.0
    small_prefill: float = 0.0
    unit: str = "large-model tokens"

    def edges(self, trees: Trees) -> NDArray[np.float64]:
        """Return the (N, 2) cost of taking each action at each node; NaN where the proposal was not generated.

        The small model proposes first, so its tokens count for both actions.
        """
        cost = self.of(trees.tokens, trees.prompt_tokens)
        cost[trees.child == MISSING] = np.nan
        return cost

    def of(self, tokens: NDArray[Any], prompt_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Return the (n, 2) cost of both actions, from (n, 2) decoded and (n, 2) prompt tokens of the proposals."""
        small, large = CONTINUE_SMALL, ESCALATE_LARGE
        cost = np.zeros((len(tokens), 2))
        proposal = self.small_decode * tokens[:, small] + self.small_prefill * prompt_tokens[:, small]
        cost += np.asarray(proposal, np.float64)[:, None]
        cost[:, large] += self.large_decode * tokens[:, large] + self.large_prefill * prompt_tokens[:, large]
        return cost


_NAMED = {
    "decode-only": CostModel("decode-only"),
    "prefill-20": CostModel("prefill-20", large_decode=1.2),
}
_PRICES = ("large_in", "large_out", "small_in", "small_out")


def cost_model(spec: str) -> CostModel:
    """Return a cost model from its name.

    - ``decode-only``: tokens that the large model decodes (the paper's, and the default).
    - ``prefill-20``: 1.2 times that (the paper's conservative variant).
    - ``prefill-full:PRICE``: decoded tokens, and PRICE for each token of the prefix at every escalation.
    - ``prices:large_in=3,large_out=15,small_in=0.1,small_out=0.2``: US dollars per million tokens; what is left
      out is free. Then `lam` is per dollar.

    Raises:
        ConfigError: There is no such model, or a price is not a number of at least 0.
    """
    name, _, argument = spec.partition(":")
    if spec in _NAMED:
        return _NAMED[spec]
    if name == "prefill-full":
        return CostModel(spec, large_prefill=_price(spec, argument))
    if name == "prices":
        prices = dict.fromkeys(_PRICES, 0.0)
        for item in argument.split(","):
            key, _, value = item.partition("=")
            if key not in prices:
                raise ConfigError(f"Cost model {spec!r}: unknown price {key!r}.{did_you_mean(key, _PRICES)}")
            prices[key] = _price(spec, value) / 1e6
        decode, prefill = prices["large_out"], prices["large_in"]
        return CostModel(spec, decode, prefill, prices["small_out"], prices["small_in"], unit="US dollars")
    known = [*_NAMED, "prefill-full", "prices"]
    raise ConfigError(f"Unknown cost model {spec!r}.{did_you_mean(name, known)}")


def _price(spec: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (np.isfinite(value) and value >= 0):
        raise ConfigError(f"Cost model {spec!r}: expected a number of at least 0, found {text!r}.")
    return value
