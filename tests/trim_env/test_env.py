"""The environment as Gymnasium and Stable-Baselines3 know it, and its three faces against each other."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from made_stores import LatexWriter, finished, same
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from rollouts.errors import ConfigError, StoreError
from rollouts.trees.compile import compile_store
from trim_env.env import TrimEnv
from trim_env.episodes import EPISODE_INFO, FINISHED, spawn_seeds
from trim_env.features import SCHEMAS
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv


@pytest.fixture(scope="module")
def quickstart():
    return decision_tables("quickstart", "test")


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    return decision_tables(finished(tmp_path_factory.mktemp("capped") / "s", 1).path, None)


@pytest.mark.parametrize("schema", [*SCHEMAS, "text", "text:agg"])
def test_gymnasiums_checker(schema):
    env = gymnasium.make("Trim-v0", rollouts="quickstart", schema=schema, render_mode="ansi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*maximum value is infinity.*")  # tokens have no bound
        check_env(env.unwrapped)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_stable_baselines3s_checker(schema):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env_sb3(gymnasium.make("Trim-v0", rollouts="quickstart", schema=schema).unwrapped)


def test_made_by_name(quickstart):
    env = gymnasium.make("Trim-v0", rollouts="quickstart", split="test", lam=1e-3)
    assert isinstance(env.unwrapped, TrimEnv) and env.unwrapped.lam == 1e-3
    vector = gymnasium.make_vec("Trim-v0", num_envs=5, rollouts="quickstart", split="test", schema="agg")
    assert isinstance(vector, TrimVectorEnv)
    observations, _ = vector.reset(seed=4)
    assert observations.shape == (5, 4) and vector.observation_space.contains(observations)
    np.testing.assert_array_equal(observations, TrimVectorEnv("quickstart", "test", 5, schema="agg").reset(seed=4)[0])


def episodes_of_singles(tables, actions, seed, lam):
    """Yield what E single environments say at every step, put together as the vector environment says it."""
    envs = [TrimEnv(tables, lam=lam) for _ in range(actions.shape[1])]
    first = np.stack([env.reset(seed=own)[0] for env, own in zip(envs, spawn_seeds(seed, len(envs)), strict=True)])
    yield first, None, None, None, None
    for row in actions:
        given = [env.step(action) for env, action in zip(envs, row, strict=True)]
        last, rewards, dones, _, infos = zip(*given, strict=True)
        now = [env.reset()[0] if done else here for env, here, done in zip(envs, last, dones, strict=True)]
        yield np.stack(now), np.array(rewards), np.array(dones), np.stack(last), infos


@pytest.mark.parametrize("store", ["quickstart", "capped"])
def test_single_vector_and_sb3_faces_give_the_same_trajectories(store, request):
    tables, count, lam, seed = request.getfixturevalue(store), 12, 2e-3, 77
    actions = np.random.default_rng(1).integers(0, 2, (150, count))
    vector = TrimVectorEnv(tables, num_envs=count, lam=lam)
    stable = SB3VecEnv(TrimVectorEnv(tables, num_envs=count, lam=lam), seed=seed)
    singles = episodes_of_singles(tables, actions, seed, lam)
    wanted = next(singles)[0]
    np.testing.assert_array_equal(vector.reset(seed=seed)[0], wanted)
    np.testing.assert_array_equal(stable.reset(), wanted)
    ended, sums = 0, dict.fromkeys(FINISHED, 0.0)
    for row, (observations, rewards, dones, last, infos) in zip(actions, singles, strict=True):
        got, got_rewards, got_dones, truncated, extra = vector.step(row)
        np.testing.assert_array_equal(got, observations)
        np.testing.assert_array_equal(got_rewards, rewards)
        np.testing.assert_array_equal(got_dones, dones)
        assert not truncated.any() and bool(extra) == dones.any()
        stable_observations, stable_rewards, stable_dones, stable_infos = stable.step(row)
        np.testing.assert_array_equal(stable_observations, observations)
        np.testing.assert_array_equal(stable_rewards, rewards.astype(np.float32))
        np.testing.assert_array_equal(stable_dones, dones)
        for index in range(count):
            if not dones[index]:
                assert stable_infos[index] == {}
                continue
            ended += 1
            final = {name: infos[index][name] for name in EPISODE_INFO}
            assert {name: extra["final_info"][name][index] for name in EPISODE_INFO} == final
            assert all(extra["final_info"][f"_{name}"][index] for name in EPISODE_INFO)
            assert extra["_final_obs"][index] and extra["_final_info"][index]
            np.testing.assert_array_equal(extra["final_obs"][index], last[index])
            np.testing.assert_array_equal(stable_infos[index]["terminal_observation"], last[index])
            assert {name: stable_infos[index][name] for name in EPISODE_INFO} == final
            assert stable_infos[index]["episode"]["r"] == final["return"]
            assert stable_infos[index]["episode"]["l"] == final["steps"]
            sums["episodes"] += 1
            for name in FINISHED[1:]:
                sums[name] += final[name]
    assert ended > 250
    assert vector.take_finished() == pytest.approx(sums)
    assert vector.take_finished() == dict.fromkeys(FINISHED, 0)
    if store == "capped":
        assert sums["escalations"] <= ended


def test_episodes_do_not_depend_on_their_neighbours(quickstart):
    alone, many = (TrimVectorEnv(quickstart, num_envs=count) for count in (1, 9))
    seeds = spawn_seeds(1, 5)[4:]
    np.testing.assert_array_equal(alone.reset(seed=seeds)[0][0], many.reset(seed=np.int64(1))[0][4])
    for _ in range(40):
        one, nine = alone.step(np.zeros(1)), many.step(np.arange(9) % 2)
        np.testing.assert_array_equal(one[0][0], nine[0][4])


def test_neighbouring_seeds_and_environments_share_no_stream(quickstart):
    """(seed, environment) draws 12 problems of 4,000: no two agree in more than chance allows, at any shift."""

    def drawn(env, seed):
        env.reset(seed=seed)
        found = [env.node.copy()]
        for _ in range(11):
            env.reset()
            found.append(env.node.copy())
        return np.transpose(found).tolist()

    vector, single = TrimVectorEnv(quickstart, num_envs=16), TrimVectorEnv(quickstart, num_envs=1)
    streams = [stream for seed in (*range(8), 1000, 1001) for stream in drawn(vector, seed)]
    streams += [stream for seed in range(8) for stream in drawn(single, [seed])]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    pairs = Counter(pair for stream in streams for pair in itertools.pairwise(stream))
    assert max(pairs.values()) <= 2  # of 1,848 among 16 million
    again = drawn(vector, 3), drawn(vector, np.int64(3)), drawn(TrimVectorEnv(quickstart, num_envs=20), 3)[:16]
    assert again[0] == again[1] == again[2] and drawn(vector, spawn_seeds(3, 16)) == again[0]
    assert drawn(vector, 2**70) != drawn(vector, 2**70 + 1)


def test_draws_reach_every_tree_evenly(capped):
    vector = TrimVectorEnv(capped, num_envs=3000)
    vector.reset(seed=0)
    roots, counts = np.unique(vector.node, return_counts=True)
    assert set(roots) == set(capped.roots)
    assert abs(counts - 3000 / len(roots)).max() < 5 * np.sqrt(3000 / len(roots))
    vector.reset()
    again = vector.node.copy()
    vector.reset(seed=0)
    assert (again != vector.node).any()  # a reset without a seed goes on


def test_lam_can_change_between_steps(capped):
    env = TrimVectorEnv(capped, num_envs=64, lam=0)
    env.reset(seed=0)
    assert (env.step(np.ones(64))[1] >= 0).all()
    env.lam = 10
    reward, tokens = env.step(np.ones(64))[1], env.totals["large_tokens"]
    assert (reward < 0).any() == (tokens > 0).any()
    env.reset(seed=0)
    assert (env.step(np.ones(64))[1] <= 1 - 10).all()


def test_the_single_environment_is_seeded_and_goes_on_without_a_seed(quickstart):
    one, other = TrimEnv(quickstart), TrimEnv(quickstart)

    def problems(env, seed):
        return [env.reset(seed=seed)[1]["problem"], *(env.reset()[1]["problem"] for _ in range(9))]

    first = problems(one, 5)
    assert first == problems(other, 5) and len(set(first)) > 5
    assert problems(one, 5) == first != problems(one, 6)


def test_reset_options_choose_a_problem_and_replica(quickstart):
    env = TrimEnv(quickstart)
    name = quickstart.trees.problem_ids[quickstart.trees.problem[quickstart.indices[40]]]
    for replica in (0, 3):
        _, info = env.reset(options={"problem": name, "replica": replica})
        assert (info["problem"], info["replica"]) == (name, replica)
    assert env.reset(options={"problem": name})[1]["replica"] == 0
    with pytest.raises(ConfigError, match=r"replica 9; it has \[0, 1, 2, 3\]"):
        env.reset(options={"problem": name, "replica": 9})
    with pytest.raises(ConfigError, match=f"No problem '{name}x'.*Did you mean '{name}'"):
        env.reset(options={"problem": name + "x"})
    with pytest.raises(ConfigError, match="options.*'seed'.*expected 'problem'"):
        env.reset(options={"seed": 3})


def test_rendering(quickstart):
    env = TrimEnv(quickstart, render_mode="ansi")
    _, info = env.reset(seed=1)
    question = quickstart.trees.questions[quickstart.trees.problem_ids.index(info["problem"])]
    first = info["proposal"]
    text = env.render()
    assert (
        text.startswith(question) and f"small?  {env.tables.trees.score[info['node'], 0]:.3f}  {first.strip()}" in text
    )
    _, _, ended, _, info = env.step(1)
    assert "LARGE" in env.render() and "small?" in env.render()
    while not ended:
        _, _, ended, _, info = env.step(0)
    lines = env.render().splitlines()
    assert lines[-1] == f"-> {'correct' if info['correct'] else 'wrong'}, {info['large_tokens']} large tokens"
    assert sum(line.startswith(" LARGE") for line in lines) == 1
    assert sum(line.startswith(" small") for line in lines) == info["steps"] - 1
    assert TrimEnv(quickstart).render() is None


def test_information_follows_the_text(quickstart):
    env = TrimEnv(quickstart)
    _, info = env.reset(seed=2)
    while True:
        before, proposal = info["partial_solution"], info["proposal"]
        _, _, ended, _, info = env.step(0)
        assert info["partial_solution"] == before + proposal
        if ended:
            break
    assert info["proposal"] == "" and info["node"] == -1


def test_the_text_space_contains_every_observation(tmp_path):
    store = finished(tmp_path / "s", kind=LatexWriter)
    env = TrimEnv(compile_store(store), None, schema="text:agg+prod")
    longest, characters = 0, set()
    for name in env.tables.trees.problem_ids:
        for plan in np.ndindex(2, 2, 2, 2):
            observation, _ = env.reset(options={"problem": name})
            for action in plan:
                assert env.observation_space.contains(observation)
                longest = max(longest, len(observation["partial_solution"] + observation["proposal"]))
                characters.update(observation["partial_solution"])
                observation, _, ended, _, _ = env.step(action)
                if ended:
                    assert env.observation_space.contains(observation)
                    break
    space = env.observation_space["partial_solution"]
    assert {"𝔼", "因", "\\", "½", "∫"} <= characters <= space.character_set
    assert longest <= space.max_length < 3 * longest
    assert not space.contains("ж")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schema": "agg++"}, ConfigError, r"Unknown feature schema 'agg\+\+'.*Did you mean 'agg\+'"),
        ({"cost": "decode"}, ConfigError, "Unknown cost model 'decode'.*Did you mean 'decode-only'"),
        ({"lam": -1e-9}, ConfigError, "lam is -1e-09, expected"),
        ({"lam": float("nan")}, ConfigError, "lam is nan"),
        ({"split": "tests"}, StoreError, r"No trees in split 'tests'.*'test'"),
        ({"rollouts": "no-such-store"}, StoreError, "no rollout store here"),
        ({"max_escalations": -1}, ConfigError, "max_escalations is -1"),
    ],
)
@pytest.mark.parametrize("kind", [TrimEnv, TrimVectorEnv])
def test_mistakes_in_the_making(kind, changes, error, message):
    with pytest.raises(error, match=message):
        kind(**{"rollouts": "quickstart", **changes})


def test_other_mistakes(quickstart, capped):
    with pytest.raises(ConfigError, match="Unknown render_mode 'human'"):
        TrimEnv(quickstart, render_mode="human")
    with pytest.raises(ConfigError, match="num_envs is 0"):
        TrimVectorEnv(quickstart, num_envs=0)
    with pytest.raises(ConfigError, match="max_escalations is 2; .* at most 1"):
        TrimEnv(capped.trees, None, max_escalations=2)
    env = TrimEnv(quickstart)
    with pytest.raises(ConfigError, match="reset"):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="action is 2, expected 0"):
        env.step(2)
    while not env.step(0)[2]:
        pass
    with pytest.raises(ConfigError, match="reset"):
        env.step(0)


def test_mistakes_in_stepping_many(quickstart):
    env = TrimVectorEnv(quickstart, num_envs=3)
    with pytest.raises(ConfigError, match="reset"):
        env.step(np.zeros(3))
    for seeds in ([1, 2], -4):
        with pytest.raises(ConfigError, match="for 3 environments"):
            env.reset(seed=seeds)
    env.reset(seed=[4, 4, 9])
    before = env.totals, env.node.copy()
    for actions in (np.zeros(2), np.zeros((3, 1)), np.array([0, 1, 2]), np.array([0, -1, 0])):
        with pytest.raises(ConfigError, match=r"expected \(3,\) of 0"):
            env.step(actions)
    assert same((env.totals, env.node), before)
    with pytest.raises(ConfigError, match="lam is -1"):
        env.lam = -1


def test_the_sb3_face_keeps_to_its_interface(quickstart):
    env = SB3VecEnv(TrimVectorEnv(quickstart, num_envs=4, lam=1e-3))
    assert env.seed(9) == spawn_seeds(9, 4)
    first = env.reset()
    np.testing.assert_array_equal(first, TrimVectorEnv(quickstart, num_envs=4).reset(seed=9)[0])
    assert (env.reset() != first).any()
    assert env.get_attr("lam") == [1e-3] * 4 and env.get_attr("lam", [0, 2]) == [1e-3] * 2
    env.set_attr("lam", 0.5)
    assert env.env.lam == 0.5
    assert env.env_method("take_finished", indices=1)[0]["episodes"] == 0
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 4
    env.close()


def test_lam_may_be_drawn_for_each_episode():
    env = TrimVectorEnv("quickstart", "test", 256, lam=(1e-4, 1e-2))
    observations, _ = env.reset(seed=3)
    assert env.single_observation_space.shape == (7,) and env.observation_space.contains(observations)
    drawn = np.array(env.lam)
    assert observations[:, 6] == pytest.approx(np.log10(drawn) + 3, abs=1e-5)
    assert drawn.min() < 2e-4 and drawn.max() > 5e-3 and abs(np.log10(drawn).mean() + 3) < 0.15
    again, _ = env.reset(seed=3)
    assert (again == observations).all()
    tables, seen, ended = env.tables, np.array(env.lam), 0
    node = env.node.copy()
    for _ in range(6):
        actions = np.arange(256) % 2
        _, reward, done, _, infos = env.step(actions)
        place = 2 * node + actions
        assert reward == pytest.approx(tables.solved[place] - seen * tables.cost[place])
        if done.any():
            final = infos["final_info"]
            wanted = final["correct"] - seen * final["cost"]
            assert final["return"][done] == pytest.approx(wanted[done])
            ended += int(done.sum())
            assert (np.array(env.lam)[~done] == seen[~done]).all() and (np.array(env.lam)[done] != seen[done]).all()
        seen, node = np.array(env.lam), env.node.copy()
    assert ended > 50


@pytest.mark.parametrize("lam", [(0.1, 0.01), (0.0, 1.0), (-1.0, 1.0)])
def test_a_range_of_lam_has_a_lower_and_an_upper_end(lam):
    with pytest.raises(ConfigError):
        TrimVectorEnv("quickstart", "test", 4, lam=lam)
