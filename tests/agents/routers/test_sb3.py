"""Policies of Stable-Baselines3 as routers: they decide as the model does, on disk and off; what cannot be is named."""

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from scripted_store import scripted_store
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize

import agents
from agents.evaluation.walk import run
from agents.routers import artefact, from_sb3
from agents.routers.mlp import ConditionedMLP
from rollouts.errors import ArtefactError, ConfigError
from rollouts.files.sealed import write_sealed
from rollouts.trees.compile import compile_store
from trim_env.env import TrimEnv
from trim_env.features import left_feature
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

ACTIVATIONS = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "elu": torch.nn.ELU, "gelu": torch.nn.GELU,
               "silu": torch.nn.SiLU, "sigmoid": torch.nn.Sigmoid, "leaky_relu": torch.nn.LeakyReLU}  # fmt: skip


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("sb3") / "s", 90), cache=False)


def learnt(trees, schema="agg+", lam=0.01, cap=None, **policy):
    """A PPO after one short round, so that it is not what it was initialised to."""
    env = TrimVectorEnv(decision_tables(trees, "train", schema=schema, max_large_tokens=cap), num_envs=16, lam=lam)
    options = {"n_steps": 16, "batch_size": 64, "learning_rate": 0.05, "seed": 0, "device": "cpu"}
    return PPO("MlpPolicy", SB3VecEnv(env, 0), policy_kwargs=policy, **options).learn(512)


def seen(trees, schema="agg+"):
    features = decision_tables(trees, "test").in_schema(schema)
    return np.concatenate([features, features + np.random.default_rng(0).normal(size=features.shape)]).astype(
        np.float32
    )


SHAPES = [[8], [12, 6, 5], {"pi": [7, 7], "vf": [9]}, [], [16, 16], [5, 9], [64]]


@pytest.mark.parametrize(("activation", "net_arch"), list(zip(ACTIVATIONS, SHAPES, strict=True)), ids=str)
def test_ppo_of_any_shape(trees, activation, net_arch):
    model = learnt(trees, net_arch=net_arch, activation_fn=ACTIVATIONS[activation])
    router, features = from_sb3(model, "agg+", 0.01), seen(trees)
    assert (router.name, str(router.knob), router.schema) == ("sb3-ppo", "lam=0.01", "agg+/1")
    assert router.activation == (activation if net_arch else "tanh")  # of a single layer there is none
    assert (router.probability(features) == model.predict(features, deterministic=True)[0]).all()
    with torch.no_grad():
        wanted = model.policy.get_distribution(torch.from_numpy(features)).distribution.logits.numpy()
    found = router.logits(features)
    assert found[:, 1] - found[:, 0] == pytest.approx(wanted[:, 1] - wanted[:, 0], abs=1e-4)


def test_dqn_trains_evaluates_exports_and_serves(trees, tmp_path):
    env = TrimEnv(trees, split="train", lam=0.005)
    model = DQN("MlpPolicy", env, learning_starts=50, policy_kwargs={"net_arch": [16, 16]}, seed=0, device="cpu").learn(
        600
    )
    router, tables = from_sb3(model, "agg+", 0.005, name="mine"), decision_tables(trees, "test")
    features = seen(trees)
    assert (router.probability(features) == model.predict(features, deterministic=True)[0]).all()
    assert router.activation == "relu" and router.name == "mine"
    artefact.save(router, tmp_path / "p", {"max_steps": trees.meta["max_steps"]}, onnx=True)
    policy = agents.load(tmp_path / "p")
    first, again = run(router, tables), run(policy.router, tables)
    assert (first.correct == again.correct).all() and (first.cost == again.cost).all()
    assert policy.session().decide(0.5, 12, text="") in (0, 1) and policy.kind == "mlp"
    session = onnxruntime.InferenceSession(tmp_path / "p" / "policy.onnx", providers=["CPUExecutionProvider"])
    assert (session.run(["action"], {"features": features})[0] == router.probability(features)).all()


def test_activations_are_stored_and_read(trees, tmp_path):
    for name, version in (("tanh", 2), ("elu", 3)):
        router = from_sb3(learnt(trees, net_arch=[8, 8], activation_fn=ACTIVATIONS[name]), "agg+", 0.01)
        artefact.save(router, tmp_path / name, {})
        described = artefact.json.loads((tmp_path / name / "policy.json").read_text())
        assert (described["activation"], described["version"]) == (name, version)  # version 2 reads tanh alone
        assert (artefact.load(tmp_path / name).router.logits(seen(trees)) == router.logits(seen(trees))).all()
    described["activation"] = "softmax"
    write_sealed(tmp_path / "elu" / "policy.json", described)
    with pytest.raises(ArtefactError, match="activation is 'softmax'"):
        artefact.load(tmp_path / "elu")


