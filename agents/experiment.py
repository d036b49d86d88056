"""A run: what `train.py` does, as a library. One folder holds everything that came out of it.

RUN/config.json            settings, versions, seed, hash of the rollouts
RUN/report.txt             health of every router in plain words
RUN/curve.png, .svg        the routers on the verdict half of validation
RUN/lam-0.003/policy/      the router (`agents.artefact`), the only thing that evaluation reads
RUN/lam-0.003/             metrics.jsonl, training.png, report.json, checkpoint.pt; of the POMDP estimates.json
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
from agents.base import AnyRouter, Threshold
from agents.evaluation.run import references, run
from agents.health import Health, as_plain
from agents.policy import ConditionedMLP
from agents.pomdp.fit import estimate, price_of
from agents.ppo import PPOSettings
from agents.trainer import Record, Result, Training, Validation, checked_at
from rollouts.errors import ConfigError, StoreError, did_you_mean
from rollouts.tree import Trees, compile_store
from trim_env.episodes import Lam, checked_lam, checked_range
from trim_env.features import DEFAULT_SCHEMA
from trim_env.reward import cost_model
from trim_env.tables import DecisionTables, decision_tables

AGENTS = ("ppo-agg", "pomdp", "threshold")
AUTO_LAMS = 6
_PACKAGES = ("trim-routing", "numpy", "torch", "stable-baselines3", "gymnasium", "wandb")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        rollouts: Path of a rollout store, or the name of a bundled one.
        agent: ``ppo-agg`` (TRIM-Agg), ``pomdp`` (TRIM-POMDP) or ``threshold`` (TRIM-Thr, the best threshold for each
            λ).
        lam: λ, reward lost per unit of cost; several make a sweep. Left out: six values that span the trade-off
            between the two models, computed from the rollouts.
        lam_range: Two values: one policy is trained for every λ between them, which it is told.
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
    lam_range: tuple[float, float] | None = None
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
        routers: The router for each λ; of a range, for some that span it.
        health: Their verdicts.
    """

    folder: Path
    routers: dict[float, AnyRouter]
    health: dict[float, Health]


