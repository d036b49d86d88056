"""A router of models that think, from the store to the artefact, which remembers how its steps were split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from handmade import problem
from made_stores import finished
from scripted_thinking import ThinkingWriter, splitting

import agents
from agents.deploy.export import ExportConfig, export
from agents.runs.config import TrainConfig
from agents.runs.run import train

SPLITS = ("train", "validation", "train", "validation", "test")
PROBLEMS = [problem(f"p{number}", SPLITS[number % 5]) for number in range(60)]


@pytest.mark.parametrize(("by", "agent"), [("router", "threshold"), ("large", "exact")])
def test_a_trained_router_remembers_the_splitting(tmp_path: Path, by: str, agent: str) -> None:
    told = splitting(answer_by=by, min_tokens=3)
    store = finished(tmp_path / "s", kind=ThinkingWriter, problems=PROBLEMS, splitting=told)
    settings = {"rollouts": str(store.path), "agent": agent, "lam": (3e-2,), "attempts": 1, "tracking": "none"}
    train(TrainConfig(out=tmp_path / "run", **settings))  # type: ignore[arg-type]
    export(ExportConfig(str(tmp_path / "run"), out=tmp_path / "router"))
    policy = agents.load(tmp_path / "router")
    assert policy.about["splitting"] == told and policy.describe()["splitting"] == told
    assert json.loads((tmp_path / "router" / "policy.json").read_text())["version"] == 6
