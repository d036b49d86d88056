"""Speed of routers in use: ``python -m benchmarks.decide [DIR ...]``.

Prints microseconds per decision of a session, of 64 sessions that decide together, and per begun session, by processor
time of this process (one core); and the time that importing the loader takes, NumPy included, in a process of its own.
Without folders of artefacts: networks of the default size with random weights (speed does not depend on them), by
NumPy, a threshold, and a POMDP that is fitted to the bundled rollouts first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import agents
from agents.deploy.policy import Policy, decide_together
from agents.learners.pomdp.fit import estimate
from agents.routers import artefact
from agents.routers.base import Knob, Threshold
from agents.routers.mlp import MLP
from rollouts.trees.compile import compile_store
from trim_env.features import schema_named

IMPORT = """
import time
wall, core = time.perf_counter(), time.process_time()
import agents.deploy.policy
print(time.process_time() - core, time.perf_counter() - wall)
"""
ABOUT = {"max_steps": 30, "max_escalations": None}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        folders: Artefacts; none: a set of routers of each kind.
        batch: Sessions that decide together.
        hidden: Units of each of the two layers of the networks.
        seconds: Processor seconds of each measurement; the best of five parts counts.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    batch: int = 64
    hidden: int = 128
    seconds: float = 1.0


def network(schema: str, hidden: int) -> MLP:
    """Return a network with random weights."""
    draw, weights = np.random.default_rng(0), {}
    sizes = [schema_named(schema).size, hidden, hidden, 2]
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        weights[f"{layer}.weight"] = draw.normal(size=(outputs, inputs)).astype(np.float32)
        weights[f"{layer}.bias"] = draw.normal(size=outputs).astype(np.float32)
    return MLP("trim-agg", schema_named(schema).id, Knob("lam", 1e-3), weights)


def made(hidden: int, folder: Path) -> dict[str, Policy]:
    """Return policies of all kinds by what they are called in the output."""
    policies = {}
    for schema in ("agg", "agg+"):
        place = artefact.save(network(schema, hidden), folder / schema, ABOUT)
        policies[f"network, {schema}"] = agents.load(place)
    policies["threshold"] = Policy(Threshold(0.5), ABOUT)
    policies["POMDP"] = Policy(estimate(compile_store("quickstart")).routers([1e-3])[0], ABOUT)
    return policies


def microseconds(call: Callable[[], None], decisions: int, seconds: float) -> float:
    """Return the least processor time per decision of five parts."""
    call()
    best = float("inf")
    for _ in range(5):
        count, begun = 0, time.process_time()
        while time.process_time() - begun < seconds / 5:
            for _ in range(8):
                call()
            count += 8 * decisions
        best = min(best, (time.process_time() - begun) / count)
    return 1e6 * best


def measure(policy: Policy, settings: Settings) -> tuple[float, float, float]:
    """Return microseconds per decision alone, per decision in a batch, and per begun session; accepting counts too."""
    span = policy.lam_range
    lam = None if span is None else (span[0] * span[1]) ** 0.5
    sessions = [policy.session(lam=lam) for _ in range(settings.batch)]
    known = {"tokens": 20, "terminal": False, "has_answer": False}
    proposals = [{"score": float(score), **known} for score in np.linspace(0.01, 0.99, settings.batch)]

    def renew() -> None:
        for place, session in enumerate(sessions):
            if session.ended:
                sessions[place] = policy.session(lam=lam)

    def alone() -> None:
        for session, proposal in zip(sessions, proposals, strict=True):
            session.accept(*(0.9, 20) if session.decide(**proposal) else ())
        renew()

    def together() -> None:
        for session, action in zip(sessions, decide_together(sessions, proposals), strict=True):
            session.accept(*(0.9, 20) if action else ())
        renew()

    return (
        microseconds(alone, settings.batch, settings.seconds),
        microseconds(together, settings.batch, settings.seconds),
        microseconds(lambda: _begin(policy, lam), 1, settings.seconds / 4),
    )


def _begin(policy: Policy, lam: float | None) -> None:
    policy.session(lam=lam)


def main(settings: Settings) -> None:
    """Measure and print."""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        times.append([float(value) for value in done.stdout.split()])
    core, wall = np.min(times, axis=0)
    print(f"importing the loader: {core:.3f} s of one core, {wall:.3f} s by the clock (best of three)\n")
    print(f"{'microseconds per':32}{'decision':>10}{f'in {settings.batch}':>10}{'session':>10}")
    with tempfile.TemporaryDirectory() as folder:
        named = {str(each): agents.load(each) for each in settings.folders} or made(settings.hidden, Path(folder))
        for name, policy in named.items():
            print(f"{name:32}" + "".join(f"{value:10.1f}" for value in measure(policy, settings)))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
