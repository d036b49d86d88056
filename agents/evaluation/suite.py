"""An evaluation: what `evaluate.py` does, as a library. Trained routers and reference points on one split."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from pydantic import Field

from agents.escape import finite
from agents.evaluation.bootstrap import Difference, curve_estimates, holm, paired_returns, resample_weights
from agents.evaluation.budgets import settings_of
from agents.evaluation.compare import HEADLINE, difference
from agents.evaluation.curves import CPT_TARGETS, Curve, Method, References, mixture_at
from agents.evaluation.oracle import query_oracle, spread_oracle, tree_oracle
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Candidates, spread
from agents.evaluation.table import FieldRow, MethodSummary, limits, means_of, summarise
from agents.evaluation.walk import Settings, alone, measured, references, run
from agents.routers import artefact
from agents.routers.base import Mixture, RandomRate, schemas_of, told_cap
from agents.routers.mlp import ConditionedMLP, at
from agents.routers.whole import decides_once
from rollouts.config import Imports, settings
from rollouts.errors import ArtefactError, ConfigError
from rollouts.plugins import import_module
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables, rollouts_hash

TRIM_THR, RANDOM = "trim-thr", "random"
ORACLES: dict[str, tuple[str, Callable[[DecisionTables, float], Outcomes]]] = {
    "oracle": ("oracle", tree_oracle),
    "query_oracle": ("query oracle", query_oracle),
    "query_oracle_per_draw": ("query oracle, per draw", partial(query_oracle, per_draw=True)),
}
"""Names of the oracles and what they come to, by the field of `Evaluation` that has their summary."""
SEEN = {
    "train": "These figures are too good: routers were fitted on these very problems. Take another --split.",
    "validation": "These figures are too good: settings were chosen on these very problems. Take another --split.",
}
"""What has to be said of splits on which nothing is measured that holds for new problems."""


@settings
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
        runs: Folders of runs (`train.py`), or of single policies.
        rollouts: Path of a rollout store, or the name of a bundled one.
        split: The split to evaluate on; thresholds are always chosen on ``validation``.
        out: Folder for the results; default ``evaluation-SPLIT`` in the first run's folder.
        max_escalations: Cap K for all routers but always-large; default: what the routers were trained for.
        max_large_tokens: Hard cap on the large model's tokens for a problem, for all routers but always-large;
            default: what the routers were trained for.
        transfer: Evaluate on other rollouts, or under another cap on large tokens, than a router was trained for.
        scorer: Score table, if the store has several.
        grader: Grade table, if the store has several.
        seed: Seed of the bootstrap.
        baselines: Compare with query-level routers and cascades as well (`agents.baselines`), fitted on the training
            problems; takes a minute or two, and scikit-learn.
        report: Folder for the page, one self-contained HTML file; a relative one lies in ``out``, where that is given.
        report_problems: Problems whose solutions the page shows step by step, at most.
        allow_old: Read policies of version 1 of their format too, whose settings may be damaged unnoticed.
        imports: A module to import before policies are read: that of a router of your own; may be repeated.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    rollouts: str = "quickstart"
    split: str = "test"
    out: Path | None = None
    max_escalations: int | None = None
    max_large_tokens: int | None = None
    transfer: bool = False
    scorer: str | None = None
    grader: str | None = None
    seed: int = 0
    baselines: bool = False
    report: Path | None = None
    report_problems: Annotated[int, Field(ge=0)] = 60
    allow_old: bool = False
    imports: Imports = ()


@dataclass(frozen=True, eq=False)
class Compared:
    """A method of others on the split.

    Attributes:
        group: ``step-level``, ``cascade`` or ``query-level``.
        method: Its operating points; validation has chosen its hull.
        drawn: Whether it is one of the curves; else it is in the table of the field alone.
    """

    name: str
    group: str
    method: Method
    drawn: bool


Others = Callable[[DecisionTables, DecisionTables, DecisionTables], tuple[list[Compared], list[str]]]
"""From the tables of the training problems, of validation and of the split to methods of others, and sentences on those
that could not be fitted."""


@dataclass(frozen=True)
class AtLam:
    """A trained router against the best threshold for its λ, on paired problems.

    Attributes:
        threshold: The threshold with the greatest return on validation.
        difference: Return of the router minus that of the threshold.
        holm: p-value, corrected for all λ and methods of the evaluation.
    """

    method: str
    lam: float
    threshold: float
    difference: Difference
    holm: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found.

    Attributes:
        query_oracle: Summary of the query-level oracle that chooses once for a problem.
        query_oracle_per_draw: Of the one that chooses for each draw.
        at_lam: Paired comparisons with the best threshold at each λ.
        sentences: What was gained, in plain words.
        field: Methods of others, and the trained ones beside them, by group.
    """

    methods: tuple[MethodSummary, ...]
    oracle: MethodSummary
    query_oracle: MethodSummary
    query_oracle_per_draw: MethodSummary
    at_lam: tuple[AtLam, ...]
    sentences: tuple[str, ...]
    subject: dict[str, Any]
    field: tuple[FieldRow, ...] = ()

    @property
    def oracles(self) -> tuple[MethodSummary, ...]:
        """The summaries of the oracles."""
        return self.query_oracle, self.query_oracle_per_draw, self.oracle


