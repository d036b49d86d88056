"""Settings of a run: declared once, checked before anything is written, stored with the run and read back."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from agents.learners.settings import PAPER, ExactSettings, PPOSettings, SeqSettings
from rollouts.config import Count, Imports, NotNegative, Positive, settings
from rollouts.errors import ConfigError, did_you_mean, require
from rollouts.plugins import is_plugin, load_plugin
from trim_env.costs import SOURCES, cost_model
from trim_env.features import DEFAULT_SCHEMA, schema_named

AGENTS = ("ppo-agg", "exact", "ppo-seq", "ppo-paper", "pomdp", "threshold", "arbitrage", "advantage", "query-level")
LEARNED = ("ppo-agg", "exact")  # for a range of λ, too
LIVE = ("ppo-agg", "ppo-seq")  # learn from episodes
TRACKING = ("wandb", "none")
_PACKAGES = ("trim-routing", "numpy", "torch", "stable-baselines3", "gymnasium", "wandb")
_Share = Annotated[float, Field(gt=0, le=1)]


@settings
class TrainConfig:
    """Settings of a run.

    Attributes:
        rollouts: Path of a rollout store, or the name of a bundled one.
        live: Train with the models in the loop: episodes have them write what they reach and the store lacks, and it is
            added to the store. The validation split must be complete. For ppo-agg and ppo-seq.
        models: With --live, the models that made the store: a TOML file, or ``tinymath`` (the default) or
            ``tinymath:transformers``.
        max_generated_large_tokens: With --live, end the training when the large model has decoded so many tokens.
        agent: ``ppo-agg`` (TRIM-Agg), ``exact`` (a rule by the exact gradient on the trees),
            ``ppo-seq`` (TRIM-Seq: a transformer over all steps so far), ``ppo-paper`` (ppo-agg as the paper has it,
            once: its settings, features and unnormalised advantages), ``pomdp`` (TRIM-POMDP), ``threshold``
            (TRIM-Thr, the best threshold for each λ: on the score, or on the first feature of a --schema that is
            named), ``arbitrage`` (where the large model's step will score higher), ``advantage`` (where one large step
            alone is worth its price), ``query-level`` (one model for the whole problem, from the question's text) or
            module:Class, a class of your own (`agents.routers.base`).
        lam: λ, reward lost per unit of cost; several make a sweep. Left out: six values that span the trade-off
            between the two models, computed from the rollouts.
        lam_range: Two values: one policy is trained for every λ between them, which it is told.
        budget: Share of always-large's cost to be spent in expectation, for example 0.2: after the training the setting
            that meets it is chosen, or two are mixed. Without --lam, ppo-agg and exact (without --ask) then train one
            policy for a range of λ.
        accuracy: Accuracy to be reached in expectation, at the least cost; likewise.
        schema: Feature schema: agg, agg+prod or agg+; free (what the small model makes of its own tokens, no reward
            model), prefill (and what the large model does), all (and the score); columns of score tables, such as
            agg+,small.min_logprob; of ppo-seq seq, perhaps with such columns. Your own: module:MY_SCHEMA, or
            agg+,module:my_feature (`trim_env.features`).
        cost: Cost model: decode-only, prefill-20, prefill-full:PRICE, calls:PRICE, prices:large_out=15,... or your own,
            module:my_cost (`trim_env.costs.CostModel`).
        max_escalations: Cap K on escalations per solution; default: what the store supports.
        max_large_tokens: Hard cap on the large model's tokens for a problem, in training, validation and, by default,
            evaluation: the policy is told the share left. Default: none.
        ask: Of exact: ``scorer`` or ``large``: what it tells (the score; large.*) the policy then sees, and pays, where
            it asks alone, having seen the other features; --cost calls:10 makes that 10 large-model tokens. Default: it
            always sees and pays all that it reads.
        scorer: Score table, if the store has several, or column of one that is taken for the score, such as
            small.min_logprob.
        grader: Grade table, if the store has several.
        seed: Seed of everything that is drawn.
        attempts: Most trainings for one λ: a router that collapsed or is beaten is trained again.
        out: Folder of the run; it must not exist yet. Default: a new one below runs/.
        tracking: ``wandb`` (offline unless you are logged in) or ``none``.
        ppo: Settings of the learner of ppo-agg.
        exact: Settings of the learner of exact.
        seq: Settings of the learner of ppo-seq.
    """

    rollouts: str = "quickstart"
    live: bool = False
    models: str | None = None
    max_generated_large_tokens: Count | None = None
    agent: str = "ppo-agg"
    lam: tuple[NotNegative, ...] = ()
    lam_range: tuple[Positive, Positive] | None = None
    budget: _Share | None = None
    accuracy: _Share | None = None
    schema: str = DEFAULT_SCHEMA
    cost: str = "decode-only"
    max_escalations: Annotated[int, Field(ge=0)] | None = None
    max_large_tokens: Count | None = None
    ask: str | None = None
    scorer: str | None = None
    grader: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    attempts: Count = 3
    out: Path | None = None
    tracking: str = "wandb"
    ppo: PPOSettings = field(default_factory=PPOSettings)
    exact: ExactSettings = field(default_factory=ExactSettings)
    seq: SeqSettings = field(default_factory=SeqSettings)

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        if self.agent not in AGENTS and not is_plugin(self.agent):
            raise ConfigError(f"Unknown agent {self.agent!r}.{did_you_mean(self.agent, [*AGENTS, 'module:Class'])}")
        if self.tracking not in TRACKING:
            raise ConfigError(f"Unknown tracking {self.tracking!r}.{did_you_mean(self.tracking, TRACKING)}")
        if self.live and self.agent not in LIVE:
            raise ConfigError(f"--live trains {' or '.join(LIVE)}; {self.agent} learns from complete trees.")
        if self.live and self.learner.start != "random":
            raise ConfigError(
                f"--{self.learner.section}.start exact learns from complete trees; leave it out with --live."
            )
        if not self.live and not (self.models is None and self.max_generated_large_tokens is None):
            raise ConfigError("--models and --max-generated-large-tokens are for --live; without it no model is asked.")
        if self.budget is not None and self.accuracy is not None:
            raise ConfigError("Give either --budget or --accuracy, not both.")
        if self.lam_range is not None:
            if not self.lam_range[0] < self.lam_range[1]:
                raise ConfigError(f"--lam-range is {self.lam_range[0]:g} {self.lam_range[1]:g}, expected two numbers "
                                  "above 0, the lower one first.")  # fmt: skip
            if self.lam or self.agent not in LEARNED:
                raise ConfigError("--lam-range trains one ppo-agg or exact policy for all λ in it; leave out --lam.")
        if self.ask is not None:
            if self.ask not in SOURCES:
                raise ConfigError(f"--ask is {self.ask!r}.{did_you_mean(self.ask, SOURCES)}")
            if self.agent != "exact" or self.lam_range:
                raise ConfigError(
                    "--ask trains rules of --agent exact for one λ each: name several (--lam 1e-3 3e-3 1e-2), or none "
                    "for six; for a --budget or an --accuracy two of them are mixed."
                )
        if len({f"{lam:g}" for lam in self.lam}) != len(self.lam):  # folders are named so
            raise ConfigError(f"--lam names a value twice: {' '.join(f'{lam:g}' for lam in self.lam)}.")

    @property
    def learner(self) -> PPOSettings:
        """Settings of an agent that learns by iterations."""
        return self.seq if self.agent == "ppo-seq" else self.ppo


@settings
class Resume:
    """Go on with a run that was stopped.

    Attributes:
        resume: Folder of the run; all settings are those that it was begun with.
        imports: A module to import first: that of a router of your own; may be repeated.
    """

    resume: Path
    imports: Imports = ()


def resolved(config: TrainConfig) -> TrainConfig:
    """Return a new run's settings with the schema that the agent is trained on.

    Raises:
        ConfigError: There is no agent, schema or cost model of that name, or they do not fit together.
    """
    cost, told = cost_model(config.cost, imports=True), bool(schema_named(config.schema, imports=True).history)
    if config.agent == "query-level":
        require("baselines", "sklearn")
        if config.schema != DEFAULT_SCHEMA or config.max_large_tokens is not None:
            given = "--max-large-tokens" if config.schema == DEFAULT_SCHEMA else "--schema"
            raise ConfigError(f"{given}: query-level reads the question alone and sends whole problems. Leave it out.")
    if config.agent == "pomdp":
        from agents.learners.pomdp.fit import price_of

        price_of(cost)
    if config.agent not in AGENTS and not hasattr(load_plugin(config.agent, "--agent"), "fit"):
        raise ConfigError(
            f"--agent {config.agent!r}: it has no fit(tables, lam, seed) (`agents.routers.base.Learner`)."
        )
    if config.agent == "ppo-paper":
        return _as_the_paper(config)
    if config.agent == "ppo-seq":
        if config.schema == DEFAULT_SCHEMA:
            return replace(config, schema="seq")
        if config.schema.partition(",")[0].partition("/")[0] != "seq":
            raise ConfigError(
                f"--schema is {config.schema}; ppo-seq is trained on seq, or on seq,COLUMN,... with more of the "
                "proposal: of earlier steps it is told score and tokens."
            )
        return config
    if config.agent in AGENTS and told:
        raise ConfigError(f"--schema is {config.schema}, which is that of ppo-seq; {config.agent} sees single steps.")
    return config


def _as_the_paper(config: TrainConfig) -> TrainConfig:
    """Return the settings of ppo-agg that the paper has, besides what it does not tell."""
    usual = TrainConfig()
    wanted = {"schema": "agg", "attempts": 1, **{f"ppo.{name}": value for name, value in PAPER.items()}}
    for flag, value in wanted.items():
        name = flag.removeprefix("ppo.")
        found, default = (getattr(each.ppo if name != flag else each, name) for each in (config, usual))
        if found not in (default, value):
            flag = flag.replace("_", "-")
            raise ConfigError(f"--{flag} is {found}; with --agent ppo-paper it is {value}. Leave it out.")
    return replace(config, agent="ppo-agg", schema="agg", attempts=1, ppo=replace(config.ppo, **PAPER))


def new_folder(config: TrainConfig) -> Path:
    """Return where a run goes that names no folder."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.agent.replace(':', '-')}-{Path(config.rollouts).name}-seed{config.seed}-{stamp}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def from_plain(plain: Mapping[str, Any], folder: Path) -> TrainConfig:
    """Return the settings of a run from what its ``config.json`` holds.

    Runs of ``tree-agg``, which is no more, go on with a perceptron by ``exact``.
    """
    plain = {name: value for name, value in plain.items() if name != "tree"}
    if plain.get("agent") == "tree-agg":
        plain |= {"agent": "exact", "exact": {"rule": "mlp"}}
    try:
        return TrainConfig(**{**plain, "out": folder})
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
