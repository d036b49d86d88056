"""The exact learner of a rule that asks: whether to, who writes if not and who writes if so, by one exact gradient.

With a the probability of asking in a state, p0 and p1 those of escalating without and with what is told, the state is
worth (1 - a) [(1 - p0) Q0 + p0 Q1] + a [(1 - p1) (Q0 - λ c0) + p1 (Q1 - λ c1)], where c are the prices of asking before
either action. That is one policy with p = p0 + a (p1 - p0) and a price for each visit, so that the passes of
`agents.evaluation.forest` give its return; the derivative with respect to a is
d [(p1 - p0) (Q1 - Q0) - λ ((1 - p1) c0 + p1 c1)]: what knowing is worth, less its price. The entropy of asking and
deciding is part of the return while it is fitted.

The fit begins where rules that never ask and that always ask end, which are candidates, too: held-out problems choose
among the three for each λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.forest import ENTROPIES, Forest, Rule, Scale, chances, climb, problems_of, reached
from agents.learners.exact import NAME, RULES, folded, rounds_of
from agents.learners.settings import ExactSettings
from agents.routers.asking import HEADS, Asking
from agents.routers.base import Floats, Knob
from agents.routers.mlp import Weights, at_lam
from rollouts.errors import ConfigError
from trim_env.costs import SCORER, source_of
from trim_env.tables import DecisionTables

ROUNDS = ((0.0, 0.1), (0.5, 0.01), (0.75, 0.003), (1.0, 0.003))
"""Share of the price and weight of the entropy, from one round of a fit to the next: at the whole price from the start
it would not ask, and so not learn what to do with an answer."""
KINDS = ("never", "always", "ask")
Heads = dict[str, Weights]
"""Perceptrons that are told λ as their last feature, by `agents.routers.asking.HEADS`."""


@dataclass(frozen=True, eq=False)
class AskingFrontier:
    """Rules for all λ that were asked for, and what they were chosen for.

    Attributes:
        routers: By kind and λ.
        rule: Form of the rules, of `RULES`.
        kind: Which of `KINDS` was chosen for each λ.
        held_out: Mean return on problems that fits had not seen, by kind and λ.
    """

    routers: dict[str, dict[float, Asking]]
    rule: str
    kind: dict[float, str]
    held_out: dict[str, dict[float, float]]

    def router(self, lam: float) -> Asking:
        """Return the router for one λ."""
        return self.routers[self.kind[lam]][lam]

    def report(self) -> dict[str, Any]:
        """Return what they were chosen for, as JSON holds it."""
        return {"rule": self.rule, "kind": self.kind, "held_out": self.held_out}


def fit_asking(
    tables: DecisionTables, choice: DecisionTables, lams: Sequence[float], ask: str, settings: ExactSettings, seed: int
) -> AskingFrontier:
    """Fit rules that ask.

    Args:
        tables: Training trees, in a schema that reads what is asked for.
        choice: The choice half of validation.
        lams: λ that they are for; of one, half and twice it are learned from, too.
        ask: Who is asked: ``scorer`` or ``large``.
        settings: Settings.
        seed: Of folds and first parameters.

    Raises:
        ConfigError: The schema reads nothing that is asked for.
        StoreError: Proposals that the caps allow were not generated.
    """
    if len(lams) == 1 and lams[0] > 0:
        lams = (lams[0] / 2, lams[0], 2 * lams[0])
    schema = tables.schema
    facts = tuple(sorted(fact for fact in schema.facts if source_of(fact, tables.trees.meta["scorer"]) == ask))
    if not facts:
        asked = "the scorer" if ask == SCORER else "the large model"
        raise ConfigError(f"--ask {ask}: schema {schema.name} reads nothing that {asked} tells.")
    floor = min([lam for lam in lams if lam], default=1e-6) / 2
    told = [max(lam, floor) for lam in lams]
    fitted_on, judges = folded(tables, choice, seed, ask)
    hidden = np.append(schema.reading(facts), [False] * (tables.max_large_tokens is not None)).astype(bool)
    problems = [problems_of(judge) for judge in judges]

    def router(name: str, weights: Heads, lam: float) -> Asking:
        at = max(lam, floor)
        own = {f"{head}.{key}": each for head in HEADS for key, each in at_lam(weights[head], at).items()}
        cap, activation = tables.max_large_tokens, RULES[name].activation
        return Asking(NAME, schema.id, Knob("lam", lam), ask, facts, own, cap, activation)

    best: tuple[float, str, dict[str, list[Heads]], dict[str, Floats]] | None = None
    for name in RULES if settings.rule == "auto" else (settings.rule,):
        fits = [_fits(name, parts, hidden, told, settings, seed) for parts in fitted_on]
        weights, found = dict[str, list[Heads]](), dict[str, Floats]()
        for kind in KINDS:
            each = [
                [[reached([router(name, of, lam)], judge) for lam in told] for of in fit[kind]]
                for fit, judge in zip(fits, judges, strict=True)
            ]
            mean = np.average(each, axis=0, weights=problems)  # (rounds, λ)
            weights[kind], found[kind] = [fits[0][kind][last] for last in mean.argmax(axis=0)], mean.max(axis=0)
        total = float(np.max([*found.values()], axis=0).mean())
        if best is None or total > best[0]:
            best = total, name, weights, found
    assert best is not None
    _, name, weights, found = best
    chosen = {lam: max(KINDS, key=lambda kind: found[kind][place]) for place, lam in enumerate(lams)}
    routers = {
        kind: {lam: router(name, of, lam) for lam, of in zip(lams, weights[kind], strict=True)} for kind in KINDS
    }
    held_out = {kind: dict(zip(lams, found[kind].tolist(), strict=True)) for kind in KINDS}
    return AskingFrontier(routers, name, chosen, held_out)


def _fits(
    name: str,
    parts: Sequence[Forest],
    hidden: NDArray[np.bool_],
    lams: Sequence[float],
    settings: ExactSettings,
    seed: int,
) -> dict[str, list[Heads]]:
    """Return the rules of all kinds after each round."""
    free = [forest.seeing(hidden) for forest in parts]
    form = {
        head: RULES[name].make(Scale(seen, lams), settings, seed)
        for head, seen in zip(HEADS, (free, free, parts), strict=True)
    }
    entropies = (*ENTROPIES, ROUNDS[-1][1])  # no kind may be less resolute than another
    paying = [forest.asking() for forest in parts]
    never, always = (
        rounds_of(states, form[head], lams, entropies) for states, head in ((free, "free"), (paying, "told"))
    )
    cuts = np.cumsum([len(rule.start) for rule in form.values()])[:-1]
    at, asking = np.concatenate([form["ask"].start, never[0], always[0]]), list[Heads]()
    for share, entropy in ROUNDS:
        at = ascend(parts, [*form.values()], lams, at, share, entropy)
        own = zip(form.items(), np.split(at, cuts), strict=True)
        asking.append({head: rule.weights(part) for (head, rule), part in own})
    no, yes = (_constant(logit, free[0].seen.shape[1]) for logit in (-1.0, 1.0))
    found = {
        "never": [{"ask": no, "free": form["free"].weights(one)} for one in never],
        "always": [{"ask": yes, "free": no, "told": form["told"].weights(one)} for one in always],
        "ask": asking,
    }
    blind = _constant(-1.0, len(hidden))
    return {kind: [{"told": blind} | _widened(each, hidden) for each in rounds] for kind, rounds in found.items()}


def _widened(heads: Heads, hidden: NDArray[np.bool_]) -> Heads:
    """Return perceptrons over all features, given ones of which two do not see some."""
    wide = dict(heads)
    for head in ("ask", "free"):
        narrow = heads[head]["0.weight"]
        weight = np.zeros((len(narrow), len(hidden) + 1), np.float32)
        weight[:, np.append(~hidden, True)] = narrow
        wide[head] = {**heads[head], "0.weight": weight}
    return wide


def _constant(logit: float, size: int) -> Weights:
    """Return a perceptron without hidden layers that always says the same."""
    return {"0.weight": np.zeros((2, size + 1), np.float32), "0.bias": np.array([0, logit], np.float32)}


def ascend(
    parts: Sequence[Forest],
    rules: Sequence[Rule],
    lams: Sequence[float],
    parameters: Floats,
    share: float,
    entropy: float,
) -> Floats:
    """Return parameters of the rules of `HEADS`, one after the other, with a greater expected return.

    As of `agents.evaluation.forest.ascend`, where `share` of the price of asking is paid.
    """
    prices, cuts = np.array(lams), np.cumsum([len(rule.start) for rule in rules])[:-1]

    def returned(part: int, forest: Forest, at: Floats) -> tuple[float, Floats]:
        told = [rule.logits(own, part) for rule, own in zip(rules, np.split(at, cuts), strict=True)]
        (z, ask, doubt), (z_free, free, doubt_free), (z_told, knowing, doubt_told) = (chances(each) for each, _ in told)
        paid_small, paid_large = (np.multiply.outer(share * price, prices) for price in forest.price.T)
        paid = paid_small + knowing * (paid_large - paid_small)
        now = entropy * (doubt + doubt_free + ask * (doubt_told - doubt_free)) - ask * paid
        value, visits, gain = forest.passes(free + ask * (knowing - free), prices, now)
        worth = (knowing - free) * gain - paid + entropy * (doubt_told - doubt_free - z)
        slopes = (
            visits * ask * (1 - ask) * worth,
            visits * (1 - ask) * free * (1 - free) * (gain - entropy * z_free),
            visits * ask * knowing * (1 - knowing) * (gain - paid_large + paid_small - entropy * z_told),
        )
        slope = np.concatenate([back(each) for (_, back), each in zip(told, slopes, strict=True)])
        return float(value.sum()) / len(lams), slope / len(lams)

    return climb(parts, np.concatenate([rule.penalty for rule in rules]), parameters, returned)
