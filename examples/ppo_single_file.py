"""PPO in one file, in the manner of CleanRL: collect, estimate advantages, update; the evaluation has the last word.

    python examples/ppo_single_file.py --lam 3e-3

Every update is in sight, to be changed. What it takes from the package: the vector environment, and the verdict.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical

from agents.evaluation.splits import Validation
from agents.routers.base import Knob
from agents.routers.mlp import MLP
from trim_env.vector import TrimVectorEnv

NUM_ENVS, NUM_STEPS, EPOCHS, BATCH = 1024, 16, 4, 2048
LEARNING_RATE, CLIP, ENTROPY, GAE_LAMBDA = 3e-3, 0.2, 0.003, 0.95


@dataclass
class Args:
    """Settings."""

    rollouts: str = "quickstart"
    lam: float = 3e-3
    seed: int = 0
    iterations: int = 32


args = tyro.cli(Args)
torch.manual_seed(args.seed)
torch.set_num_threads(1)  # these networks are too small for a second thread to help
env = TrimVectorEnv(args.rollouts, "train", NUM_ENVS, lam=args.lam)
size, shape = env.tables.schema.size, (NUM_STEPS, NUM_ENVS)
actor, critic = (
    nn.Sequential(nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, n)) for n in (2, 1)
)
parameters = [*actor.parameters(), *critic.parameters()]
optimizer = torch.optim.Adam(parameters, LEARNING_RATE, eps=1e-5)
observations = torch.zeros(*shape, size)
actions, logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(5))
observation = torch.as_tensor(env.reset(seed=args.seed)[0])

for iteration in range(args.iterations):
    left = 1 - iteration / args.iterations
    env.lam_share = min(1.0, 0.2 + 4 * (1 - left))  # at the full λ from the start it may never find out what helps
    with torch.no_grad():
        for t in range(NUM_STEPS):
            policy = Categorical(logits=actor(observation))
            observations[t], actions[t] = observation, policy.sample()
            logprobs[t], values[t] = policy.log_prob(actions[t]), critic(observation)[:, 0]
            seen, reward, done, _, _ = env.step(actions[t].numpy().astype(np.int64))
            observation, rewards[t], dones[t] = map(torch.as_tensor, (seen, reward, done))
        advantages, after, ahead = torch.zeros(shape), critic(observation)[:, 0], torch.zeros(NUM_ENVS)
        for t in reversed(range(NUM_STEPS)):  # where an episode ended, the next observation is of another one
            ahead = rewards[t] - values[t] + (1 - dones[t]) * (after + GAE_LAMBDA * ahead)
            advantages[t], after = ahead, values[t]
    flat = [x.flatten(0, 1) for x in (observations, actions, logprobs, advantages, advantages + values)]
    for batch in torch.cat([torch.randperm(len(flat[0])) for _ in range(EPOCHS)]).split(BATCH):
        seen, action, before, advantage, target = (x[batch] for x in flat)
        policy = Categorical(logits=actor(seen))
        ratio, advantage = (policy.log_prob(action) - before).exp(), (advantage - advantage.mean()) / advantage.std()
        gain = torch.min(advantage * ratio, advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        loss = 0.5 * (critic(seen)[:, 0] - target).square().mean() - gain - ENTROPY * left * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

weights = {f"{int(name[0]) // 2}{name[1:]}": value.numpy() for name, value in actor.state_dict().items()}
router = MLP("ppo-single-file", env.tables.schema.id, Knob("lam", args.lam), weights)
validation = Validation(lambda indices: replace(env.tables, indices=indices), env.tables.trees)
print(validation.assess(router, args.lam, final=True).sentence)
