"""An algorithm of Stable-Baselines3, from training to an exported router.

    python train.py --agent examples.sb3_dqn:Agent --lam 3e-3 --out runs/dqn
    python evaluate.py runs/dqn
    python -m agents export runs/dqn --out dqn-router

What `from_sb3` returns is a router like ours: NumPy arrays that need neither torch nor Stable-Baselines3 any more, nor
this file.
"""

from typing import Any

import torch
from stable_baselines3 import DQN

from agents.routers import from_sb3
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import DecisionTables
from trim_env.vector import TrimVectorEnv

STEPS, EPISODES = 200_000, 256


class Agent:
    """DQN for one λ at a time; `agents.routers.base.Learner` is what ``--agent`` asks for."""

    @classmethod
    def fit(cls, tables: DecisionTables, lam: float, seed: int) -> Any:
        """Train on the training split and return a router."""
        torch.set_num_threads(1)  # the network is too small for a second thread to help
        env = SB3VecEnv(TrimVectorEnv(tables, num_envs=EPISODES, lam=lam), seed)
        model = DQN(
            "MlpPolicy",
            env,
            gamma=1.0,  # a right answer is worth the same however long it took
            # Returns to the end. A step that scores low is better if the large model wrote it, which later features do
            # not tell: with one-step targets, escalating never seems to pay. (From Stable-Baselines3 2.7 on.)
            n_steps=16,
            learning_rate=3e-3,
            buffer_size=STEPS,
            learning_starts=10 * EPISODES,
            batch_size=512,
            train_freq=1,
            gradient_steps=4,
            target_update_interval=5 * EPISODES,
            exploration_fraction=0.8,
            policy_kwargs={"net_arch": [32, 32]},
            seed=seed,
        ).learn(STEPS)
        return from_sb3(model, tables.schema.id, lam, max_large_tokens=tables.max_large_tokens, name="dqn")
