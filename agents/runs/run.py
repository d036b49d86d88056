"""A run: what `train.py` does, as a library. One folder holds everything that came out of it.

RUN/config.json            settings, versions, seed, hash of the rollouts
RUN/report.txt             health of every router in plain words
RUN/generated.json         of a live training: what its models have written so far
RUN/curve.png, .svg        the routers on the verdict half of validation
RUN/lam-0.003/policy/      the router (`agents.routers.artefact`), the only thing that evaluation reads
RUN/lam-0.003/             metrics.jsonl, training.png, report.json; of the POMDP estimates.json, of exact,
                           arbitrage, advantage and query-level fit.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.baselines import query_level
from agents.evaluation.budgets import lam_costs, meet_target
from agents.evaluation.health import Health
from agents.evaluation.splits import Record, Validation, halves
from agents.evaluation.walk import decision_shares, references, run
from agents.learners import advantage, arbitrage
from agents.learners.asking import AskingFrontier, fit_asking
from agents.learners.exact import Frontier, fit, neighbours
from agents.learners.loop import Training, checked_at
from agents.learners.pomdp.fit import estimate, price_of
from agents.routers import artefact
from agents.routers.base import AnyRouter, Threshold, checked
from agents.routers.mlp import ConditionedMLP, at
from agents.routers.whole import decides_once
from agents.runs import config as settings
from agents.runs.config import TrainConfig
from agents.runs.listener import Listener
from agents.runs.live import Models
from agents.runs.pictures import draw_curve, draw_training
from agents.tracking import NoTracker, WandbTracker, wandb_mode
from rollouts.config import as_plain
from rollouts.errors import BudgetSpent, ConfigError, StoreError
from rollouts.files.atomic import write_text
from rollouts.files.sealed import read_sealed, refusing_damage, write_sealed
from rollouts.plugins import import_module, loaded_plugin
from rollouts.text.splitting import BLANK_LINE
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from rollouts.trees.live import Generated
from trim_env.episodes import EpisodesVectorEnv, Lam
from trim_env.features import DEFAULT_SCHEMA
from trim_env.tables import DecisionTables, decision_tables, rollouts_hash

AUTO_LAMS = 6
_PREDICTING = {"arbitrage": arbitrage, "advantage": advantage, "query-level": query_level}


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        routers: The router for each λ; of a range, for some that span it.
        sentence: What a budget or an accuracy that was asked for comes to, and what a budget of tokens ended; else
            empty.
        generated: What the models of a live training have written; None without them.
    """

    config: TrainConfig
    folder: Path
    routers: dict[float, AnyRouter]
    health: dict[float, Health]
    sentence: str = ""
    generated: Generated | None = None


def train(config: TrainConfig, listener: Listener | None = None) -> Trained:
    """Train the routers of a new run.

    Raises:
        ConfigError: A setting is wrong, or the folder exists.
        StoreError: The rollouts cannot be used.
        BackendError: A model of a live training is gone; what it wrote is in the store, and `resume` goes on.
        BudgetSpent: A live training was to generate no more before one iteration was done; likewise.
    """
    config, listener = settings.resolved(config), listener or Listener()
    if config.tracking != "none":
        wandb_mode()  # fails now, if it must
    models, trees = _opened(config, listener)
    folder = config.out or settings.new_folder(config)
    new = _Run(replace(_with_lams(config, trees), out=folder), trees, folder, listener, models)  # fails now, if it must
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; nothing was overwritten. Choose another --out, or --resume it.")
    folder.mkdir(parents=True, exist_ok=True)
    rollouts = {**trees.meta, "hash": rollouts_hash(trees, new.config.schema)}
    described = {"config": as_plain(new.config), "versions": settings.versions(), "rollouts": rollouts}
    write_sealed(folder / "config.json", described)
    return new.finish()


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
    if not file.exists():
        raise ConfigError(f"{folder}: no run to resume here (no config.json).")
    with refusing_damage(file, ConfigError, "settings", "Start a new run."):
        described = read_sealed(file)
        config = settings.from_plain(described["config"], folder)
        recorded = described["rollouts"]["hash"]
    models, trees = _opened(config, listener)
    now = rollouts_hash(trees, config.schema)
    if recorded not in (now, trees.meta["hash"]):  # earlier versions noted no columns
        raise StoreError(
            f"{config.rollouts}: these rollouts have hash {now}, the run was begun on {recorded}. "
            "They have grown or changed since; start a new run."
        )
    return _Run(config, trees, folder, listener, models).finish()


