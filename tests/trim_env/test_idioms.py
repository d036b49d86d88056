"""What users of Gymnasium and Stable-Baselines3 write without thinking works here as well."""

from __future__ import annotations

import copy
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers
from made_stores import finished, rollout, same
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize
from test_live import idle

from rollouts.errors import ConfigError
from trim_env.env import TrimEnv
from trim_env.episodes import EPISODE_INFO, spawn_seeds
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    return decision_tables(finished(tmp_path_factory.mktemp("capped") / "s").path, None, max_escalations=1)


# ---------------------------------------------------------------- Gymnasium


@pytest.mark.parametrize("mode", [None, "sync", "async", "vector_entry_point"])
@pytest.mark.parametrize("render_mode", [None, "left out"])
def test_make_vec(mode, render_mode):
    options = {} if render_mode else {"render_mode": None}
    env = gymnasium.make_vec("Trim-v0", num_envs=3, vectorization_mode=mode, split="test", **options)
    first = env.reset(seed=spawn_seeds(4, 3))[0]
    np.testing.assert_array_equal(first, TrimVectorEnv("quickstart", "test", 3).reset(seed=4)[0])
    assert env.observation_space.contains(env.step(np.array([0, 1, 0]))[0])
    env.close()


def test_specs_go_through_json():
    env = gymnasium.make("Trim-v0", split="test", lam=1e-3, schema="text:agg", render_mode="ansi")
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.spec == env.spec and again.unwrapped.lam == 1e-3
    assert same(again.reset(seed=3), env.reset(seed=3)) and same(again.step(1), env.step(1))
    options = {"split": "test", "lam": (1e-4, 1e-2), "autoreset_mode": "NEXT_STEP"}
    vector = gymnasium.make_vec("Trim-v0", num_envs=5, **options)
    again = gymnasium.make_vec(EnvSpec.from_json(vector.spec.to_json()))
    assert again.num_envs == 5 and again.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert same(rollout(again, 9, seed=3), rollout(vector, 9, seed=3))


def test_the_next_step_form_gives_the_episodes_of_the_other(capped, tmp_path):
    """Episode by episode: the same first observations, rewards, ends and sums; one more step for each end."""
    live = idle(finished(tmp_path / "s").path, split=None, num_envs=7, max_escalations=1, autoreset_mode="NextStep")
    for next_step in (TrimVectorEnv(capped, num_envs=7, autoreset_mode="NextStep"), live):
        same_step = TrimVectorEnv(capped, num_envs=7)
        seen = {env: [[[each.copy()]] for each in env.reset(seed=5)[0]] for env in (next_step, same_step)}
        final = {env: [[] for _ in range(7)] for env in (next_step, same_step)}
        for env in (next_step, same_step):
            over = np.zeros(7, bool)
            for _ in range(120 if env is next_step else 60):
                actions = np.array([(sum(map(len, each)) + len(each)) % 2 for each in seen[env]])
                if env is next_step:
                    actions[over] = 1  # ignored
                shown, reward, done, truncated, infos = env.step(actions)
                assert not truncated.any()
                for i in range(7):
                    if over[i]:
                        assert reward[i] == 0 and not done[i]
                        seen[env][i].append([shown[i]])
                        continue
                    told = infos.get("final_info", {}) if env is same_step else infos
                    last = infos["final_obs"][i] if env is same_step and done[i] else shown[i]
                    seen[env][i][-1] += [float(reward[i]), last]
                    if done[i]:
                        assert all(told[f"_{name}"][i] for name in EPISODE_INFO)
                        final[env][i].append({name: told[name][i] for name in EPISODE_INFO})
                        if env is same_step:
                            seen[env][i].append([shown[i]])
                over = done if env is next_step else over
        for i in range(7):
            count = min(len(each[i]) for each in final.values())
            assert count > 8 and final[next_step][i][:count] == final[same_step][i][:count]
            assert same(seen[next_step][i][:count], seen[same_step][i][:count])
    live.close()


@pytest.mark.parametrize("schema", ["agg+", "seq"])
def test_all_episodes_may_end_at_once(tmp_path, schema):
    store = finished(tmp_path / "s")
    options = {"split": None, "num_envs": 1, "schema": schema, "autoreset_mode": "NEXT_STEP"}
    live = idle(store.path, **options)
    found = [rollout(env, 60, seed=0) for env in (TrimVectorEnv(store.path, **options), live)]
    assert same(*found) and sum(bool(done[0]) for _, _, done, *_ in found[0][1:]) > 10
    live.close()


