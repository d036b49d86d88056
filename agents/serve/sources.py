"""Where what a policy reads comes from: which upstreams have to tell what, and which are not needed. Asks nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agents.deploy.policy import Policy
from agents.routers.asking import Asking
from agents.routers.base import StatefulRouter, is_blind, parts_of
from rollouts.errors import ConfigError
from rollouts.text.likelihood import STATISTICS, UNSCORED, as_score, first_of
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.columns import checked_signal
from trim_env.costs import source_of
from trim_env.features import schema_named

Told = tuple[str, tuple[float, ...] | None]
"""What a model has told of a step: its role, and `rollouts.text.likelihood.STATISTICS`."""


@dataclass(frozen=True)
class Sources:
    """What a policy reads besides the texts and tokens of steps.

    Attributes:
        table: Name of the reward model's scores.
        scorer: Whether the reward model is asked.
        small: Whether the small model has to tell the log-probabilities of what it decodes.
        large: Whether the large model looks at proposals, and tells those of its own steps.
        column: The column that is taken for the score, where that is none of the reward model's.
    """

    table: str = "scorer"
    scorer: bool = True
    small: bool = False
    large: bool = False
    column: str | None = None

    def told_by(self, role: str) -> bool:
        """Whether a model has to tell the log-probabilities of what it decodes."""
        return self.small if role == SMALL else self.large

    def score(self, signals: Mapping[str, float]) -> float:
        """Return the score of a step that the reward model is not asked about."""
        value = signals.get(self.column or "")
        score = None if value is None else as_score(str(self.column).rpartition(".")[2], value)
        return UNSCORED if score is None else score

    def signals(self, score: float, *told: Told) -> dict[str, float]:
        """Return the columns of a step by name, as rollouts hold them: its score, and what models have told of it."""
        known = {f"{self.table}.score": score} if self.scorer else {}
        for role, statistics in told:
            known |= dict(zip((f"{role}.{name}" for name in STATISTICS), statistics or (), strict=False))
        return {name: checked_signal(name, value) for name, value in known.items()}


def sources_of(policy: Policy) -> Sources:
    """Return the sources of a policy.

    Raises:
        ConfigError: It reads something that no upstream of this service can tell.
    """
    parts = parts_of(policy.router)
    schemas = [schema_named(part.schema) for part in parts if not is_blind(part)]
    scored = any(isinstance(part, StatefulRouter) for part in parts) or any("score" in each.facts for each in schemas)
    told, column = str(policy.about.get("scorer") or "scorer"), None
    for role in ROLES:
        if told == role or told.rpartition(".")[0] == role:
            column = f"{role}.{first_of(STATISTICS)}" if told == role else told
    for part in parts:
        if isinstance(part, Asking):
            _check_asking(part, told)
    read = {name for each in schemas for name in each.signals} | ({column} if scored and column else set())
    table = told.removesuffix(".score") if told in read else told  # a scorer may be named as TABLE.score
    able = {f"{role}.{name}" for role in ROLES for name in STATISTICS} | ({f"{table}.score"} if not column else set())
    if lacking := sorted(name for name in read if name not in able):
        raise ConfigError(
            f"The policy reads {', '.join(lacking)}, which none of the servers tells: they are a small model, a large "
            f"model and the scorer {told!r}, one score for each step."
        )
    tables = {str(name).rpartition(".")[0] for name in read}
    scorer = column is None and (scored or table in tables)
    return Sources(table, scorer, SMALL in tables, LARGE in tables, column)


def _check_asking(router: Asking, scorer: str) -> None:
    """Raise `ConfigError` unless whom a policy asks tells what it asks for, and all else is told without."""
    tells = {fact for fact in schema_named(router.schema).facts if source_of(fact, scorer) == router.source}
    if tells != {*router.facts}:
        raise ConfigError(
            f"The policy asks the {router.source} for {', '.join(router.facts)}. Of what it reads, with the score of "
            f"{scorer!r}, that tells {', '.join(sorted(tells)) or 'nothing'}."
        )
