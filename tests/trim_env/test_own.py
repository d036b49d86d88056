"""Features, schemas and cost models of users' own, by ``module:object``: from training to use."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from made_stores import finished, rollout, same
from test_live import idle

import agents
from agents.deploy.policy import Policy
from agents.evaluation.suite import EvaluateConfig, evaluate
from agents.routers.base import Knob
from agents.runs.config import TrainConfig
from agents.runs.run import resume, train
from rollouts.errors import ArtefactError, ConfigError
from rollouts.trees.columns import Fold
from rollouts.trees.compile import compile_store
from trim_env.costs import cost_model
from trim_env.env import TrimEnv
from trim_env.features import SCHEMAS, Feature, Schema, schema_named
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

MODULE = """
import operator

import numpy as np

from rollouts.trees.columns import Fold
from trim_env.features import Feature, Schema

doubtful = Feature("score below 0.5", 0, 1, ("score",), lambda score: score < 0.5)
mean = Feature(
    "mean score", 0, 1, (Fold("sum_score", "score", 0.0, operator.add), "step"),
    lambda total, step: total / np.maximum(step - 1, 1), version=3,
)  # fmt: skip
own = Schema("whatever", 2, (doubtful, mean))
gone = Feature("gone", 0, 1, ("score",), lambda score: score * np.nan)


class Dear:
    name, unit, large_decode = "dear", "cents", 2.0

    def of(self, tokens, prompt_tokens):
        cost = np.zeros(tokens.shape)
        cost[:, 1] = 5 + 2.0 * tokens[:, 1]
        return cost


dear = Dear()


class Odd(Dear):
    def of(self, tokens, prompt_tokens):
        return -np.ones(tokens.shape)