def evaluate(config: EvaluateConfig, others: Others | None = None) -> Evaluation:
    """Evaluate trained routers, beside others if there are any.

    Raises:
        ArtefactError: There is no policy in a folder, it is damaged, or it was trained on other rollouts.
        StoreError: The rollouts cannot be used, or a split is empty.
        ConfigError: Settings contradict each other.
    """
    if config.baselines and others is None:
        raise ConfigError("`baselines` needs those of others: evaluate(config, agents.baselines.methods.field_beside).")
    for module in config.imports:
        import_module(module)
    methods = load_methods(config.runs, config.allow_old)
    trees = compile_store(config.rollouts, config.scorer, config.grader)
    agreed = _agreed(methods, trees, config)
    asked = compile_store(config.rollouts, config.scorer, config.grader, split=config.split)
    tables = decision_tables(trees, None, **agreed)
    same, validation = asked.meta["hash"] == trees.meta["hash"], tables.on(trees.select("validation"))
    split = tables.on(trees.select(config.split)) if same else decision_tables(asked, config.split, **agreed)
    both, choosing = references(split), references(validation)
    candidates = Candidates(validation)
    curves = {
        name: measured([each for item in items for each in _settings(item, validation, choosing)], choosing, split)
        for name, items in methods.items()
    }
    swept = TRIM_THR if TRIM_THR not in curves else f"{TRIM_THR} (swept)"
    curves[swept] = measured(candidates.spread_over(choosing.large), choosing, split)
    rates = (RandomRate(float(rate)) for rate in np.linspace(0.05, 0.95, 10))
    curves[RANDOM] = measured([(each, run(each, validation)) for each in rates], choosing, split)
    bounds = {
        place: summarise(name, Method.whole(spread_oracle(partial(oracle, split), both)), both, config.seed)
        for place, (name, oracle) in ORACLES.items()
    }
    beside, lacking = list[Compared](), list[str]()
    if others is not None:
        beside, lacking = others(tables.on(trees.select("train")), validation, split)
    groups = {name: "query-level" for name, items in methods.items() if decides_once(items[0].router)}
    found = [
        Compared(name, groups.get(name, "step-level"), method, True)
        for name, method in curves.items()
        if name != RANDOM
    ]
    curves |= {each.name: each.method for each in beside if each.drawn}
    summaries = tuple(summarise(name, method, both, config.seed) for name, method in curves.items())
    weights = resample_weights(len(both.small), seed=config.seed)
    subject = {
        "rollouts": str(config.rollouts),
        "hash": asked.meta["hash"],
        "split": config.split,
        "problems": len(both.small),
        "cost": split.cost_model.name,
        "max_escalations": split.max_escalations,
        "max_large_tokens": split.max_large_tokens,
        "transfer": config.transfer,
    }
    seen = [SEEN[config.split]] if config.split in SEEN and not config.transfer else []
    return Evaluation(
        methods=summaries,
        **bounds,
        at_lam=_at_lam(methods, candidates, split, weights),
        sentences=(_at_budget(summaries), *_sentences(list(methods), swept, curves, both, weights), *lacking, *seen),
        subject=subject,
        field=field_rows_of([*found, *beside], both, alone(split), weights) if beside else (),
    )


