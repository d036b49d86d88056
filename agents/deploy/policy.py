"""A router in use: feed it the score and the tokens of each proposal of a solution, get who writes the step.

    policy = agents.load("DIR")
    session = policy.session()                     # one per solution
    action = session.decide(score=0.73, tokens=31, text="So 3 + 4 = 7.")
    if action:                                     # the large model writes the step instead
        session.accept(score=0.91, tokens=44)
    else:
        session.accept()

Knows nothing of models, texts or rollouts. Needs NumPy alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from agents.deploy.session import Session, decide_together
from agents.escape import finite
from agents.routers import artefact
from agents.routers.asking import Asking
from agents.routers.base import AnyRouter, Mixture, parts_of, refuse_undrafted, told_cap
from agents.routers.budgets import LamCosts
from agents.routers.mlp import MLP, ConditionedMLP
from agents.routers.whole import QueryRouter, decides_once
from rollouts.errors import ArtefactError, ConfigError
from trim_env.features import Schema, schema_named

_KEPT = 256  # λ whose routers are kept at hand
_TOLD = ("package", "small", "large", "scorer", "grader", "rollouts", "cost", "held_out", "calibration", "splitting")


def load(folder: str | Path, *, allow_old: bool = False) -> Policy:
    """Read a router for use.

    Args:
        folder: An exported artefact, or a ``policy`` folder of a run.
        allow_old: Read artefacts of version 1 too, which cannot tell whether their settings were damaged.

    Raises:
        ArtefactError: There is none, it is damaged, of another version or made for other features, or of a class
            of somebody's whose module is not imported.
    """
    folder = Path(folder)
    if not (folder / "policy.json").exists():
        below = sorted(str(file.parent) for file in folder.glob("*/policy.json"))
        below += sorted(str(file.parent) for file in folder.glob("*/policy/policy.json"))
        if below:
            raise ArtefactError(f"{folder}: no policy here, but below it; load one of {', '.join(below)}.")
    found = artefact.load(folder, allow_old=allow_old)
    return Policy(found.router, found.about, found.kind, str(folder))


@dataclass(frozen=True, eq=False)
class Policy:
    """A router with what is needed to use it.

    Attributes:
        router: The router; of a range of λ, the one that makes a router for each (`at`).
        about: What its artefact says: models, scorer, rollouts, cap, held-out metrics.
        kind: How it is stored (`agents.routers.artefact.Artefact`).
    """

    router: artefact.Storable
    about: dict[str, Any]
    kind: str = ""
    place: str = "policy"
    _at: dict[float, AnyRouter] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the router fits the features of this version and that all is said that sessions need."""
        for name, least in (("max_steps", 1), ("max_escalations", 0)):
            value = self.about.get(name)
            if (value is None and name == "max_steps") or (value is not None and _whole(value) < least):
                raise ArtefactError(f"{self.place}: says {name} is {value!r}, expected a whole number >= {least}.")
        if self.decides_once and self.max_large_tokens is not None:
            raise ArtefactError(
                f"{self.place}: {self.name} sends whole problems and cannot keep a cap of large tokens."
            )
        told = self.about.get("features")
        names = [feature.name for feature in self._checked(self.router).features]
        if told is not None and [each.get("name") for each in told] != names:
            raise ArtefactError(f"{self.place}: made for the features {told}, this version computes {names}.")

    def _checked(self, router: artefact.Storable) -> Schema:
        if isinstance(router, Mixture):
            self._checked(router.second)
            return self._checked(router.first)
        refuse_undrafted(router)
        try:
            schema = schema_named(router.schema)
        except ConfigError as error:
            raise ArtefactError(f"{self.place}: {error}") from error
        if isinstance(router, MLP | ConditionedMLP):
            wanted = schema.size + (told_cap(router) is not None) + isinstance(router, ConditionedMLP)
            if router.weights["0.weight"].shape[1] != wanted:
                raise ArtefactError(
                    f"{self.place}: its network takes {router.weights['0.weight'].shape[1]} features; schema "
                    f"{router.schema} and its knobs make {wanted}."
                )
        return schema

    @property
    def name(self) -> str:
        """Name of the router, as in tables and plots."""
        return self.router.name

    @property
    def schema(self) -> str:
        """Its feature schema, with version."""
        return self.router.schema

    @property
    def decides_once(self) -> bool:
        """Whether it decides for a whole problem, before anything is generated; no cap on escalations binds it then."""
        return decides_once(self.router)

    @property
    def max_steps(self) -> int:
        """Most steps of a solution; the step number among the features is a share of it."""
        return int(self.about["max_steps"])

    @property
    def max_escalations(self) -> int | None:
        """Most escalations of a solution; None without a cap."""
        return self.about.get("max_escalations")

    @property
    def max_large_tokens(self) -> int | None:
        """Most tokens that the large model may decode for a solution; None without a cap."""
        return self.about.get("max_large_tokens")

    @property
    def lam_range(self) -> tuple[float, float] | None:
        """Least and greatest λ that sessions may ask for; None if the router takes none."""
        return (self.router.low, self.router.high) if isinstance(self.router, ConditionedMLP) else None

    @property
    def setting(self) -> str:
        """The knob, or its range, for people to read."""
        if isinstance(self.router, ConditionedMLP):
            return f"lam={self.router.low:g}..{self.router.high:g}"
        return str(self.router.knob)

    @property
    def default_lam(self) -> float | None:
        """λ of sessions that name neither λ nor budget; None if they must."""
        lam: float | None = self.about.get("default_lam")
        return lam if self.lam_range else None

    @property
    def budget_range(self) -> tuple[float, float] | None:
        """Least and greatest share of always-large's cost that sessions may ask for; None if the router takes none."""
        return self._costs.range

    @cached_property
    def _costs(self) -> LamCosts:
        return LamCosts(self.about.get("budgets", []) if self.lam_range else [])

    def at(self, lam: float | None = None, budget: float | None = None) -> AnyRouter | QueryRouter | Mixture:
        """Return the router for a λ or a budget, if it takes one: the same object for the same setting.

        Args:
            lam: λ, reward lost per unit of cost.
            budget: Share of always-large's cost to be spent in expectation.

        Raises:
            ConfigError: The router takes no such setting, it is out of range, or there is none and must be one.
        """
        if lam is not None and budget is not None:
            raise ConfigError("Give either lam or budget, not both.")
        if not isinstance(self.router, ConditionedMLP):
            self._refuse(lam, budget)
            return self.router
        low, high = self.router.low, self.router.high
        if budget is not None:
            lam = min(max(self._costs.lam(_number("budget", budget), self.name), low), high)
        elif lam is None:
            lam = self.default_lam
        if lam is None:
            budgets = " or a budget" if self.budget_range else ""
            raise ConfigError(f"{self.name} serves every lam from {low:g} to {high:g}: name one{budgets}.")
        lam = _number("lam", lam)
        if lam not in self._at:
            if len(self._at) >= _KEPT:
                self._at.clear()
            self._at[lam] = self.router.at(lam)
        return self._at[lam]

    def _refuse(self, lam: float | None, budget: float | None) -> None:
        """Raise `ConfigError` unless what is asked for is what the router was made for."""
        assert not isinstance(self.router, ConditionedMLP)
        made = {self.router.knob.name: self.router.knob.value}
        calibration = self.about.get("calibration", {})
        made.setdefault(str(calibration.get("target")), calibration.get("value", math.nan))
        for name, value in (("lam", lam), ("budget", budget)):
            if value is not None and not math.isclose(_number(name, value), made.get(name, math.nan), rel_tol=1e-6):
                raise ConfigError(
                    f"{name} is {value:g}, but {self.name} has one fixed setting, {self.router.knob}. Leave {name} "
                    "out, or use a policy that was trained for a range (train.py --lam-range)."
                )

    def session(self, lam: float | None = None, budget: float | None = None, seed: int | None = None) -> Session:
        """Begin a solution.

        Args:
            lam: λ for this solution, where `lam_range` is not None.
            budget: Share of always-large's cost to be spent in expectation, where `budget_range` is not None.
            seed: Of what routers draw: a random router's actions, which part of a mixture decides. None: from entropy.

        A policy that `decides_once` has a session of one decision, ``session.decide(question="...")``.

        Raises:
            ConfigError: As of `at`.
        """
        router = self.at(lam, budget)
        knob = router.knob
        drawn = seed is not None or isinstance(router, Mixture)
        generator = np.random.default_rng(seed) if drawn else None  # from entropy it takes as long as a decision
        if isinstance(router, Mixture):
            assert generator is not None
            router = router.pick(float(generator.random()))
        caps = (None, None) if self.decides_once else (self.max_escalations, self.max_large_tokens)
        return Session(router, knob, self.max_steps, caps, generator, self.about.get("splitting"))

    def describe(self) -> dict[str, Any]:
        """Return what users may know of it, as JSON holds it."""
        knob = artefact.knob_of(self.router) | ({"default": self.default_lam} if self.lam_range else {})
        asking = (part for part in parts_of(self.router) if isinstance(part, Asking))
        asks = list(dict.fromkeys(fact for part in asking for fact in part.facts))
        described: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "schema": self.schema,
            "features": [] if self.decides_once else [each.name for each in schema_named(self.schema).features],
            "knob": knob,
            **({"decides": "once for a problem, from its text"} if self.decides_once else {}),
            **({"asks": asks} if asks else {}),
            "budget_range": list(self.budget_range) if self.budget_range else None,
            "max_steps": self.max_steps,
            "max_escalations": self.max_escalations,
            "max_large_tokens": self.max_large_tokens,
            **{name: self.about[name] for name in _TOLD if name in self.about},
        }
        plain: dict[str, Any] = finite(described)
        return plain


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {value!r}, expected a number.")
    return number


__all__ = ["Policy", "Session", "decide_together", "load"]
