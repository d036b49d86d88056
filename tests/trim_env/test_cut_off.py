"""The cap on large tokens: every episode of small trees against a recursive enumeration; all faces alike."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from handmade import ScriptedScorer
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stores import finished, rollout, same, writers
from test_env import episodes_of_singles
from test_live import close, empty, idle

from rollouts.errors import ConfigError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE
from rollouts.trees.compile import compile_store
from rollouts.trees.verify import verify_store
from trim_env.costs import cost_model
from trim_env.env import TrimEnv
from trim_env.episodes import EPISODE_INFO
from trim_env.live import LiveVectorEnv
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

LAM = 0.013


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(finished(tmp_path_factory.mktemp("capped") / "s"), cache=False)


def episodes(trees, row, left, calls, made=()):
    """Yield all episodes from a node as lists of (row, asked, accepted, paid, event), straight from the rules."""
    for asked in (CONTINUE_SMALL, ESCALATE_LARGE):
        needed = int(trees.tokens[row, ESCALATE_LARGE])
        accepted, paid, event = asked, 0, ""
        if asked == ESCALATE_LARGE and (left == 0 or calls == 0):
            accepted, event = CONTINUE_SMALL, "masked"
        elif asked == ESCALATE_LARGE and needed > left:
            accepted, paid, event = CONTINUE_SMALL, left, "cut off"
        elif asked == ESCALATE_LARGE:
            paid = needed
        path = [*made, (row, asked, accepted, paid, event)]
        child = int(trees.child[row, accepted])
        if child < 0:
            yield path
        else:
            yield from episodes(trees, child, left - paid, calls - accepted, path)


def wanted(trees, path):
    events = [event for *_, event in path]
    row, _, accepted, *_ = path[-1]
    paid = sum(step[3] for step in path)
    correct = bool(trees.correct[row, accepted] == 1)
    return {
        "correct": correct,
        "return": pytest.approx(correct - LAM * paid),
        "cost": paid,
        "large_tokens": paid,
        "small_tokens": sum(int(trees.tokens[step[0], CONTINUE_SMALL]) for step in path),
        "escalations": sum(step[2] for step in path),
        "masked": events.count("masked"),
        "cut_off": events.count("cut off"),
        "steps": len(path),
    }


def check_single(tables, path, cap):
    env = TrimEnv(tables, lam=LAM)
    seen, info = env.reset(seed=0)
    left, rewards = cap, 0.0
    for row, asked, _, paid, event in path:
        assert seen[-1] == np.float32(left / cap) and info["large_tokens_left"] == left and info["node"] == row
        assert info["action_mask"].tolist() == [True, left > 0 and (event != "masked")] or asked == CONTINUE_SMALL
        assert env.observation_space.contains(seen)
        seen, reward, ended, _, info = env.step(asked)
        rewards += reward
        left -= paid
    assert ended and info["large_tokens_left"] == left
    found = wanted(tables.trees, path)
    assert {name: info[name] for name in found} == found and rewards == found["return"]
    assert set(found) == set(EPISODE_INFO)


def check_vector(tables, paths):
    env = TrimVectorEnv(tables, num_envs=len(paths), lam=LAM)
    env.reset(seed=0)
    for step in range(max(len(path) for path in paths)):
        _, reward, done, _, extra = env.step(np.array([path[step][1] if step < len(path) else 0 for path in paths]))
        for index, path in enumerate(paths):
            if step < len(path):
                assert done[index] == (step == len(path) - 1)
                ends = done[index] and wanted(tables.trees, path)["correct"]
                assert reward[index] == pytest.approx(ends - LAM * path[step][3])
            if step == len(path) - 1:
                found = wanted(tables.trees, path)
                assert {name: extra["final_info"][name][index] for name in found} == found


def test_every_episode_under_every_cap_that_matters(trees):
    """Caps that are exactly the tokens of a step, one more, one less, and less than any step."""
    steps = np.unique(trees.tokens[:, ESCALATE_LARGE])
    sizes = {1, int(steps[0]) - 1, *(int(n) + d for n in steps[[0, len(steps) // 2, -1]] for d in (-1, 0, 1)), 10**6}
    seen = {"masked": 0, "middle": 0, "end": 0, "exact": 0}
    for cap in sorted(size for size in sizes if size > 0):
        for calls in (None, 1):
            for index in range(0, len(trees.root), 3):
                options = {"max_escalations": calls, "max_large_tokens": cap, "indices": np.array([index])}
                tables = decision_tables(trees, None, **options)
                paths = list(episodes(trees, int(trees.root[index]), cap, 99 if calls is None else calls))
                check_vector(tables, paths)
                for path in paths[::3]:
                    check_single(tables, path, cap)
                for path in paths:
                    cut = [place for place, step in enumerate(path) if step[4] == "cut off"]
                    seen["masked"] += any(step[4] == "masked" for step in path)
                    seen["middle"] += bool(cut) and cut[0] < len(path) - 1
                    seen["end"] += bool(cut) and trees.child[path[cut[0]][0], ESCALATE_LARGE] < 0
                    seen["exact"] += sum(step[3] for step in path) == cap and not cut
    assert min(seen.values()) > 20, seen


def test_a_cap_below_every_step_buys_nothing_but_is_paid(trees):
    cap = int(trees.tokens[:, ESCALATE_LARGE].min()) - 1
    env = TrimEnv(decision_tables(trees, None, max_large_tokens=cap), lam=LAM)
    for seed in range(12):
        env.reset(seed=seed)
        infos = [env.step(1)[4]]
        while "correct" not in infos[-1]:
            infos.append(env.step(1)[4])
        last = infos[-1]
        assert (last["large_tokens"], last["escalations"], last["cut_off"]) == (cap, 0, 1)
        assert last["masked"] == last["steps"] - 1


@settings(max_examples=60)
@given(cap=st.integers(1, 30), calls=st.integers(0, 3), seed=st.integers(0, 10**6), rate=st.floats(0, 1))
def test_spending_never_exceeds_the_cap(trees, cap, calls, seed, rate):
    tables = decision_tables(trees, None, max_large_tokens=cap, max_escalations=calls)
    env = TrimVectorEnv(tables, num_envs=40, lam=LAM)
    generator = np.random.default_rng(seed)
    seen, _ = env.reset(seed=seed)
    for _ in range(25):
        spent = env.totals["large_tokens"]
        assert (spent <= cap).all() and seen[:, -1] == pytest.approx((cap - spent) / cap)
        seen, *_, extra = env.step(generator.random(40) < rate)
        if extra:
            done = extra["_final_info"]
            final = {name: extra["final_info"][name][done] for name in ("large_tokens", "cut_off", "escalations")}
            assert (final["large_tokens"] <= cap).all() and (final["cut_off"] <= 1).all()
            assert (final["large_tokens"][final["cut_off"] == 1] == cap).all()  # what was left is paid, and no less
            assert (final["escalations"] + final["cut_off"] <= calls).all()


@pytest.mark.parametrize("calls", [None, 2])
@pytest.mark.parametrize("cost", ["decode-only", "prices:large_in=3,large_out=15,small_out=1"])
def test_all_faces_give_the_same_trajectories(tmp_path, calls, cost):
    store, cap, count, seed = finished(tmp_path / "s", calls), 9, 12, 7
    options = {"cost": cost, "max_large_tokens": cap}
    tables = decision_tables(store.path, None, **options)
    actions = np.random.default_rng(1).integers(0, 2, (60, count))
    vector = TrimVectorEnv(tables, num_envs=count, lam=LAM)
    stable = SB3VecEnv(TrimVectorEnv(tables, num_envs=count, lam=LAM), seed=seed)
    live = idle(store.path, split=None, num_envs=count, lam=LAM, max_escalations=calls, **options)
    singles = episodes_of_singles(tables, actions, seed, LAM)
    first = next(singles)[0]
    for observations in (vector.reset(seed=seed)[0], stable.reset(), live.reset(seed=seed)[0]):
        np.testing.assert_array_equal(observations, first)
    assert vector.observation_space.contains(first) and first.shape == (count, 7)
    cut = 0
    for row, (observations, rewards, dones, last, infos) in zip(actions, singles, strict=True):
        got = vector.step(row)
        assert same(live.step(row), got)
        np.testing.assert_array_equal(got[0], observations)
        np.testing.assert_allclose(got[1], rewards, atol=1e-12)
        np.testing.assert_array_equal(got[2], dones)
        stable_got = stable.step(row)
        np.testing.assert_array_equal(stable_got[0], observations)
        np.testing.assert_array_equal(stable_got[1], got[1].astype(np.float32))
        for index in np.flatnonzero(dones):
            final = {name: got[4]["final_info"][name][index] for name in EPISODE_INFO}
            assert final == pytest.approx({name: infos[index][name] for name in EPISODE_INFO})
            assert {name: stable_got[3][index][name] for name in EPISODE_INFO} == final
            np.testing.assert_array_equal(got[4]["final_obs"][index], last[index])
            np.testing.assert_array_equal(stable_got[3][index]["terminal_observation"], last[index])
            cut += infos[index]["cut_off"]
    assert cut > 20
    live.close()


def test_a_truncated_step_costs_its_prompt_and_what_was_decoded(trees):
    spec = "prices:large_in=3,large_out=15,small_in=2,small_out=1"
    model, tables = cost_model(spec), decision_tables(trees, None, cost=spec, max_large_tokens=3)
    rows = np.flatnonzero(trees.tokens[:, ESCALATE_LARGE] > 3)[:20]
    found = tables.take(rows, np.ones(len(rows), int), np.full(len(rows), 3))
    tokens = np.array(trees.tokens[rows])
    tokens[:, ESCALATE_LARGE] = 3
    np.testing.assert_allclose(found.cost, model.of(tokens, trees.prompt_tokens[rows])[:, 1])
    assert found.cut_off.all() and (found.place == 2 * rows).all()


@pytest.mark.parametrize("closed", [None, 1])
def test_live_episodes_leave_whole_steps_in_a_sound_store(tmp_path, closed):
    store = empty(tmp_path / "s", closed)
    options = {"split": None, "num_envs": 9, "replicas": 2, "max_large_tokens": 4, "max_escalations": closed}
    env = LiveVectorEnv(store.path, writers(), ScriptedScorer(), **options)
    first = rollout(env, 40, seed=0)
    assert sum(extra["final_info"]["cut_off"].sum() for *_, extra in first[1:] if extra) > 5
    env.close()
    assert not [line for line in verify_store(store).problems if closed is not None or "not closed" not in line]
    again = idle(store.path, **options)
    assert same(rollout(again, 40, seed=0), first) and again.generated == 0
    again.close()
    if closed is not None:
        close(store, writers(), replicas=2, grader="exact")
        tables = decision_tables(store.path, None, max_large_tokens=4)
        assert same(rollout(TrimVectorEnv(tables, num_envs=9), 40, seed=0), first)


def test_the_share_left_comes_after_the_schema_and_before_lam(trees):
    env = TrimVectorEnv(decision_tables(trees, None, max_large_tokens=12), num_envs=8, lam=(0.001, 0.1))
    env.reset(seed=0)
    seen = env.step(np.ones(8))[0]
    assert seen.shape == (8, 8) == env.observation_space.shape
    assert (seen[:, 6] == ((12 - env.totals["large_tokens"]) / 12).astype(np.float32)).all() and seen[:, 6].min() < 1
    assert seen[:, 7] == pytest.approx(np.log10(env.lam) + 3, abs=1e-5)


def test_by_name_with_the_checker_and_as_text():
    env = gymnasium.make("Trim-v0", rollouts="quickstart", schema="text:agg", max_large_tokens=50, render_mode="ansi")
    assert env.observation_space["features"].shape == (5,)
    check_env(gymnasium.make("Trim-v0", rollouts="quickstart", max_large_tokens=50, render_mode="ansi").unwrapped)
    env.reset(seed=0)
    assert env.step(1)[0]["features"][-1] < 1


@pytest.mark.parametrize("kind", [TrimEnv, TrimVectorEnv])
def test_a_cap_of_nothing_is_a_mistake(trees, kind, tmp_path):
    for cap in (0, -5):
        with pytest.raises(ConfigError, match=f"max_large_tokens is {cap}, expected at least 1"):
            kind(trees, None, max_large_tokens=cap)
    store = finished(tmp_path / "s")
    with pytest.raises(ConfigError, match="max_large_tokens is 0"):
        idle(store.path, max_large_tokens=0)
