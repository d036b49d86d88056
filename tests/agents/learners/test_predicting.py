"""Arbitrage and one-deviation advantage: answers that are known, ordinary artefacts, runs from training to session."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from scripted_store import scripted_store

import agents
import evaluate as evaluate_command
import train as train_command
from agents import __main__ as command
from agents.evaluation.forest import Forest
from agents.evaluation.oracle import score_oracle, step_oracle
from agents.evaluation.splits import halves
from agents.evaluation.walk import run
from agents.learners import advantage, arbitrage
from agents.learners.supervised import output
from agents.routers import artefact
from agents.routers.base import Constant
from agents.routers.mlp import MLP
from agents.runs.config import TrainConfig
from rollouts.errors import ConfigError, StoreError
from rollouts.trees.compile import compile_store
from trim_env.features import schema_named
from trim_env.tables import decision_tables

CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}, {"max_escalations": 2, "max_large_tokens": 11}]
PREDICTING = {"arbitrage": arbitrage, "advantage": advantage}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("predicting") / "s", 240).path


@pytest.fixture(scope="module")
def trees(store):
    return compile_store(store)


def fitted(learner, trees, seed=0, schema="agg+", **caps):
    choice = decision_tables(trees, indices=halves(trees)[0], schema=schema, **caps)
    return learner.fit(decision_tables(trees, "train", schema=schema, **caps), choice, seed)


LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95], np.float32)
CHANCES = np.array([0.1, 0.9, 0.3, 0.75, 0.05])  # of a better large step, by the level of the small one's score


def by_score(trees):
    """Trees in which whether the large model's step is better depends on the score of the small one's alone."""
    draw = np.random.default_rng(0)
    level = draw.integers(0, len(LEVELS), trees.nodes)
    better = draw.random(trees.nodes) < CHANCES[level]
    small = LEVELS[level]
    return replace(trees, score=np.stack([small, np.where(better, small + 0.02, small - 0.02)], axis=1)), level


def test_where_the_difference_depends_on_the_score_alone_it_is_bayes_rule(trees):
    made, level = by_score(trees)
    found = fitted(arbitrage, made, schema="score")
    prior = np.log((1 - found.share) / found.share)  # both classes were weighted alike
    for chance in (0.5, 0.2, 0.8):
        router = found.cut(prior + np.log(chance / (1 - chance)))
        assert isinstance(router, MLP)
        actions = router.probability(decision_tables(made, None, schema="score").features)
        assert (actions == (CHANCES > chance)[level]).all(), chance


def test_tau_is_part_of_the_network(trees):
    found = fitted(arbitrage, trees)
    forest = found.held_out.forest
    odds = output(found.weights, forest)
    for tau in (0.1, 0.5, 0.9):
        router = found.cut(np.log(tau / (1 - tau)))
        assert router.knob.name == "threshold" and router.knob.value == pytest.approx(tau)
        assert ((router.probability(forest.seen) > 0) == (1 / (1 + np.exp(-odds)) > tau)).all()


def test_tau_is_chosen_on_the_choice_half(trees):
    found = fitted(arbitrage, trees)
    choice = decision_tables(trees, indices=halves(trees)[0])
    for lam in (0.0, 0.01, 0.1):
        best = run(found.router(lam), choice).returns(lam).mean()
        assert all(best >= run(found.cut(cut), choice).returns(lam).mean() - 1e-6 for cut in found.cuts[::20])
    spent = [run(found.router(lam), choice).large_tokens.mean() for lam in (0.0, 0.05, 5.0)]
    assert spent[0] >= spent[1] >= spent[2] == 0


def enumerated(tables, row, used=0, left=0, first=0):
    """Whether a tree is solved and what it costs: an action, and always-small after it, straight from the rules."""
    cap, tokens = tables.max_large_tokens, int(tables.trees.tokens[row, 1])
    closed = used == tables.max_escalations or (cap is not None and left == 0)
    action = 0 if closed else first
    paid = 0 if not action else tokens if cap is None else min(tokens, left)
    accepted = action if paid == tokens else 0
    child = int(tables.trees.child[row, accepted])
    if child < 0:
        return float(tables.trees.correct[row, accepted] == 1), paid
    solved, later = enumerated(tables, child, used + accepted, max(left - paid, 0))
    return solved, paid + later


@pytest.mark.parametrize("closed", [None, 2])
@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_advantages_are_those_of_enumeration(tmp_path, caps, closed):
    """On trees that are closed under K escalations, too, wherever fewer than K are used."""
    trees = compile_store(scripted_store(tmp_path / "s", 24, max_escalations=closed), cache=False)
    tables = decision_tables(trees, "train", **caps)
    forest = Forest(tables)
    gain, cost = advantage.one_deviation(forest)
    graph, seen = forest.graph, set()
    for place, row in enumerate(graph.rows.tolist()):
        at = int(graph.spent.escalations[place]), int(graph.spent.left[place])
        stay, go = (enumerated(tables, row, *at, first) for first in (0, 1))
        assert (gain[place], cost[place]) == pytest.approx((go[0] - stay[0], go[1] - stay[1]))
        seen.add(float(gain[place]))
    assert seen >= {0.0, 1.0} and (gain[~graph.open] == 0).all()


def test_where_the_score_tells_the_gain_it_escalates_there(trees):
    forest = Forest(decision_tables(trees, None))
    gain = np.zeros(trees.nodes)
    gain[forest.graph.rows], _ = advantage.one_deviation(forest)
    told = np.array([0.5, 0.9, 0.1], np.float32)[gain.astype(int)]  # gains of 0, 1 and -1
    made = replace(trees, score=np.stack([told, trees.score[:, 1]], axis=1))
    found = fitted(advantage, made, schema="score")
    seen = decision_tables(made, None, schema="score").features
    assert (found.router(0.001).probability(seen) == (gain > 0)).all()
    assert found.router(10.0).probability(seen).sum() == 0
    assert found.explained[0] > 0.9


def test_one_network_holds_gain_and_price(trees):
    found = fitted(advantage, trees)
    gain, cost = found.networks
    forest = Forest(decision_tables(trees, "test"))
    for lam in (0.0, 0.004, 0.1):
        logits = found.router(lam).logits(forest.seen)
        assert logits[:, 1] == pytest.approx(output(gain, forest), abs=1e-5)
        assert logits[:, 0] == pytest.approx(lam * found.unit * output(cost, forest), abs=1e-5)


def test_both_learn_from_the_price_of_a_model(trees):
    """Costs are those of the cost model, what comes after included: small tokens that are saved count."""
    prices = "prices:large_out=15,small_out=2"
    forest = Forest(decision_tables(trees, "train", cost=prices))
    _, cost = advantage.one_deviation(forest)
    trees_cost = Forest(decision_tables(trees, "train"))
    assert cost != pytest.approx(15e-6 * advantage.one_deviation(trees_cost)[1])


@pytest.mark.parametrize("learner", PREDICTING.values(), ids=PREDICTING)
def test_the_same_seed_gives_the_same_router(learner, trees):
    one, again, other = (fitted(learner, trees, seed).router(0.01) for seed in (1, 1, 2))
    assert all((one.weights[name] == again.weights[name]).all() for name in one.weights)
    assert (one.weights["0.weight"] != other.weights["0.weight"]).any()


@pytest.mark.parametrize("learner", PREDICTING.values(), ids=PREDICTING)
@pytest.mark.parametrize("caps", CAPS[1:], ids=str)
def test_caps_are_told_and_kept(learner, trees, caps):
    router, tables = fitted(learner, trees, **caps).router(0.001), decision_tables(trees, "test", **caps)
    assert router.max_large_tokens == tables.max_large_tokens
    found = run(router, tables)
    assert found.large_tokens.max() <= (tables.max_large_tokens or np.inf)
    assert found.solutions.escalations.max() <= (tables.max_escalations or np.inf) and found.escalations.sum() > 0


def test_scores_may_be_for_training_alone():
    """A router by the reward model's scores that reads the small model's own numbers."""
    trees = compile_store("quickstart")
    tables = [decision_tables(trees, split, schema="free") for split in ("train", "validation")]
    some = [replace(each, indices=each.indices[:300]) for each in tables]
    router = arbitrage.fit(*some, 0).router(0.003)
    assert "score" not in schema_named(router.schema).facts
    held = replace(tables[1], indices=tables[1].indices[300:])
    simple = max(run(each, held).returns(0.003).mean() for each in (Constant(0), Constant(1)))
    assert run(router, held).returns(0.003).mean() > simple + 0.05


def walked(trees, indices, escalates):
    """Accuracy and large tokens of a rule on nodes, tree by tree."""
    found = []
    for root in trees.root[indices].tolist():
        row, tokens = root, 0
        while True:
            action = int(escalates(row))
            tokens += int(trees.tokens[row, 1]) * action
            child = int(trees.child[row, action])
            if child < 0:
                found.append((trees.correct[row, action] == 1, tokens))
                break
            row = child
    return np.mean(found, axis=0)


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_the_oracle_of_scores_is_walked_tree_by_tree(trees, tau):
    tables, score = decision_tables(trees, "test"), trees.score
    found = score_oracle(tables, tau)
    wanted = walked(trees, tables.indices, lambda row: float(score[row, 1]) - float(score[row, 0]) > tau)
    assert (found.correct.mean(), found.large_tokens.mean()) == pytest.approx(tuple(wanted))


def test_the_oracle_of_steps_needs_labels(trees):
    with pytest.raises(StoreError, match="has no exact labels of steps"):
        step_oracle(decision_tables(trees, "test"))
    label = np.random.default_rng(0).integers(0, 2, trees.score.shape).astype(np.int8)
    tables = decision_tables(replace(trees, label=label), "test")
    wanted = walked(trees, tables.indices, lambda row: label[row, 0] == 0 and label[row, 1] == 1)
    found = step_oracle(tables)
    assert (found.correct.mean(), found.large_tokens.mean()) == pytest.approx(tuple(wanted))


def test_what_cannot_be_compared_is_refused(trees):
    never = replace(trees, score=np.full_like(trees.score, 0.5))
    with pytest.raises(StoreError, match="arbitrage has nothing to learn"):
        fitted(arbitrage, never)
    score = trees.score.copy()
    score[trees.root[decision_tables(trees, "train").indices[:3]], 1] = np.nan
    signals = {"scripted.score": score}  # what stands in for a score is none
    for lacking in (replace(trees, score=score), replace(trees, signals=signals)):
        with pytest.raises(StoreError, match="3 decisions lack the score of a proposal by scripted"):
            fitted(arbitrage, lacking)
        with pytest.raises(StoreError, match="3 decisions lack the score of a proposal by scripted"):
            score_oracle(decision_tables(lacking, "train"))


@pytest.mark.parametrize("agent", PREDICTING)
def test_from_training_to_a_session(agent, store, trees, tmp_path, capsys):
    out, exported = tmp_path / "run", tmp_path / "router"
    arguments = ["--agent", agent, "--rollouts", str(store), "--lam", "0.001", "0.02", "--tracking", "none"]
    assert train_command.main([*arguments, "--out", str(out)]) == 0
    assert len((out / "report.txt").read_text().splitlines()) == 2 and (out / "curve.png").stat().st_size > 0
    told = json.loads((out / "lam-0.02" / "fit.json").read_text())
    assert set(told) == ({"share", "auc"} if agent == "arbitrage" else {"gain_explained", "cost_explained"})
    assert evaluate_command.main([str(out), "--rollouts", str(store), "--out", str(tmp_path / "results")]) == 0
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert found["methods"][0]["name"] == agent and len(found["methods"][0]["points"]) == 2
    assert command.main(["export", str(out), "--lam", "0.001", "--out", str(exported), "--onnx"]) == 0
    policy, router = agents.load(exported), artefact.load(out / "lam-0.001" / "policy").router
    graph = onnxruntime.InferenceSession(exported / "policy.onnx")
    tables = decision_tables(trees, "test")
    actions = graph.run(["action"], {"features": tables.features})[0]
    assert (actions == router.probability(tables.features)).all()
    for root in tables.roots.tolist():
        session, row = policy.session(), root
        while row >= 0:
            ends, answers = trees.child[row] < 0, trees.has_answer[row]
            action = session.decide(
                trees.score[row, 0], int(trees.tokens[row, 0]), terminal=bool(ends[0]), has_answer=bool(answers[0])
            )
            assert action == actions[row]
            if action:
                session.accept(trees.score[row, 1], int(trees.accepted_tokens[row, 1]), terminal=bool(ends[1]))
            else:
                session.accept()
            row = int(trees.child[row, action])
    assert train_command.main(["--resume", str(out)]) == 0


def test_they_are_for_single_lams_and_complete_trees():
    for agent in PREDICTING:
        with pytest.raises(ConfigError, match="--lam-range trains one ppo-agg or exact policy"):
            TrainConfig(agent=agent, lam_range=(1e-3, 1e-2))
        with pytest.raises(ConfigError, match=f"{agent} learns from complete trees"):
            TrainConfig(agent=agent, live=True)
