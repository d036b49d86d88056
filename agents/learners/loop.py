"""Trains a router for one λ or for a range: attempts within a budget, each of which ends with a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agents.evaluation.health import Health
from agents.evaluation.splits import Baselines, Record, Validation
from agents.evaluation.walk import run
from agents.learners.exact import fit
from agents.learners.ppo import PPOAgg
from agents.learners.settings import ExactSettings, PPOSettings, SeqSettings
from agents.routers.mlp import MLP, ConditionedMLP, at
from agents.routers.seq import SeqPolicy
from rollouts.errors import BudgetSpent
from trim_env.episodes import EpisodesVectorEnv, Lam
from trim_env.tables import DecisionTables

Trainable = MLP | ConditionedMLP | SeqPolicy


def learner(tables: DecisionTables, lam: Lam, settings: PPOSettings, seed: int, episodes: Any = None) -> PPOAgg:
    """Return the learner that the settings belong to; `episodes` as of `agents.learners.ppo.PPOAgg`."""
    if isinstance(settings, SeqSettings):
        from agents.learners.ppo_seq import PPOSeq

        return PPOSeq(tables, lam, settings, seed, episodes)
    return PPOAgg(tables, lam, settings, seed, episodes)


@dataclass(frozen=True)
class Result:
    """A trained router.

    Attributes:
        router: The last policy of the attempt whose last policy does best on the choice half. No checkpoint on the way
            is chosen: the best of many on a few hundred problems is the luckiest (results/retraining.md).
        health: Verdict on the other half, by λ.
        records: What was logged, by iteration, of all attempts.
    """

    router: Trainable
    health: dict[float, Health]
    records: list[Record]
    baselines: dict[float, Baselines]
    attempts: int


def remedy(settings: PPOSettings, attempt: int) -> PPOSettings:
    """Return the settings of an attempt, from 0: the first as asked for, then more exploration and a slower λ."""
    if attempt == 0:
        return replace(settings, lam_start=1.0) if settings.start == "exact" else settings
    return replace(
        settings,
        iterations=int(settings.iterations * 1.5),
        entropy=settings.entropy * 3**attempt,
        lam_start=settings.lam_start / 2,
        lam_ramp=max(settings.lam_ramp, 0.6),
    )


def checked_at(lam: Lam) -> tuple[float, ...]:
    """Return the λ at which a training is validated: its own, or five that span its range."""
    if isinstance(lam, tuple):
        return tuple(float(np.clip(float(f"{value:.3g}"), *lam)) for value in np.geomspace(*lam, 7)[1:-1])
    return (lam,)


class Training:
    """One training for one λ, or for a range of λ.

    If the router is collapsed or beaten on the choice half, it is trained again: another seed, a warm start from the
    best simple rule by behaviour cloning, and the settings of `remedy`; at most `attempts` times in all.
    """

    def __init__(
        self,
        tables: DecisionTables,
        validation: Validation,
        lam: Lam,
        settings: PPOSettings,
        seed: int,
        *,
        attempts: int = 3,
        episodes: Callable[..., EpisodesVectorEnv] | None = None,
        exact: ExactSettings | None = None,
    ) -> None:
        """Begin the first attempt; `episodes` as of `agents.learners.ppo.PPOAgg`, `exact` of the rule to start from."""
        self.tables, self.validation, self.lam, self.seed = tables, validation, lam, seed
        self.exact = exact or ExactSettings()
        self.settings, self.attempts, self.episodes = settings, attempts, episodes
        self.lams = checked_at(lam)
        self.baselines = {each: validation.candidates.best(each) for each in self.lams}
        self.records: list[Record] = []
        self._begin(0)

    def _begin(self, attempt: int) -> None:
        self.attempt = attempt
        seed = int(np.random.SeedSequence(self.seed, spawn_key=(attempt,)).generate_state(1)[0])  # 32 bits, for torch
        self.learner = learner(self.tables, self.lam, remedy(self.settings, attempt), seed, self.episodes)
        if attempt:
            self.learner.imitate(self.baselines[self.lams[len(self.lams) // 2]].best)
        elif self.learner.settings.start == "exact":
            lams = self.lams if isinstance(self.lam, tuple) else (self.lam,)
            rule = fit(self.tables, self.validation.choice, lams, self.exact, self.seed).router(self.lam)
            self.learner.imitate(rule)

    @property
    def planned(self) -> int:
        """Iterations planned by now: those done, and those left of the attempt under way."""
        return len(self.records) + self.learner.settings.iterations - self.learner.iteration

    def run(self, on_iteration: Callable[[Record], None] | None = None) -> Result:
        """Train to the end; `on_iteration` is called with the record of each iteration.

        Raises:
            BudgetSpent: No more may be generated, and not one iteration is done; later than that, it ends the training.
        """
        found: list[tuple[float, Trainable]] = []
        while True:
            try:
                while not self.learner.done:
                    record = self._iterate()
                    if on_iteration:
                        on_iteration(record)
            except BudgetSpent:
                if not self.records:
                    raise
                self.attempts = self.attempt + 1
            if self.learner.iteration:
                found.append((self.records[-1]["validation/return"], self.learner.router()))
            _, router = max(found, key=lambda each: each[0])
            if self.attempt + 1 >= self.attempts or all(
                each.fine for each in self._assess(router, final=False).values()
            ):
                break
            self._begin(self.attempt + 1)
        return Result(router, self._assess(router, final=True), self.records, self.baselines, self.attempt + 1)

    def _assess(self, router: Trainable, *, final: bool) -> dict[float, Health]:
        return {lam: self.validation.assess(at(router, lam), lam, final=final) for lam in self.lams}

    def _iterate(self) -> Record:
        record = self.learner.iterate()
        measured = self._measure(self.learner.router())
        record |= {"attempt": float(self.attempt), **{f"validation/{name}": v for name, v in measured.items()}}
        record["step"] = float(len(self.records) + 1)
        self.records.append(record)
        return record

    def _measure(self, router: Trainable) -> Record:
        """Return means, over the λ that are validated, of what `Validation.measure` finds."""
        choice = self.validation.choice
        found = [self.validation.measure(run(at(router, lam), choice), lam) for lam in self.lams]
        return {name: float(np.mean([each[name] for each in found])) for name in found[0]}
