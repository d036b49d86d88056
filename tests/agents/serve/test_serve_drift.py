"""Decisions that look like held-out ones are no news; others are one warning in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_harness import Router, Upstreams, policy

from agents.evaluation.walk import decision_shares, run_trees
from agents.routers import artefact
from agents.routers.base import Knob, Threshold
from agents.serve.drift import EVERY, FEWEST, Drift
from agents.serve.metrics import Metrics
from rollouts.errors import ArtefactError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

EXPECTED = {"scores": [0.5, 0.0, 0.0, 0.5], "escalated": 0.5}
LAM = Knob("lam", 0.01)


def about(**more: Any) -> dict[str, Any]:
    return {"held_out": [{"lam": 0.01, "decisions": {**EXPECTED, **more}}]}


def gauge(metrics: Metrics, what: str, lam: str = "0.01") -> Any:
    return metrics.registry.get_sample_value("trim_drift", {"policy": "p", "lam": lam, "what": what})


def test_what_is_as_expected_is_not_warned_of_and_what_is_not_is_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    caplog.set_level(logging.WARNING, "trim.serve")
    drift = Drift("p", about(), metrics)
    for number in range(FEWEST - 1):
        drift.saw(LAM, 0.9 * (number % 2), number % 2)
    assert gauge(metrics, "scores") == 0 and not caplog.records  # too few to say anything
    for number in range(EVERY):
        drift.saw(LAM, 0.9 * (number % 2), number % 2)
    assert abs(gauge(metrics, "scores")) < 0.01 and abs(gauge(metrics, "escalations")) < 0.01 and not caplog.records
    for _ in range(2100):
        drift.saw(LAM, 0.1, 1)
    assert gauge(metrics, "scores") == pytest.approx(0.5) and gauge(metrics, "escalations") == pytest.approx(0.5)
    words = [record.getMessage() for record in caplog.records]
    assert len(words) == 2 and sum("scores are below one half, 50 % there" in each for each in words) == 1
    assert sum("of the steps, 50 % there" in each for each in words) == 1


def test_decisions_count_at_the_nearest_setting_and_without_figures_nothing_does() -> None:
    metrics = Metrics()
    both = {"held_out": [{"lam": 0.001, "decisions": EXPECTED}, {"lam": 0.1, "decisions": EXPECTED}, {"lam": 9.0}]}
    drift = Drift("p", both, metrics)
    for _ in range(FEWEST + EVERY):
        drift.saw(Knob("lam", 0.002), None, 1)
        drift.saw(Knob("threshold", 0.5), None, 1)
    assert gauge(metrics, "escalations", "0.001") == 0.5 and gauge(metrics, "escalations", "0.1") == 0
    assert gauge(metrics, "scores", "0.001") == 0  # none was known
    for none in ({}, {"held_out": [{"lam": 0.1}]}):
        Drift("p", none, metrics).saw(LAM, 0.1, 1)


def test_shares_on_trees_are_those_of_the_walk() -> None:
    trees = compile_store("quickstart", split="validation")
    tables = decision_tables(trees, "validation", indices=trees.select("validation")[:100])
    totals, found = run_trees(tables, Threshold(0.5)), decision_shares(Threshold(0.5), tables)
    assert found["escalated"] == pytest.approx(totals["escalations"].sum() / totals["steps"].sum())
    assert sum(found["scores"]) == pytest.approx(1, abs=1e-4)
    assert sum(found["scores"][:10]) == pytest.approx(found["escalated"], abs=1e-4)  # of a threshold at one half


@pytest.mark.parametrize("bad", [{"scores": [2.0]}, {"escalated": "x"}, {"scores": [float("nan")]}, {"scores": 3}])
def test_figures_that_are_none_are_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises((ArtefactError, ValueError)):
        artefact.load(policy(tmp_path, **about(**bad)))


def test_a_service_compares(upstreams: Upstreams, tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in (("FEWEST", 10), ("EVERY", 5)):
        monkeypatch.setattr(f"agents.serve.drift.{name}", value)
    running = Router(policy(tmp_path, Threshold(1.1), **about(escalated=0.0)), upstreams.urls())
    try:
        running.chats(8)
        assert running.metric("trim_drift", what="escalations") == 1.0
        assert 0 < running.metric("trim_drift", what="scores") <= 1 and np.isfinite(running.metric("trim_drift"))
    finally:
        running.stop()
