"""Everything that the page says of an evaluation, gathered: the values that its scripts draw, by name.

Nothing here knows how they look. Each part is described where it is built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import Estimate, resample_weights
from agents.evaluation.suite import RANDOM, TRIM_THR, EvaluateConfig, Evaluation, load_methods
from agents.evaluation.table import (
    FIELD_NOTE,
    NOTES,
    MethodSummary,
    caption,
    field_rows,
    headline_rows,
    limits,
    method_rows,
    point_rows,
)
from agents.report.maths import PATTERN, formulas
from agents.report.positions import positions
from agents.report.reliability import scorer_reliability
from agents.report.routers import setting, shown_routers
from agents.report.traces import FLAGS, Traced, choose, flags, problem_record
from agents.report.walks import ANSWERED, Paths, follow
from agents.routers.artefact import Artefact
from rollouts.store.store import Store
from rollouts.text.steps import ROLES
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

TRACE_BYTES = 2_300_000
"""Most bytes of traces on a page, so that a phone still opens it."""


def gather(config: EvaluateConfig, evaluation: Evaluation, trace_bytes: int = TRACE_BYTES) -> dict[str, Any]:
    """Return the page of an evaluation as JSON holds it, with at most so many bytes of traces.

    Raises:
        TrimError: As `agents.evaluation.suite.evaluate`.
    """
    subject, seed = evaluation.subject, config.seed
    trees = compile_store(config.rollouts, config.scorer, config.grader, split=config.split)
    caps = {name: subject[name] for name in ("max_escalations", "max_large_tokens")}
    tables = decision_tables(trees, subject["split"], cost=subject["cost"], **caps)
    uncapped = replace(tables, max_escalations=None, max_large_tokens=None)
    trained = load_methods(config.runs, config.allow_old)
    shown = shown_routers(trained, evaluation.methods)
    paths = [follow(each.router, uncapped if each.method == "always-large" else tables) for each in shown]
    small, large = paths[-2:]
    marks = [flags(each, small) for each in paths]
    _, problem = np.unique(trees.problem[tables.indices], return_inverse=True)
    weights = resample_weights(int(problem.max()) + 1, seed=seed)
    settings = [  # routers at one setting, through all trees of the split
        {
            "method": each.method,
            "knob": each.knob,  # None for a constant
            "label": each.label,
            "counts": {name: int(which.sum()) for name, which in own.items()},  # solutions, by flag
            "share": float(path.large_tokens.sum() / max(int(large.large_tokens.sum()), 1)),
            "positions": positions(path, problem, weights),
        }
        for each, path, own in zip(shown, paths, marks, strict=True)
    ]
    everything = [*evaluation.methods, *evaluation.oracles]
    traced = Traced(trees, tables.indices, paths, marks, small, large)
    answers = {each.id: each.answer for each in Store(config.rollouts).problems()}
    problems, sampling = _problems(traced, answers, config, trace_bytes)
    page = {
        "subject": _subject(evaluation, tables, seed),
        "sentences": evaluation.sentences,
        "caption": caption(everything, limits(subject)),
        "methods": [
            _method(each, _kind(each, evaluation, trained), trained, trees.meta["scorer"]) for each in everything
        ],
        "references": {"always-small": everything[0].small, "always-large": everything[0].large},
        "alone": {"small": _alone(trees, small, problem), "large": _alone(trees, large, problem)},
        "tables": {  # as text, the first row a header
            "headline": headline_rows(everything),
            "all": method_rows(everything),
            "points": {each.name: point_rows(each) for each in everything},
            "notes": NOTES,
            "field": field_rows(evaluation.field) if evaluation.field else [],
            "field_note": FIELD_NOTE,
        },
        "at_lam": evaluation.at_lam,
        "settings": settings,
        "first": _first(settings),
        "flags": FLAGS,  # what they mean
        "reliability": scorer_reliability(trees, small, problem, weights),
        "problems": problems,
        "maths": {"pattern": PATTERN, "drawn": formulas(_texts(problems))},
        "sampling": sampling,
    }
    told: dict[str, Any] = plain(page)
    return told


def _problems(
    traced: Traced, answers: Mapping[str, str], config: EvaluateConfig, most: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the traces of problems drawn at random, as many as fit, and how many those are."""
    chosen = choose(traced.trees, traced.indices, config.report_problems, config.seed)
    records: list[dict[str, Any]] = []
    size = 0
    for position in chosen:
        record = problem_record(traced, position, answers)
        size += len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        if size > most:
            break
        records.append(record)
    return records, {"shown": len(records), "wanted": len(chosen), "megabytes": most / 1e6}