def field_rows_of(
    methods: Sequence[Compared], both: References, by_itself: References, weights: Any
) -> tuple[FieldRow, ...]:
    """Return the rows of the table of the field, by group; `by_itself` is what either model comes to alone."""
    rows = []
    for each in methods:
        told = [by_itself.small, *(outcomes for _, outcomes in each.method.points), by_itself.large]
        takes, curve = mixture_at(each.method, both, HEADLINE, told), Curve.of(each.method, both)
        marks = tuple(f"cpt_{x}" for x in CPT_TARGETS if curve.by_mixing(x))
        rows.append(
            FieldRow(each.name, each.group, curve_estimates(each.method, both, weights), marks, means_of(takes))
        )
    order = ("step-level", "cascade", "query-level")
    return tuple(sorted(rows, key=lambda row: order.index(row.group)))


def load_methods(folders: Sequence[Path], allow_old: bool = False) -> dict[str, list[artefact.Artefact]]:
    """Load the policies below each folder: one method for each folder, by the routers' name.

    Raises:
        ArtefactError: A folder holds no policy.
        ConfigError: No folders, or one of them twice.
    """
    if not folders:
        raise ConfigError("Name the folder of at least one run, as `python train.py` prints it.")
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise ConfigError("A run is named twice.")
    loaded: list[tuple[Path, list[artefact.Artefact]]] = []
    for folder in folders:
        places = [folder] if (folder / "policy.json").is_file() else sorted(folder.glob("**/policy"))
        if not places:
            raise ArtefactError(f"{folder}: no trained policy here (expected {folder}/lam-*/policy).")
        loaded.append((folder, [artefact.load(place, allow_old=allow_old) for place in places]))
    names = _told_apart([(items[0].router.name, folder.resolve()) for folder, items in loaded])
    return dict(zip(names, (items for _, items in loaded), strict=True))


def _told_apart(named: Sequence[tuple[str, Path]]) -> list[str]:
    """Return names that differ: with as much of the end of their folders as it takes where they do not."""
    plain = [name for name, _ in named]
    found, depth = plain, 0
    while len(set(found)) < len(found) or RANDOM in found:
        depth += 1
        found = [
            name if plain.count(name) == 1 and name != RANDOM else f"{name} ({'/'.join(folder.parts[-depth:])})"
            for name, folder in named
        ]
    return found


def _agreed(methods: dict[str, list[artefact.Artefact]], trees: Trees, config: EvaluateConfig) -> dict[str, Any]:
    """Return cost model and caps that all routers share.

    Raises:
        ArtefactError: They were trained on other rollouts.
        ConfigError: They do not agree, or one is told the share left of another cap than the one in force.
    """
    found: dict[str, set[Any]] = {"cost": set(), "max_escalations": set(), "max_large_tokens": set()}
    named = [(name, item) for name, items in methods.items() for item in items]
    for name, item in named:
        trained_on = item.about.get("rollouts", {})
        fitting = {rollouts_hash(trees, schema) for schema in schemas_of(item.router)}
        if trained_on.get("hash") not in fitting and not config.transfer:
            raise ArtefactError(
                f"{name}: trained on rollouts {trained_on.get('store')!r} with hash {trained_on.get('hash')}, but "
                f"{config.rollouts} has hash {trees.meta['hash']}. Name those rollouts, or say --transfer if the "
                "comparison is meant."
            )
        for key, values in found.items():
            values.add(item.about.get(key))
    agreed: dict[str, Any] = {key: getattr(config, key, None) for key in found}  # what was asked for, first
    for key, values in found.items():
        if agreed[key] is None:
            if len(values) > 1:
                raise ConfigError(f"The routers were trained for different {key}: {', '.join(map(str, values))}.")
            agreed[key] = values.pop()
    cap = agreed["max_large_tokens"]
    for name, item in named:
        told = told_cap(item.router)
        if told not in (None, cap) and not (config.transfer and cap is not None):
            raise ConfigError(
                f"{name}: trained under a cap of {told} large tokens, whose share left it is told; the cap here is "
                f"{cap}. Leave out --max-large-tokens, or say --transfer if the comparison is meant."
            )
    return agreed


