"""Step-level rules of others: known answers, walks token by token, what is not charged for, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from made_routers import Remembering, network
from scripted_store import scripted_store

from agents.baselines.vote import Vote
from agents.deploy.policy import Policy
from agents.deploy.session import Session
from agents.evaluation.outcomes import OPTIONAL, Outcomes
from agents.evaluation.walk import references, run, run_trees
from agents.routers import artefact
from agents.routers.base import Constant, Knob, Mixture, RandomRate, Threshold
from agents.routers.first_token import FirstToken
from agents.routers.modes import Modes
from agents.routers.takeover import Takeover
from agents.routers.whole import OneModel
from rollouts.errors import ArtefactError, ConfigError, StoreError, TrimError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

PRICES = {"large_out": 15, "large_in": 3, "small_out": 0.5, "small_in": 0.1, "scorer_in": 0.7, "call": 2}
PRICED = "prices:" + ",".join(f"{name}={value}" for name, value in PRICES.items())


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("rivals") / "s", 60), cache=False)


@pytest.fixture(scope="module", params=["decode-only", PRICED], ids=["tokens", "priced"])
def tables(request, trees):
    return decision_tables(trees, "test", cost=request.param)


def step_of(tables, row, action, drafted, reads, goes_on):
    """What a step adds to the fields of `Outcomes`, token by token, straight from the rules."""
    (small, large), (small_in, large_in) = tables.trees.tokens[row].tolist(), tables.trees.prompt_tokens[row].tolist()
    if tables.cost_model.name == "decode-only":
        cost = large * action
    else:
        p = PRICES
        read = p["scorer_in"] * (small_in + small) + p["call"] if reads else 0
        cost = drafted * (p["small_out"] * small + p["small_in"] * small_in + read)
        again = drafted or not goes_on  # what goes on in one request reads no prefix anew
        cost = (cost + action * (p["large_out"] * large + p["large_in"] * large_in * again)) / 1e6
    child = int(tables.trees.child[row, action])
    correct = float(child < 0 and tables.trees.correct[row, action] == 1)
    serial = 1 + reads + action if drafted else 0 if goes_on else 2  # a glimpse of the small model, and the step
    tokens = [large * action, small * drafted, small * drafted * action]
    return child, np.array([correct, cost, *tokens, action, 1.0, reads * drafted, serial])


def expected(tables, decide, row, state=None, reads=True, goes_on=False):
    """(9,) expected outcomes from a node on; `decide` gives P(escalate), whether without a draft, and what follows."""
    chance, undrafted, after = decide(row, state)
    total = np.zeros(9)
    for action, share in ((0, 1 - chance), (1, chance)):
        if share:
            child, own = step_of(tables, row, action, not (undrafted and action), reads, goes_on)
            later = 0 if child < 0 else expected(tables, decide, child, after(action), reads, goes_on)
            total += share * (own + later)
    return total


def check(tables, router, decide, reads=True):
    totals, goes_on = run_trees(tables, router), isinstance(router, Takeover)
    for place, root in enumerate(tables.roots.tolist()):
        got = [totals[name][place] for name in (*Outcomes.columns(), *OPTIONAL[1:])]
        assert got == pytest.approx(expected(tables, decide, root, reads=reads, goes_on=goes_on).tolist())


TRIGGERS = [Threshold(0.3), RandomRate(0.3), network(), Remembering(True), Remembering(False)]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda each: each.name)
def test_a_takeover_is_walked_token_by_token(tables, trigger):
    features, trees = tables.in_schema(trigger.schema), tables.trees

    def decide(row, state):
        taken, own = state or (False, trigger.start(1) if hasattr(trigger, "start") else None)
        if own is None:
            chance, kept = float(trigger.probability(features[[row]])[0]), None
        else:
            chance, kept = trigger.decide(features[[row]], own)
            chance = float(chance[0])

        def after(action):
            scores, tokens = trees.score[[row], action], trees.accepted_tokens[[row], action]
            return taken or action == 1, None if own is None else trigger.accept(
                kept, np.array([action]), scores, tokens
            )

        return 1.0 if taken else chance, taken, after

    check(tables, Takeover(trigger), decide, reads=not isinstance(trigger, RandomRate))


def test_a_takeover_from_the_first_step_is_always_large(trees):
    tables = decision_tables(trees, "test")
    found, large = run(Takeover(Constant(1)), tables), references(tables).large
    assert (found.correct == large.correct).all() and (found.cost == large.cost).all()
    roots = tables.trees.tokens[tables.roots, 0]
    assert found.small_tokens.sum() == roots.sum() / 2  # one proposal in each of two replicas, which it did not like
    never = run(Takeover(Constant(0)), tables)
    assert (never.correct == references(tables).small.correct).all() and never.cost.sum() == 0


def test_it_costs_at_least_what_single_steps_do(trees):
    tables = decision_tables(trees, "test")
    for threshold in (0.1, 0.3, 0.6):
        step, whole = (run(each, tables) for each in (Threshold(threshold), Takeover(Threshold(threshold))))
        assert whole.escalations.sum() > step.escalations.sum()


def test_a_cap_on_escalations_does_not_bind_a_takeover_and_what_lacks_is_named(trees, tmp_path):
    free, capped = (decision_tables(trees, "test", max_escalations=k) for k in (None, 1))
    one, other = (run(Takeover(Threshold(0.5)), each) for each in (free, capped))
    assert (one.cost == other.cost).all() and (one.escalations > 1).any()
    closed = compile_store(scripted_store(tmp_path / "s", 24, max_escalations=1), cache=False)
    with pytest.raises(StoreError, match=r"large proposals .* were not generated .*Expand the store"):
        run(Takeover(Threshold(0.5)), decision_tables(closed, "test"))
    at_once = run(Takeover(Constant(1)), decision_tables(closed, "test"))  # the large model's whole path is there
    assert (at_once.cost == references(decision_tables(closed, "test")).large.cost).all()


def test_a_cap_on_tokens_is_refused(trees):
    with pytest.raises(ConfigError, match="takeover by trim-thr: the large model writes all that follows .* cap of 9"):
        run(Takeover(Threshold(0.5)), decision_tables(trees, "test", max_large_tokens=9))
    with pytest.raises(ConfigError, match="trained under a cap of 9 large tokens"):
        Takeover(replace(network(7), max_large_tokens=9))


@pytest.mark.parametrize(
    "trigger", [FirstToken(1.0), Mixture(Threshold(0.1), Threshold(0.2), 0.5, Knob("budget", 0.2)), OneModel(1)]
)
def test_a_takeover_is_triggered_by_one_router_of_proposals(trigger):
    with pytest.raises(ConfigError, match="cannot be its trigger"):
        Takeover(trigger)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Takeover(Threshold(0.5)), "cannot be stored or served"),
        (FirstToken(1.0), "cannot be stored or served"),
        (Mixture(Threshold(0.1), Threshold(0.2), 0.5, Knob("budget", 0.2)), "A Mixture is no router of steps"),
        (Vote(0.5), "decides once for a whole problem"),
    ],
)
def test_sessions_are_of_routers_that_decide_on_proposals(router, message):
    with pytest.raises(TrimError, match=message):
        Session(router, router.knob, 9, (None, None), None)


def test_the_first_token_is_enough(tables):
    """Nothing is drafted where it escalates for doubt; at the last step the draft is what tells that it is one."""
    trees = tables.trees
    entropy = np.random.default_rng(0).uniform(0, 2, (trees.nodes, 2)).astype(np.float32)
    known = replace(tables, trees=replace(trees, signals={"small.first_entropy": entropy}))

    def decide(row, state):
        doubtful = entropy[row, 0] >= 1
        return float(doubtful or trees.child[row, 0] < 0), doubtful, lambda action: ()

    check(known, FirstToken(1.0), decide, reads=False)
    always = run(FirstToken(0.0), known)
    assert always.small_tokens.sum() == 0 and (always.correct == references(known).large.correct).all()
    never = run(FirstToken(3.0, last=False), known)
    assert never.escalations.sum() == 0 and never.small_tokens.sum() > 0


def test_modes_are_those_of_pats():
    router, state, seen = Modes(), Modes().start(1), []
    for score in (0.9, 0.9, 0.7, 0.8, 0.85, 0.99, 0.99):
        state = router.accept(state, np.array([0]), np.array([score], np.float32), np.array([5]))
        seen.append(int(state[0, 0]))
    assert seen == [1, 2, 0, 0, 1, 2, 2]
    features = np.array([[0.3], [0.5], [0.74], [0.9]], np.float32)
    wanted = {0: [1, 1, 1, 1], 1: [1, 1, 1, 0], 2: [1, 0, 0, 0]}  # who is asked for a step in each mode
    for mode, actions in wanted.items():
        chances, after = router.decide(features, np.full((4, 1), float(mode)))
        assert chances.tolist() == actions and (after == mode).all()


def test_modes_are_walked_token_by_token(tables):
    features, trees = tables.in_schema("agg/1"), tables.trees

    def decide(row, mode):
        mode = 0 if mode is None else mode
        score = features[row, 0]

        def after(action):
            accepted = trees.score[row, action]
            return 0 if accepted < np.float32(0.75) else min(mode + (accepted >= np.float32(0.85)), 2)

        return float(mode == 0 or score < np.float32((0, 0.75, 0.4)[mode])), False, after

    check(tables, Modes(), decide)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_rsd_with_a_step_function_is_a_threshold(tables, threshold):
    """RSD (https://arxiv.org/abs/2501.19324): a draft is accepted if and only if its reward is at least δ."""
    score = tables.trees.score

    def decide(row, state):
        accepted = score[row, 0] >= np.float32(threshold)
        return float(not accepted), False, lambda action: ()

    check(tables, Threshold(threshold), decide)


def test_specreason_is_a_threshold_on_digits_that_pays_for_each(trees):
    """From 7 of 9 on a step is accepted; the large model's reply is one token at every step, whatever it says."""
    digits = np.random.default_rng(0).integers(0, 10, (trees.nodes, 2))
    told = replace(trees, score=(digits / 9).astype(np.float32))
    tables = decision_tables(told, "test", cost="calls:1")
    found = run(Threshold(7 / 9), tables)
    assert found.cost == pytest.approx(found.large_tokens + found.steps)

    def decide(row, state):
        return float(digits[row, 0] < 7), False, lambda action: ()

    free = decision_tables(told, "test")
    check(free, Threshold(7 / 9), decide)


@pytest.mark.parametrize("router", [Takeover(Threshold(0.5)), FirstToken(1.0)], ids=lambda each: each.name)
def test_what_decides_without_a_proposal_is_not_stored_or_served(router, tmp_path):
    for use in (lambda: artefact.save(router, tmp_path / "p", {}), lambda: Policy(router, {"max_steps": 5})):
        with pytest.raises(ArtefactError, match=f"{router.name} cannot be stored or served: it lets the large model"):
            use()
    assert not (tmp_path / "p").exists()


def test_modes_are_not_stored_but_decide_in_sessions(trees, tmp_path):
    with pytest.raises(ArtefactError, match="modes:Modes cannot be stored"):
        artefact.save(Modes(), tmp_path / "p", {})
    tables = decision_tables(trees, "test")
    wanted, escalations = run(Modes(), tables), 0
    policy = Policy(Modes(), {"max_steps": 30})
    for root in tables.roots.tolist():
        session, row = policy.session(), root
        while row >= 0:
            score, tokens, ends = trees.score[row], trees.accepted_tokens[row], trees.child[row] < 0
            action = session.decide(score[0], int(trees.tokens[row, 0]), terminal=bool(ends[0]))
            if action:
                session.accept(score[1], int(tokens[1]), terminal=bool(ends[1]))
            else:
                session.accept()
            escalations, row = escalations + action, int(trees.child[row, action])
    assert escalations == 2 * wanted.escalations.sum()