odd = Odd()
"""
NAME = "agg+,own_features:doubtful,own_features:mean"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Let a module of one's own be importable, and not imported."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    yield
    sys.modules.pop("own_features", None)


@pytest.fixture
def trees(tmp_path):
    return compile_store(finished(tmp_path / "s"), cache=False)


def test_names_of_schemas(own):
    with pytest.raises(ConfigError, match="--import own_features"):
        schema_named(NAME)
    schema = schema_named(NAME, imports=True)
    assert schema.id == "agg+/1,own_features:doubtful/1,own_features:mean/3"
    assert schema_named(schema.id) == schema == schema_named(NAME)
    assert schema.features[:6] == SCHEMAS["agg+"].features and schema.facts == {*SCHEMAS["agg+"].facts}
    whole = schema_named("own_features:own")
    assert whole.id == "own_features:own/2" and schema_named(whole.id) == whole and whole.facts == {"score"}
    for name, message in (
        ("agg+,own_features:doubtful/2", "Feature 'own_features:doubtful' is at version 1 here; version 2"),
        ("own_features:own/1", "is at version 2 here; version 1"),
        ("agg+,own_features:doubtfull", "doubtfull"),
        ("agg+,doubtful", "expected module:object"),
        ("own_features:doubtful", "is a Feature, expected a trim_env.features.Schema. A schema comes first"),
        ("agg+,own_features:own", "is a Schema, expected a trim_env.features.Feature"),
    ):
        with pytest.raises(ConfigError, match=message):
            schema_named(name)


def test_features_read_columns_that_there_are():
    with pytest.raises(ConfigError, match="'mine': no column 'scores'. Did you mean 'score'"):
        Schema("mine", 1, (Feature("mine", 0, 1, ("scores",), np.sqrt),))
    for fold, message in (
        (Fold("sum", "scor", 0, np.add), "no column 'scor'"),
        (Fold("min_score", "score", 0, np.add), "another column is called 'min_score'"),
        (Fold("step", "score", 0, np.add), "another column is called 'step'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Schema("mine", 1, (Feature("mine", 0, 1, (fold,), np.sqrt),))


def test_a_fold_of_ones_own_is_the_same_everywhere(own, trees, tmp_path):
    """Compiled trees, live episodes and sessions against sums over the paths."""
    env = TrimEnv(trees, None, schema=NAME)
    generator, checked = np.random.default_rng(0), 0
    policy = Policy(Keeping(env.tables.schema.id), {"max_steps": 30})
    for seed in range(40):
        seen, info = env.reset(seed=seed)
        session, ended, path = policy.session(), False, []
        while not ended:
            row, action = info["node"], int(generator.integers(2))
            score, tokens = trees.score[row], trees.tokens[row]
            assert seen[6] == (score[0] < 0.5) and seen[7] == pytest.approx(np.mean(path) if path else 0, abs=1e-6)
            known = {"terminal": trees.child[row, 0] < 0, "has_answer": trees.has_answer[row, 0]}
            session.decide(score[0], tokens[0], **known)
            np.testing.assert_array_equal(policy.router.seen[-1][0], seen)
            step = {"score": score[1], "tokens": tokens[1], "terminal": trees.child[row, 1] < 0} if action else {}
            session.accept(action=action, **step)
            path.append(float(score[action]))
            seen, _, ended, _, info = env.step(action)
            checked += 1
    assert checked > 100
    live = idle(finished(tmp_path / "t").path, split=None, num_envs=6, schema=NAME)
    assert same(rollout(live, 40, seed=0), rollout(TrimVectorEnv(trees, None, 6, schema=NAME), 40, seed=0))
    live.close()


class Keeping:
    """A router that remembers its features and always escalates."""

    name, knob = "keeping", Knob("action", 1)

    def __init__(self, schema):
        self.schema, self.seen = schema, []

    def probability(self, features):
        self.seen.append(features)
        return np.ones(len(features))


def test_from_training_to_use(own, tmp_path):
    config = TrainConfig(
        agent="exact", lam=(3e-3,), schema=NAME, cost="own_features:dear", out=tmp_path / "run", tracking="none",
    )  # fmt: skip
    train(config)
    folder = tmp_path / "run" / "lam-0.003" / "policy"
    stored = json.loads((folder / "policy.json").read_text())
    assert stored["schema"] == schema_named(NAME).id and stored["about"]["cost"] == "own_features:dear"
    found = evaluate(EvaluateConfig((tmp_path / "run",)))
    assert found.subject["cost"] == "dear"
    policy = agents.load(folder)
    assert policy.describe()["features"][-2:] == ["score below 0.5", "mean score"]
    actions = decisions(policy)
    del sys.modules["own_features"]
    for use in (lambda: agents.load(folder), lambda: evaluate(EvaluateConfig((tmp_path / "run",)))):
        with pytest.raises((ArtefactError, ConfigError), match="own_features.*--import own_features"):
            use()
    with pytest.raises(ConfigError, match="--import own_features"):
        resume(tmp_path / "run")
    assert "own_features" not in sys.modules
    __import__("own_features")
    assert decisions(agents.load(folder)) == actions


def decisions(policy):
    session, found = policy.session(), []
    for score in (0.9, 0.1, 0.6, 0.3, 0.2):
        found.append(session.decide(score, 20, text="So 3 + 4 = 7.\n\n"))
        session.accept(*(0.8, 25) if found[-1] else ())
    return found


def test_a_cost_model_of_ones_own(own, trees):
    with pytest.raises(ConfigError, match="--import own_features"):
        cost_model("own_features:dear")
    env = TrimVectorEnv(trees, None, 30, cost="own_features:dear", lam=0.01)
    env.reset(seed=0)
    tokens = trees.tokens[env.node, 1]
    solved = (trees.correct[env.node, 1] == 1) * 1.0
    np.testing.assert_allclose(env.step(np.ones(30))[1], solved - 0.01 * (5 + 2.0 * tokens))
    tables = decision_tables(trees, None, cost="own_features:dear", max_large_tokens=3)
    taken = tables.take(np.flatnonzero(trees.tokens[:, 1] > 3)[:9], np.ones(9, int), np.full(9, 3))
    assert (taken.cost == 5 + 2.0 * 3).all()
    for name, message in (
        ("own_features:Dear", "a type is no trim_env.costs.CostModel"),
        ("own_features:doubtful", "a Feature is no trim_env.costs.CostModel"),
        ("own_features:odd", "'dear' gave an array .* from -1 to -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrimEnv(trees, None, cost=name)
    with pytest.raises(ConfigError, match="'gone' is not a number"):
        TrimEnv(trees, None, schema="agg,own_features:gone")
