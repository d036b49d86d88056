"""A run: what `train.py` does, as a library. One folder holds everything that came out of it.

RUN/config.json            settings, versions, seed, hash of the rollouts
RUN/report.txt             health of every router in plain words
RUN/curve.png, .svg        the routers on the verdict half of validation
RUN/lam-0.003/policy/      the router (`agents.routers.artefact`), the only thing that evaluation reads
RUN/lam-0.003/             metrics.jsonl, training.png, report.json, checkpoint.pt; of the POMDP estimates.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.health import Health, as_plain
from agents.evaluation.splits import Record, Validation
from agents.evaluation.targets import budgets, meet_target
from agents.evaluation.walk import references, run
from agents.learners.loop import Result, Training, checked_at
from agents.learners.pomdp.fit import estimate, price_of
from agents.routers import artefact
from agents.routers.base import AnyRouter
from agents.routers.mlp import ConditionedMLP, at
from agents.runs import config as settings
from agents.runs import tracking
from agents.runs.config import TrainConfig
from agents.runs.pictures import draw_curve, draw_training
from rollouts.errors import ConfigError, StoreError
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.episodes import Lam
from trim_env.tables import DecisionTables, decision_tables

AUTO_LAMS = 6


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: Its folder.
        routers: The router for each λ; of a range, for some that span it.
        health: Their verdicts.
        sentence: What a budget or an accuracy that was asked for comes to; empty if none was.
    """

    folder: Path
    routers: dict[float, AnyRouter]
    health: dict[float, Health]
    sentence: str = ""


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
    settings.check(config)
    config = settings.with_schema(config)
    listener = listener or Listener()
    trees = _compile(config, listener)
    config = _with_lams(config, trees)
    validation = _validation(config, trees)  # fails now, if it must, and not after the folder was made
    folder = config.out or settings.new_folder(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; nothing was overwritten. Choose another --out, or --resume it.")
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, out=folder)
    described = {"config": settings.as_plain(config), "versions": settings.versions(), "rollouts": trees.meta}
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
        config = settings.from_plain(described["config"], folder)
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


def _compile(config: TrainConfig, listener: Listener) -> Trees:
    return compile_store(config.rollouts, config.scorer, config.grader, on_progress=listener.compiling)


def _with_lams(config: TrainConfig, trees: Trees) -> TrainConfig:
    """Fill in λ where none is named: six values, or for a budget the range that they span."""
    if config.lam or config.lam_range:
        return config
    lams = automatic_lams(trees, config)
    if config.agent in settings.LEARNED and (config.budget is not None or config.accuracy is not None):
        return replace(config, lam_range=(lams[0], lams[-1]))
    return replace(config, lam=lams)


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
        trees,
        schema=config.schema,
        cost=config.cost,
        max_escalations=config.max_escalations,
        max_large_tokens=config.max_large_tokens,
        indices=indices,
    )


def _validation(config: TrainConfig, trees: Trees) -> Validation:
    return Validation(lambda indices: _tables(config, trees, indices), trees)


def _run(config: TrainConfig, trees: Trees, validation: Validation, folder: Path, listener: Listener) -> Trained:
    tables = _tables(config, trees, trees.select("train"))
    routers: dict[float, AnyRouter] = {}
    health: dict[float, Health] = {}
    stored: list[artefact.Storable] = []
    tasks: tuple[Lam, ...] = (config.lam_range,) if config.lam_range else config.lam
    for task in tasks:
        place = folder / _label(task)
        place.mkdir(exist_ok=True)
        report = place / "report.json"
        if report.is_file():  # finished before the run was stopped
            router, attempts = artefact.load(place / "policy").router, 0
            own = {lam: validation.assess(at(router, lam), lam, final=True) for lam in checked_at(task)}
        else:
            tracker = tracking.start(
                config.tracking, place, f"{config.agent} {_label(task)}", folder.name, settings.as_plain(config)
            )
            router, own, attempts, picture = _fit(config, tables, validation, task, place, tracker, listener)
            about = _about(config, trees, validation, router, own)
            if not (place / "policy" / "policy.json").exists():
                artefact.save(router, place / "policy", about)
            found = [{"lam": lam, **as_plain(each), "attempts": attempts} for lam, each in own.items()]
            tracker.finish({**found[len(found) // 2], **about["held_out"][len(found) // 2]}, picture, place / "policy")
            report.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        stored.append(router)
        for lam, each in own.items():
            routers[lam], health[lam] = at(router, lam), each
            if attempts:
                listener.end(lam, each, attempts)
    lines = [f"lam {lam:g}: {each.sentence}" for lam, each in health.items()]
    sentence = ""
    if config.budget is not None or config.accuracy is not None:
        sentence = meet_target(
            stored, validation, folder, origin(config, trees, validation), config.budget, config.accuracy
        )
        lines.append(sentence)
    (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curve(routers, validation, config.rollouts, folder)
    return Trained(folder, routers, health, sentence)


def _label(task: Lam) -> str:
    return f"lam-{task[0]:g}-to-{task[1]:g}" if isinstance(task, tuple) else f"lam-{task:g}"


def _title(name: str, task: Lam) -> str:
    return f"{name}, {_label(task).replace('lam-', 'λ = ').replace('-to-', ' to ')}"


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
    return (
        result.router,
        result.health,
        result.attempts,
        draw_training(result, validation, _title(result.router.name, task), place),
    )


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
        config.learner,
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
    """Return what an artefact says of its origin and of what it reached."""
    held_out = [_held_out(validation, at(router, lam), lam, each) for lam, each in health.items()]
    about = {**origin(config, trees, validation), "held_out": held_out}
    return {**about, "budgets": budgets(router, validation)} if isinstance(router, ConditionedMLP) else about


def origin(config: TrainConfig, trees: Trees, validation: Validation) -> dict[str, Any]:
    """Return models, scorer, rollouts and the like, as artefacts name them."""
    return {
        "package": settings.versions()["trim-routing"],
        "small": trees.meta["small"],
        "large": trees.meta["large"],
        "scorer": trees.meta["scorer"],
        "grader": trees.meta["grader"],
        "rollouts": {"store": Path(trees.meta["store"]).name, "hash": trees.meta["hash"]},
        "max_steps": trees.meta["max_steps"],
        "cost": config.cost,
        "max_escalations": validation.verdict.max_escalations,
        "max_large_tokens": validation.verdict.max_large_tokens,
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


__all__ = ["Listener", "TrainConfig", "Trained", "automatic_lams", "resume", "train"]
