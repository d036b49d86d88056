"""A run: what `train.py` does, as a library. One folder holds everything that came out of it.

RUN/config.json            settings, versions, seed, hash of the rollouts
RUN/report.txt             health of every router in plain words
RUN/curve.png, .svg        the routers on the verdict half of validation
RUN/lam-0.003/policy/      the router (`agents.routers.artefact`), the only thing that evaluation reads
RUN/lam-0.003/             metrics.jsonl, training.png, report.json; of the POMDP estimates.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.budgets import lam_costs, meet_target
from agents.evaluation.health import Health
from agents.evaluation.splits import Record, Validation
from agents.evaluation.walk import references, run
from agents.learners.loop import Training, checked_at
from agents.learners.pomdp.fit import estimate, price_of
from agents.routers import artefact
from agents.routers.base import AnyRouter, checked
from agents.routers.mlp import ConditionedMLP, at
from agents.runs import config as settings
from agents.runs.config import TrainConfig
from agents.runs.listener import Listener
from agents.runs.pictures import draw_curve, draw_training
from agents.tracking import NoTracker, WandbTracker, wandb_mode
from rollouts.config import as_plain
from rollouts.errors import ConfigError, StoreError
from rollouts.plugins import import_module, loaded_plugin
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


def train(config: TrainConfig, listener: Listener | None = None) -> Trained:
    """Train the routers of a new run.

    Raises:
        ConfigError: A setting is wrong, or the folder exists.
        StoreError: The rollouts cannot be used.
    """
    config = settings.resolved(config)
    if config.tracking != "none":
        wandb_mode()  # fails now, if it must
    listener = listener or Listener()
    trees = _compile(config, listener)
    config = _with_lams(config, trees)
    validation = _validation(config, trees)  # fails now, if it must, and not after the folder was made
    folder = config.out or settings.new_folder(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; nothing was overwritten. Choose another --out, or --resume it.")
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, out=folder)
    described = {"config": as_plain(config), "versions": settings.versions(), "rollouts": trees.meta}
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return _run(config, trees, validation, folder, listener)


def resume(folder: Path, listener: Listener | None = None, imports: Sequence[str] = ()) -> Trained:
    """Go on with a run that was stopped: what was finished is kept, the other λ are trained from their beginning.

    Args:
        folder: The run's folder.
        listener: Whom to tell.
        imports: Modules to import first; a folder does not say what is to be imported.

    Raises:
        ConfigError: There is no run, or its settings are not of this version.
        StoreError: The rollouts cannot be used, or have changed since.
    """
    listener = listener or Listener()
    file = folder / "config.json"
    for module in imports:
        import_module(module)
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
            tracker = _tracker(config, task, place)
            router, own, attempts, picture = _fit(config, tables, validation, task, place, tracker, listener)
            about = _about(config, trees, validation, router, own)
            if not (place / "policy" / "policy.json").exists():
                artefact.save(router, place / "policy", about)
            found = [{"lam": lam, **asdict(each), "attempts": attempts} for lam, each in own.items()]
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


def _tracker(config: TrainConfig, task: Lam, place: Path) -> NoTracker:
    if config.tracking == "none":
        return NoTracker()
    return WandbTracker(place, f"{config.agent} {_label(task)}", place.parent.name, as_plain(config))


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
    tracker: NoTracker,
    listener: Listener,
) -> tuple[artefact.Storable, dict[float, Health], int, Path | None]:
    """Return router, health by λ, number of attempts, and a picture of the training if there is one."""
    if config.agent in ("ppo-agg", "tree-agg", "ppo-seq"):
        return _train(config, tables, validation, task, place, tracker, listener)
    assert isinstance(task, float)
    router: Any
    if config.agent == "threshold":
        router = validation.candidates.best(task).threshold
    elif config.agent == "pomdp":
        estimates = estimate(tables.trees, indices=tables.indices)
        router = estimates.routers([task], price=price_of(tables.cost_model))[0]
        (place / "estimates.json").write_text(json.dumps(estimates.report(), indent=1) + "\n", encoding="utf-8")
    else:
        learner = loaded_plugin(config.agent, "--agent")
        router = checked(learner.fit(tables, task, config.seed), config.agent)
    return router, {task: validation.assess(router, task, final=True)}, 1, None


def _train(
    config: TrainConfig,
    tables: DecisionTables,
    validation: Validation,
    lam: Lam,
    place: Path,
    tracker: NoTracker,
    listener: Listener,
) -> tuple[artefact.Storable, dict[float, Health], int, Path | None]:
    training = Training(tables, validation, lam, config.learner, config.seed, attempts=config.attempts)
    listener.begin(lam, training)
    with (place / "metrics.jsonl").open("w", encoding="utf-8") as lines:

        def keep(record: Record) -> None:
            lines.write(json.dumps({name: float(value) for name, value in sorted(record.items())}) + "\n")
            lines.flush()
            tracker.log(record)
            listener.iteration(lam, training, record)

        result = training.run(keep)
    picture = draw_training(result, validation, _title(result.router.name, lam), place)
    return result.router, result.health, result.attempts, picture


def _about(
    config: TrainConfig, trees: Trees, validation: Validation, router: artefact.Storable, health: Mapping[float, Health]
) -> dict[str, Any]:
    """Return what an artefact says of its origin and of what it reached."""
    held_out = [_held_out(validation, at(router, lam), lam, each) for lam, each in health.items()]
    about = {**origin(config, trees, validation), "held_out": held_out}
    return {**about, "budgets": lam_costs(router, validation)} if isinstance(router, ConditionedMLP) else about


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


__all__ = ["Trained", "automatic_lams", "resume", "train"]
