"""Sessions of a router that asks: what is needed when, and the same decisions and costs as walker and environment."""

import numpy as np
import pytest
from scripted_store import scripted_store

import agents
from agents.deploy.policy import Policy
from agents.deploy.session import decide_together
from agents.evaluation.walk import run_trees
from agents.routers import artefact
from agents.routers.asking import HEADS, Asking
from agents.routers.base import Constant, Knob, Mixture, RandomRate
from rollouts.errors import ArtefactError, ConfigError
from rollouts.trees.arrays import ASK
from rollouts.trees.columns import columns_of
from rollouts.trees.compile import compile_store
from trim_env.env import TrimEnv
from trim_env.features import Schema, schema_named, standard
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

LAM, PRICE = 0.01, 3
CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 9}]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("asking") / "s", 40), cache=False)


def drawn(seed=0, facts=("score",), schema="agg+/1", cap=None) -> Asking:
    draw, size = np.random.default_rng(seed), schema_named(schema).size + (cap is not None)
    shapes = {"0.weight": (4, size), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}
    weights = {f"{head}.{name}": draw.normal(size=each) for head in HEADS for name, each in shapes.items()}
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    return Asking("drawn", schema, Knob("lam", LAM), "scorer", facts, weights, cap)


def mixed(trees, **caps) -> Asking:
    """A router that asks at some nodes, and escalates at some with and without."""
    tables = decision_tables(trees, None)
    seen = np.insert(tables.features, tables.features.shape[1], 0.9, axis=1)[:, : 6 + ("max_large_tokens" in caps)]
    for seed in range(3000):
        router = drawn(seed, cap=caps.get("max_large_tokens"))
        asks, escalates = router.asks(seen), router.probability(seen) > 0
        if 0.2 < asks.mean() < 0.8 and all(0.1 < escalates[each].mean() < 0.9 for each in (asks, ~asks)):
            return router
    raise AssertionError


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_session_environment_and_walker_agree(trees, caps):
    router = mixed(trees, **caps)
    tables = decision_tables(trees, None, cost=f"calls:{PRICE}", **caps)
    policy = Policy(router, {"max_steps": trees.meta["max_steps"], **caps})
    env = TrimEnv(trees, None, lam=LAM, cost=f"calls:{PRICE}", ask="scorer", **caps)
    assert env.action_space.n == 3
    columns, totals, asked = columns_of(trees), run_trees(tables, router), 0
    for place, tree in enumerate(tables.indices.tolist()):
        options = {"problem": trees.problem_ids[trees.problem[tree]], "replica": int(trees.replica[tree])}
        seen, info = env.reset(options=options)
        session, accepted, returned, ended = policy.session(), [], 0.0, False
        while not ended:
            row = info["node"]
            free = {name: columns[name][row] for name in ("terminal", "has_answer")}
            action = session.decide(tokens=int(columns["tokens"][row]), **free)
            assert seen[0] == seen[1] == seen[6] == 0 and env.action_space.contains(np.int64(action))
            assert env.observation_space.contains(seen) and info["action_mask"][ASK] == info["action_mask"][1]
            if action == ASK:
                asked += 1
                seen, reward, ended, _, info = env.step(ASK)
                assert reward == pytest.approx(-LAM * PRICE) and not ended and info["node"] == row
                assert (seen[:6] == tables.features[row]).all() and seen[6] == 1 and not info["action_mask"][ASK]
                score = columns["score"][row]
                action = session.decide(score=score, accepted=[{"score": each} for each in accepted])
            seen, reward, ended, _, info = env.step(action)
            returned += reward
            wrote = env._accepted[-1][1]
            accepted.append(float(trees.score[row, wrote]))
            paid = env._vector.totals["large_tokens"][0] - session.large_tokens
            if action and wrote:
                own = int(trees.accepted_tokens[row, 1])
                session.accept(tokens=own, wasted=0) if not caps else session.accept(tokens=int(paid))
            else:
                session.accept(**({"action": 0, "wasted": int(paid)} if action else {}))
        assert info["asked"] == totals["asked"][place] and info["cost"] == totals["cost"][place]
        assert info["correct"] == totals["correct"][place]
        assert info["return"] == pytest.approx(totals["correct"][place] - LAM * totals["cost"][place])
    assert asked > 10


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
def test_vector_and_single_environments_agree(trees, mode):
    caps = {"max_large_tokens": 9}
    given = {"lam": LAM, "cost": f"calls:{PRICE}", "ask": "scorer", "schema": "agg+", **caps}
    vector = TrimVectorEnv(trees, None, 5, autoreset_mode=mode, **given)
    singles = [TrimEnv(trees, None, **given) for _ in range(5)]
    vector.reset(seed=[10, 11, 12, 13, 14])
    last = [each.reset(seed=10 + i)[0] for i, each in enumerate(singles)]
    draw, over = np.random.default_rng(0), np.zeros(5, bool)
    for _ in range(60):
        actions = draw.integers(0, 3, 5)
        seen, rewards, done, _, infos = vector.step(actions)
        for i, env in enumerate(singles):
            if mode == "NEXT_STEP" and over[i]:
                last[i], _ = env.reset()
                assert rewards[i] == 0 and (seen[i] == last[i]).all()
                continue
            last[i], reward, ended, _, info = env.step(actions[i])
            assert (reward, ended) == (pytest.approx(rewards[i]), done[i])
            if ended:
                told = infos["final_info"] if mode == "SAME_STEP" else infos
                assert told["asked"][i] == info["asked"] and told["_asked"][i] and told["cost"][i] == info["cost"]
                if mode == "SAME_STEP":
                    last[i], _ = env.reset()
            assert (seen[i] == last[i]).all()
        over = done


