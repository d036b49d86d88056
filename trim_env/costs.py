"""Cost models: what a decision costs, as a sum over the edges of a tree (docs/design.md, section 5).

Only costs that are sums over edges can be optimised by a policy that sees one decision at a time; prices that
depend on what is in a server's cache may be reported, not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.plugins import is_plugin, load_plugin, loaded_plugin
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees
from trim_env.features import Schema

SCORER = "scorer"
SOURCES = (SCORER, LARGE)  # who reads proposals so that a router may decide


@runtime_checkable
class CostModel(Protocol):
    """What a cost model has to offer; ``--cost my_module:my_cost`` names an object of one's own.

    Attributes:
        name: For tables and messages.
        unit: What a cost of 1 is.
        large_decode: Price of a token that the large model decodes: so much less does a step cost for each token that
            a cap on large tokens cuts off.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def unit(self) -> str: ...  # noqa: D102

    @property
    def large_decode(self) -> float: ...  # noqa: D102

    def of(self, tokens: NDArray[Any], prompt_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Return what both actions cost at n decisions, an array of shape (n, 2), at least 0.

        Args:
            tokens: (n, 2) tokens decoded for the small and for the large model's proposal, 0 where there is none.
            prompt_tokens: (n, 2) tokens of the prompts that they are decoded from.
        """


@dataclass(frozen=True)
class TokenPrices:
    """Weights of the kinds of tokens; a cost is their weighted sum.

    Attributes:
        name: As on the command line.
        large_decode: Per token that the large model decodes.
        large_prefill: Per token of the prefix that it reads, at every escalation (no cache).
        small_decode: Per token that the small model decodes, accepted or not.
        small_prefill: Per token of the prefix that it reads, at every step (no cache).
        scorer_prefill: Per token that a scorer reads, where its scores are: prefix and proposal, at every step.
        large_cached: Per token of the prefix where the large model looks at every proposal, and so has read it before;
            the proposal's tokens cost `large_prefill`. None: as `large_prefill`.
        call: Per proposal that a scorer or the large model reads so that a router may decide.
        unit: What a cost of 1 is.
    """

    name: str
    large_decode: float = 1.0
    large_prefill: float = 0.0
    small_decode: float = 0.0
    small_prefill: float = 0.0
    scorer_prefill: float = 0.0
    large_cached: float | None = None
    call: float = 0.0
    unit: str = "large-model tokens"

    def of(self, tokens: NDArray[Any], prompt_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Return the (n, 2) cost of both actions; the small model proposes first, so its tokens count for both."""
        small, large = CONTINUE_SMALL, ESCALATE_LARGE
        cost = np.zeros((len(tokens), 2))
        proposal = self.small_decode * tokens[:, small] + self.small_prefill * prompt_tokens[:, small]
        cost += np.asarray(proposal, np.float64)[:, None]
        cost[:, large] += self.large_decode * tokens[:, large] + self.large_prefill * prompt_tokens[:, large]
        return cost

    def of_signals(
        self, tokens: NDArray[Any], prompt_tokens: NDArray[Any], sources: frozenset[str]
    ) -> NDArray[np.float64]:
        """Return the (n, 2) further cost of what is read of a proposal to decide (`sources_of`)."""
        small, large = CONTINUE_SMALL, ESCALATE_LARGE
        prefix, own = np.asarray(prompt_tokens, np.float64), np.asarray(tokens[:, small], np.float64)
        cost = np.full((len(tokens), 2), self.call * len(sources))
        if SCORER in sources:
            cost += (self.scorer_prefill * (prefix[:, small] + own))[:, None]
        if LARGE in sources:
            cached = self.large_prefill if self.large_cached is None else self.large_cached
            cost += (cached * prefix[:, small] + self.large_prefill * own)[:, None]
            cost[:, large] += (cached - self.large_prefill) * prefix[:, large]
        return cost


def sources_of(schema: Schema, scorer: str) -> frozenset[str]:
    """Return who has to read a proposal for a router with these features: ``scorer``, ``large``, both or none.

    What the small model makes of its own tokens costs nothing: it is known once they are decoded.

    Args:
        schema: The features.
        scorer: Score table, or column of one, that the score comes from.
    """
    return frozenset(filter(None, (source_of(name, scorer) for name in schema.facts)))


def source_of(fact: str, scorer: str) -> str | None:
    """Return who has to read a proposal to tell a fact of it: ``scorer``, ``large``, or None, as of `sources_of`."""
    table = fact.rpartition(".")[0]
    if fact == "score":
        table = next((role for role in ROLES if scorer in (role, f"{role}.{scorer.rpartition('.')[2]}")), scorer)
    return (LARGE if table == LARGE else SCORER) if table not in ("", SMALL) else None


def cost_of(
    model: CostModel, tokens: NDArray[Any], prompt_tokens: NDArray[Any], sources: frozenset[str]
) -> NDArray[np.float64]:
    """Return what both actions cost at n decisions, an array of shape (n, 2), with what is read to decide.

    Raises:
        ConfigError: The model gives no such array, or costs that are no numbers of at least 0.
    """
    cost = np.array(model.of(tokens, prompt_tokens), np.float64)
    if cost.shape != tokens.shape or not (np.isfinite(cost) & (cost >= 0)).all():
        found = f", with values from {cost.min():g} to {cost.max():g}" if cost.size else ""
        raise ConfigError(
            f"Cost model {model.name!r} gave an array of shape {cost.shape} for {len(tokens):,} decisions{found}; "
            "expected finite numbers of at least 0, two for each decision."
        )
    if sources and isinstance(model, TokenPrices):
        cost += model.of_signals(tokens, prompt_tokens, sources)
    return cost


def charges_signals(model: CostModel) -> bool:
    """Whether it costs anything to read proposals."""
    return isinstance(model, TokenPrices) and any(
        (model.scorer_prefill, model.large_prefill, model.large_cached, model.call)
    )


def edge_costs(model: CostModel, trees: Trees, sources: frozenset[str] = frozenset()) -> NDArray[np.float64]:
    """Return the (N, 2) cost of taking each action at each node; NaN where the proposal was not generated."""
    cost = cost_of(model, trees.tokens, trees.prompt_tokens, sources)
    alone = trees.large_alone
    cost[alone, CONTINUE_SMALL] = cost[alone, ESCALATE_LARGE]
    cost[trees.child == MISSING] = np.nan
    return cost


_NAMED = {
    "decode-only": TokenPrices("decode-only"),
    "prefill-20": TokenPrices("prefill-20", large_decode=1.2),
}
_PRICES = {
    "large_in": "large_prefill",
    "large_out": "large_decode",
    "large_cached": "large_cached",
    "small_in": "small_prefill",
    "small_out": "small_decode",
    "scorer_in": "scorer_prefill",
    "call": "call",
}


def cost_model(spec: str | CostModel, *, imports: bool = False) -> CostModel:
    """Return a cost model from its name, or as it is.

    - ``decode-only``: tokens that the large model decodes (the paper's, and the default).
    - ``prefill-20``: 1.2 times that (the paper's conservative variant).
    - ``prefill-full:PRICE``: decoded tokens, and PRICE for each token of the prefix at every escalation.
    - ``calls:PRICE``: decoded tokens, and PRICE for each proposal that a scorer or the large model reads for a router.
    - ``prices:large_in=3,large_out=15,small_in=0.1,small_out=0.2``: US dollars per million tokens; what is left
      out is free. Then `lam` is per dollar. What routers read is charged to those that read it: ``scorer_in``, and
      ``large_cached`` and ``large_in`` where the large model looks at proposals; ``call`` for a million proposals
      that either looks at (`TokenPrices`).
    - ``module:object``: a `CostModel` of one's own.

    Args:
        spec: The name.
        imports: Import the module of a ``module:object``, as is right where a user has typed it. Names that come out
            of files are looked up among the modules that are imported already.

    Raises:
        ConfigError: There is no such model, or a price is not a number of at least 0.
    """
    if not isinstance(spec, str):
        return spec
    name, _, argument = spec.partition(":")
    if spec in _NAMED:
        return _NAMED[spec]
    if name == "prefill-full":
        return TokenPrices(spec, large_prefill=_price(spec, argument))
    if name == "calls":
        return TokenPrices(spec, call=_price(spec, argument))
    if name == "prices":
        prices: dict[str, Any] = {}
        for item in argument.split(","):
            key, _, value = item.partition("=")
            if key not in _PRICES:
                raise ConfigError(f"Cost model {spec!r}: unknown price {key!r}.{did_you_mean(key, _PRICES)}")
            if _PRICES[key] in prices:
                raise ConfigError(f"Cost model {spec!r}: the price {key!r} is there twice.")
            prices[_PRICES[key]] = _price(spec, value) / 1e6
        return TokenPrices(spec, **{"large_decode": 0.0, "unit": "US dollars", **prices})
    if is_plugin(spec):
        own = (load_plugin if imports else loaded_plugin)(spec, "Cost model")
        if not isinstance(own, CostModel) or isinstance(own, type):
            raise ConfigError(f"Cost model {spec!r}: a {type(own).__name__} is no trim_env.costs.CostModel object.")
        return own
    known = [*_NAMED, "prefill-full", "calls", "prices", "module:object"]
    raise ConfigError(f"Unknown cost model {spec!r}.{did_you_mean(name, known)}")


def _price(spec: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (np.isfinite(value) and value >= 0):
        raise ConfigError(f"Cost model {spec!r}: expected a number of at least 0, found {text!r}.")
    return value
