"""Speed of the environment over the bundled rollouts: ``python -m benchmarks.env``.

Prints millions of steps per second of the array face, of the Stable-Baselines3 face, and of that library's
DummyVecEnv over single environments, each by processor time of this process (one core) and by wall time, and the
ratio of the last two. Actions are random, which ends an episode every six or seven steps. Takes about ten seconds.

The Stable-Baselines3 face spends its time on ended episodes: that interface wants a dict for each, some 600 of 4,096
in every step, at 1.8 microseconds. Measured on 2026-11-21 at 4,096 episodes on one of two shared cores: array face
9.3 M steps/s, Stable-Baselines3 face 2.1 M, so that 77 % of its time are those dicts (the last lines of the output);
DummyVecEnv over 1,024 environments 0.025 M.
Since 2026-11-26 a single environment is a vector of one episode, at half its former speed: DummyVecEnv over 64
environments went from 0.027 M to 0.013 M on another machine, whose array face does 15 M before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from trim_env.env import TrimEnv
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import DecisionTables, decision_tables
from trim_env.vector import TrimVectorEnv


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        rollouts: Path of a rollout store, or a bundled one's name.
        split: Split that episodes are drawn from.
        array: Numbers of episodes of the array face.
        sb3: Numbers of episodes of the Stable-Baselines3 face.
        dummy: Numbers of episodes of DummyVecEnv.
        seconds: Processor seconds of each measurement; the best of three counts.
    """

    rollouts: str = "quickstart"
    split: str = "train"
    array: tuple[int, ...] = (64, 1024, 4096, 16384)
    sb3: tuple[int, ...] = (64, 1024, 4096)
    dummy: tuple[int, ...] = (64, 1024)
    seconds: float = 0.6


@dataclass(frozen=True)
class Speed:
    """Steps of single episodes per second, by processor time and by wall time."""

    core: float
    wall: float


def speed(step: Callable[[Any], Any], episodes: int, seconds: float) -> Speed:
    """Return the best speed of three runs of some processor seconds each, after some steps of warming up."""
    actions = np.random.default_rng(0).integers(0, 2, (64, episodes))
    for row in actions[:16]:
        step(row)
    best = Speed(0.0, 0.0)
    for _ in range(3):
        count, core, wall = 0, time.process_time(), time.perf_counter()
        while time.process_time() - core < seconds / 3:
            for row in actions[:16]:
                step(row)
            count += 16 * episodes
        now = Speed(count / (time.process_time() - core), count / (time.perf_counter() - wall))
        best = max(best, now, key=lambda found: found.core)
    return best


def array_face(tables: DecisionTables, episodes: int, seconds: float) -> Speed:
    """Return the speed of the array face."""
    env = TrimVectorEnv(tables, num_envs=episodes)
    env.reset(seed=0)
    return speed(env.step, episodes, seconds)


def stable_face(env: VecEnv, seconds: float) -> Speed:
    """Return the speed of an environment as Stable-Baselines3 knows it."""
    env.seed(0)
    env.reset()
    return speed(env.step, env.num_envs, seconds)


def show(name: str, episodes: int, found: Speed, note: str = "") -> None:
    """Print one measurement."""
    core, wall = found.core / 1e6, found.wall / 1e6
    print(f"{name:<16}{episodes:>6} episodes  {core:8.3f} M steps/s of one core  {wall:8.3f} by wall time{note}")


def main(settings: Settings) -> None:
    """Run the benchmark."""
    tables = decision_tables(settings.rollouts, settings.split)
    arrays = {count: array_face(tables, count, settings.seconds) for count in settings.array}
    for count, found in arrays.items():
        show("array face", count, found)
    stable = {}
    for count in settings.sb3:
        stable[count] = stable_face(SB3VecEnv(TrimVectorEnv(tables, num_envs=count)), settings.seconds)
        show("SB3 face", count, stable[count])
    for count in settings.dummy:
        dummy = DummyVecEnv([lambda: TrimEnv(tables)] * count)
        found = stable_face(dummy, settings.seconds)
        ratio = f"  (SB3 face: {stable[count].core / found.core:.0f} times that)" if count in stable else ""
        show("DummyVecEnv", count, found, ratio)
    for count in sorted(set(stable) & set(arrays)):
        share = 1 - stable[count].core / arrays[count].core
        print(f"{count} episodes: {share:.0%} of the SB3 face's time goes into dicts for ended episodes")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
