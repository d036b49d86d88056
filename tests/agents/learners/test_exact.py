"""The exact learner: a problem whose answer is known, caps, whole frontiers, ranges, artefacts, runs."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from made_trees import telling
from scripted_store import scripted_store

from agents.evaluation.oracle import tree_oracle
from agents.evaluation.splits import Validation, halves
from agents.evaluation.walk import run
from agents.learners.exact import RULES, Frontier, fit, neighbours
from agents.learners.loop import Training
from agents.learners.ppo import PPOAgg
from agents.learners.settings import EXACT_RULES, ExactSettings, PPOSettings
from agents.routers import artefact
from agents.routers.base import told_cap
from agents.routers.mlp import MLP, ConditionedMLP
from agents.runs.config import TrainConfig
from agents.runs.run import resume, train
from rollouts.errors import ConfigError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

LAM = 0.003
CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}, {"max_escalations": 2, "max_large_tokens": 11}]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("exact") / "s", 120).path


@pytest.fixture(scope="module")
def trees(store):
    return compile_store(store)


def fitted(trees, lams=(0.001,), rule="quadratic", seed=0, **caps) -> Frontier:
    choice = decision_tables(trees, indices=halves(trees)[0], **caps)
    return fit(decision_tables(trees, "train", **caps), choice, lams, ExactSettings(rule=rule), seed)


@pytest.mark.parametrize("rule", EXACT_RULES)
@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_it_solves_a_problem_whose_answer_is_known(trees, caps, rule):
    """What one escalation, or so many tokens, are best spent on; the policy is told what is left of the tokens."""
    clear = telling(trees)
    tables = decision_tables(clear, "train", **caps)
    frontier = fitted(clear, rule=rule, **caps)
    router = frontier.router(0.001)
    assert isinstance(router, MLP) and router.name == "exact" and router.knob.value == 0.001
    assert told_cap(router) == tables.max_large_tokens
    assert router.size == tables.features.shape[1] + (tables.max_large_tokens is not None)
    assert set(frontier.held_out) == ({*RULES} if rule == "auto" else {rule}) and frontier.rule in frontier.held_out
    found, best = run(router, tables), tree_oracle(tables, 0.001).returns(0.001).mean()
    assert found.returns(0.001).mean() > best - 0.03
    assert found.large_tokens.max() <= (tables.max_large_tokens or np.inf)


def test_one_fit_gives_a_whole_frontier(trees):
    lams = (1e-3, 2e-3, 5e-3, 7e-3, 1e-2, 1.5e-2)
    tables, frontier = decision_tables(trees, "train"), fitted(trees, lams)
    for lam in lams:
        alone = run(fitted(trees, (lam,)).router(lam), tables).returns(lam).mean()
        assert run(frontier.router(lam), tables).returns(lam).mean() > alone - 0.03
    spent = [run(frontier.router(lam), tables).large_tokens.mean() for lam in lams]
    assert spent[-1] < 0.8 * spent[0]
    wide = frontier.router((1e-3, 1.5e-2))
    assert isinstance(wide, ConditionedMLP)
    assert (wide.at(5e-3).probability(tables.features) == frontier.router(5e-3).probability(tables.features)).all()


def test_lams_that_lie_far_apart_are_fitted_apart():
    assert neighbours((0.01, 0.001, 0.0)) == [[0.0], [0.001, 0.01]]
    assert neighbours((1e-4, 1e-3, 1e-2, 1e-1)) == [[1e-4, 1e-3], [1e-2], [1e-1]]
    assert neighbours((0.003,)) == [[0.003]] and neighbours((0.0,)) == [[0.0]]
    many = np.geomspace(1e-4, 1, 30).tolist()
    assert sum(neighbours(many), []) == many
    assert all(group[-1] <= 20 * group[0] for group in neighbours(many))


def test_the_same_seed_gives_the_same_rule(trees):
    for rule in ("quadratic", "mlp"):
        first, again = (fitted(trees, rule=rule, seed=4) for _ in range(2))
        assert first.held_out == again.held_out
        assert all((first.weights[name] == again.weights[name]).all() for name in first.weights)
    assert (fitted(trees, rule="mlp", seed=5).weights["0.weight"] != first.weights["0.weight"]).any()


def test_a_few_problems_and_odd_features_are_enough(trees):
    """Columns that never change; fewer problems than folds."""
    tables = decision_tables(trees, "train")
    few = replace(tables, indices=tables.indices[:3], features=np.ones_like(tables.features))
    frontier = fit(few, replace(few, indices=halves(trees)[0]), (LAM,), ExactSettings(), 0)
    assert all(np.isfinite(values).all() for values in frontier.weights.values())


@pytest.mark.parametrize(("rule", "version"), [("linear", 2), ("quadratic", 4), ("mlp", 2)])
def test_an_artefact_runs_in_numpy_and_as_onnx(trees, tmp_path, rule, version):
    frontier = fitted(trees, (1e-3, 1e-2), rule, max_large_tokens=9)
    seen = np.random.default_rng(0).uniform(-1, 1, (500, 7)).astype(np.float32)
    for name, made in (("one", frontier.router(1e-3)), ("range", frontier.router((1e-3, 1e-2)))):
        artefact.save(made, tmp_path / name, {}, onnx=True)
        described = json.loads((tmp_path / name / "policy.json").read_text())
        assert described["version"] == version and described["activation"] == RULES[rule].activation
        loaded = artefact.load(tmp_path / name).router
        assert type(loaded) is type(made)
        at = loaded.at(2e-3) if name == "range" else loaded
        graph = onnxruntime.InferenceSession(tmp_path / name / "policy.onnx")
        told = {"lam": np.full(500, 2e-3)} if name == "range" else {}
        assert (graph.run(["action"], {"features": seen, **told})[0] == at.probability(seen)).all()


def test_a_rule_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="Unknown --exact.rule 'quadrat'. Did you mean 'quadratic'"):
        ExactSettings(rule="quadrat")
    with pytest.raises(ConfigError, match="Unknown --ppo.start 'exat'. Did you mean 'exact'"):
        PPOSettings(start="exat")


def test_train_py_trains_it_and_resumes_it(store, tmp_path):
    config = TrainConfig(str(store), agent="exact", lam=(0.0, LAM, 0.03), tracking="none", out=tmp_path / "run")
    trained = train(config)
    kept = {lam: router.weights for lam, router in trained.routers.items()}
    told = json.loads((config.out / "lam-0.003" / "fit.json").read_text())
    assert told["rule"] == "quadratic" and len(told["held_out"]["quadratic"]) == len(told["entropies"])
    assert (config.out / "curve.png").exists() and trained.health[LAM].sentence in (
        config.out / "report.txt"
    ).read_text()
    for file in (
        "report.json",
        "policy/policy.json",
        "policy/policy.safetensors",
    ):  # stopped before the second was done
        (config.out / "lam-0.03" / file).unlink()
    resumed = resume(config.out)
    assert resumed.health == trained.health
    for lam, weights in kept.items():
        assert all((resumed.routers[lam].weights[name] == values).all() for name, values in weights.items())


def test_a_budget_gets_a_policy_for_a_range(store, tmp_path):
    trained = train(TrainConfig(str(store), agent="exact", budget=0.3, tracking="none", out=tmp_path / "run"))
    (policy,) = (tmp_path / "run").glob("lam-*-to-*/policy")
    stored = artefact.load(policy)
    assert isinstance(stored.router, ConditionedMLP) and len(stored.about["budgets"]) > 5
    assert len(trained.routers) == 5 and "budget" in trained.sentence.lower()


def test_ppo_starts_from_the_rule_that_is_asked_for(store, tmp_path, monkeypatch):
    def asked(tables, choice, lams, settings, seed):
        raise RuntimeError(settings.rule)

    monkeypatch.setattr("agents.learners.loop.fit", asked)
    start = {"ppo": PPOSettings(start="exact"), "exact": ExactSettings(rule="linear")}
    with pytest.raises(RuntimeError, match="linear"):
        train(TrainConfig(str(store), lam=(0.01,), tracking="none", out=tmp_path / "run", **start))


@pytest.mark.parametrize("lam", [0.001, (0.0005, 0.01)])
@pytest.mark.parametrize("cap", [None, 9])
def test_ppo_may_start_from_it(trees, lam, cap):
    """One iteration that learns nothing: what is returned is what was cloned."""
    tables = decision_tables(trees, "train", max_large_tokens=cap)
    validation = Validation(lambda indices: decision_tables(trees, indices=indices, max_large_tokens=cap), trees)
    still = PPOSettings(iterations=1, num_envs=8, n_steps=8, learning_rate=1e-12, start="exact")
    learner = Training(tables, validation, lam, still, 0, attempts=1).learner
    assert isinstance(learner, PPOAgg) and learner.settings.lam_share(0) == 1
    ranged = isinstance(lam, tuple)
    frontier = fit(tables, validation.choice, lam if ranged else (lam,), ExactSettings(), 0)
    for one in (0.0005, 0.003, 0.01) if ranged else (lam,):
        cloned = learner.router().at(one) if ranged else learner.router()
        wanted = run(frontier.router(one), tables).returns(one).mean()
        assert run(cloned, tables).returns(one).mean() > wanted - 0.07  # constants have 0.2 less
