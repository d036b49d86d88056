"""A run: what `train.py` does, as a library. One folder holds everything that came out of it.

RUN/config.json            settings, versions, seed, hash of the rollouts
RUN/report.txt             health of every router in plain words
RUN/curve.png, .svg        the routers on the verdict half of validation
RUN/lam-0.003/policy/      the router (`agents.artefact`), the only thing that evaluation reads
RUN/lam-0.003/             metrics.jsonl, training.png, report.json, checkpoint.pt
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents import artefact, tracking
from agents.base import Router, Threshold
from agents.evaluation.run import references, run
from agents.health import Health, as_plain
from agents.ppo import PPOSettings
from agents.trainer import Record, Result, Training, Validation
from rollouts.errors import ConfigError, StoreError, did_you_mean
from rollouts.tree import Trees, compile_store
from trim_env.features import DEFAULT_SCHEMA
from trim_env.tables import DecisionTables, decision_tables
from trim_env.vector import checked_lam

AGENTS = ("ppo-agg", "threshold")
AUTO_LAMS = 6
_PACKAGES = ("trim-routing", "numpy", "torch", "stable-baselines3", "gymnasium", "wandb")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        rollouts: Path of a rollout store, or the name of a bundled one.
        agent: ``ppo-agg`` (TRIM-Agg) or ``threshold`` (TRIM-Thr, the best threshold for each λ).
        lam: λ, reward lost per unit of cost; several make a sweep. Left out: six values that span the trade-off
            between the two models, computed from the rollouts.
        schema: Feature schema: agg, agg+prod or agg+.
        cost: Cost model: decode-only, prefill-20, prefill-full:PRICE or prices:large_out=15,...
        max_escalations: Cap K on escalations per solution; default: what the store supports.
        scorer: Score table, if the store has several.
        grader: Grade table, if the store has several.
        seed: Seed of everything that is drawn.
        attempts: Most trainings for one λ: a router that collapsed or is beaten is trained again.
        out: Folder of the run; it must not exist yet. Default: a new one below runs/.
        tracking: ``wandb`` (offline unless you are logged in) or ``none``.
        ppo: Settings of the learner.
    """

    rollouts: str = "quickstart"
    agent: str = "ppo-agg"
    lam: tuple[float, ...] = ()
    schema: str = DEFAULT_SCHEMA
    cost: str = "decode-only"
    max_escalations: int | None = None
    scorer: str | None = None
    grader: str | None = None
    seed: int = 0
    attempts: int = 3
    out: Path | None = None
    tracking: str = "wandb"
    ppo: PPOSettings = field(default_factory=PPOSettings)


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: Its folder.
        routers: The router for each λ.
        health: Its verdict.
    """

    folder: Path
    routers: dict[float, Router]
    health: dict[float, Health]


class Listener:
    """What a run tells whoever watches; every method may be overridden."""

    def compiling(self, trees: int) -> None:
        """Some more trees were compiled."""

    def begin(self, lam: float, training: Training) -> None:
        """A training begins, or goes on."""

    def iteration(self, lam: float, training: Training, record: Record) -> None:
        """An iteration is done, and on disk."""

    def end(self, lam: float, health: Health, attempts: int) -> None:
        """A training has ended."""


def train(config: TrainConfig, listener: Listener | None = None) -> Trained:
    """Train the routers of a new run.

    Raises:
        ConfigError: A setting is wrong, or the folder exists.
        StoreError: The rollouts cannot be used.
    """
    _check(config)
    listener = listener or Listener()
    trees = _compile(config, listener)
    lams = config.lam or automatic_lams(trees, config)
    validation = _validation(config, trees)  # fails now, if it must, and not after the folder was made
    folder = config.out or _new_folder(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; nothing was overwritten. Choose another --out, or --resume it.")
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, lam=lams, out=folder)
    described = {"config": _plain(config), "versions": versions(), "rollouts": trees.meta}
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return _run(config, trees, validation, folder, listener)


def resume(folder: Path, listener: Listener | None = None) -> Trained:
    """Go on with a run that was stopped; it ends as it would have.

    Raises:
        ConfigError: There is no run, or its settings are not of this version.
        StoreError: The rollouts cannot be used, or have changed since.
    """
    listener = listener or Listener()
    file = folder / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        config = _config(described["config"], folder)
        recorded = described["rollouts"]["hash"]
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: no run to resume here (no config.json).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged settings ({type(error).__name__}: {error}).") from error
    trees = _compile(config, listener)
    if trees.meta["hash"] != recorded:
        raise StoreError(
            f"{config.rollouts}: these rollouts have hash {trees.meta['hash']}, the run was begun on {recorded}. "
            "They have grown or changed since; start a new run."
        )
    return _run(config, trees, _validation(config, trees), folder, listener)


def _check(config: TrainConfig) -> None:
    if config.agent not in AGENTS:
        raise ConfigError(f"Unknown agent {config.agent!r}.{did_you_mean(config.agent, AGENTS)}")
    tracking.check(config.tracking)
    for lam in config.lam:
        checked_lam(lam)
    if len(set(config.lam)) != len(config.lam):
        raise ConfigError(f"--lam names a value twice: {' '.join(f'{lam:g}' for lam in config.lam)}.")
    if config.attempts < 1:
        raise ConfigError(f"--attempts is {config.attempts}, expected at least 1.")


def _compile(config: TrainConfig, listener: Listener) -> Trees:
    return compile_store(config.rollouts, config.scorer, config.grader, on_progress=listener.compiling)


def automatic_lams(trees: Trees, config: TrainConfig) -> tuple[float, ...]:
    """Return values of λ that span the trade-off: from 1/8 to 4 times that at which both models' returns are equal.

    Raises:
        ConfigError: Always-large is no better than always-small on the training split.
    """
    both = references(_tables(config, trees, trees.select("train")))
    gap = both.large.correct.mean() - both.small.correct.mean()
    price = both.large.cost.mean() - both.small.cost.mean()
    if gap <= 0 or price <= 0:
        raise ConfigError(
            f"On the training split always-large solves {100 * gap:+.1f} points more than always-small: there is "
            "nothing to route for. Use another pair of models, or name --lam."
        )
    even = gap / price
    return tuple(float(f"{lam:.2g}") for lam in even * np.geomspace(1 / 8, 4, AUTO_LAMS))


def _tables(config: TrainConfig, trees: Trees, indices: NDArray[Any]) -> DecisionTables:
    return decision_tables(
        trees, schema=config.schema, cost=config.cost, max_escalations=config.max_escalations, indices=indices
    )


def _validation(config: TrainConfig, trees: Trees) -> Validation:
    return Validation(lambda indices: _tables(config, trees, indices), trees)


def _run(config: TrainConfig, trees: Trees, validation: Validation, folder: Path, listener: Listener) -> Trained:
    tables = _tables(config, trees, trees.select("train"))
    routers: dict[float, Router] = {}
    health: dict[float, Health] = {}
    for lam in config.lam:
        place = folder / f"lam-{lam:g}"
        place.mkdir(exist_ok=True)
        report = place / "report.json"
        if report.is_file():  # finished before the run was stopped
            routers[lam] = artefact.load(place / "policy").router
            health[lam] = validation.assess(routers[lam], lam, final=True)
            continue
        tracker = tracking.start(config.tracking, place, f"{config.agent} lam={lam:g}", folder.name, _plain(config))
        picture, attempts = None, 1
        if config.agent == "threshold":
            routers[lam] = validation.candidates.best(lam).threshold
            health[lam] = validation.assess(routers[lam], lam, final=True)
        else:
            result = _train_one(config, tables, validation, lam, place, tracker, listener)
            routers[lam], health[lam], attempts = result.router, result.health, result.attempts
            picture = _draw_training(result, validation, lam, place)
        about = _about(config, trees, validation, routers[lam], lam, health[lam])
        if not (place / "policy" / "policy.json").exists():
            artefact.save(routers[lam], place / "policy", about)
        found = {**as_plain(health[lam]), "lam": lam, "attempts": attempts}
        tracker.finish({**found, **about["held_out"]}, picture, place / "policy")
        report.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        listener.end(lam, health[lam], attempts)
    lines = [f"lam {lam:g}: {health[lam].sentence}" for lam in config.lam]
    (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw_curve(routers, validation, config, folder)
    return Trained(folder, routers, health)


def _train_one(
    config: TrainConfig,
    tables: DecisionTables,
    validation: Validation,
    lam: float,
    place: Path,
    tracker: tracking.Tracker,
    listener: Listener,
) -> Result:
    lines = tracking.JsonLines(place / "metrics.jsonl")
    training = Training(
        tables,
        validation,
        lam,
        config.ppo,
        config.seed,
        attempts=config.attempts,
        checkpoint=place / "checkpoint.pt",
        outputs=[lines, *tracker.output()],
    )
    lines.keep(len(training.records))
    listener.begin(lam, training)
    result = training.run(lambda record: listener.iteration(lam, training, record))
    lines.close()
    return result


def _about(
    config: TrainConfig, trees: Trees, validation: Validation, router: Router, lam: float, health: Health
) -> dict[str, Any]:
    """Return what an artefact says of its origin."""
    outcomes = run(router, validation.verdict)
    both = validation.references[1]
    return {
        "package": versions()["trim-routing"],
        "lam": lam,
        "small": trees.meta["small"],
        "large": trees.meta["large"],
        "scorer": trees.meta["scorer"],
        "grader": trees.meta["grader"],
        "rollouts": {"store": Path(trees.meta["store"]).name, "hash": trees.meta["hash"]},
        "max_steps": trees.meta["max_steps"],
        "cost": config.cost,
        "max_escalations": validation.verdict.max_escalations,
        "held_out": {
            "problems": len(outcomes),
            "accuracy": float(outcomes.correct.mean()),
            "cost": float(outcomes.cost.mean()),
            "share": float(outcomes.cost.sum() / both.large.cost.sum()),
            "always_small_accuracy": float(both.small.correct.mean()),
            "always_large_accuracy": float(both.large.correct.mean()),
        },
        "health": {"verdict": health.verdict, "sentence": health.sentence},
    }


def _draw_training(result: Result, validation: Validation, lam: float, place: Path) -> Path:
    from agents.evaluation.plots import Level, TrainingHistory, training_curve

    def column(name: str) -> NDArray[np.float64]:
        return np.array([record[name] for record in result.records])

    history = TrainingHistory(
        column("step"), column("validation/return"), column("validation/accuracy"), column("validation/share")
    )
    simple = result.baselines
    levels = {}
    named: dict[str, Router] = {
        f"best constant: {simple.constant.name}": simple.constant,
        "best threshold": simple.threshold,
    }
    for name, router in named.items():
        measured = validation.measure(run(router, validation.choice), lam)
        levels[name] = Level(measured["return"], measured["accuracy"], measured["share"])
    return training_curve(history, levels, f"{result.router.name}, λ = {lam:g}", place / "training")[0]


def _draw_curve(routers: Mapping[float, Router], validation: Validation, config: TrainConfig, folder: Path) -> None:
    from agents.evaluation.plots import cost_accuracy
    from agents.evaluation.spread import spread
    from agents.evaluation.table import summarise

    both = validation.references[1]
    points = [(lam, run(router, validation.verdict)) for lam, router in routers.items()]
    chosen = spread(
        [(router.knob.value, outcomes) for router, outcomes in validation.candidates.thresholds],
        validation.references[0].large,
    )
    simple = [(knob, run(Threshold(knob), validation.verdict)) for knob, _ in chosen]
    summaries = [summarise(next(iter(routers.values())).name, points, both)]
    if config.agent != "threshold":
        summaries.append(summarise("trim-thr", simple, both))
    cost_accuracy(summaries, f"{config.rollouts}, verdict half of validation", folder / "curve")


def _new_folder(config: TrainConfig) -> Path:
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


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {**asdict(config), "out": str(config.out) if config.out else None, "lam": list(config.lam)}


def _config(plain: Mapping[str, Any], folder: Path) -> TrainConfig:
    unknown = sorted(set(plain) - {each.name for each in fields(TrainConfig)})
    if unknown:
        raise ConfigError(f"{folder / 'config.json'}: unknown settings {', '.join(unknown)}.")
    return TrainConfig(**{**plain, "lam": tuple(plain["lam"]), "out": folder, "ppo": PPOSettings(**plain["ppo"])})
