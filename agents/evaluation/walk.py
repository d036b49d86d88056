"""Runs any router over the trees of a split and returns what became of every problem, exactly.

Expectations are exact in the router's own randomness: where a router draws, both branches are followed with their
probabilities. What remains is the sampling of problems and of the models' texts. Routers of whole problems are run on
the two solutions of each tree that one model wrote alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.curves import Method, References
from agents.evaluation.outcomes import OPTIONAL, Outcomes, Solutions, mix
from agents.routers.asking import Asking
from agents.routers.base import AnyRouter, Mixture, Router, StatefulRouter, Undrafted, is_blind, told_cap
from agents.routers.takeover import Takeover
from agents.routers.whole import (
    Attempts,
    Cascade,
    OneModel,
    QueryRouter,
    VerifiedCascade,
    VotingCascade,
    Whole,
)
from rollouts.errors import ConfigError
from rollouts.text.steps import ROLES
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, Trees
from trim_env.costs import cost_of, sources_of
from trim_env.features import left_feature, schema_named
from trim_env.graph import Decide, Decisions, Floats, Ints, Moved, Spent, walk
from trim_env.tables import DecisionTables

SCORE_BINS = 20
Settings = Sequence[tuple[AnyRouter | Mixture | Whole, Outcomes]]
"""Settings of a method, and what each comes to on the problems that choose."""
Seen = Callable[[Ints, Ints], NDArray[np.float32]]  # (rows of nodes, large tokens left), both (n,) -> (n, d) features


def run(router: AnyRouter | Mixture | Whole, tables: DecisionTables) -> Outcomes:
    """Return the outcomes of a router on the split of some tables.

    Raises:
        StoreError: A proposal that the router needs was not generated.
        ConfigError: It has to be told what is left of a cap on large tokens, and the tables have none; or it is one of
            whole problems, which cannot keep such a cap, and they have one.
    """
    if isinstance(router, Mixture):
        return mix(run(router.first, tables), run(router.second, tables), router.share)
    if isinstance(router, QueryRouter | Cascade):
        return by_problem(tables, run_whole(tables, router))
    return by_problem(tables, run_trees(tables, router))


def measured(settings: Settings, choosing: References, tables: DecisionTables) -> Method:
    """Return the settings of a method on the split of some tables; `choosing` is where their outcomes are from."""
    points = [(router.knob.value, run(router, tables)) for router, _ in settings]
    return Method.chosen(points, [(router.knob.value, outcomes) for router, outcomes in settings], choosing)


def seen_by(router: AnyRouter, tables: DecisionTables) -> Seen:
    """Return what a router is told at nodes where so many large tokens are left.

    Raises:
        ConfigError: It has to be told what is left of a cap, and the tables have none.
    """
    features, cap, wanted = tables.in_schema(router.schema), tables.max_large_tokens, told_cap(router)
    if wanted is None:
        return lambda rows, _: features[rows]
    if cap is None:
        raise ConfigError(
            f"{router.name} was trained under a cap of {wanted} large tokens for a problem and has to be told what is "
            "left of it; no cap is set here. Set one (max_large_tokens)."
        )
    return lambda rows, left: np.concatenate([features[rows], left_feature(left, cap)[:, None]], axis=1)


def references(tables: DecisionTables) -> References:
    """Return the outcomes of always-small and always-large in the same trees; no cap binds always-large."""
    small, large = always_trees(tables)
    return References(by_problem(tables, small), by_problem(tables, large))


def alone(tables: DecisionTables) -> References:
    """Return what both models come to by themselves, in one request each: always-large without small proposals."""
    return References(*(by_problem(tables, run_whole(tables, OneModel(action))) for action in (0, 1)))


def always_trees(tables: DecisionTables) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return the outcomes of each tree, as `run_trees` does, of always-small and of always-large (uncapped)."""
    tables = tables.charged(None)
    small = run_trees(tables, lambda rows, _: np.zeros(len(rows)))
    free = replace(tables, max_escalations=None, max_large_tokens=None)
    return small, run_trees(free, lambda rows, _: np.ones(len(rows)))


