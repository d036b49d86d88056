"""The exact return of stochastic policies on rollout trees, its gradient, and rules that are fitted by it.

On a tree the expected return of a policy is a sum over states: a node and what is spent of the caps. With p(s) the
probability of escalating in state s, d(s) that of reaching s and Q the expected returns after either action, both by
one pass over the states, the gradient with respect to the policy's logit z(s) = ln p/(1 - p) is
d(s) p(s) (1 - p(s)) (Q1(s) - Q0(s)): the policy gradient theorem (Sutton et al. 2000) with nothing left to chance but
the models' texts. Those are frozen draws, one per node and replica: what is exact on them may be overfitted to them,
so choose on held-out problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agents.routers.asking import Asking
from agents.routers.base import Knob, Router
from agents.routers.mlp import MLP, Weights, at_lam
from rollouts.errors import StoreError
from rollouts.trees.arrays import in_a_file
from trim_env.features import lam_feature, left_feature
from trim_env.graph import Floats, States
from trim_env.tables import DecisionTables, missing

_CAPPED = 4096  # nodes of a part under a cap on tokens, where each is several states: what fits the caches is faster
_STEEP = 30.0  # logits beyond are as good as certain
_SCALE = 100.0  # returns times that: what BFGS's first step is right for
_ITERATIONS = 40  # most of a climb
_MANY = 400  # parameters
_LINEAR, _PRODUCTS = 0.001, 0.3  # penalties: the fewer problems, the more a quadratic rule is a linear one
ENTROPIES = (0.1, 0.03, 0.01)
"""Weights of the entropy bonus, from one round of a fit to the next; with little data it is better to stop early."""


class Forest:
    """All n states of some trees that the caps let a policy reach.

    Attributes:
        problem: Positions of the problems that they belong to, each once.
        seen: (n, d) what the policy is told in them: the features and, under a cap on large tokens, the share left.
        price: (n, 2) what asking costs before either action; 0 where nothing is asked.
    """

    def __init__(self, tables: DecisionTables, schema: str | None = None, ask: str = "") -> None:
        """Gather the states.

        Args:
            tables: The trees.
            schema: Of the features that are seen, and paid for; default: that of the tables.
            ask: ``scorer`` or ``large``, which is paid only where it is asked.

        Raises:
            StoreError: Proposals that the caps allow were not generated.
        """
        from scipy.sparse import csr_array

        whole = tables if schema is None else tables.charged(schema)
        tables = tables.charged(schema or tables.schema, ask) if ask else whole
        graph, taken = tables.graph, tables.graph.moved.taken
        self.graph = States(graph.child, graph.levels, graph.roots, graph.rows, graph.spent, graph.open)
        if graph.missing.any():
            raise StoreError(missing(tables, taken.place[graph.missing]))
        self.trees, self.problem = len(tables.indices), np.unique(tables.trees.problem[tables.indices])
        self.seen = (tables.features if schema is None else tables.in_schema(schema))[graph.rows]
        self.price = np.zeros((len(graph.rows), 2))
        if ask:
            self.price = np.reshape(whole.cost - tables.cost, (-1, 2))[graph.rows] * graph.open[:, None]
        if tables.max_large_tokens is not None:
            left = left_feature(graph.spent.left, tables.max_large_tokens)
            self.seen = np.concatenate([self.seen, left[:, None]], axis=1)
        self._solved, self._cost = (np.ascontiguousarray(each.T) for each in (tables.solved[taken.place], taken.cost))
        self._child = np.ascontiguousarray(graph.child.T)
        self._before = []  # by level but the first: which actions of the level before lead to each state
        for earlier, level in zip(graph.levels, graph.levels[1:], strict=False):
            onto = self._child[:, earlier].reshape(-1) - level.start
            leads = np.flatnonzero((onto >= 0) & (onto < level.stop - level.start))
            shape = level.stop - level.start, len(onto)
            self._before.append(csr_array((np.ones(len(leads)), (onto[leads], leads)), shape))

    def seeing(self, hidden: NDArray[np.bool_]) -> Forest:
        """Return the same states, where some of what is seen, (d,), is not."""
        other = copy(self)
        other.seen = self.seen[:, ~hidden]
        return other

    def asking(self) -> Forest:
        """Return the same states, where asking is paid always."""
        other = copy(self)
        other._cost = self._cost + self.price.T
        return other

    def _now(self, level: Any, lams: Floats) -> Floats:
        """Return (2, m, k) rewards of both actions in the m states of a level."""
        return self._solved[:, level, None] - self._cost[:, level, None] * lams

    def passes(self, escalate: Floats, lams: Floats, now: Floats | None = None) -> tuple[Floats, Floats, Floats]:
        """Return mean expected returns, expected visits, and what escalating returns more than continuing.

        Args:
            escalate: (n, k) probabilities of escalating of k policies.
            lams: (k,) λ of each.
            now: (n, k) further rewards of states where the caps leave a choice.

        Returns:
            (k,) means over trees, (n, k) visits of states where the caps leave a choice, 0 of others, and (n, k) gains.
            With p of escalating, visits p (1 - p) gains are the derivatives with respect to the logits.
        """
        graph, (n, k) = self.graph, escalate.shape
        value, reach, gain = np.zeros((n + 1, k)), np.empty((n, k)), np.empty((n, k))
        for level in reversed(graph.levels):
            stay, go = self._now(level, lams) + value.take(self._child[:, level], axis=0)
            gain[level] = go - stay
            value[level] = stay + escalate[level] * gain[level]
            if now is not None:
                value[level] += now[level] * graph.open[level, None]
        reach[graph.levels[0]] = np.bincount(graph.roots)[:, None]
        for level, after, before in zip(graph.levels, graph.levels[1:], self._before, strict=False):
            going = reach[level] * escalate[level]
            reach[after] = before @ np.concatenate([reach[level] - going, going])
        visits = reach * (graph.open / self.trees)[:, None]
        return value[graph.roots].mean(axis=0), visits, gain

    def returns(self, escalate: NDArray[np.bool_], lam: float, asked: NDArray[np.bool_] | None = None) -> Floats:
        """Return the (k,) mean returns of k policies that draw nothing, given (n, k) whether they escalate, and ask."""
        graph, escalate = self.graph, escalate & self.graph.open[:, None]
        value = np.zeros((len(escalate) + 1, escalate.shape[1]), np.float32)
        for level in reversed(graph.levels):
            worth = self._now(level, np.array([lam])).astype(np.float32)
            stay, go = worth + value.take(self._child[:, level], axis=0)
            value[level] = np.where(escalate[level], go, stay)
            if asked is not None:
                price = np.where(escalate[level], self.price[level, 1:], self.price[level, :1])
                value[level] -= lam * price * asked[level]
        means: Floats = value[graph.roots].mean(axis=0, dtype=np.float64)
        return means


def reached(routers: Sequence[Router], parts: Sequence[Forest]) -> float:
    """Return the mean return, over trees and routers, of routers that draw nothing, each for the λ that is its knob."""
    found = 0.0
    for forest, share in shares(parts):
        returns = []
        for router in routers:
            asked = router.asks(forest.seen)[:, None] if isinstance(router, Asking) else None
            returns.append(forest.returns(router.probability(forest.seen)[:, None] > 0, router.knob.value, asked))
        found += share * float(np.mean(returns))
    return found


def forests(tables: DecisionTables, ask: str = "") -> list[Forest]:
    """Return the forests of the parts of some tables, arguments as of `Forest`: what is summed over them is bounded."""
    nodes = None if tables.max_large_tokens is None else _CAPPED
    return [Forest(part, None, ask) for part in tables.parts(nodes)]


def shares(parts: Sequence[Forest]) -> list[tuple[Forest, float]]:
    """Return forests with their shares of the trees."""
    total = sum(each.trees for each in parts)
    return [(each, each.trees / total) for each in parts]


def problems_of(parts: Sequence[Forest]) -> int:
    """Return how many problems there are in parts, which may share some."""
    return len(np.unique(np.concatenate([each.problem for each in parts])))


class Rule(Protocol):
    """A rule with w parameters, for the states of some forests and k values of λ.

    Attributes:
        start: (w,) parameters to begin with.
        penalty: (w,) weights of their squares; the more training problems, the less they count.
    """

    start: Floats
    penalty: Floats

    def logits(self, parameters: Floats, part: int = 0) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Return the (n, k) logits, and what turns derivatives with respect to them into those to the parameters.

        Args:
            parameters: (w,).
            part: Position of the forest whose n states they are of.
        """

    def weights(self, parameters: Floats) -> Weights:
        """Return it as a perceptron (`agents.routers.mlp`) that is told λ as its last feature."""


