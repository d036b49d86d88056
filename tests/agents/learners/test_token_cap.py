"""Routers under a cap on large tokens: exact expectations and oracles by brute force, training, artefacts, sessions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from made_routers import QUICK, Remembering, network
from scripted_store import scripted_store

import evaluate as evaluate_command
import train as train_command
from agents.deploy.policy import load
from agents.evaluation.oracle import query_oracle, tree_oracle
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Candidates
from agents.evaluation.suite import EvaluateConfig, evaluate
from agents.evaluation.walk import references, run, run_trees
from agents.learners.ppo import PPOAgg
from agents.learners.settings import PPOSettings
from agents.routers import artefact
from agents.routers.base import Constant, Knob, Mixture, RandomRate, Threshold, told_cap
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.features import left_feature
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv


@pytest.fixture(scope="module", params=[(None, 3), (None, 8), (2, 11), (None, 10**6)], ids=str)
def tables(request, tmp_path_factory):
    calls, cap = request.param
    store = scripted_store(tmp_path_factory.mktemp("capped") / "s", 30, max_escalations=calls)
    return decision_tables(compile_store(store, cache=False), "test", max_large_tokens=cap)


def moves(tables, row, used, left):
    """Return (action, accepted, paid, cost) of both actions at a node, straight from the rules."""
    trees, needed = tables.trees, int(tables.trees.tokens[row, 1])
    closed = left == 0 or used == tables.max_escalations
    if closed:
        return [(0, 0, 0), (1, 0, 0)]
    return [(0, 0, 0), (1, 0, left) if needed > left else (1, 1, int(trees.tokens[row, 1]))]


def value(tables, decide, row, used=0, left=None, state=None):
    """Return (7,) the expected fields of `Outcomes` from a node on; `decide` gives P(escalate) and the state after."""
    left = tables.max_large_tokens if left is None else left
    chance, after = decide(row, left, state)
    total, trees = np.zeros(7), tables.trees
    for action, accepted, paid in moves(tables, row, used, left):
        share = chance if action else 1 - chance
        if share == 0:
            continue
        child, small = int(trees.child[row, accepted]), int(trees.tokens[row, 0])
        correct = float(child < 0 and trees.correct[row, accepted] == 1)
        own = np.array([correct, paid, paid, small, small * accepted, accepted, 1.0])
        later = np.zeros(7)
        if child >= 0:
            following = None if after is None else (after, row, accepted)
            later = value(tables, decide, child, used + accepted, left - paid, following)
        total += share * (own + later)
    return total


def check(tables, totals, decide):
    for place, tree in enumerate(tables.indices):
        got = [totals[name][place] for name in Outcomes.columns()]
        assert got == pytest.approx(value(tables, decide, int(tables.trees.root[tree])).tolist(), abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_random_routers_are_evaluated_exactly(tables, rate):
    check(tables, run_trees(tables, lambda rows, _: np.full(len(rows), rate)), lambda *_: (rate, None))
    found = run(RandomRate(rate), tables)
    assert (found.large_tokens <= tables.max_large_tokens).all()


def test_monte_carlo_agrees(tables):
    env, draw = TrimVectorEnv(tables, num_envs=4000), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(8):
        env.step(draw.random(4000) < 0.5)
    totals, exact = env.take_finished(), run(RandomRate(0.5), tables)
    assert totals["large_tokens"] / totals["episodes"] == pytest.approx(exact.large_tokens.mean(), rel=0.03)
    assert totals["correct"] / totals["episodes"] == pytest.approx(exact.correct.mean(), abs=0.02)


def told(tables, seed=0):
    """Return a network that is told the share left, and heeds it."""
    plain = network(7, seed=seed)
    own = {"0.weight": plain.weights["0.weight"] * np.array([1, 1, 1, 1, 1, 1, 3], np.float32)}
    own["2.bias"] = plain.weights["2.bias"] + np.array([0, 2], np.float32)  # escalates often
    return replace(plain, weights={**plain.weights, **own}, max_large_tokens=tables.max_large_tokens)


def test_a_network_is_told_what_is_left_on_every_path(tables):
    router, features, heeded = told(tables), tables.features, 0

    def decide(row, left, _):
        nonlocal heeded
        seen = [np.append(features[row], left_feature(each, tables.max_large_tokens))[None] for each in (left, 0)]
        mine, other = (float(router.probability(each.astype(np.float32))[0]) for each in seen)
        heeded += mine != other
        return mine, None

    found = run(router, tables)
    totals = run_trees(
        tables, lambda rows, spent: np.array([decide(*each, 0)[0] for each in zip(rows, spent.left, strict=True)])
    )
    check(tables, totals, decide)
    assert found.large_tokens.sum() == pytest.approx(np.sum(totals["large_tokens"]) / 2)  # two replicas
    assert heeded > 10 or tables.max_large_tokens < 5  # less than two steps


@pytest.mark.parametrize("deterministic", [True, False])
def test_routers_with_state_see_what_was_accepted(tables, deterministic):
    router = Remembering(deterministic)
    features, trees = tables.in_schema(router.schema), tables.trees

    def decide(row, left, state):
        if state is None:
            before = router.start(1)
        else:
            kept, last, accepted = state
            scores, tokens = trees.score[[last], accepted], trees.accepted_tokens[[last], accepted]
            before = router.accept(kept, np.array([accepted]), scores, tokens)
        chance, after = router.decide(features[[row]], before)
        return float(chance[0]), after

    check(tables, run_trees(tables, router), decide)


def best(tables, lam, row, used=0, left=None):
    left = tables.max_large_tokens if left is None else left
    values = []
    for _, accepted, paid in moves(tables, row, used, left):
        child = int(tables.trees.child[row, accepted])
        later = best(tables, lam, child, used + accepted, left - paid) if child >= 0 else 0.0
        values.append((child < 0 and tables.trees.correct[row, accepted] == 1) - lam * paid + later)
    return max(values)


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.05, -0.2])  # below 0: spending is worth it, so that the cap binds
def test_the_oracle_keeps_to_the_cap_and_is_the_best_path(tables, lam):
    found = tree_oracle(tables, lam)
    wanted = [best(tables, lam, int(root)) for root in tables.roots]
    assert found.returns(lam).sum() * 2 == pytest.approx(sum(wanted))
    assert (found.large_tokens <= tables.max_large_tokens).all()
    for router in (RandomRate(0.4), Constant(1), told(tables)):
        assert (found.returns(lam) >= run(router, tables).returns(lam) - 1e-12).all()


def test_references_are_exempt(tables):
    free = replace(tables, max_escalations=None, max_large_tokens=None)
    both = references(tables)
    assert (both.large.large_tokens == references(free).large.large_tokens).all()
    assert (both.large.escalations == both.large.steps).all()
    assert (query_oracle(tables, 0.0).correct == query_oracle(free, 0.0).correct).all()
    assert run(Constant(1), tables).large_tokens.max() <= tables.max_large_tokens
    assert all(outcomes.large_tokens.max() <= tables.max_large_tokens for _, outcomes in Candidates(tables).thresholds)


def test_who_is_told_needs_a_cap_and_who_is_not_needs_none(tables):
    free = replace(tables, max_large_tokens=None)
    with pytest.raises(ConfigError, match=f"under a cap of {tables.max_large_tokens} large tokens.*no cap is set here"):
        run(told(tables), free)
    for router in (Threshold(0.5), network()):
        assert told_cap(router) is None and (run(router, tables).large_tokens <= run(router, free).large_tokens).all()
    assert told_cap(Mixture(Threshold(0.5), told(tables), 0.5, Knob("budget", 0.1))) == tables.max_large_tokens


def test_a_session_cuts_off_as_the_tables_do(tables, tmp_path):
    about = {"max_steps": 30, "max_escalations": tables.max_escalations, "max_large_tokens": tables.max_large_tokens}
    router, trees = told(tables), tables.trees
    artefact.save(router, tmp_path / "p", about)
    policy = load(tmp_path / "p")
    assert told_cap(policy.router) == tables.max_large_tokens == policy.max_large_tokens
    totals, cut = run_trees(tables, lambda rows, s: router.probability(seen_with(tables, rows, s.left))), 0
    for place, root in enumerate(tables.roots):
        session, row = policy.session(), int(root)
        while row >= 0:
            score, tokens = trees.score[row], trees.tokens[row]
            assert session.large_tokens_left == tables.max_large_tokens - session.large_tokens
            action = session.decide(
                score[0], int(tokens[0]), terminal=trees.child[row, 0] < 0, has_answer=trees.has_answer[row, 0]
            )
            left = session.large_tokens_left
            if action and tokens[1] > left:
                session.accept(action=0, wasted=left)
                action, cut = 0, cut + 1
                assert session.large_tokens_left == 0
            elif action:
                session.accept(score[1], int(tokens[1]), terminal=trees.child[row, 1] < 0)
            else:
                session.accept()
            row = int(trees.child[row, action])
        assert session.ended
        assert (session.large_tokens, session.escalations) == (
            totals["large_tokens"][place],
            totals["escalations"][place],
        )
    assert cut or tables.max_large_tokens > 100


def seen_with(tables, rows, left):
    return np.concatenate([tables.features[rows], left_feature(left, tables.max_large_tokens)[:, None]], axis=1)


# ---------------------------------------------------------------- training and evaluating


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("training") / "s", 90).path


SMALL = PPOSettings(iterations=3, num_envs=64, n_steps=8, batch_size=256, n_epochs=2, hidden=16)


def test_a_policy_is_trained_under_the_cap_and_told_of_it(store):
    import torch

    tables = decision_tables(compile_store(store), "train", max_large_tokens=9)
    learner = PPOAgg(tables, 0.001, replace(SMALL, iterations=6), seed=0)
    while not learner.done:
        record = learner.iterate()
        assert record["train/large_tokens"] <= 9
    router = learner.router()
    assert (router.max_large_tokens, router.size) == (9, 7)
    rows = np.arange(len(tables.features))
    seen = seen_with(tables, rows, rows % 10)
    with torch.no_grad():
        actions, _ = learner.learner.predict(seen, deterministic=True)
    assert (router.probability(seen) == actions).all()
    before = router.weights["0.weight"][:, 6].copy()
    learner.imitate(Threshold(0.5), updates=5)
    assert (learner.router().weights["0.weight"][:, 6] != before).any()


def test_a_policy_for_a_range_of_lam_keeps_both_columns_apart(store):
    tables = decision_tables(compile_store(store), "train", max_large_tokens=9)
    learner = PPOAgg(tables, (0.001, 0.1), SMALL, seed=0)
    learner.iterate()
    learner.imitate(Constant(0), updates=3)
    router = learner.router()
    own = router.at(0.01)
    assert own.max_large_tokens == 9 and own.size == 7 and router.weights["0.weight"].shape[1] == 8
    seen = seen_with(tables, np.arange(50), np.arange(50) % 10)
    whole = replace(own, weights=router.weights)
    lam = np.full((50, 1), np.log10(0.01) + 3, np.float32)
    assert own.logits(seen) == pytest.approx(whole.logits(np.concatenate([seen, lam], axis=1)), abs=1e-5)
    assert run(own, tables).large_tokens.max() <= 9


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--rollouts", str(store), "--lam", "0.005", "--out", str(out), "--tracking", "none", *QUICK]
    assert train_command.main([*arguments, "--max-large-tokens", "9"]) == 0
    return out


def test_a_run_names_its_cap_and_evaluation_keeps_to_it(finished, store, tmp_path, capsys):
    stored = artefact.load(finished / "lam-0.005" / "policy")
    assert stored.about["max_large_tokens"] == 9 == told_cap(stored.router)
    assert "verdict half of validation, at most 9 large-model tokens" in (finished / "curve.svg").read_text()
    assert evaluate_command.main([str(finished), "--rollouts", str(store), "--out", str(tmp_path / "out")]) == 0
    assert "at most 9 large-model tokens" in " ".join(capsys.readouterr().out.split())
    assert "at most 9 large-model tokens" in (tmp_path / "out" / "results.md").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["subject"]["max_large_tokens"] == 9
    points = [point for method in [*found["methods"], found["oracle"]] for point in method["points"]]
    assert 6 < max(point["large_tokens"] for point in points) <= 9
    assert "test, at most 9 large-model tokens" in (tmp_path / "out" / "curve.svg").read_text()


def test_another_cap_is_refused_unless_meant(finished, store, tmp_path):
    with pytest.raises(ConfigError, match="trained under a cap of 9 large tokens.*cap here is 30.*--transfer"):
        evaluate(EvaluateConfig((finished,), str(store), max_large_tokens=30))
    meant = evaluate(EvaluateConfig((finished,), str(store), max_large_tokens=30, transfer=True))
    assert meant.subject["max_large_tokens"] == 30
    about = {**artefact.load(finished / "lam-0.005" / "policy").about, "max_large_tokens": None}
    artefact.save(Threshold(0.5), tmp_path / "free" / "policy", about)
    free = evaluate(EvaluateConfig((tmp_path / "free",), str(store)))
    capped = evaluate(EvaluateConfig((tmp_path / "free",), str(store), max_large_tokens=9))
    assert free.methods[0].metrics != capped.methods[0].metrics
    with pytest.raises(ConfigError, match="trained for different max_large_tokens"):
        evaluate(EvaluateConfig((finished, tmp_path / "free"), str(store)))
    together = evaluate(EvaluateConfig((finished, tmp_path / "free"), str(store), max_large_tokens=9))
    assert [method.name for method in together.methods[:2]] == ["trim-agg", "trim-thr"]


def test_a_cap_of_nothing_is_refused(store, tmp_path, capsys):
    base = ["--rollouts", str(store), "--out", str(tmp_path / "x"), "--tracking", "none", "--max-large-tokens", "0"]
    assert train_command.main(base) == 2
    assert "--max-large-tokens is 0, expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