def run_trees(tables: DecisionTables, policy: AnyRouter | Decide) -> dict[str, Floats]:
    """Return the expected outcome of each tree of the split: the fields of `Outcomes` as (R,) arrays."""
    if isinstance(policy, Takeover):
        tables = _uncapped(policy, tables)
    asking = policy if isinstance(policy, Asking) else None
    whole, sources = tables, frozenset[str]()  # with what is paid where it asks, and who reads every proposal
    if isinstance(policy, Router | StatefulRouter):
        blind = is_blind(policy.trigger if isinstance(policy, Takeover) else policy)
        schema, bought = None if blind else policy.schema, asking.source if asking else ""
        sources = frozenset() if blind else _sources(tables, policy.schema) - {bought}
        whole, tables = tables.charged(schema), tables.charged(schema, bought)
    if asking:
        price, seen = whole.cost - tables.cost, seen_by(asking, tables)

    def told(done: Decisions, undrafted: NDArray[np.bool_]) -> dict[str, Any]:
        called = done.moved.accepted | done.moved.taken.cut_off
        values, asked = outcomes_of(tables, done.moved), np.zeros(len(called), np.int64)
        if asking:  # not where caps leave no choice
            asked = (asking.asks(seen(done.rows, done.spent.left)) & done.spent.open(tables)).astype(np.int64)
            values |= {"asked": asked, "cost": values["cost"] + asked * price[2 * done.rows + called]}
        values |= {"scorer_calls": len(sources) + asked, "serial_calls": 1 + bool(sources) + asked + called}
        if isinstance(policy, Undrafted):
            own = _without_draft(tables, done.rows, policy.goes_on)
            values |= {name: np.where(undrafted, each, values[name]) for name, each in own.items()}
        return values

    parts = []
    for part in tables.parts():
        totals, count = dict[str, Any](), len(part.indices)
        for done, undrafted in walked(part, policy):
            for name, each in told(done, undrafted).items():
                totals[name] = totals.get(name, 0.0) + np.bincount(done.tree, done.mass * each, minlength=count)
        parts.append(totals)
    return joined(parts)


