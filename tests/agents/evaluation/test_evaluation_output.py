"""Tables, files, figures and sentences say what the numbers say."""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from made_outcomes import level, outcomes, references, simulated

from agents.escape import finite
from agents.evaluation.bootstrap import paired_curves, resample_weights
from agents.evaluation.compare import difference, number
from agents.evaluation.curves import Method, References
from agents.evaluation.plots import cost_accuracy, training_curve
from agents.evaluation.suite import EvaluateConfig, evaluate
from agents.evaluation.table import (
    method_rows,
    point_rows,
    rich_table,
    summarise,
    to_csv,
    to_markdown,
)
from rollouts.errors import ConfigError, DataError

NAMES = ("A", "B")
WEIGHTS = resample_weights(200, 400)


@pytest.fixture(scope="module")
def summaries():
    good, refs = simulated(200, [0.05, 0.2, 0.5, 1.2], 4)
    poor, _ = simulated(200, [0.2], 1.2)
    return [summarise("good | fast", good, refs, resamples=200), summarise("poor", poor, refs, resamples=200)]


@pytest.fixture(scope="module")
def without_gap():
    refs = References(outcomes([1, 1, 0], 0), outcomes([1, 0, 0], 10))
    return summarise("lost", Method.whole([(0.5, outcomes([1, 1, 0], 3))]), refs, resamples=50)


def test_summary_holds_points_by_cost_and_flags(summaries):
    good, poor = summaries
    assert [point.knob for point in good.points] == [0.05, 0.2, 0.5, 1.2]
    assert [point.on_curve for point in good.points] == [True, True, True, False]
    assert "cpt_95" in poor.by_mixing
    assert poor.metrics["accuracy"] == poor.points[0].metrics["accuracy"]
    assert "accuracy" not in good.metrics  # a curve has no one accuracy
    point = good.points[0]
    assert point.discarded_tokens == pytest.approx(0.8 * point.large_tokens)
    assert point.total_tokens > point.large_tokens


def to_json(summaries):
    return json.dumps([finite(asdict(summary)) for summary in summaries], allow_nan=False)


def test_same_seed_same_summary(summaries):
    good, refs = simulated(200, [0.05, 0.2, 0.5, 1.2], 4)
    assert to_json([summarise("good | fast", good, refs, resamples=200)]) == to_json(summaries[:1])
    assert to_json([summarise("good | fast", good, refs, seed=1, resamples=200)]) != to_json(summaries[:1])


def test_table_marks_mixing_and_leaves_gaps(summaries):
    rows = {row[0]: row[1:] for row in method_rows(summaries)}
    assert rows["CPT(95 %), %"][1].endswith("†")
    assert not rows["CPT(50 %), %"][0].endswith("†")
    assert rows["Accuracy, %"][0] == "–"
    value = summaries[1].metrics["accuracy"]
    assert rows["Accuracy, %"][1] == f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    assert "not on the hull" in point_rows(summaries[0])[-1][1]


def test_undefined_is_said(without_gap):
    rows = {row[0]: row[1] for row in method_rows([without_gap])}
    assert rows["CPT(80 %), %"] == rows["ΔIBC"] == "undefined"
    record = next(row for row in csv.DictReader(io.StringIO(to_csv([without_gap]))) if row["metric"] == "cpt_80")
    assert (record["value"], record["low"], record["undefined"]) == ("", "", "1")
    assert json.loads(to_json([without_gap]))[0]["metrics"]["cpt_80"]["value"] is None


def test_share_of_undefined_resamples_is_shown():
    refs = References(outcomes([1, 0, 0], 0), outcomes([1, 0, 1], 10))
    summary = summarise("few", Method.whole([(0.0, outcomes([1, 0, 0.5], 2))]), refs, resamples=200)
    cell = next(row[1] for row in method_rows([summary]) if row[0] == "ΔIBC")
    assert f"undefined in {100 * summary.metrics['delta_ibc'].undefined:.1f} % of resamples" in cell


def test_csv_has_a_row_for_each_method_and_metric(summaries):
    rows = list(csv.DictReader(io.StringIO(to_csv(summaries))))
    assert len(rows) == sum(len(summary.metrics) for summary in summaries)
    found = next(row for row in rows if row["method"] == "poor" and row["metric"] == "cpt_95_cost")
    expected = summaries[1].metrics["cpt_95_cost"]
    assert float(found["value"]) == pytest.approx(expected.value, rel=1e-5)
    assert float(found["high"]) == pytest.approx(expected.high, rel=1e-5)
    assert found["by_mixing"] == "true"


def test_json_is_plain_and_complete(summaries):
    text = to_json(summaries)
    assert "NaN" not in text and "Infinity" not in text
    first = json.loads(text)[0]
    assert first["metrics"]["delta_ibc"]["low"] == summaries[0].metrics["delta_ibc"].low
    assert first["points"][0]["metrics"]["c"]["value"] == summaries[0].points[0].metrics["c"].value


