"""Everything that the page says of an evaluation, as plain values: nothing here knows how it looks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.bootstrap import resample_weights
from agents.evaluation.suite import RANDOM, TRIM_THR, EvaluateConfig, Evaluation, load_methods
from agents.evaluation.table import (
    NOTES,
    MethodSummary,
    as_plain,
    caption,
    headline_rows,
    limits,
    method_rows,
    point_rows,
)
from agents.report.positions import positions, triple
from agents.report.reliability import scorer_reliability
from agents.report.routers import Shown, shown_routers
from agents.report.traces import FLAGS, Traced, choose, flags, problem_record
from agents.report.walks import Paths, follow
from rollouts.errors import ConfigError
from rollouts.store.store import Store
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

TRACE_BYTES = 2_300_000
"""Most bytes of traces on a page, so that a phone still opens it."""


@dataclass(frozen=True)
class TraceLimits:
    """How much of the traces goes on the page.

    Attributes:
        problems: Problems, at most.
        bytes: Bytes of JSON, at most.
    """

    problems: int = 60
    bytes: int = TRACE_BYTES


def gather(config: EvaluateConfig, evaluation: Evaluation, most: TraceLimits | None = None) -> dict[str, Any]:
    """Return the content of the page of an evaluation; see `described`.

    Raises:
        TrimError: As `agents.evaluation.suite.evaluate`.
    """
    if config.report_problems < 0:
        raise ConfigError(f"report_problems is {config.report_problems}, expected at least 0.")
    subject = evaluation.subject
    trees = compile_store(config.rollouts, config.scorer, config.grader)
    caps = {name: subject[name] for name in ("max_escalations", "max_large_tokens")}
    tables = decision_tables(trees, subject["split"], cost=subject["cost"], **caps)
    answers = {problem.id: problem.answer for problem in Store(config.rollouts).problems()}
    shown = shown_routers(load_methods(config.runs), evaluation.methods)
    return described(evaluation, shown, tables, answers, most or TraceLimits(config.report_problems), config.seed)


def described(
    evaluation: Evaluation,
    shown: Sequence[Shown],
    tables: DecisionTables,
    answers: Mapping[str, str],
    most: TraceLimits,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the content of the page.

    Args:
        evaluation: What was found.
        shown: Routers to follow; always-small and always-large are the last two.
        tables: The split that it was found on.
        answers: Reference answers by problem id.
        most: How much of the traces is wanted.
        seed: Of the bootstrap, and of the draw of problems.

    Returns:
        Lists, dicts, strings and numbers; undefined numbers are None.
    """
    uncapped = replace(tables, max_escalations=None, max_large_tokens=None)
    paths = [follow(each.router, uncapped if each.method == "always-large" else tables) for each in shown]
    small, large = paths[-2:]
    marks = [flags(each, small) for each in paths]
    _, problem = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
    weights = resample_weights(int(problem.max()) + 1, seed=seed)
    traced = Traced(tables.trees, tables.indices, paths, marks, small, large)
    problems, sampling = _problems(traced, answers, most, seed)
    settings = [
        {
            "method": each.method,
            "knob": each.knob,
            "label": each.label,
            "counts": {name: int(which.sum()) for name, which in own.items()},
            "share": _share(path, large),
            "positions": positions(path, problem, weights),
        }
        for each, path, own in zip(shown, paths, marks, strict=True)
    ]
    everything = [*evaluation.methods, evaluation.query_oracle, evaluation.oracle]
    content = {
        "subject": _subject(evaluation, tables, seed),
        "sentences": evaluation.sentences,
        "caption": caption(everything, limits(evaluation.subject)),
        "methods": [_method(each, _kind(each, evaluation)) for each in everything],
        "references": [
            {"name": name, "c": triple(each["c"]), "accuracy": triple(each["accuracy"])}
            for name, each in zip(
                ("always-small", "always-large"), (everything[0].small, everything[0].large), strict=True
            )
        ],
        "tables": {
            "headline": headline_rows(everything),
            "all": method_rows(everything),
            "points": {each.name: point_rows(each) for each in everything},
            "notes": NOTES,
        },
        "at_lam": [
            {"method": each.method, "lam": each.lam, "threshold": each.threshold, "p": each.holm}
            | {"difference": triple(each.difference)}
            for each in evaluation.at_lam
        ],
        "settings": settings,
        "first": _first(settings),
        "flags": FLAGS,
        "reliability": scorer_reliability(tables.trees, small, problem, weights),
        "problems": problems,
        "sampling": sampling,
    }
    plain: dict[str, Any] = as_plain(_rounded(content))
    return plain