class Listener:
    """What a run tells whoever watches; every method may be overridden."""

    def compiling(self, trees: int) -> None:
        """Some more trees were compiled."""

    def begin(self, lam: Lam, training: Training) -> None:
        """A training begins, or goes on."""

    def iteration(self, lam: Lam, training: Training, record: Record) -> None:
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
    lams = config.lam if config.lam or config.lam_range else automatic_lams(trees, config)
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
    if config.agent == "pomdp":
        price_of(cost_model(config.cost))
    tracking.check(config.tracking)
    for lam in config.lam:
        checked_lam(lam)
    if config.lam_range is not None:
        checked_range(config.lam_range)
        if config.lam or config.agent != "ppo-agg":
            raise ConfigError("--lam-range trains one ppo-agg policy for all λ in it; leave out --lam.")
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
    routers: dict[float, AnyRouter] = {}
    health: dict[float, Health] = {}
    tasks: tuple[Lam, ...] = (config.lam_range,) if config.lam_range else config.lam
    for task in tasks:
        place = folder / _label(task)
        place.mkdir(exist_ok=True)
        report = place / "report.json"
        if report.is_file():  # finished before the run was stopped
            router, attempts = artefact.load(place / "policy").router, 0
            own = {lam: validation.assess(_at(router, lam), lam, final=True) for lam in checked_at(task)}
        else:
            tracker = tracking.start(
                config.tracking, place, f"{config.agent} {_label(task)}", folder.name, _plain(config)
            )
            router, own, attempts, picture = _fit(config, tables, validation, task, place, tracker, listener)
            about = _about(config, trees, validation, router, own)
            if not (place / "policy" / "policy.json").exists():
                artefact.save(router, place / "policy", about)
            found = [{"lam": lam, **as_plain(each), "attempts": attempts} for lam, each in own.items()]
            tracker.finish({**found[len(found) // 2], **about["held_out"][len(found) // 2]}, picture, place / "policy")
            report.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        for lam, each in own.items():
            routers[lam], health[lam] = _at(router, lam), each
            if attempts:
                listener.end(lam, each, attempts)
    lines = [f"lam {lam:g}: {each.sentence}" for lam, each in health.items()]
    (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw_curve(routers, validation, config, folder)
    return Trained(folder, routers, health)


def _label(task: Lam) -> str:
    return f"lam-{task[0]:g}-to-{task[1]:g}" if isinstance(task, tuple) else f"lam-{task:g}"


def _at(router: artefact.Storable, lam: float) -> AnyRouter:
    return router.at(lam) if isinstance(router, ConditionedMLP) else router


def _fit(
    config: TrainConfig,
    tables: DecisionTables,
    validation: Validation,
    task: Lam,
    place: Path,
    tracker: tracking.Tracker,
    listener: Listener,
) -> tuple[artefact.Storable, dict[float, Health], int, Path | None]:
    """Return router, health by λ, number of attempts, and a picture of the training if there is one."""
    if config.agent == "threshold":
        assert isinstance(task, float)
        router = validation.candidates.best(task).threshold
        return router, {task: validation.assess(router, task, final=True)}, 1, None
    if config.agent == "pomdp":
        assert isinstance(task, float)
        estimates = estimate(tables.trees, indices=tables.indices)
        planned = estimates.routers([task], price=price_of(tables.cost_model))[0]
        (place / "estimates.json").write_text(json.dumps(estimates.report(), indent=1) + "\n", encoding="utf-8")
        return planned, {task: validation.assess(planned, task, final=True)}, 1, None
    result = _train_one(config, tables, validation, task, place, tracker, listener)
    return result.router, result.health, result.attempts, _draw_training(result, validation, task, place)


def _train_one(
    config: TrainConfig,
    tables: DecisionTables,
    validation: Validation,
    lam: Lam,
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
    config: TrainConfig, trees: Trees, validation: Validation, router: artefact.Storable, health: Mapping[float, Health]
) -> dict[str, Any]:
    """Return what an artefact says of its origin."""
    return {
        "package": versions()["trim-routing"],
        "small": trees.meta["small"],
        "large": trees.meta["large"],
        "scorer": trees.meta["scorer"],
        "grader": trees.meta["grader"],
        "rollouts": {"store": Path(trees.meta["store"]).name, "hash": trees.meta["hash"]},
        "max_steps": trees.meta["max_steps"],
        "cost": config.cost,
        "max_escalations": validation.verdict.max_escalations,
        "held_out": [_held_out(validation, _at(router, lam), lam, each) for lam, each in health.items()],
    }


def _held_out(validation: Validation, router: AnyRouter, lam: float, health: Health) -> dict[str, Any]:
    """Return what a router reached on the verdict half of validation."""
    outcomes, both = run(router, validation.verdict), validation.references[1]
    return {
        "lam": lam,
        "problems": len(outcomes),
        "accuracy": float(outcomes.correct.mean()),
        "cost": float(outcomes.cost.mean()),
        "share": float(outcomes.cost.sum() / both.large.cost.sum()),
        "always_small_accuracy": float(both.small.correct.mean()),
        "always_large_accuracy": float(both.large.correct.mean()),
        "verdict": health.verdict,
        "sentence": health.sentence,
    }


def _draw_training(result: Result, validation: Validation, task: Lam, place: Path) -> Path:
    from agents.evaluation.plots import Level, TrainingHistory, training_curve

    def column(name: str) -> NDArray[np.float64]:
        return np.array([record[name] for record in result.records])

    history = TrainingHistory(
        column("step"), column("validation/return"), column("validation/accuracy"), column("validation/share")
    )
    levels = {}
    for name in ("best constant", "best threshold"):
        found = [
            validation.measure(run(getattr(simple, name.removeprefix("best ")), validation.choice), lam)
            for lam, simple in result.baselines.items()
        ]
        levels[name] = Level(
            *(float(np.mean([each[key] for each in found])) for key in ("return", "accuracy", "share"))
        )
    title = f"{result.router.name}, {_label(task).replace('lam-', 'λ = ').replace('-to-', ' to ')}"
    return training_curve(history, levels, title, place / "training")[0]


def _draw_curve(routers: Mapping[float, AnyRouter], validation: Validation, config: TrainConfig, folder: Path) -> None:
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


def _pair(value: list[float] | None) -> tuple[float, float] | None:
    return None if value is None else (value[0], value[1])


def _config(plain: Mapping[str, Any], folder: Path) -> TrainConfig:
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
        }
    )
