"""Routers for tests: an untrained network, one that remembers all it saw, and settings of the shortest training."""

import json
from dataclasses import dataclass

import numpy as np

from agents.routers.base import Knob
from agents.routers.mlp import MLP
from rollouts.files.sealed import digest_of

QUICK = ["--ppo.iterations", "2", "--ppo.num-envs", "64", "--ppo.n-steps", "8", "--ppo.hidden", "8", "--attempts", "1"]


def network(width=6, hidden=8, seed=0) -> MLP:
    draw = np.random.default_rng(seed)
    sizes = [width, hidden, hidden, 2]
    weights = {}
    for layer in range(3):
        weights[f"{layer}.weight"] = draw.normal(size=(sizes[layer + 1], sizes[layer])).astype(np.float32)
        weights[f"{layer}.bias"] = draw.normal(size=sizes[layer + 1]).astype(np.float32)
    return MLP("trim-agg", "agg+/1", Knob("lam", 3e-3), weights)


@dataclass(frozen=True)
class Remembering:
    """Escalates with a probability that depends on all that was accepted: any wrong score, action or order shows."""

    deterministic: bool
    name: str = "remembering"
    schema: str = "agg/1"
    knob: Knob = Knob("lam", 0.0)

    def start(self, n):
        return np.zeros((n, 2))

    def decide(self, features, state):
        wave = np.sin(50 * (features[:, 0].astype(float) + state[:, 0]))
        after = np.stack([state[:, 0], features[:, 0].astype(float)], axis=1)
        return (wave > 0).astype(float) if self.deterministic else np.clip(0.5 + 0.8 * wave, 0, 1), after

    def accept(self, state, actions, scores, tokens):
        memory = 0.7 * state[:, 0] + 0.3 * scores.astype(float) + 0.01 * tokens + 0.2 * actions + 0.1 * state[:, 1]
        return np.stack([memory, np.full(len(memory), np.nan)], axis=1)


def sealed(described):
    """Return a policy.json whose digest is right, whatever it says: what only its author could write."""
    if isinstance(described, dict) and "digest" in described:
        described = {**described, "digest": digest_of(described)}
    return json.dumps(described)