class Scale:
    """Features of the states of forests, and k values of λ as features (`told`), to mean 0 and deviation 1."""

    def __init__(self, forests: Sequence[Forest], lams: Sequence[float]) -> None:
        """Measure means and deviations."""
        self._plain = [forest.seen for forest in forests]
        self.size, self.parts = self._plain[0].shape[1], len(forests)
        count, told = sum(map(len, self._plain)), lam_feature(np.array(lams)).astype(np.float64)
        mean = sum(each.astype(np.float64).sum(axis=0) for each in self._plain) / count
        variance = sum(((each - mean) ** 2).sum(axis=0) for each in self._plain) / count
        self._mean = np.append(mean, told.mean())
        deviation = np.append(np.sqrt(variance), told.std())
        self._deviation = np.where(deviation > 1e-6, deviation, 1.0)
        self._kept = [self._scaled(each) for each in self._plain] if self.parts == 1 else []
        self.told: Floats = (told - self._mean[-1]) / self._deviation[-1]

    def _scaled(self, plain: NDArray[np.float32]) -> Floats:
        values: Floats = (plain - self._mean[:-1]) / self._deviation[:-1]
        return values

    def seen(self, part: int) -> Floats:
        """Return the (n, d) standardised features of one forest."""
        return self._kept[part] if self._kept else self._scaled(self._plain[part])

    def unscaled(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """Return (h, d + 1) weights and (h,) biases for plain features, given those for standardised ones."""
        weight = weight / self._deviation
        return weight, bias - weight @ self._mean


def layers(*parts: tuple[Floats, Floats]) -> Weights:
    """Return layers as a perceptron holds them; the last, of one output, becomes the logits of both actions."""
    *hidden, (weight, bias) = parts
    last = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return {
        f"{number}.{name}": np.ascontiguousarray(values, np.float32)
        for number, layer in enumerate([*hidden, last])
        for name, values in zip(("weight", "bias"), layer, strict=True)
    }


class Polynomial:
    """A linear rule, or a quadratic one, over the features and λ."""

    def __init__(self, scale: Scale, *, quadratic: bool) -> None:
        """Compute the terms in which λ does not stand, and those that stand beside it."""
        self.scale, self._quadratic, d = scale, quadratic, scale.size
        self._pairs = np.triu_indices(d if quadratic else 0)
        self._terms = [self._made(part) for part in range(scale.parts)]
        self._square = scale.told**2 if quadratic else 0 * scale.told
        self._beside = d + 1 if quadratic else 1  # the first terms, which λ multiplies
        self._parts = np.cumsum([1 + d + len(self._pairs[0]), self._beside])
        self.start: Floats = np.zeros(self._parts[-1] + 1)
        self.penalty: Floats = np.full(len(self.start), _PRODUCTS)
        self.penalty[: d + 1] = self.penalty[self._parts[0]] = _LINEAR

    def _made(self, part: int) -> Floats:
        seen = self.scale.seen(part)
        products = seen[:, self._pairs[0]] * seen[:, self._pairs[1]]
        terms = np.concatenate([np.ones((len(seen), 1)), seen, products], axis=1).T
        place = np.empty(terms.shape) if self.scale.parts == 1 else in_a_file(terms.shape, np.float64)
        place[:] = terms
        return place.T

    def logits(self, parameters: Floats, part: int = 0) -> tuple[Floats, Callable[[Floats], Floats]]:
        """See `Rule`."""
        own, beside, square = np.split(parameters, self._parts)
        told, every = self.scale.told, self._terms[part]
        some = every[:, : self._beside]

        def dot(terms: Floats, values: Floats, sums: str = "nt,t->n") -> Floats:
            found: Floats = np.einsum(sums, terms, values)  # BLAS would wake all cores for so little
            return found

        def back(slope: Floats) -> Floats:
            square = slope.sum(axis=0) @ self._square
            by_lam = dot(some, slope @ told, "nt,n->t")
            return np.concatenate([dot(every, slope @ np.ones_like(told), "nt,n->t"), by_lam, [square]])

        return dot(every, own)[:, None] + np.outer(dot(some, beside), told) + square * self._square, back

    def weights(self, parameters: Floats) -> Weights:
        """See `Rule`: a quadratic form is a sum of squares of linear ones, with signs."""
        own, beside, square = np.split(parameters, self._parts)
        d = self.scale.size
        linear = np.append(own[1 : d + 1], beside[0])
        if not self._quadratic:
            return layers(self.scale.unscaled(linear[None], own[:1]))
        form = np.zeros((d + 1, d + 1))
        form[self._pairs] = own[d + 1 :]
        form[:d, d], form[d, d] = beside[1:], square[0]
        signs, directions = np.linalg.eigh((form + form.T) / 2)
        # The linear part b is ((b + 1)^2 - (b - 1)^2) / 4.
        hidden = np.concatenate([directions.T, [linear, linear]]), np.append(np.zeros(d + 1), [1.0, -1.0])
        return layers(self.scale.unscaled(*hidden), (np.append(signs, [0.25, -0.25])[None], own[:1]))


def ascend(parts: Sequence[Forest], rule: Rule, lams: Sequence[float], parameters: Floats, entropy: float) -> Floats:
    """Return parameters of a rule that was made for some forests, with a greater mean return over k values of λ.

    The entropy of the decisions, with its weight, counts as return.
    """
    prices = np.array(lams)

    def returned(part: int, forest: Forest, at: Floats) -> tuple[float, Floats]:
        logits, back = rule.logits(at, part)
        z, p, doubt = chances(logits)
        value, visits, gain = forest.passes(p, prices)
        slope = visits * p * (1 - p) * gain
        slope -= entropy * visits * p * (1 - p) * z  # as if visits stayed: held-out returns differ by less than 0.001
        return float(value.sum() + entropy * (visits * doubt).sum()) / len(lams), back(slope) / len(lams)

    return climb(parts, rule.penalty, parameters, returned)


def climb(
    parts: Sequence[Forest],
    penalty: Floats,
    parameters: Floats,
    returned: Callable[[int, Forest, Floats], tuple[float, Floats]],
) -> Floats:
    """Return parameters at which more is returned, by quasi-Newton steps on the gradient, summed over forests.

    Args:
        parts: The forests.
        penalty: (w,) weights of the squares of the parameters; the more problems, the less they count.
        parameters: (w,) to begin with.
        returned: From a forest, its position before it, and parameters to what is returned in the mean over its trees
            and to the derivatives.
    """
    penalty = penalty / problems_of(parts)

    def loss(at: Floats) -> tuple[float, Floats]:
        total, change = -float(penalty @ (at * at)), 2 * penalty * at
        for part, (forest, share) in enumerate(shares(parts)):
            value, slope = returned(part, forest, at)
            total += share * value
            change -= share * slope
        return -total, change

    return least(loss, parameters, _ITERATIONS)


def chances(logits: Floats) -> tuple[Floats, Floats, Floats]:
    """Return logits within what is as good as certain, probabilities, and their entropies."""
    z = np.clip(logits, -_STEEP, _STEEP)
    tail = np.abs(z)
    np.exp(np.negative(tail, out=tail), out=tail)
    p = np.where(z > 0, 1.0, tail)
    p /= 1 + tail
    doubt = np.log1p(tail, out=tail)
    doubt += np.maximum(z, 0)
    doubt -= p * z
    return z, p, doubt


def least(loss: Callable[[Floats], tuple[float, Floats]], parameters: Floats, iterations: int) -> Floats:
    """Return what makes a loss, which is of the size of a return and tells its gradient, less."""
    from scipy.optimize import minimize

    def scaled(at: Floats) -> tuple[float, Floats]:
        value, slope = loss(at)
        return _SCALE * value, _SCALE * slope

    # BFGS for few parameters: as good as L-BFGS-B, whose products of a few numbers each keep all cores busy.
    method, options = "BFGS" if len(parameters) < _MANY else "L-BFGS-B", {"maxiter": iterations, "gtol": 1e-5 * _SCALE}
    best: Floats = minimize(scaled, parameters, jac=True, method=method, options=options).x
    return best


def linear_rule(forest: Forest, schema: str, lam: float, max_large_tokens: int | None) -> MLP:
    """Return a linear rule for one λ, fitted on the trees of a forest."""
    rule = Polynomial(Scale([forest], [lam]), quadratic=False)
    parameters = rule.start
    for entropy in ENTROPIES:
        parameters = ascend([forest], rule, [lam], parameters, entropy)
    return MLP("linear", schema, Knob("lam", lam), at_lam(rule.weights(parameters), lam), max_large_tokens)