def _settings(item: artefact.Artefact, validation: DecisionTables, choosing: References) -> Settings:
    """Return the operating points of a router; of one for a range of λ 16, whose λ spread the cost on validation."""
    settings = [(each, run(each, validation)) for each in settings_of(item.router)]
    return spread(settings, choosing.large) if isinstance(item.router, ConditionedMLP) else settings


def _at_lam(
    methods: dict[str, list[artefact.Artefact]],
    candidates: Candidates,
    split: DecisionTables,
    weights: Any,
) -> tuple[AtLam, ...]:
    rows: list[tuple[str, float, float, Difference]] = []
    for name, items in methods.items():
        for item in items:
            if isinstance(item.router, Mixture):  # of a budget, not of a λ
                continue
            for held_out in item.about.get("held_out", ()):
                lam = float(held_out["lam"])
                router = at(item.router, lam)
                threshold = candidates.best(lam).threshold
                own, simple = run(router, split), run(threshold, split)
                rows.append((name, lam, threshold.threshold, paired_returns(own, simple, lam, weights)))
    corrected: Any = holm([row[3].p_value for row in rows]) if rows else []
    return tuple(AtLam(*row, float(p)) for row, p in zip(rows, corrected, strict=True))


def _at_budget(summaries: Sequence[MethodSummary]) -> str:
    """Say what a budget of 20 % buys."""
    first, *others = (f"{100 * each.metrics['accuracy_at_20'].value:.1f} % by {each.name}" for each in summaries)
    small, large = (100 * each["accuracy"].value for each in (summaries[0].small, summaries[0].large))
    return (
        f"Problems solved at 20 % of always-large's cost: {first}, {', '.join(others)}; always-small solves "
        f"{small:.1f} %, always-large {large:.1f} %."
    )


def _sentences(
    trained: list[str], swept: str, curves: dict[str, Method], both: References, weights: Any
) -> tuple[str, ...]:
    pairs = [(name, swept) for name in trained] + [(trained[0], name) for name in trained[1:]]
    said = (difference((one, other), curves[one], curves[other], both, weights) for one, other in pairs)
    return tuple(dict.fromkeys(said))


def save(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write JSON, CSV, Markdown and the pictures; return the files."""
    from agents.evaluation.plots import cost_accuracy
    from agents.evaluation.table import to_csv, to_markdown

    folder.mkdir(parents=True, exist_ok=True)
    everything = [*evaluation.methods, *evaluation.oracles]
    texts = {
        "results.json": json.dumps(finite(asdict(evaluation)), indent=1, allow_nan=False) + "\n",
        "results.csv": to_csv(everything),
        "results.md": to_markdown(everything, limits(evaluation.subject), evaluation.field),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    subject = evaluation.subject
    dataset = f"{Path(subject['rollouts']).name}, {subject['split']}"
    if caps := limits(subject):
        dataset += f", {caps}"
    drawn = [method for method in evaluation.methods if method.name != RANDOM]  # it is the line of random mixing
    pictures = cost_accuracy(drawn, dataset, folder / "curve", evaluation.oracle)
    return [*(folder / name for name in texts), *pictures]