def test_markdown_columns_agree(summaries):
    table = [line for line in to_markdown(summaries).splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
    assert set(columns[: len(method_rows(summaries)) + 1]) == {4}
    assert "good \\| fast" in table[0]


def test_rich_table_prints_brackets(summaries):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, record=True)
    rows = method_rows(summaries)
    console.print(rich_table([*rows, ["[bold]", "[red]x", "y"]], "title"))
    text = console.export_text()
    assert rows[-1][1] in text and "[red]x" in text


def test_no_points_is_an_error():
    with pytest.raises(DataError, match="no operating points"):
        summarise("empty", Method.whole([]), references())


def test_figures_are_written_and_the_same_each_time(summaries, tmp_path):
    png, svg = cost_accuracy(summaries, "made up", tmp_path / "new" / "lam-0.5", oracle=summaries[1])
    assert (png.name, svg.name) == ("lam-0.5.png", "lam-0.5.svg")
    width, height = (int.from_bytes(png.read_bytes()[i : i + 4]) for i in (16, 20))
    assert width * 9 == height * 16
    assert svg.read_bytes() == cost_accuracy(summaries, "made up", tmp_path / "lam-0.5", summaries[1])[1].read_bytes()


def test_figure_without_a_gap(without_gap, tmp_path):
    assert cost_accuracy([without_gap], "made up", tmp_path / "lost")[0].stat().st_size > 10_000


def test_figure_refuses_methods_on_different_problems(summaries, without_gap, tmp_path):
    with pytest.raises(DataError, match="same problems"):
        cost_accuracy([*summaries, without_gap], "made up", tmp_path / "mixed")
    free = summarise("free", Method.whole([(0.0, level(0.5, 0))]), references(cost=0), resamples=20)
    with pytest.raises(DataError, match="above 0"):
        cost_accuracy([free], "made up", tmp_path / "free")


def test_training_curve(tmp_path):
    names = ("step", "validation/return", "validation/accuracy", "validation/share")
    records = [dict(zip(names, (i, i / 10, i / 5, 1 - i / 5), strict=True)) for i in range(5)]
    levels = {
        "best constant": {"return": 0.2, "accuracy": 0.5, "share": 0.0},
        "best threshold": {"return": 0.3, "accuracy": 0.6, "share": 0.2},
    }
    png, svg = training_curve(records, levels, "PPO", tmp_path / "training")
    assert png.stat().st_size > 10_000 and svg.stat().st_size > 10_000


def test_importing_loads_neither_matplotlib_nor_rich():
    code = (
        "import sys, agents.evaluation.plots, agents.evaluation.compare\n"
        "print('matplotlib' in sys.modules or 'rich' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def solved(count, tokens, problems=200):
    """Solve the first problems."""
    return outcomes(np.arange(problems) < count, tokens)


def test_numbers_never_round_to_zero():
    assert [number(x) for x in (1.84, 0.0, 0.04, -0.0312, -1.26)] == ["1.8", "0.0", "0.04", "-0.03", "-1.3"]


def test_sentences_of_curves():
    good, refs = simulated(200, [0.05, 0.2, 0.5], 5)
    poor, _ = simulated(200, [0.2, 0.5], 1.2)
    found = difference(NAMES, good, poor, refs, WEIGHTS)
    percent = paired_curves(good, poor, refs, WEIGHTS)["cpt_80_percent"]
    assert percent.high < 0
    assert found.startswith("A recovers 80 % of the gap between always-small and always-large (B only by mixing")
    assert f"at {-percent.value:.1f} % less cost than B (95 % interval {-percent.high:.1f} %" in found
    back = difference(NAMES, poor, good, refs, WEIGHTS)
    assert "% more cost than B" in back and "(A only by mixing" in back
    again, _ = simulated(200, [0.05, 0.2, 0.5], 5, seed=0)
    assert "No difference" in difference(NAMES, good, again, refs, WEIGHTS)


def test_sentence_of_curves_without_a_gap():
    refs = References(solved(100, 0), solved(90, 100))
    points = Method.whole([(0.0, solved(110, 50))])
    assert difference(NAMES, points, points, refs, WEIGHTS).startswith("There is no gap to recover")


def test_sentence_of_curves_with_an_uncertain_gap_makes_no_claim():
    # always-large solves 3 problems more: 5 % of the resamples have no gap.
    refs = References(solved(100, 0), solved(103, 100))
    cheap, dear = (Method.whole([(0.0, solved(103, cost))]) for cost in (5, 80))
    found = difference(NAMES, cheap, dear, refs, WEIGHTS)
    assert paired_curves(cheap, dear, refs, WEIGHTS)["cpt_80_percent"].high < 0
    assert found.startswith("No difference in the cost of recovering")
    assert re.search(r"undefined in \d\.\d % of resamples", found)


def test_baselines_are_not_left_out_in_silence() -> None:
    with pytest.raises(ConfigError, match="field_beside"):
        evaluate(EvaluateConfig((Path("runs/none"),), baselines=True))