def _opened(config: TrainConfig, listener: Listener) -> tuple[Models | None, Trees]:
    """Return the models of a live training, and the trees that are complete."""
    if config.live:
        models = Models(config, listener)
        return models, models.compiled()
    return None, compile_store(config.rollouts, config.scorer, config.grader, on_progress=listener.compiling)


def _with_lams(config: TrainConfig, trees: Trees) -> TrainConfig:
    """Fill in λ where none is named: six values, or for a budget the range that they span."""
    if config.lam or config.lam_range:
        return config
    lams, target = automatic_lams(trees, config), config.budget is not None or config.accuracy is not None
    if target and config.agent in settings.LEARNED and not config.ask:
        return replace(config, lam_range=(lams[0], lams[-1]))
    return replace(config, lam=lams)


def automatic_lams(trees: Trees, config: TrainConfig) -> tuple[float, ...]:
    """Return values of λ that span the trade-off: from 1/8 to 4 times that at which both models' returns are equal.

    Raises:
        ConfigError: Always-large is no better than always-small on the training split.
    """
    indices = _fitted_on(config, trees)
    split = trees.splits[trees.problem[indices[0]]]
    both = references(_tables(config, trees).on(indices))
    gap = both.large.correct.mean() - both.small.correct.mean()
    price = both.large.cost.mean() - both.small.cost.mean()
    if gap <= 0 or price <= 0:
        raise ConfigError(
            f"On the {split} split always-large solves {100 * gap:+.1f} points more than always-small: there is "
            "nothing to route for. Use another pair of models, or name --lam."
        )
    even = gap / price
    return tuple(float(f"{lam:.2g}") for lam in even * np.geomspace(1 / 8, 4, AUTO_LAMS))


def _fitted_on(config: TrainConfig, trees: Trees) -> NDArray[np.int64]:
    """Return the training trees, or where a live training has none that are complete, the choice half of validation."""
    if config.live and "train" not in trees.splits[trees.problem]:
        return halves(trees)[0]
    return trees.select("train")


def _tables(config: TrainConfig, trees: Trees) -> DecisionTables:
    caps: dict[str, Any] = {name: getattr(config, name) for name in ("max_escalations", "max_large_tokens")}
    return decision_tables(trees, None, schema=config.schema, cost=config.cost, **caps)


def _label(task: Lam) -> str:
    return f"lam-{task[0]:g}-to-{task[1]:g}" if isinstance(task, tuple) else f"lam-{task:g}"


Fitted = tuple[artefact.Storable, dict[float, Health], int, Path | None]
"""A router, its health by λ, the number of attempts, and a picture of the training if there is one."""