def test_wrappers_of_vectors(capped):
    def made(mode):
        return TrimVectorEnv(capped, num_envs=6, lam=1e-2, autoreset_mode=mode)

    returns = {}
    for mode in ("SAME_STEP", "NEXT_STEP"):
        env = wrappers.RecordEpisodeStatistics(made(mode), buffer_length=1000)
        env.reset(seed=2)
        for _ in range(80 if mode == "SAME_STEP" else 120):
            *_, infos = env.step(np.zeros(6, int))
            if "episode" in infos:
                told = infos["final_info"] if mode == "SAME_STEP" else infos
                ended = infos["_episode"]
                np.testing.assert_allclose(infos["episode"]["r"][ended], told["return"][ended], atol=1e-6)
                np.testing.assert_array_equal(infos["episode"]["l"][ended], told["steps"][ended])
        returns[mode] = env.episode_count
        env = wrappers.DictInfoToList(wrappers.NormalizeReward(made(mode)))
        env.reset(seed=2)
        for _ in range(20):
            _, reward, done, _, infos = env.step(np.zeros(6, int))
            for ends, info in zip(done, infos, strict=True):
                assert ends == (set(EPISODE_INFO) <= set(info.get("final_info", info)))
        assert np.isfinite(reward).all()
    assert min(returns.values()) > 100
    env = wrappers.NormalizeObservation(made("NEXT_STEP"))  # which takes no other
    env.reset(seed=2)
    assert abs(np.mean([env.step(np.zeros(6, int))[0] for _ in range(200)])) < 0.3


def test_a_mode_that_there_is_not(capped):
    with pytest.raises(ConfigError, match="autoreset_mode is 'SAMESTEP'.*Did you mean 'SAME_STEP'"):
        TrimVectorEnv(capped, num_envs=1, autoreset_mode="SAMESTEP")
    with pytest.raises(ConfigError, match="SAME_STEP"):
        SB3VecEnv(TrimVectorEnv(capped, num_envs=1, autoreset_mode=AutoresetMode.NEXT_STEP))
    with pytest.raises(ConfigError, match="render_mode 'ansi'"):
        TrimVectorEnv(capped, num_envs=1, render_mode="ansi")