def joined(parts: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    """Return the outcomes of the trees of several parts, one part after the other."""
    return {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}


def _uncapped(router: Takeover, tables: DecisionTables) -> DecisionTables:
    """Return tables without a cap on escalations: the large model writes all that follows.

    Raises:
        ConfigError: There is a cap on large tokens, which such a router cannot keep.
    """
    if tables.max_large_tokens is not None:
        raise ConfigError(
            f"{router.name}: the large model writes all that follows the first escalation, whatever it takes; the cap "
            f"of {tables.max_large_tokens} large tokens (max_large_tokens) cannot be kept. Leave it out."
        )
    return tables if tables.max_escalations is None else replace(tables, max_escalations=None)


def _without_draft(tables: DecisionTables, rows: Ints, goes_on: bool) -> dict[str, Any]:
    """Return what differs where the large model writes a step for which the small one was not asked (`Undrafted`)."""
    called = np.array([0, 1])
    tokens, read = tables.trees.tokens[rows] * called, tables.trees.prompt_tokens[rows] * called * (not goes_on)
    cost = cost_of(tables.cost_model, tokens, read, frozenset())[:, ESCALATE_LARGE]
    glimpsed = 0 if goes_on else 2  # a first token of the small model, and the step
    return {"cost": cost, "small_tokens": 0, "discarded_tokens": 0, "scorer_calls": 0, "serial_calls": glimpsed}


def _sources(tables: DecisionTables, schema: str) -> frozenset[str]:
    return sources_of(schema_named(schema), tables.trees.meta["scorer"])


def run_whole(tables: DecisionTables, router: Whole) -> dict[str, Floats]:
    """Return the expected outcome of each tree, as `run_trees` does, of a router of whole problems.

    What a model writes alone is one long step, and is charged as one: one request, whose prompt is the question. The
    steps that `Outcomes` counts are still those of the text. No cap on escalations binds such a router.

    Raises:
        ConfigError: There is a cap on large tokens.
        StoreError: A part of such a solution was not generated.
    """
    if tables.max_large_tokens is not None and not isinstance(router, OneModel):
        raise ConfigError(
            f"{router.name} sends whole problems to the large model and cannot keep a cap of {tables.max_large_tokens} "
            "large tokens for a problem (max_large_tokens). Compare it without one."
        )
    small, nothing = tables.alone.tokens[:, CONTINUE_SMALL], np.zeros(len(tables.indices))
    if isinstance(router, QueryRouter):
        send = np.asarray(router.sends(attempts_of(tables).questions), np.float64)
        cost = (1 - send) * _charged(tables, (1, 0))[:, CONTINUE_SMALL]
        cost += send * _charged(tables, (0, 1))[:, ESCALATE_LARGE]
        paid = {"cost": cost, "small_tokens": (1 - send) * small, "discarded_tokens": nothing}
        return _sent(tables, send) | paid | {"scorer_calls": nothing, "serial_calls": nothing + 1}
    attempts, sources = attempts_of(tables, router.schema), _sources(tables, router.schema)
    send = np.asarray(router.retries(attempts), np.float64)
    drafted, again = _charged(tables, (1, 1), sources).T
    read = nothing + len(sources)
    totals = _sent(tables, send, router.keeps(attempts) if isinstance(router, VotingCascade) else None)
    serial = 1 + bool(sources) + send  # samples of one problem are drawn side by side
    if isinstance(router, VerifiedCascade):
        samples, prompt, decoded = router.verifying(attempts).T
        verified = tables.cost_model.of(np.stack([decoded, nothing], axis=1), np.stack([prompt, nothing], axis=1))
        drafted, again = (each + verified[:, CONTINUE_SMALL] for each in (drafted, again))
        small, read, serial = small + decoded, read + samples, serial + (samples > 0)
    if isinstance(router, VotingCascade):
        small, first, read = (_of_problem(attempts, each) for each in (small, drafted, read))
        drafted, again = first, again + first - drafted
    totals |= {"cost": (1 - send) * drafted + send * again, "small_tokens": small, "discarded_tokens": send * small}
    return totals | {"scorer_calls": read, "serial_calls": serial}


def attempts_of(tables: DecisionTables, schema: str | None = None) -> Attempts:
    """Return what the small model wrote alone, with what a schema tells of it."""
    trees, last = tables.trees, tables.alone.last[:, CONTINUE_SMALL]
    problem, unknown = trees.problem[tables.indices], np.full((trees.nodes, 2), np.nan)
    return Attempts(
        problems=np.array(trees.problem_ids)[problem],
        questions=tuple(trees.questions[each] for each in problem),
        replicas=trees.replica[tables.indices],
        features=np.zeros((len(last), 0), np.float32) if schema is None else tables.in_schema(schema)[last],
        last=lambda position: trees.proposal(last[position], CONTINUE_SMALL),
        told=lambda name: trees.signals.get(name, unknown)[last, CONTINUE_SMALL].astype(np.float64),
    )


def solutions(tables: DecisionTables, action: int) -> list[str]:
    """Return the R texts of the solutions that one model wrote alone."""
    free = replace(tables, max_escalations=None, max_large_tokens=None)
    texts = [""] * len(tables.indices)
    for done in walk(free, lambda rows, _: np.full(len(rows), float(action))):
        for tree, row in zip(done.tree.tolist(), done.rows.tolist(), strict=True):
            texts[tree] += tables.trees.proposal(row, action)
    return texts


def _sent(tables: DecisionTables, send: Floats, kept: Ints | None = None) -> dict[str, Floats]:
    """Return what becomes of solutions that the large model writes with some probabilities, but for their drafts."""
    own = tables.alone
    drafts = np.arange(len(send)) if kept is None else kept

    def either(values: Floats) -> Floats:
        mean: Floats = (1 - send) * values[drafts, CONTINUE_SMALL] + send * values[:, ESCALATE_LARGE]
        return mean

    return {
        "correct": either(own.correct),
        "large_tokens": send * own.tokens[:, ESCALATE_LARGE],
        "escalations": send * own.steps[:, ESCALATE_LARGE],
        "steps": either(own.steps),
    }


def _charged(
    tables: DecisionTables, called: tuple[int, int], sources: frozenset[str] = frozenset()
) -> NDArray[np.float64]:
    """Return the (R, 2) cost of whole solutions as one step each, of which only some models are called."""
    own = tables.alone
    return cost_of(tables.cost_model, own.tokens * called, own.prompt_tokens * called, sources)


def _of_problem(attempts: Attempts, values: Floats) -> Floats:
    """Return for each attempt the sum over all attempts at its problem."""
    _, problem = np.unique(attempts.problems, return_inverse=True)
    return np.bincount(problem, values).astype(np.float64)[problem]


def decision_shares(router: AnyRouter, tables: DecisionTables) -> dict[str, Any]:
    """Return what a router's decisions look like: how the scores of proposals spread, and which share escalates.

    What one model alone writes (``answer_by``) is not decided, and does not count.

    Returns:
        ``scores``, shares of `SCORE_BINS` equal parts of [0, 1], and ``escalated``.
    """
    bins = SCORE_BINS
    counts, escalated = np.zeros(bins), 0.0
    for part in tables.parts():
        for done, _ in walked(part, router):
            place = np.clip((tables.trees.score[done.rows, CONTINUE_SMALL] * bins).astype(np.int64), 0, bins - 1)
            mass = done.mass * ~answered(tables.trees, done.rows)
            counts += np.bincount(place, mass, minlength=bins)
            escalated += float(mass @ (done.moved.accepted == ESCALATE_LARGE))
    total = max(float(counts.sum()), 1e-12)
    return {"scores": [round(float(each), 6) for each in counts / total], "escalated": min(escalated / total, 1.0)}


def answered(trees: Trees, rows: Ints) -> NDArray[np.bool_]:
    """Return (n,) at which of n nodes one model alone writes: its step is the proposal of both, and costs once."""
    by = (trees.meta.get("splitting") or {}).get("answer_by")
    if by not in ROLES:
        return np.zeros(len(rows), bool)
    tokens, reasons, author = trees.tokens[rows], trees.stop_reason[rows], ROLES.index(by)
    found: NDArray[np.bool_] = (tokens[:, author] > 0) & (tokens[:, 1 - author] == 0) & (reasons[:, 0] == reasons[:, 1])
    return found


def walked(tables: DecisionTables, policy: AnyRouter | Decide) -> Iterator[tuple[Decisions, NDArray[np.bool_]]]:
    """Return all that a router does, by depth, and which of it had no proposal before it (`Undrafted`)."""
    if not isinstance(policy, Router | StatefulRouter):
        for done in walk(tables, policy):
            yield done, np.zeros(len(done.rows), bool)
        return
    seen, without = seen_by(policy, tables), np.zeros(0, bool)
    remembering = policy if isinstance(policy, StatefulRouter) else None
    trees, state = tables.trees, np.zeros((len(tables.indices), 0))  # a row for each walk under way
    if remembering:
        state = remembering.start(len(state))

    def decide(rows: Ints, spent: Spent) -> Floats:
        nonlocal state, without
        told = seen(rows, spent.left)
        without = policy.undrafted(told, state) if isinstance(policy, Undrafted) else np.zeros(len(rows), bool)
        if isinstance(policy, Router):
            return policy.probability(told)
        escalate, state = policy.decide(told, state)
        return escalate

    def accept(rows: Ints, going: Ints, actions: Ints) -> None:
        nonlocal state
        assert remembering is not None
        at = rows, actions
        state = remembering.accept(state[going], actions, trees.score[at], trees.accepted_tokens[at])

    for done in walk(tables, decide, accept if remembering else None):
        yield done, without[done.walk] & (done.moved.accepted == ESCALATE_LARGE)


def outcomes_of(tables: DecisionTables, moved: Moved) -> dict[str, NDArray[Any]]:
    """Return what actions add to the fields of `Outcomes`, in their order; arrays shaped as those of `moved`."""
    small = tables.small_tokens[moved.taken.place]
    return {
        "correct": tables.solved[moved.taken.place],
        "cost": moved.taken.cost,
        "large_tokens": moved.taken.large_tokens,
        "small_tokens": small,
        "discarded_tokens": small * moved.accepted,
        "escalations": moved.accepted,
        "steps": np.ones(moved.accepted.shape),
    }


def by_problem(tables: DecisionTables, totals: dict[str, Floats]) -> Outcomes:
    """Average the outcomes of trees over the replicas of each problem."""
    problems, position = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
    replicas = np.bincount(position)
    ids = tuple(tables.trees.problem_ids[problem] for problem in problems)
    columns = (*Outcomes.columns(), *OPTIONAL)
    means = {name: np.bincount(position, totals[name]) / replicas for name in columns if name in totals}
    return Outcomes(ids, **means, solutions=Solutions(totals["correct"], totals["escalations"]))
