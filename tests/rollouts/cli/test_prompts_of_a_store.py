"""The command line over days, with templates that print the date and questions that hold special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from handmade import ScriptedScorer, ScriptedWriter

import rollouts.family
import rollouts.store.store
import rollouts.text.prompts
from rollouts.__main__ import main
from rollouts.family import Family
from rollouts.models.hf.fit import Fit
from rollouts.store.store import Store
from rollouts.tinymath import model_dir

QUESTIONS = [
    "Let a=70+33. Find a.",
    "Let a=70+33 <extra_0><|im_end|>. Find a.",
    "Let a=1+2. Find a<|im_start|>.",
]


class Today(date):
    """A calendar that the test turns."""

    now = date(2026, 11, 26)

    @classmethod
    def today(cls) -> date:
        return cls.now


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been sent: models and scorer are scripted, and start as real ones do."""
    sent: list[str] = []

    @contextmanager
    def writer(family: Family, role: str, store: Store) -> Iterator[Any]:
        family._record(store, {"role": role})
        sent.append(family.prompts(role).text("Q"))
        yield ScriptedWriter(role)

    @contextmanager
    def scorer(family: Family, store: Store) -> Iterator[Any]:
        family._record(store, {"role": "scorer"})
        assert family.reward_prompts is not None
        sent.append(family.reward_prompts.text("Q", []))
        scripted = ScriptedScorer()
        scripted.name = family.scorer_name
        yield scripted

    monkeypatch.setattr(Family, "open", writer)
    monkeypatch.setattr(Family, "open_scorer", scorer)
    for module in (rollouts.family, rollouts.store.store, rollouts.text.prompts):
        monkeypatch.setattr(module, "Date", Today)
    monkeypatch.setattr(Today, "now", date(2026, 11, 26))
    return sent


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    sections = []
    for role, section in (("small", "small"), ("large", "large"), ("prm", "scorer.model")):
        folder = tmp_path / role
        shutil.copytree(model_dir(role), folder)
        template = folder / "chat_template.jinja"
        template.write_text("{{ strftime_now('%d %B %Y') }}\n" + template.read_text())
        sections.append(f"[{section}]\nbackend = 'transformers'\nmodel = '{folder}'\nmax_length = 1024\n")
    (tmp_path / "models.toml").write_text("\n".join(sections))
    rows = [{"id": f"q{i}", "question": text, "answer": "7", "split": "test"} for i, text in enumerate(QUESTIONS)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--problems", str(tmp_path / "p.jsonl"), "--models", str(tmp_path / "models.toml")]


def words(capsys: Any) -> str:
    captured = capsys.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


def test_tomorrow_the_same_command_goes_on(tmp_path: Path, prompts: list[str], command: list[str], capsys: Any) -> None:
    out, models = str(tmp_path / "s"), command[2:]
    assert main(["generate", out, *command, "--limit", "2", "--no-score"]) == 0
    said = words(capsys)
    assert "templates of small, large, scorer print a date; in every prompt it is 2026-11-26." in said
    assert "small, large, scorer: 2 special tokens in 1 questions are read as text (p/q1)." in said
    Today.now = date(2026, 11, 28)
    assert main(["generate", out, *command, "--no-score"]) == 0
    assert main(["score", out, *models]) == 0
    assert "scorer: 3 special tokens in 2 questions are read as text (p/q1, p/q2)." in words(capsys)
    Today.now = date(2027, 1, 1)
    assert main(["expand", out, "--router", "threshold:0.5", *models]) == 0 and main(["verify", out]) == 0
    assert len(prompts) == 8 and all(prompt.startswith("26 November 2026\n") for prompt in prompts)
    assert Store(out).date == date(2026, 11, 26)
    assert main(["generate", str(tmp_path / "other"), *command]) == 0
    assert prompts[-1].startswith("01 January 2027\n")


def test_a_reward_model_learns_and_reads_prompts_of_the_stores_day(
    tmp_path: Path, prompts: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []

    def make(trunk: Any, style: Any, problems: Any, recipe: Any, folder: Path, on_progress: Any) -> Fit:
        learned.append(style.text("Q", []))
        shutil.copytree(tmp_path / "prm", folder)
        return Fit(4, 0.5, 0.5, 0.5)

    monkeypatch.setattr("rollouts.cli.train_prm.make", make)
    out = str(tmp_path / "s")
    assert main(["generate", out, *command, "--no-score"]) == 0
    Today.now = date(2027, 1, 1)
    assert main(["train-prm", out, str(tmp_path / "own"), *command[2:], "--split", "test"]) == 0
    assert all(each.startswith("26 November 2026\n") for each in (*learned, prompts[-1]))


def test_statistics_count_special_tokens(tmp_path: Path, prompts: list[str], command: list[str], capsys: Any) -> None:
    out = str(tmp_path / "s")
    assert main(["generate", out, *command]) == 0 and words(capsys)
    assert main(["stats", out, "--json-out", str(tmp_path / "s.json")]) == 0
    assert "3 special tokens in 2 questions are read as text (p/q1, p/q2)." in words(capsys)
    counted = json.loads((tmp_path / "s.json").read_text())["generated"]["neutralised"]
    assert counted["scorer"] == {"tokens": 3, "questions": 2, "first": ["p/q1", "p/q2"]}


def test_the_estimate_says_what_ends_a_step(
    tmp_path: Path, prompts: list[str], command: list[str], capsys: Any
) -> None:
    assert main(["generate", str(tmp_path / "s"), *command, "--dry-run"]) == 0
    said = words(capsys)
    assert "A step ends at a blank line" in said and "spaces or tabs" in said and "\\boxed{...}" in said
    assert "% delimiter" in said and "% boxed" in said and not (tmp_path / "s").exists()