def test_the_checker_of_gymnasium_on_an_episode_with_a_range_of_lam():
    env = gymnasium.make("Trim-v0", split="test", lam=[1e-4, 1e-2], render_mode="ansi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert env.observation_space.shape == (7,)


# ---------------------------------------------------------------- Stable-Baselines3


def test_a_learner_by_the_name_of_the_environment():
    model = PPO("MlpPolicy", "Trim-v0", n_steps=32, batch_size=16, n_epochs=1, device="cpu")
    model.learn(32)
    assert isinstance(model.get_env().envs[0].unwrapped, TrimEnv)


def test_environments_by_name():
    with pytest.warns(UserWarning, match="'rgb_array' that is not in the possible render_modes"):  # SB3 tries it first
        env = make_vec_env("Trim-v0", n_envs=4, seed=7, env_kwargs={"split": "test"})
    first = env.reset()
    np.testing.assert_array_equal(first, TrimVectorEnv("quickstart", "test", 4).reset(seed=[7, 8, 9, 10])[0])
    ended: list = []
    while not ended:
        ended = [info["episode"] for info in env.step(np.zeros(4, int))[3] if "episode" in info]
    assert set(ended[0]) == {"r", "l", "t"}
    env.close()


def test_a_learner_on_the_fast_face(capped):
    env = SB3VecEnv(TrimVectorEnv(capped, num_envs=8), seed=0)
    assert env.env_is_wrapped(Monitor) == [True] * 8 and env.env_is_wrapped(gymnasium.Wrapper, [1]) == [False]
    model = PPO("MlpPolicy", VecNormalize(env, norm_reward=False), n_steps=8, batch_size=32, n_epochs=1, device="cpu")
    model.learn(64)
    assert len(model.ep_info_buffer) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, _ = evaluate_policy(model, SB3VecEnv(TrimVectorEnv(capped, num_envs=2), seed=0), n_eval_episodes=6)
    assert mean <= 1


def test_options_of_the_next_reset(capped):
    env = SB3VecEnv(TrimVectorEnv(capped, num_envs=3), seed=1)
    drawn = env.reset()
    single = TrimEnv(capped)
    env.set_options({"problem": "p3", "replica": 1})
    np.testing.assert_array_equal(env.reset(), [single.reset(options={"problem": "p3", "replica": 1})[0]] * 3)
    env.set_options([{}, {"problem": "p5"}, {"problem": "p2", "replica": 1}])
    env.seed(1)
    mixed = env.reset()
    np.testing.assert_array_equal(mixed[0], drawn[0])
    np.testing.assert_array_equal(mixed[1], single.reset(options={"problem": "p5"})[0])
    np.testing.assert_array_equal(mixed[2], single.reset(options={"problem": "p2", "replica": 1})[0])
    env.seed(1)
    np.testing.assert_array_equal(env.reset(), drawn)  # for one reset alone
    for options, message in (
        ({"problem": "p9"}, "No problem 'p9'"),
        ({"problem": "p3", "replica": 2}, r"no replica 2; it has \[0, 1\]"),
        ({"problem": ["p1", "p2"]}, "another number of episodes than 3"),
        ({"replica": 1}, "expected 'problem'"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrimVectorEnv(capped, num_envs=3).reset(options=options)


def test_options_of_the_live_environment(tmp_path):
    store = finished(tmp_path / "s")
    env = idle(store.path, split="train", num_envs=2)
    wanted = TrimVectorEnv(store.path, None, 2)
    options = {"problem": ["p3", "p1"], "replica": [1, 0]}
    np.testing.assert_array_equal(env.reset(options=options)[0], wanted.reset(options=options)[0])
    with pytest.raises(ConfigError, match="No problem 'p5'"):  # which is in another split
        env.reset(options={"problem": "p5"})
    env.close()


def test_attributes_by_index(capped):
    env = SB3VecEnv(TrimVectorEnv(capped, num_envs=4, lam=(1e-3, 1e-1)), seed=0)
    env.reset()
    assert env.get_attr("lam", [1, 3]) == [env.env.lam[1], env.env.lam[3]]
    assert env.get_attr("num_envs", 2) == [4]
    env.set_attr("lam_share", 0.5)
    assert env.env.lam_share == 0.5
    with pytest.raises(ConfigError, match="All 4 episodes share lam_share"):
        env.set_attr("lam_share", 0.1, indices=[0])
    assert env.has_attr("lam") and not env.has_attr("gamma")


def test_action_masks_are_what_maskable_learners_ask_for(capped):
    """`sb3_contrib.common.maskable.utils.get_action_masks` stacks env_method's results, or calls the method."""
    seen = set()
    for cap in (4, 6):
        tables = decision_tables(capped.trees, None, max_escalations=1, max_large_tokens=cap)
        single = TrimEnv(tables)
        assert single.reset(seed=0)[1]["action_mask"].tolist() == single.action_masks().tolist() == [True, True]
        env = SB3VecEnv(TrimVectorEnv(tables, num_envs=40), seed=0)
        env.reset()
        for _ in range(30):
            masks, totals = np.stack(env.env_method("action_masks")), env.env.totals
            spent = totals["escalations"] >= 1, totals["large_tokens"] >= cap
            assert masks.shape == (40, 2) and masks.dtype == bool and masks[:, 0].all()
            np.testing.assert_array_equal(masks[:, 1], ~(spent[0] | spent[1]))
            *_, infos = env.step(masks[:, 1].astype(int))
            assert not any(info.get("masked") for info in infos)  # what is masked was not asked for
            seen |= set(zip(*(each.tolist() for each in spent), strict=True))
    assert len(env.env_method("action_masks", indices=[2, 5])) == 2
    assert {(False, True), (True, False)} <= seen


# ---------------------------------------------------------------- pickling


@pytest.mark.parametrize("options", [{}, {"lam": (1e-3, 1e-1), "autoreset_mode": "NEXT_STEP"}])
@pytest.mark.parametrize("schema", ["agg+", "seq"])
def test_pickled_vectors_go_on_identically(capped, schema, options):
    env = TrimVectorEnv(decision_tables(capped.trees, None, schema=schema, max_large_tokens=9), num_envs=9, **options)
    rollout(env, 7, seed=3)
    again = pickle.loads(pickle.dumps(env))
    assert same(rollout(again, 40, start=False), rollout(env, 40, start=False))
    assert again.take_finished() == env.take_finished()


def test_other_pickled_faces_go_on_identically(capped):
    stable = SB3VecEnv(TrimVectorEnv(capped, num_envs=5), seed=3)
    stable.reset()
    stable.step(np.ones(5, int))
    again = pickle.loads(pickle.dumps(stable))
    for actions in np.random.default_rng(0).integers(0, 2, (30, 5)):
        assert same(again.step(actions), stable.step(actions))
    single = TrimEnv(capped, render_mode="ansi")
    seed = 0
    while single.reset(seed=seed) and single.step(1)[2]:
        seed += 1
    for other in (pickle.loads(pickle.dumps(single)), copy.deepcopy(single)):
        mine = copy.deepcopy(single)
        for _ in range(30):
            assert mine.render() == other.render()
            step, same_step = mine.step(0), other.step(0)
            assert same(step, same_step)
            if step[2]:
                assert same(mine.reset(), other.reset())
