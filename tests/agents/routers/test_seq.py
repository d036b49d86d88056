"""TRIM-Seq: masking, order, the same decisions in NumPy as in torch, artefacts, training that learns."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from made_trees import telling
from scripted_store import scripted_store

import evaluate as evaluate_command
import train as train_command
from agents.deploy.policy import Policy, load
from agents.evaluation.oracle import tree_oracle
from agents.evaluation.walk import run, run_trees
from agents.learners.ppo_seq import NAME, PPOSeq, SeqExtractor
from agents.learners.settings import SeqSettings
from agents.routers import artefact
from agents.routers.base import Knob, Router, StatefulRouter, Threshold
from agents.routers.seq import SCHEMA, SeqPolicy
from agents.runs.config import TrainConfig, resolved
from agents.runs.run import resume, train
from rollouts.errors import ArtefactError, ConfigError
from rollouts.trees.compile import compile_store
from trim_env.features import SCHEMAS
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

STEPS = 9
SMALL = SeqSettings(
    iterations=4, num_envs=64, n_steps=8, batch_size=256, n_epochs=2, hidden=16, width=8, heads=2, layers=2
)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("seq") / "s", 120))


def networks(layers=2, width=8, heads=2, hidden=6, cap=None, seed=0, steps=STEPS):
    """Return a random extractor with a head, as torch modules and as a policy."""
    torch.manual_seed(seed)
    extras = 3 + (cap is not None)
    space = spaces.Box(-9, 9, (2 * steps + extras,), np.float32)
    extractor = SeqExtractor(space, steps=steps, told=2, width=width, layers=layers, heads=heads)
    head = [torch.nn.Linear(width + extras, hidden), torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, 2)]
    for module in (extractor, *head):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
    weights = {name: values.numpy() for name, values in extractor.state_dict().items()}
    for place, layer in enumerate(head):
        weights |= {f"head.{place}.{kind}": getattr(layer, kind).detach().numpy() for kind in ("weight", "bias")}
    tanh = torch.nn.Tanh()
    whole = torch.nn.Sequential(extractor, head[0], tanh, head[1], tanh, head[2])
    return whole, SeqPolicy(NAME, SCHEMA, Knob("lam", 0.01), weights, heads, cap)


def drawn(count=400, extras=3, seed=0):
    """Return observations of all lengths, with zeros behind the proposal, and their lengths."""
    draw = np.random.default_rng(seed)
    length = draw.integers(1, STEPS + 1, count)
    pairs = draw.normal(size=(count, STEPS, 2)) * (np.arange(STEPS) < length[:, None])[:, :, None]
    rest = np.column_stack([length / STEPS, draw.integers(0, 2, (count, extras - 1))])
    return np.concatenate([pairs.reshape(count, -1), rest], axis=1).astype(np.float32), length


def torch_logits(whole, observations):
    with torch.no_grad():
        return whole(torch.from_numpy(observations)).numpy()


@pytest.mark.parametrize(("layers", "heads", "cap"), [(1, 1, None), (2, 2, None), (3, 4, 50)])
def test_numpy_computes_what_torch_does(layers, heads, cap):
    whole, policy = networks(layers, 8, heads, cap=cap)
    seen, _ = drawn(9000, 3 + (cap is not None))
    assert policy.logits(seen) == pytest.approx(torch_logits(whole, seen), abs=2e-5)
    assert policy.logits(seen).std(axis=0).min() > 0.1


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_never_changes_anything(layers):
    whole, policy = networks(layers)
    seen, length = drawn()
    noise = np.random.default_rng(1).normal(size=(len(seen), STEPS, 2)) * 30
    dirty = seen.copy()
    behind = np.repeat(np.arange(STEPS) >= length[:, None], 2, axis=1)
    dirty[:, : 2 * STEPS][behind] = noise.reshape(len(seen), -1)[behind]
    assert behind.mean() > 0.3
    np.testing.assert_array_equal(torch_logits(whole, dirty), torch_logits(whole, seen))
    np.testing.assert_array_equal(policy.logits(dirty), policy.logits(seen))
    alone = np.concatenate([policy.logits(each[None]) for each in seen[:50]])  # nor does the length of others
    assert alone == pytest.approx(policy.logits(seen)[:50], abs=1e-9)
    shorter = seen[length < STEPS]
    assert torch_logits(whole, shorter[:1]) == pytest.approx(torch_logits(whole, shorter)[:1], abs=1e-5)


def test_order_and_every_step_matter():
    _, policy = networks()
    seen, length = drawn()
    long = seen[length >= 4]
    first = policy.logits(long)
    swapped = long.copy()
    swapped[:, [0, 1, 2, 3]] = long[:, [2, 3, 0, 1]]
    assert (np.abs(policy.logits(swapped) - first).max(axis=1) > 1e-4).mean() > 0.95
    for step in range(4):
        for part in range(2):
            changed = long.copy()
            changed[:, 2 * step + part] += 1
            assert (np.abs(policy.logits(changed) - first).max(axis=1) > 1e-4).mean() > 0.95


def test_the_state_holds_what_the_environment_shows(trees):
    """A router with state that is fed step by step sees the observations of an environment, bit for bit."""
    for cap in (None, 9):
        tables = decision_tables(trees, "test", schema="seq", max_large_tokens=cap)
        width = tables.trees.meta["max_steps"]
        seen: list[np.ndarray] = []

        class Recording(SeqPolicy):
            def logits(self, observations, seen=seen):
                seen.append(observations)
                return np.stack([np.zeros(len(observations)), observations.sum(axis=1) % 1 - 0.5], axis=1)

        _, made = networks(cap=cap, steps=width)
        router = Recording(NAME, SCHEMA, made.knob, made.weights, 2, cap)
        assert isinstance(router, StatefulRouter) and not isinstance(router, Router)
        run_trees(tables, router)
        env = TrimVectorEnv(tables, num_envs=len(tables.indices))
        env.reset(seed=0)
        env.node[:] = tables.roots
        observations = env._observe(slice(None))
        running = np.ones(len(tables.indices), bool)
        order = np.arange(len(tables.indices))
        for shown in seen:
            want = {row.tobytes() for row in observations[order[running]]}
            got = {row.tobytes() for row in shown}
            assert got == want
            actions = (observations.astype(np.float32).sum(axis=1) % 1 - 0.5 > 0).astype(int)
            observations, _, done, _, _ = env.step(actions)
            running &= ~done
        assert not running.any() and len(seen) > 3


def test_a_history_of_a_node_is_that_of_a_path_to_it(trees):
    tables = decision_tables(trees, "test", schema="seq")
    env = TrimVectorEnv(tables, num_envs=300)
    env.reset(seed=0)
    draw, merged, checked = np.random.default_rng(0), 0, 0
    for _ in range(6):
        observations = env.step(draw.integers(0, 2, 300))[0]
        told = tables.observed(env.node)
        same = (told == observations).all(axis=1)
        merged += int((~same).sum())  # reached on another path
        checked += int((same & (env.totals["steps"] > 1)).sum())
        np.testing.assert_array_equal(told[:, -3:], observations[:, -3:])
    assert checked > 300 > merged / 3


def test_ppo_solves_a_problem_whose_answer_is_known(trees):
    tables = decision_tables(telling(trees), "train", schema="seq")
    learner = PPOSeq(tables, 0.001, replace(SMALL, iterations=40, n_epochs=4, learning_rate=5e-3), seed=0)
    before = run(learner.router(), tables).returns(0.001).mean()
    while not learner.done:
        learner.iterate()
    best = tree_oracle(tables, 0.001).returns(0.001).mean()
    assert run(learner.router(), tables).returns(0.001).mean() == pytest.approx(best, abs=0.01)
    assert before < best - 0.05


@pytest.mark.parametrize("cap", [None, 9])
def test_the_router_is_the_policy_that_was_trained(trees, cap):
    tables = decision_tables(trees, "train", schema="seq", max_large_tokens=cap)
    learner = PPOSeq(tables, 0.01, SMALL, seed=0)
    learner.iterate()
    learner.imitate(Threshold(0.5), updates=3)
    env, agreed = TrimVectorEnv(tables, num_envs=256), 0
    observations, _ = env.reset(seed=1)
    for _ in range(10):
        with torch.no_grad():
            actions, _ = learner.learner.predict(observations, deterministic=True)
            wanted = learner.learner.policy.get_distribution(torch.from_numpy(observations)).distribution.logits.numpy()
        logits = learner.router().logits(observations)
        assert logits[:, 1] - logits[:, 0] == pytest.approx(wanted[:, 1] - wanted[:, 0], abs=1e-5)
        assert ((logits[:, 1] > logits[:, 0]) == actions).all()
        agreed += len(actions)
        observations = env.step(np.arange(256) % 2)[0]
    assert agreed == 2560


def test_an_artefact_and_a_session_decide_alike(trees, tmp_path):
    tables = decision_tables(trees, "test", schema="seq")
    _, made = networks(steps=trees.meta["max_steps"])
    leaning = np.median(np.diff(made.logits(tables.observed(np.arange(trees.nodes))), axis=1))
    bias = made.weights["head.2.bias"] - np.array([0, leaning], np.float32)  # so that it escalates about half the time
    router = replace(made, weights={**made.weights, "head.2.bias": bias})
    artefact.save(router, tmp_path / "p", {"max_steps": trees.meta["max_steps"]}, onnx=True)  # it has no ONNX form
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["policy.json", "policy.safetensors"]
    policy, wanted, escalated = load(tmp_path / "p"), run_trees(tables, router), 0
    assert policy.kind == "seq" and policy.router.knob == router.knob and policy.name == "trim-seq"
    for name, values in run_trees(tables, policy.router).items():
        np.testing.assert_array_equal(values, wanted[name])
    for place, root in enumerate(tables.roots):
        session, row = policy.session(), int(root)
        while row >= 0:
            score, tokens, child = trees.score[row], trees.tokens[row], trees.child[row]
            action = session.decide(
                score[0], int(tokens[0]), terminal=child[0] < 0, has_answer=trees.has_answer[row, 0]
            )
            if action:
                session.accept(score[1], int(trees.accepted_tokens[row, 1]), terminal=child[1] < 0)
            else:
                session.accept()
            row = int(child[action])
        assert session.escalations == wanted["escalations"][place]
        escalated += session.escalations
    assert 0 < escalated < wanted["steps"].sum()


def test_more_of_the_proposal_may_follow_the_history(trees):
    """Which columns they are is not lost on the way from the command line to sessions."""
    look = -np.random.default_rng(0).exponential(size=trees.score.shape).astype(np.float32)
    told = replace(trees, signals={**trees.signals, "small.min_logprob": look})
    asked = TrainConfig(agent="ppo-seq", schema="seq,small.min_logprob")
    assert resolved(asked).schema == asked.schema and resolved(TrainConfig(agent="ppo-seq")).schema == "seq"
    tables = decision_tables(told, "test", schema=asked.schema)
    learner = PPOSeq(tables, 0.01, replace(SMALL, iterations=1), seed=0)
    learner.iterate()
    router = learner.router()
    env = TrimVectorEnv(tables, num_envs=64)
    observations, _ = env.reset(seed=0)
    logits = learner.learner.policy.get_distribution(torch.from_numpy(observations)).distribution.logits.detach()
    assert np.diff(router.logits(observations)) == pytest.approx(np.diff(logits.numpy()), abs=1e-5)
    changed = observations.copy()
    changed[:, -1] += 1
    assert (router.logits(changed) != router.logits(observations)).any()
    leaning = np.median(np.diff(router.logits(tables.observed(np.arange(told.nodes)))))
    bias = router.weights["head.2.bias"] - np.array([0, leaning], np.float32)
    router = replace(router, weights={**router.weights, "head.2.bias": bias})
    wanted, escalated, policy = run_trees(tables, router), 0, Policy(router, {"max_steps": told.meta["max_steps"]})
    for place, root in enumerate(tables.roots):
        session, row = policy.session(), int(root)
        while row >= 0:
            own = {"terminal": told.child[row, 0] < 0, "has_answer": told.has_answer[row, 0]}
            own["small.min_logprob"] = look[row, 0]
            action = session.decide(told.score[row, 0], int(told.tokens[row, 0]), **own)
            large = told.score[row, 1], int(told.accepted_tokens[row, 1])
            session.accept(*large, terminal=told.child[row, 1] < 0) if action else session.accept()
            row = int(told.child[row, action])
        assert session.escalations == wanted["escalations"][place]
        escalated += session.escalations
    assert 0 < escalated < wanted["steps"].sum()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("position", lambda v: v[:, :4], "position has shape"),
        ("blocks.1.query.weight", lambda v: v[:4], r"blocks.1.query.weight has shape \(4, 8\), expected \(8, 8\)"),
        ("head.2.weight", lambda v: np.concatenate([v, v]), r"head.2.weight has shape \(4, 6\), expected \(2, 6\)"),
        ("norm.bias", lambda v: v * np.nan, "not finite"),
        ("embed.bias", None, "embed.bias has shape None"),
        ("head.0.weight", None, "lack 'head.0.weight'"),
        ("more", lambda v: np.zeros(3, np.float32), "more has shape"),
    ],
)
def test_weights_that_are_no_network_are_refused(name, change, message):
    _, policy = networks()
    weights = dict(policy.weights)
    if change is None:
        del weights[name]
    else:
        weights[name] = change(weights.get(name))
    with pytest.raises(ArtefactError, match=message):
        replace(policy, weights=weights)
    for heads in (3, 0):
        with pytest.raises(ArtefactError, match=f"{heads} heads for a width of 8"):
            replace(policy, heads=heads)


# ---------------------------------------------------------------- runs


def test_one_command_trains_resumes_and_evaluates(tmp_path, capsys):
    store = scripted_store(tmp_path / "s", 90).path
    quick = ["--seq.iterations", "2", "--seq.num-envs", "64", "--seq.n-steps", "8", "--seq.hidden", "8"]
    quick += ["--seq.width", "8", "--attempts", "1", "--tracking", "none", "--max-large-tokens", "30"]
    out = tmp_path / "run"
    arguments = ["--agent", "ppo-seq", "--rollouts", str(store), "--lam", "0.005", "--out", str(out), *quick]
    assert train_command.main(arguments) == 0
    stored = artefact.load(out / "lam-0.005" / "policy")
    assert isinstance(stored.router, SeqPolicy) and stored.router.schema == "seq/1"
    assert stored.router.max_large_tokens == 30 and stored.router.max_steps == 30
    assert json.loads((out / "config.json").read_text())["config"]["schema"] == "seq"
    (out / "lam-0.005" / "report.json").unlink()
    assert resume(out).health
    capsys.readouterr()
    assert evaluate_command.main([str(out), "--rollouts", str(store)]) == 0
    assert "trim-seq" in capsys.readouterr().out


def test_settings_that_do_not_fit_are_refused(tmp_path):
    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message):
            train(TrainConfig(**{"agent": "ppo-seq", "out": tmp_path / "x", "tracking": "none", **changes}))

    for other in ("agg", "free", "agg+,small.min_logprob"):
        refused("ppo-seq is trained on seq, or on seq,COLUMN,... with more of the proposal", schema=other)
    refused("--schema is seq, which is that of ppo-seq; ppo-agg sees", agent="ppo-agg", schema="seq")
    refused("--lam-range trains one ppo-agg or exact", lam_range=(1e-3, 1e-2))
    with pytest.raises(ConfigError, match="a width that the heads divide"):
        SeqSettings(width=10, heads=4)
    assert SCHEMAS["seq"].id == SCHEMA
