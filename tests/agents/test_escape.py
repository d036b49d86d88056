"""Names that are made to do harm are shown, and do nothing: on terminals, in tables, spreadsheets and pictures."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate as evaluate_command
import train as train_command
from agents import __main__ as command
from agents import escape
from agents.evaluation.curves import Method, References
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.plots import cost_accuracy
from agents.evaluation.table import headline_rows, rich_table, summarise, to_csv, to_markdown
from agents.routers import artefact
from agents.routers.base import Threshold
from rollouts.trees.compile import compile_store

EVIL = '=HYPERLINK("//x")\x1b[31m[red]|<img src=x onerror=y>\n# $\\frac$ \u202e*_`\ud800'


@pytest.mark.parametrize("text", [EVIL, "\x9b2J", "a\rb", "\u2028", "\x00", "\t", "\ufeff"])
def test_terminals_get_one_line_of_printable_text(text):
    shown = escape.terminal(text)
    assert shown.isprintable() and shown.encode()
    assert escape.terminal("λ = 0.003 †, ΔIBC [+0.1, –] [bold]") == "λ = 0.003 †, ΔIBC [+0.1, –] [bold]"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n="])
def test_no_cell_is_a_formula(start):
    assert escape.csv_cell(f"{start}1+1")[0] in "'\\"
    assert escape.csv_cell("trim-agg (a-b)") == "trim-agg (a-b)"


def test_markdown_shows_names_as_they_are():
    assert escape.markdown("trim-agg (second run)") == "trim-agg (second run)"
    shown = escape.markdown(EVIL)
    assert "<" not in shown and "\n" not in shown and r"\|" in shown and r"\[red\]" in shown and r"\*\_\`" in shown


def outcomes(seed):
    draw = np.random.default_rng(seed)
    one, tokens = np.ones(40), draw.integers(5, 50, 40).astype(float)
    return Outcomes(tuple(map(str, range(40))), draw.random(40), tokens * seed, tokens * seed, tokens, one, one, one)


@pytest.fixture(scope="module")
def summary():
    both = References(outcomes(0), outcomes(3))
    return summarise(EVIL, Method.whole([(0.5, outcomes(1)), (0.6, outcomes(2))]), both, resamples=50)


def test_tables_of_every_kind(summary):
    from rich.console import Console

    rows = list(csv.reader(io.StringIO(to_csv([summary]))))
    assert all(row[0].startswith("'=HYPERLINK") and row[0].isprintable() for row in rows[1:])
    text = to_markdown([summary])
    assert "<img" not in text and "\x1b" not in text and text.encode()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bars = {line.replace(r"\|", "").count("|") for line in lines[:3]}
    assert bars == {3}
    console = Console(file=io.StringIO(), width=400, force_terminal=True)
    console.print(rich_table(headline_rows([summary]), "title"))
    assert "\x1b[31m" not in console.file.getvalue() and "[red]" in console.file.getvalue()


def test_pictures(summary, tmp_path):
    files = cost_accuracy([summary], "data", tmp_path / "curve")
    assert all(file.stat().st_size > 1000 for file in files)
    assert escape.plot("trim-agg") == "trim-agg" and not escape.plot("_hidden").startswith("_")


def store(folder, name=EVIL):
    trees = compile_store("quickstart")
    about = {
        "rollouts": {"store": "quickstart", "hash": trees.meta["hash"]},
        "cost": "decode-only",
        "max_steps": trees.meta["max_steps"],
        "max_escalations": None,
        "max_large_tokens": None,
        "held_out": [{"lam": 0.003, "verdict": "beaten", "sentence": f"It is {EVIL}."}],
    }
    return artefact.save(Threshold(0.4, name), folder / "policy", about)


def test_the_commands(tmp_path, capsys):
    place = store(tmp_path)
    assert command.main(["export", str(place), "--out", str(tmp_path / "out")]) == 0
    assert evaluate_command.main([str(place), "--out", str(tmp_path / "results"), "--report", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "\x1b[31m" not in text and "\u202e" not in text and text.encode()
    assert "=HYPERLINK" in printed.out and "[red]" in printed.out and "advised against" in printed.err
    for file in ("results.csv", "results.md", "results.json"):
        text = (tmp_path / "results" / file).read_text(encoding="utf-8")
        assert "\x1b" not in text and (file != "results.md" or "<img" not in text)
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_verdicts_of_a_training(capsys):
    bar = train_command.ProgressBar()
    bar.console.width = 400
    bar.end(0.003, SimpleNamespace(verdict="better", sentence=f"[+0.1, -0.2] {EVIL}"), 2)
    printed = capsys.readouterr().err
    assert printed.startswith("λ = 0.003 (2 attempts): [+0.1, -0.2] =HYPERLINK") and "[red]" in printed
    assert "\x1b" not in printed


def test_a_training_tells_at_once_that_it_is_under_way(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = train_command.ProgressBar()
    assert "getting ready" in capsys.readouterr().err
    bar.close()


def test_errors(tmp_path, capsys):
    place = store(tmp_path)
    described = json.loads((place / "policy.json").read_text())
    described["kind"] = EVIL
    (place / "policy.json").write_text(json.dumps(described))
    for main, arguments in (
        (command.main, ["export", str(place), "--out", str(tmp_path / "out")]),
        (evaluate_command.main, [str(place)]),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr().err.split("error: ")[1]
        assert printed.rstrip("\n").isprintable()
    assert Path(place).exists()