class _Run:
    """A run under way."""

    def __init__(
        self, config: TrainConfig, trees: Trees, folder: Path, listener: Listener, models: Models | None
    ) -> None:
        self.models = models
        if models:
            models.count_in(folder / "generated.json")
        self.ended: list[str] = []
        self.episodes: Callable[..., EpisodesVectorEnv] | None = None
        self.config, self.trees, self.folder, self.listener = config, trees, folder, listener
        self.validation = Validation(lambda indices: self._tables.on(indices), trees)

    @cached_property
    def _tables(self) -> DecisionTables:
        """Tables for all trees."""
        return _tables(self.config, self.trees)

    @cached_property
    def _fitting(self) -> DecisionTables:
        """Those for the training trees, or what a live training begins with."""
        return self._tables.on(_fitted_on(self.config, self.trees))

    def finish(self) -> Trained:
        """Train what is not finished yet, and say what came out of all."""
        with ExitStack() as self._held:
            return self._finish()

    def _finish(self) -> Trained:
        config, validation, folder = self.config, self.validation, self.folder
        routers: dict[float, AnyRouter] = {}
        health: dict[float, Health] = {}
        stored: list[artefact.Storable] = []
        tasks: tuple[Lam, ...] = (config.lam_range,) if config.lam_range else config.lam
        for task in tasks:
            place = folder / _label(task)
            place.mkdir(exist_ok=True)
            try:
                router, own, attempts = self._finished(task, place) or self._made(task, place)
            except BudgetSpent as error:
                if not stored:
                    raise
                self.ended.append(str(error))  # the others are reported all the same
                continue
            stored.append(router)
            for lam, each in own.items():
                routers[lam], health[lam] = at(router, lam), each
                if attempts:
                    self.listener.end(lam, each, attempts)
        lines = [f"lam {lam:g}: {each.sentence}" for lam, each in health.items()]
        sentence = " ".join(self.ended)
        if config.budget is not None or config.accuracy is not None:
            target = meet_target(stored, validation, folder, self.origin(), config.budget, config.accuracy)
            sentence = f"{sentence} {target}".lstrip()
        lines += [sentence] * bool(sentence)
        (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw_curve(routers, validation, config.rollouts, folder)
        return Trained(config, folder, routers, health, sentence, self.models.generated if self.models else None)

    def _finished(self, task: Lam, place: Path) -> tuple[artefact.Storable, dict[float, Health], int] | None:
        """Return what `_made` did, without attempts, if that was finished before the run was stopped."""
        if not (place / "report.json").is_file():
            return None
        router = artefact.load(place / "policy").router
        return router, self._assessed(router, task), 0

    def _made(self, task: Lam, place: Path) -> tuple[artefact.Storable, dict[float, Health], int]:
        """Return a router that is stored in its place, with its health by λ and the number of attempts."""
        config, tracker = self.config, NoTracker()
        if config.tracking != "none":
            name = f"{config.agent} {_label(task)}"
            tracker = WandbTracker(place, name, self.folder.name, as_plain(config))
        try:
            router, own, attempts, picture = self._fit(task, place, tracker)
        except BudgetSpent:
            tracker.stop()
            raise
        about = self._about(router, own)
        if (place / "policy").exists():  # written when the run was stopped, and not reported
            shutil.rmtree(place / "policy")
        artefact.save(router, place / "policy", about)
        found = [{"lam": lam, **asdict(each), "attempts": attempts} for lam, each in own.items()]
        report = json.dumps(found, indent=1) + "\n"
        write_text(place / "report.json", report)
        tracker.finish({**found[len(found) // 2], **about["held_out"][len(found) // 2]}, picture, place / "policy")
        return router, own, attempts

    def _fit(self, task: Lam, place: Path, tracker: NoTracker) -> Fitted:
        config, tables = self.config, self._fitting
        if config.agent in ("ppo-agg", "ppo-seq"):
            return self._train(task, place, tracker)
        router: Any
        if config.agent in ("exact", *_PREDICTING):
            found: Any = self._frontiers[task] if config.agent == "exact" else self._predictions
            router, told = found.router(task), found.report()
            (place / "fit.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            return router, self._assessed(router, task), 1, None
        assert isinstance(task, float)
        if config.agent == "threshold":
            schema = tables.schema  # thresholds are on the score, or on the first feature of a schema that is named
            usual = schema.name == DEFAULT_SCHEMA
            router = self.validation.thresholds_on(Threshold.schema if usual else schema.id).best(task).threshold
        elif config.agent == "pomdp":
            estimates = estimate(tables.trees, indices=tables.indices)
            router = estimates.routers([task], price=price_of(tables.cost_model))[0]
            (place / "estimates.json").write_text(json.dumps(estimates.report(), indent=1) + "\n", encoding="utf-8")
        else:
            learner = loaded_plugin(config.agent, "--agent")
            router = checked(learner.fit(tables, task, config.seed), config.agent)
        return router, self._assessed(router, task), 1, None

    @cached_property
    def _predictions(self) -> Any:
        """What those learners make that predict what the large model does for it, for all λ."""
        learner: Any = _PREDICTING[self.config.agent]
        return learner.fit(self._fitting, self.validation.choice, self.config.seed)

    @cached_property
    def _frontiers(self) -> dict[Lam, Frontier | AskingFrontier]:
        """What the exact learner makes for each task."""
        config, train, choice = self.config, self._fitting, self.validation.choice
        if config.lam_range:
            lams = np.geomspace(*config.lam_range, 5).tolist()
            return {config.lam_range: fit(train, choice, lams, config.exact, config.seed)}
        found: dict[Lam, Frontier | AskingFrontier] = {}
        for group in neighbours(config.lam):
            if config.ask:
                found |= dict.fromkeys(group, fit_asking(train, choice, group, config.ask, config.exact, config.seed))
                continue
            found |= dict.fromkeys(group, fit(train, choice, group, config.exact, config.seed))
        return found

    def _assessed(self, router: artefact.Storable, task: Lam) -> dict[float, Health]:
        return {lam: self.validation.assess(at(router, lam), lam, final=True) for lam in checked_at(task)}

    def _train(self, lam: Lam, place: Path, tracker: NoTracker) -> Fitted:
        config, tables = self.config, self._fitting
        if self.models and self.episodes is None:
            self.episodes = self._held.enter_context(self.models.opened(tables))
        training = Training(
            tables,
            self.validation,
            lam,
            config.learner,
            config.seed,
            attempts=config.attempts,
            episodes=self.episodes,
            exact=config.exact,
        )
        self.listener.begin(lam, training)
        with (place / "metrics.jsonl").open("w", encoding="utf-8") as lines:

            def keep(record: Record) -> None:
                lines.write(json.dumps({name: float(value) for name, value in sorted(record.items())}) + "\n")
                lines.flush()
                tracker.log(record)
                self.listener.iteration(lam, training, record)

            try:
                result = training.run(keep)
            except BudgetSpent as error:
                raise BudgetSpent(
                    f"{error} Not one iteration of {_label(lam)} was done by then; what was generated is in the store. "
                    "In a new run, raise --max-generated-large-tokens, or collect less at a time (--ppo.num-envs, "
                    "--ppo.n-steps)."
                ) from error
        if not training.learner.done:
            done, planned = len(training.records), training.planned
            self.ended.append(f"The budget of large tokens ended {_label(lam)} after {done} of {planned} iterations.")
        title = f"{result.router.name}, {_label(lam).replace('lam-', 'λ = ').replace('-to-', ' to ')}"
        return result.router, result.health, result.attempts, draw_training(result, self.validation, title, place)

    def _about(self, router: artefact.Storable, health: Mapping[float, Health]) -> dict[str, Any]:
        """Return what an artefact says of its origin and of what it reached."""
        held_out = [self._held_out(at(router, lam), lam, each) for lam, each in health.items()]
        about = {**self.origin(), "held_out": held_out}
        return {**about, "budgets": lam_costs(router, self.validation)} if isinstance(router, ConditionedMLP) else about

    def origin(self) -> dict[str, Any]:
        """Return models, scorer, rollouts and the like, as artefacts name them."""
        meta, pomdp = self.trees.meta, self.config.agent == "pomdp"  # which reads its own features
        trained_on = rollouts_hash(self.trees, DEFAULT_SCHEMA if pomdp else self.config.schema)
        return {
            "package": settings.versions()["trim-routing"],
            **{name: meta[name] for name in ("small", "large", "scorer", "grader")},
            "rollouts": {
                "store": Path(meta["store"]).name,
                "hash": trained_on,
                **({"live": True} if self.models else {}),
            },
            "max_steps": meta["max_steps"],
            "splitting": meta.get("splitting") or BLANK_LINE.described(),
            "cost": self.config.cost,
            "max_escalations": self.validation.verdict.max_escalations,
            "max_large_tokens": self.validation.verdict.max_large_tokens,
        }

    def _held_out(self, router: AnyRouter, lam: float, health: Health) -> dict[str, Any]:
        """Return what a router reached on the verdict half of validation."""
        outcomes, both = run(router, self.validation.verdict), self.validation.references[1]
        return {
            "lam": lam,
            "problems": len(outcomes),
            "accuracy": float(outcomes.correct.mean()),
            "cost": float(outcomes.cost.mean()),
            "share": both.share(outcomes),
            "always_small_accuracy": float(both.small.correct.mean()),
            "always_large_accuracy": float(both.large.correct.mean()),
            "verdict": health.verdict,
            "sentence": health.sentence,
            **({} if decides_once(router) else {"decisions": decision_shares(router, self.validation.verdict)}),
        }
