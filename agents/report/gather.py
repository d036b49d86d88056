"""Everything that the page says of an evaluation, gathered: `Page` names it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    caption,
    headline_rows,
    limits,
    method_rows,
    point_rows,
)
from agents.report.content import Method, Page, Problem, Sampling, Setting, Subject, plain
from agents.report.positions import positions
from agents.report.reliability import scorer_reliability
from agents.report.routers import shown_routers
from agents.report.traces import FLAGS, Traced, choose, flags, problem_record
from agents.report.walks import follow
from rollouts.errors import ConfigError
from rollouts.store.store import Store
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

TRACE_BYTES = 2_300_000
"""Most bytes of traces on a page, so that a phone still opens it."""


def gather(config: EvaluateConfig, evaluation: Evaluation, trace_bytes: int = TRACE_BYTES) -> dict[str, Any]:
    """Return the `Page` of an evaluation as JSON holds it.

    Args:
        config: Settings of the evaluation.
        evaluation: What was found.
        trace_bytes: Bytes of traces as JSON, at most.

    Raises:
        TrimError: As `agents.evaluation.suite.evaluate`.
    """
    if config.report_problems < 0:
        raise ConfigError(f"report_problems is {config.report_problems}, expected at least 0.")
    subject, seed = evaluation.subject, config.seed
    trees = compile_store(config.rollouts, config.scorer, config.grader)
    caps = {name: subject[name] for name in ("max_escalations", "max_large_tokens")}
    tables = decision_tables(trees, subject["split"], cost=subject["cost"], **caps)
    uncapped = replace(tables, max_escalations=None, max_large_tokens=None)
    shown = shown_routers(load_methods(config.runs, config.allow_old), evaluation.methods)
    paths = [follow(each.router, uncapped if each.method == "always-large" else tables) for each in shown]
    small, large = paths[-2:]
    marks = [flags(each, small) for each in paths]
    _, problem = np.unique(trees.problem[tables.indices], return_inverse=True)
    weights = resample_weights(int(problem.max()) + 1, seed=seed)
    settings: list[Setting] = [
        {
            "method": each.method,
            "knob": each.knob,
            "label": each.label,
            "counts": {name: int(which.sum()) for name, which in own.items()},
            "share": float(path.large_tokens.sum() / max(int(large.large_tokens.sum()), 1)),
            "positions": positions(path, problem, weights),
        }
        for each, path, own in zip(shown, paths, marks, strict=True)
    ]
    everything = [*evaluation.methods, evaluation.query_oracle, evaluation.oracle]
    traced = Traced(trees, tables.indices, paths, marks, small, large)
    answers = {each.id: each.answer for each in Store(config.rollouts).problems()}
    problems, sampling = _problems(traced, answers, config, trace_bytes)
    page: Page = {
        "subject": _subject(evaluation, tables, seed),
        "sentences": evaluation.sentences,
        "caption": caption(everything, limits(subject)),
        "methods": [_method(each, _kind(each, evaluation)) for each in everything],
        "references": {"always-small": everything[0].small, "always-large": everything[0].large},
        "tables": {
            "headline": headline_rows(everything),
            "all": method_rows(everything),
            "points": {each.name: point_rows(each) for each in everything},
            "notes": NOTES,
        },
        "at_lam": evaluation.at_lam,
        "settings": settings,
        "first": _first(settings),
        "flags": FLAGS,
        "reliability": scorer_reliability(trees, small, problem, weights),
        "problems": problems,
        "sampling": sampling,
    }
    told: dict[str, Any] = plain(page)
    return told


def _problems(
    traced: Traced, answers: Mapping[str, str], config: EvaluateConfig, most: int
) -> tuple[list[Problem], Sampling]:
    """Return the traces of problems drawn at random, as many as fit, and how many those are."""
    chosen = choose(traced.trees, traced.indices, config.report_problems, config.seed)
    records: list[Problem] = []
    size = 0
    for position in chosen:
        record = problem_record(traced, position, answers)
        size += len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        if size > most:
            break
        records.append(record)
    return records, {"shown": len(records), "wanted": len(chosen), "megabytes": most / 1e6}


def _first(settings: Sequence[Setting]) -> int:
    """Return the setting that the page opens with: of the first method the one whose cost is nearest to 20 %."""
    own = [i for i, each in enumerate(settings) if each["method"] == settings[0]["method"]]
    return min(own, key=lambda i: abs(settings[i]["share"] - 0.2))


def _subject(evaluation: Evaluation, tables: DecisionTables, seed: int) -> Subject:
    meta, subject = tables.trees.meta, evaluation.subject
    return {
        "split": subject["split"],
        "problems": subject["problems"],
        "cost": subject["cost"],
        "transfer": subject["transfer"],
        "hash": subject["hash"],
        "caps": limits(subject),
        "rollouts": Path(subject["rollouts"]).name,
        "small": str(meta["small"]),
        "large": str(meta["large"]),
        "scorer": str(meta["scorer"]),
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


def _method(summary: MethodSummary, kind: str) -> Method:
    return {
        "name": summary.name,
        "kind": kind,
        "band": summary.band,
        "knots": summary.knots,
        "mixing_from": summary.mixing_from,
        "points": [
            {
                "knob": point.knob,
                "on_curve": point.on_curve,
                "c": point.metrics["c"].value,
                "accuracy": point.metrics["accuracy"],
                "pgr": point.metrics["pgr"],
                "large_tokens": point.large_tokens,
                "escalations": point.escalations,
            }
            for point in summary.points
        ],
        "cpt_80": summary.metrics["cpt_80"],
    }
