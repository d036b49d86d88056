"""How long a training takes, whether it is long enough, and where the time goes: ``python -m benchmarks.train``.

Trains one λ with the defaults of `train.py` and again for ten times as long, and says when the first came within 1 % of
the mean validation return that the second ended with; then trains a sweep of eight λ one after another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import tyro

from agents.evaluation.splits import Validation
from agents.evaluation.walk import run
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings
from agents.routers.mlp import at
from benchmarks.robustness import LAMS
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        lam: λ of the long comparison.
        lams: λ of the sweep; empty leaves it out.
        rollouts: The store.
        longer: How many times longer the long run is.
    """

    lam: float = 3e-3
    lams: tuple[float, ...] = LAMS
    rollouts: str = "quickstart"
    longer: int = 10


class Clock:
    """Adds up the time spent in some methods."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Add the time spent in a method to a name."""
        plain = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

        setattr(owner, method, timed)


def main() -> None:
    """Run the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    begin = time.perf_counter()
    trees = compile_store(settings.rollouts)
    train = decision_tables(trees, "train")
    validation = Validation(lambda indices: decision_tables(trees, indices=indices), trees)
    everything = decision_tables(trees, "validation")
    print(f"loading and preparing: {time.perf_counter() - begin:.1f} s (trees compiled before, or in it)")

    clock = Clock()
    training = Training(train, validation, settings.lam, PPOSettings(), 0, attempts=1)
    learner = training.learner.learner
    clock.watch(learner, "train", "gradients")
    clock.watch(learner, "collect_rollouts", "episodes, policy included")
    clock.watch(training.learner.env, "step", "of which environment")
    moments: list[float] = []
    returns: list[float] = []
    begin = time.perf_counter()

    def note(record: dict[str, float]) -> None:
        moments.append(time.perf_counter() - begin)
        returns.append(float(run(at(training.learner.router(), settings.lam), everything).returns(settings.lam).mean()))

    training.run(note)
    seconds = moments[-1]
    decisions = training.learner.learner.num_timesteps
    print(f"one λ ({settings.lam:g}): {seconds:.1f} s, {decisions:,} decisions, {decisions / seconds:,.0f} a second")
    for name, spent in clock.seconds.items():
        print(f"  {name}: {100 * spent / seconds:.0f} %")

    begin = time.perf_counter()
    long = replace(PPOSettings(), iterations=PPOSettings().iterations * settings.longer)
    router = Training(train, validation, settings.lam, long, 0, attempts=1).run().router
    best = float(run(at(router, settings.lam), everything).returns(settings.lam).mean())
    print(f"{settings.longer} x longer: {time.perf_counter() - begin:.1f} s, validation return {best:.4f}")
    reached = [second for second, value in zip(moments, returns, strict=True) if value >= 0.99 * best]
    print(f"the first ended at {returns[-1]:.4f} ({100 * returns[-1] / best - 100:+.2f} %); within 1 % after "
          + (f"{reached[0]:.1f} s" if reached else "never"))  # fmt: skip

    if settings.lams:
        begin = time.perf_counter()
        for lam in settings.lams:
            Training(train, validation, lam, PPOSettings(), 0).run()
        print(f"{len(settings.lams)} λ, one after another: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