def test_without_ask_there_are_two_actions(trees):
    env = TrimEnv(trees, None)
    _, info = env.reset(seed=0)
    assert env.action_space.n == 2 and "asked" not in info and len(info["action_mask"]) == 2
    with pytest.raises(ConfigError, match="The action is 2, expected 0"):
        env.step(2)
    with pytest.raises(ConfigError, match="ask is 'prm'"):
        TrimEnv(trees, None, ask="prm")
    with pytest.raises(ConfigError, match="tells of earlier steps"):
        TrimEnv(trees, None, ask="scorer", schema="seq")


def always(ask: bool, facts=("score",), schema="agg+/1") -> Asking:
    router = drawn(0, facts, schema)
    for name, values in router.weights.items():
        if name.startswith("ask."):
            values[:] = 0
    router.weights["ask.1.bias"][:] = (not ask, ask)
    return drawn_with(router)


def drawn_with(router):
    return Asking(router.name, router.schema, router.knob, router.source, router.facts, dict(router.weights))


def test_what_is_asked_for_is_needed_after_ask_alone():
    session = Policy(always(True), {"max_steps": 9}).session()
    given = {"terminal": False, "has_answer": False, "tokens": 7}
    assert session.decide(**given) == ASK
    with pytest.raises(ConfigError, match=r"asks for score: call decide\(\)"):
        session.accept()
    with pytest.raises(ConfigError, match=r"decide\(\) lacks score"):
        session.decide()
    assert session.decide(score=0.5) in (0, 1)
    with pytest.raises(ConfigError, match="still open"):
        session.decide(score=0.5)
    session.accept(action=0)
    assert session.decide(**given) == ASK
    for wrong in ((), [{}], [0.9], [{"score": 1}, {"score": 1}]):
        with pytest.raises(ConfigError, match="expected score of each of the 1 accepted steps"):
            session.decide(score=0.5, accepted=wrong)
    first = session.decide(score=0.5, accepted=[{"score": 0.1}])
    session.override(first)
    session.accept(action=1, tokens=4)
    assert session.decide(**given) == ASK
    session.override(0)  # nobody can tell
    session.accept()
    assert session.decide(**given, score=0.2, accepted=[{"score": 0.1}] * 3) in (0, 1)  # told at once


def test_a_router_that_does_not_ask_needs_no_score_and_caps_end_asking():
    given = {"terminal": False, "has_answer": False, "tokens": 7}
    assert Policy(always(False), {"max_steps": 9}).session().decide(**given) in (0, 1)
    assert Policy(always(True), {"max_steps": 9, "max_escalations": 0}).session().decide(**given) == 0