def _texts(problems: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what a page shows of problems that may have formulas in it."""
    for problem in problems:
        yield problem["question"]
        yield problem["answer"] or ""
        yield from (each["text"] for node in problem["nodes"] for each in node if each is not None)


def _alone(trees: Trees, paths: Paths, problem: NDArray[np.integer[Any]]) -> dict[str, float]:
    """Return the mean tokens of a problem that each model decodes on a path of its own; accepted steps alone."""
    tokens, count = trees.tokens[paths.rows], np.bincount(problem)
    found = {}
    for author, role in enumerate(ROLES):
        own = (tokens[:, :, author] * np.isin(paths.actions, (author, ANSWERED))).sum(axis=1)
        found[role] = float((np.bincount(problem, own) / count).mean())
    return found


def _first(settings: Sequence[Mapping[str, Any]]) -> int:
    """Return the setting that the page opens with: of the first method the one whose cost is nearest to 20 %."""
    own = [i for i, each in enumerate(settings) if each["method"] == settings[0]["method"]]
    return min(own, key=lambda i: abs(settings[i]["share"] - 0.2))


def _subject(evaluation: Evaluation, tables: DecisionTables, seed: int) -> dict[str, Any]:
    meta, subject = tables.trees.meta, evaluation.subject
    return {
        **{name: subject[name] for name in ("split", "problems", "cost", "transfer", "hash")},
        "caps": limits(subject),
        "rollouts": Path(subject["rollouts"]).name,
        **{name: str(meta[name]) for name in ("small", "large", "scorer")},
        "trees": len(tables.indices),
        "left_out_trees": int(meta["left_out_trees"]),  # for want of a score
        "resamples": evaluation.methods[0].resamples,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version("trim-routing"),
    }


def _kind(summary: MethodSummary, evaluation: Evaluation, trained: Mapping[str, Any]) -> str:
    """Return ``oracle``, ``random``, ``threshold``, ``trained``, or the group of a method of others."""
    if summary in evaluation.oracles:
        return "oracle"
    group = next((row.group for row in evaluation.field if row.name == summary.name), "step-level")
    if group != "step-level":
        return group
    if summary.name == RANDOM:
        return "random"
    return "threshold" if summary.name.startswith(TRIM_THR) and summary.name not in trained else "trained"


def _method(
    summary: MethodSummary, kind: str, trained: Mapping[str, Sequence[Artefact]], scorer: str
) -> dict[str, Any]:
    """Return what the page draws and recommends of a method: fields of its summary and of its points."""
    told = ("knob", "on_curve", "large_tokens", "total_tokens", "escalations")
    return {
        **{name: getattr(summary, name) for name in ("name", "band", "knots", "mixing_from")},
        "kind": kind,
        "points": [
            {
                **{name: getattr(point, name) for name in told},
                **{name: point.metrics[name] for name in ("accuracy", "pgr")},
                "c": point.metrics["c"].value,
                "cost": point.metrics["c"],
                **setting(trained.get(summary.name, ()), point.knob, scorer),
            }
            for point in summary.points
        ],
        "cpt_80": summary.metrics["cpt_80"],
    }


def plain(value: Any) -> Any:
    """Return values as scripts read them: estimates as [value, low, high], six digits, null for what is undefined."""
    if isinstance(value, Estimate):
        value = (value.value, value.low, value.high)
    elif hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