def test_a_cap_and_a_range_of_lam_are_told(trees):
    model = learnt(trees, lam=(0.001, 0.1), cap=9)
    router = from_sb3(model, "agg+", (0.001, 0.1), max_large_tokens=9)
    assert isinstance(router, ConditionedMLP) and router.max_large_tokens == 9
    features = decision_tables(trees, "test").features
    left = left_feature(np.arange(len(features)) % 10, 9)[:, None]
    told = np.full((len(features), 1), np.log10(0.02) + 3, np.float32)
    wanted, _ = model.predict(np.concatenate([features, left, told], axis=1), deterministic=True)
    own = router.at(0.02).probability(np.concatenate([features, left], axis=1))
    assert (own == wanted).mean() > 0.99  # λ's column is rounded into the bias
    tables = decision_tables(trees, "test", max_large_tokens=9)
    assert run(router.at(0.02), tables).large_tokens.max() <= 9
    with pytest.raises(ConfigError, match=r"agg\+/1 and its knobs make 6 numbers"):
        from_sb3(model, "agg+", 0.01)


def test_a2c_is_an_actor_critic_too(trees):
    model = A2C("MlpPolicy", TrimEnv(trees, split="train", lam=0.01), seed=0, device="cpu").learn(100)
    assert from_sb3(model, "agg+", 0.01).activation == "tanh"


class Doubling(BaseFeaturesExtractor):
    """Somebody's own extractor."""

    def __init__(self, space):
        super().__init__(space, features_dim=2 * space.shape[0])

    def forward(self, observations):
        return torch.cat([observations, observations], dim=1)


class Softened(torch.nn.Tanh):
    """Not what its name's parent computes."""

    def forward(self, values):
        return super().forward(0.01 * values) + values.roll(1, dims=1)


class Turned(PPO):
    """A model whose decisions are not those of its network."""

    def predict(self, *arguments, **options):
        actions, state = super().predict(*arguments, **options)
        return 1 - actions, state


class Other(gymnasium.Env):
    """Of another shape."""

    def __init__(self, observations, actions):
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


BOX = spaces.Box(-1, 1, (6,), np.float32)


def test_what_cannot_be_converted_is_named(trees):
    def refused(message, model, schema="agg+"):
        with pytest.raises(ConfigError, match=message):
            from_sb3(model, schema, 0.01)

    quick = {"device": "cpu", "n_steps": 8, "batch_size": 8}
    env = TrimEnv(trees, split="train", lam=0.01)
    refused(
        "PPO: its features are extracted by Doubling",
        PPO("MlpPolicy", env, policy_kwargs={"features_extractor_class": Doubling}, **quick),
    )
    refused("layers .*Softened", PPO("MlpPolicy", env, policy_kwargs={"activation_fn": Softened}, **quick))
    refused("decides otherwise than its network does", Turned("MlpPolicy", env, **quick))
    normalised = VecNormalize(SB3VecEnv(TrimVectorEnv(decision_tables(trees, "train"), num_envs=4), 0))
    refused("normalised .VecNormalize", PPO("MlpPolicy", normalised, **quick))
    refused("expected Discrete.2.", PPO("MlpPolicy", Other(BOX, spaces.Discrete(3)), **quick))
    refused("expected Discrete.2.", SAC("MlpPolicy", Other(BOX, spaces.Box(-1, 1, (1,))), device="cpu"))
    pictures = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    refused(
        r"its observations are Box\(0, 255, \(3, 36, 36\)",
        PPO("CnnPolicy", Other(pictures, spaces.Discrete(2)), **quick),
    )
    several = spaces.Dict({"one": BOX})
    refused("its observations are Dict", PPO("MultiInputPolicy", Other(several, spaces.Discrete(2)), **quick))
    refused("schema agg/1 and its knobs make 4", PPO("MlpPolicy", env, **quick), "agg")
    refused("hold the history", PPO("MlpPolicy", env, **quick), "seq")
    model = PPO("MlpPolicy", env, **quick)
    model.policy.lstm_actor = torch.nn.LSTM(6, 6)
    refused("its policy is recurrent", model)