def test_sessions_decide_together_as_alone():
    given = [{"terminal": False, "has_answer": bool(i % 2), "tokens": 5 + i} for i in range(20)]
    policy = Policy(drawn(5), {"max_steps": 9})
    alone, together = ([policy.session() for _ in given] for _ in range(2))
    wanted = [session.decide(**each) for session, each in zip(alone, given, strict=True)]
    assert decide_together(together, given) == wanted and len(set(wanted)) > 1
    waiting = [i for i, action in enumerate(wanted) if action == ASK]
    some = [together[i] for i in waiting]
    with pytest.raises(ConfigError, match="lacks score"):
        decide_together(some, [{"score": 0.5}] * (len(some) - 1) + [{}])
    told = [{"score": 0.1 * (i % 9)} for i in waiting]
    found = decide_together(some, told)
    assert found == [alone[i].decide(**each) for i, each in zip(waiting, told, strict=True)]


def test_columns_of_score_tables_can_be_asked_for():
    schema = "agg+/1,large.min_logprob/1,least(large.min_logprob)/1"
    router = always(True, ("large.min_logprob",), schema)
    session = Policy(router, {"max_steps": 9}).session()
    assert session.decide(0.5, 7, terminal=False, has_answer=False) == ASK
    assert session.decide(**{"large.min_logprob": -0.5}) in (0, 1)
    session.accept(action=0)
    assert session.decide(0.5, 7, terminal=False, has_answer=False) == ASK
    told = session.decide(**{"large.min_logprob": -0.5}, accepted=[{"large.min_logprob": -2.0}])
    assert told in (0, 1)
    want = router.probability(
        schema_named(schema).single(
            {"score": 0.5, "min_score": 0.5, "tokens": 7, "step": 2, "max_steps": 9, "terminal": 0, "has_answer": 0}
            | {"large.min_logprob": -0.5, "least(large.min_logprob)": -2.0}
        )
    )
    assert told == want[0]


def test_it_is_stored_and_damage_is_named(tmp_path, trees):
    router = mixed(trees)
    artefact.save(router, tmp_path / "a", {"max_steps": 9})
    policy = agents.load(tmp_path / "a")
    seen = decision_tables(trees, None).features
    assert isinstance(policy.router, Asking) and (policy.router.asks(seen) == router.asks(seen)).all()
    assert (policy.router.probability(seen) == router.probability(seen)).all()
    assert policy.describe()["asks"] == ["score"]
    for parts in ((Constant(0), router), (router, Constant(1)), (router, router)):
        mixture = Policy(Mixture(*parts, 0.5, Knob("budget", 0.2)), {"max_steps": 9})
        assert mixture.describe()["asks"] == ["score"]
    assert "asks" not in Policy(Constant(0), {"max_steps": 9}).describe()
    with pytest.raises(ArtefactError, match="No feature of agg./1 reads small.min_logprob"):
        drawn(facts=("small.min_logprob",))
    lacking = {name: values for name, values in router.weights.items() if not name.startswith("told.0")}
    with pytest.raises(ArtefactError, match="perceptron 'told' does not take the features"):
        Asking("x", "agg+/1", router.knob, "scorer", ("score",), lacking)


def test_what_reads_nothing_is_told_nothing():
    for router in (Constant(1), RandomRate(0.5)):
        sessions = [Policy(router, {"max_steps": 3}).session(seed=seed) for seed in range(3)]
        assert sessions[0].decide() in (0, 1)
        assert set(decide_together(sessions[1:], [{}, {"tokens": 4}])) <= {0, 1}


def test_asking_takes_schemas_as_objects_and_needs_something_to_ask_for(trees):
    mine = Schema("mine", 1, (standard("score"), standard("tokens")))
    env = TrimVectorEnv(trees, num_envs=2, schema=mine, ask="scorer", cost="calls:10")
    assert env.single_action_space.n == 3
    with pytest.raises(ConfigError, match="reads nothing that the scorer tells"):
        TrimVectorEnv(trees, num_envs=2, schema="tokens", ask="scorer", cost="calls:10")