def _problems(
    traced: Traced, answers: Mapping[str, str], most: TraceLimits, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the traces of problems drawn at random, as many as fit, and how many those are."""
    chosen = choose(traced.trees, traced.indices, most.problems, seed)
    records: list[dict[str, Any]] = []
    size = 0
    for position in chosen:
        record = problem_record(traced, position, answers)
        size += len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        if size > most.bytes:
            break
        records.append(record)
    problems = len(np.unique(traced.trees.problem[traced.indices]))
    sampling = {
        "shown": len(records),
        "wanted": len(chosen),
        "problems": problems,
        "trees": len(traced.indices),
        "megabytes": most.bytes / 1e6,
    }
    return records, sampling


def _share(paths: Paths, large: Paths) -> float:
    """Return the large tokens of paths as a share of those of always-large."""
    return float(paths.large_tokens.sum() / max(int(large.large_tokens.sum()), 1))


def _first(settings: Sequence[Mapping[str, Any]]) -> int:
    """Return the setting that the page opens with: of the first method the one whose cost is nearest to 20 %."""
    own = [i for i, each in enumerate(settings) if each["method"] == settings[0]["method"]]
    return min(own, key=lambda i: abs(settings[i]["share"] - 0.2))


def _subject(evaluation: Evaluation, tables: DecisionTables, seed: int) -> dict[str, Any]:
    meta, subject = tables.trees.meta, evaluation.subject
    return {
        **{key: subject[key] for key in ("split", "problems", "cost", "transfer", "hash")},
        "caps": limits(subject),
        "rollouts": Path(subject["rollouts"]).name,
        **{key: str(meta[key]) for key in ("small", "large", "scorer", "grader")},
        "trees": len(tables.indices),
        "left_out_trees": int(meta["left_out_trees"]),
        "resamples": evaluation.methods[0].resamples,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version("trim-routing"),
    }


def _kind(summary: MethodSummary, evaluation: Evaluation) -> str:
    """Return ``oracle``, ``random``, ``threshold`` or ``trained``."""
    if summary in (evaluation.oracle, evaluation.query_oracle):
        return "oracle"
    if summary.name == RANDOM:
        return "random"
    return "threshold" if summary.name.startswith(TRIM_THR) else "trained"


def _method(summary: MethodSummary, kind: str) -> dict[str, Any]:
    """Return what the figure of curves draws of a method."""
    band = summary.band
    points = [
        {
            "knob": point.knob,
            "on_curve": point.on_curve,
            "c": point.metrics["c"].value,
            "accuracy": triple(point.metrics["accuracy"]),
            "pgr": triple(point.metrics["pgr"]),
            "large_tokens": point.large_tokens,
            "escalations": point.escalations,
        }
        for point in summary.points
    ]
    return {
        "name": summary.name,
        "kind": kind,
        "band": {"c": band.c, "accuracy": band.accuracy, "low": band.low, "high": band.high},
        "knots": summary.knots,
        "mixing_from": summary.mixing_from,
        "points": points,
        "cpt_80": triple(summary.metrics["cpt_80"]),
    }


def _rounded(value: Any) -> Any:
    """Return nested values with numbers cut to six significant digits: what a page can show."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float) and np.isfinite(value):
        return float(f"{value:.6g}")
    return value
