"""A policy that Stable-Baselines3 trained over our observations as a router of ours: NumPy arrays, no training stack.

    model = DQN("MlpPolicy", gymnasium.make("Trim-v0", lam=3e-3)).learn(100_000)
    router = from_sb3(model, "agg+", lam=3e-3)

Nothing of torch or Stable-Baselines3 is imported here: what the model holds is read by name, and the router is held
against the model's own decisions before it is returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Knob
from agents.routers.mlp import MLP, ConditionedMLP, for_lam
from rollouts.errors import ConfigError
from trim_env.features import schema_named

# by the module's repr, parameters included
_ACTIVATIONS = {
    "Tanh()": "tanh",
    "ReLU()": "relu",
    "LeakyReLU(negative_slope=0.01)": "leaky_relu",
    "ELU(alpha=1.0)": "elu",
    "Sigmoid()": "sigmoid",
    "SiLU()": "silu",
    "GELU(approximate='none')": "gelu",
}
_DRAWN, _BOUND = 1000, 8.0  # observations that are drawn, and where features without a bound end
_CLOSE = 1e-4  # logits of the model are float32


def from_sb3(
    model: Any,
    schema: str,
    lam: float | tuple[float, float],
    *,
    max_large_tokens: int | None = None,
    name: str | None = None,
) -> MLP | ConditionedMLP:
    """Return the deterministic policy of a model as a router, which evaluates, exports and serves as ours do.

    Args:
        model: PPO, A2C, MaskablePPO, DQN or another model with an ``MlpPolicy`` of theirs, of any ``net_arch``.
        schema: Feature schema of the observations that it was trained on; one without a history.
        lam: λ that it was trained for, or (low, high) if λ is the last of its observations (`TrimVectorEnv` with a
            range of λ).
        max_large_tokens: Cap M that it was trained under: the share of M left then follows the schema's features.
        name: As in tables and plots; default ``sb3-ppo`` or the like.

    Raises:
        ConfigError: The model cannot be converted; the message names what of it.
    """
    kind = type(model).__name__
    known = schema_named(schema)
    if known.history:
        raise ConfigError(f"{kind}: a perceptron over schema {schema!r}, whose observations hold the history, is no "
                          "router: routers are given single decisions.")  # fmt: skip
    size = known.size + (max_large_tokens is not None) + isinstance(lam, tuple)
    if getattr(model.observation_space, "shape", None) != (size,):
        raise ConfigError(
            f"{kind}: its observations are {model.observation_space}; schema {known.id} and its knobs make {size} "
            "numbers. Name the schema, lam and max_large_tokens that it was trained with."
        )
    if getattr(model.action_space, "n", None) != 2 or getattr(model.action_space, "start", 0) != 0:
        raise ConfigError(f"{kind}: its actions are {model.action_space}, expected Discrete(2).")
    normalised = model.get_vec_normalize_env()
    if normalised is not None and normalised.norm_obs:
        raise ConfigError(f"{kind}: its observations are normalised (VecNormalize), which is no part of the policy. "
                          "Train with norm_obs=False: features of a schema are scaled already.")  # fmt: skip
    weights, activation = perceptron(_layers(model.policy, kind))
    name = name or f"sb3-{kind.lower()}"
    _compare(model, MLP(name, known.id, Knob("lam", 0.0), weights, max_large_tokens, activation))
    return for_lam(name, known.id, lam, weights, max_large_tokens, activation)


def perceptron(modules: Iterable[Any]) -> tuple[dict[str, NDArray[np.float32]], str]:
    """Return the weights of torch's linear layers as `MLP` names them, and the activation between them.

    Raises:
        ConfigError: There is something else among the modules, or not one activation between every two layers.
    """
    weights: dict[str, NDArray[np.float32]] = {}
    found = [module for module in modules if type(module).__name__ != "Flatten"]
    activations = {_ACTIVATIONS.get(repr(module), repr(module)) for module in found[1::2]} or {"tanh"}
    odd = [repr(module) for module in found[::2] if type(module).__name__ != "Linear"]
    odd += sorted(activations - set(_ACTIVATIONS.values()))
    if odd or len(activations) > 1 or len(found) % 2 == 0:
        raise ConfigError(
            f"The network has the layers {', '.join(map(repr, found))}; a router is made of linear ones with one and "
            f"the same activation between them: {', '.join(_ACTIVATIONS)}."
        )
    for layer, module in enumerate(found[::2]):
        for part in ("weight", "bias"):
            weights[f"{layer}.{part}"] = getattr(module, part).detach().cpu().numpy().copy()
    return weights, activations.pop()


def _layers(policy: Any, kind: str) -> list[Any]:
    """Return the modules between observations and the numbers of which the greatest decides."""
    if hasattr(policy, "lstm_actor"):
        raise ConfigError(f"{kind}: its policy is recurrent ({type(policy).__name__}), expected a perceptron.")
    if hasattr(policy, "action_net") and hasattr(getattr(policy, "mlp_extractor", None), "policy_net"):
        network, layers = policy, [*policy.mlp_extractor.policy_net, policy.action_net]
    elif hasattr(getattr(policy, "q_net", None), "q_net"):
        network, layers = policy.q_net, [*policy.q_net.q_net]
    else:
        raise ConfigError(
            f"{kind}: its policy is a {type(policy).__name__}, expected an actor-critic MlpPolicy or a DQN's."
        )
    extractor = type(network.features_extractor)
    if f"{extractor.__module__}.{extractor.__name__}" != "stable_baselines3.common.torch_layers.FlattenExtractor":
        raise ConfigError(f"{kind}: its features are extracted by {extractor.__name__}, expected the observations "
                          "themselves (FlattenExtractor).")  # fmt: skip
    return layers


def _compare(model: Any, router: MLP) -> None:
    """Raise `ConfigError` unless the router decides as the model does, draws near a tie aside."""
    space = model.observation_space
    low, high = np.maximum(space.low, -_BOUND), np.minimum(space.high, _BOUND)
    drawn = np.random.default_rng(0).uniform(low, high, (_DRAWN, len(low))).astype(np.float32)
    wanted, _ = model.predict(drawn, deterministic=True)
    logits = router.logits(drawn)
    differing = (router.probability(drawn) != wanted) & (np.abs(logits[:, 1] - logits[:, 0]) > _CLOSE)
    if differing.any():
        raise ConfigError(
            f"{type(model).__name__}: on {int(differing.sum())} of {_DRAWN} observations it decides otherwise than its "
            "network does; something between them (a wrapper, a subclass) cannot be converted."
        )
