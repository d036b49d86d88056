"""Settings of a run: declared once, checked before anything is written, stored with the run and read back."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agents.learners.exact import TreeSettings
from agents.learners.pomdp.fit import price_of
from agents.learners.ppo import PPOSettings, SeqSettings
from agents.learners.settings import LearnerSettings
from agents.runs import tracking
from rollouts.errors import ConfigError, did_you_mean
from trim_env.costs import cost_model
from trim_env.episodes import checked_lam, checked_range
from trim_env.features import DEFAULT_SCHEMA, schema_named
from trim_env.tables import checked_token_cap

AGENTS = ("ppo-agg", "tree-agg", "ppo-seq", "pomdp", "threshold")
LEARNED = ("ppo-agg", "tree-agg")  # for a range of λ, too
_PACKAGES = ("trim-routing", "numpy", "torch", "stable-baselines3", "gymnasium", "wandb")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        rollouts: Path of a rollout store, or the name of a bundled one.
        agent: ``ppo-agg`` (TRIM-Agg), ``tree-agg`` (the same policy, by the exact gradient on the trees),
            ``ppo-seq`` (TRIM-Seq: a transformer over all steps so far), ``pomdp`` (TRIM-POMDP) or ``threshold``
            (TRIM-Thr, the best threshold for each λ).
        lam: λ, reward lost per unit of cost; several make a sweep. Left out: six values that span the trade-off
            between the two models, computed from the rollouts.
        lam_range: Two values: one policy is trained for every λ between them, which it is told.
        budget: Share of always-large's cost to be spent in expectation, for example 0.2: after the training the setting
            that meets it is chosen, or two are mixed. Without --lam, ppo-agg and tree-agg then train one policy for a
            range of λ.
        accuracy: Accuracy to be reached in expectation, at the least cost; likewise.
        schema: Feature schema: agg, agg+prod or agg+; of ppo-seq always seq. Your own: module:MY_SCHEMA, or
            agg+,module:my_feature (`trim_env.features`).
        cost: Cost model: decode-only, prefill-20, prefill-full:PRICE, prices:large_out=15,... or your own,
            module:my_cost (`trim_env.costs.CostModel`).
        max_escalations: Cap K on escalations per solution; default: what the store supports.
        max_large_tokens: Hard cap on the large model's tokens for a problem, in training, validation and, by default,
            evaluation: the policy is told the share left. Default: none.
        scorer: Score table, if the store has several.
        grader: Grade table, if the store has several.
        seed: Seed of everything that is drawn.
        attempts: Most trainings for one λ: a router that collapsed or is beaten is trained again.
        out: Folder of the run; it must not exist yet. Default: a new one below runs/.
        tracking: ``wandb`` (offline unless you are logged in) or ``none``.
        ppo: Settings of the learner of ppo-agg.
        tree: Settings of the learner of tree-agg.
        seq: Settings of the learner of ppo-seq.
    """

    rollouts: str = "quickstart"
    agent: str = "ppo-agg"
    lam: tuple[float, ...] = ()
    lam_range: tuple[float, float] | None = None
    budget: float | None = None
    accuracy: float | None = None
    schema: str = DEFAULT_SCHEMA
    cost: str = "decode-only"
    max_escalations: int | None = None
    max_large_tokens: int | None = None
    scorer: str | None = None
    grader: str | None = None
    seed: int = 0
    attempts: int = 3
    out: Path | None = None
    tracking: str = "wandb"
    ppo: PPOSettings = field(default_factory=PPOSettings)
    tree: TreeSettings = field(default_factory=TreeSettings)
    seq: SeqSettings = field(default_factory=SeqSettings)

    @property
    def learner(self) -> LearnerSettings:
        """Settings of the agent's learner."""
        if self.agent == "tree-agg":
            return self.tree
        return self.seq if self.agent == "ppo-seq" else self.ppo


def check(config: TrainConfig) -> None:
    """Raise `ConfigError` for settings that no run can have."""
    if config.agent not in AGENTS:
        raise ConfigError(f"Unknown agent {config.agent!r}.{did_you_mean(config.agent, AGENTS)}")
    cost = cost_model(config.cost, imports=True)
    if config.agent == "pomdp":
        price_of(cost)
    _check_schema(config)
    checked_token_cap(config.max_large_tokens)
    tracking.check(config.tracking)
    for lam in config.lam:
        checked_lam(lam)
    if config.budget is not None and config.accuracy is not None:
        raise ConfigError("Give either --budget or --accuracy, not both.")
    for name in ("budget", "accuracy"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"--{name} is {value:g}, expected a share above 0 and at most 1.")
    if config.lam_range is not None:
        checked_range(config.lam_range)
        if config.lam or config.agent not in LEARNED:
            raise ConfigError("--lam-range trains one ppo-agg or tree-agg policy for all λ in it; leave out --lam.")
    if len(set(config.lam)) != len(config.lam):
        raise ConfigError(f"--lam names a value twice: {' '.join(f'{lam:g}' for lam in config.lam)}.")
    if config.attempts < 1:
        raise ConfigError(f"--attempts is {config.attempts}, expected at least 1.")


def _check_schema(config: TrainConfig) -> None:
    told = bool(schema_named(config.schema, imports=True).history)
    if config.agent == "ppo-seq" and not told and config.schema != DEFAULT_SCHEMA:
        raise ConfigError(f"--schema is {config.schema}; ppo-seq is trained on seq. Leave it out.")
    if config.agent != "ppo-seq" and told:
        raise ConfigError(f"--schema is {config.schema}, which is that of ppo-seq; {config.agent} sees single steps.")


def with_schema(config: TrainConfig) -> TrainConfig:
    """Return settings with the schema that the agent is trained on."""
    return replace(config, schema="seq") if config.agent == "ppo-seq" else config


def new_folder(config: TrainConfig) -> Path:
    """Return where a run goes that names no folder."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.agent}-{Path(config.rollouts).name}-seed{config.seed}-{stamp}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """Return settings as JSON can hold them."""
    return {**asdict(config), "out": str(config.out) if config.out else None, "lam": list(config.lam)}


def _pair(value: list[float] | None) -> tuple[float, float] | None:
    return None if value is None else (value[0], value[1])


def from_plain(plain: Mapping[str, Any], folder: Path) -> TrainConfig:
    """Return settings from `as_plain`; raise `ConfigError` for unknown ones."""
    unknown = sorted(set(plain) - {each.name for each in fields(TrainConfig)})
    if unknown:
        raise ConfigError(f"{folder / 'config.json'}: unknown settings {', '.join(unknown)}.")
    return TrainConfig(
        **{
            **plain,
            "lam": tuple(plain["lam"]),
            "lam_range": _pair(plain["lam_range"]),
            "out": folder,
            "ppo": PPOSettings(**plain["ppo"]),
            "tree": TreeSettings(**plain["tree"]),
            "seq": SeqSettings(**plain["seq"]),
        }
    )
