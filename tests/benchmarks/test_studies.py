"""Studies: what is fitted is kept by name, and their reports say of the same router that it is the same."""

from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from made_outcomes import level, references, simulated
from scripted_store import scripted_store

from agents.evaluation.bootstrap import Estimate, resample_weights
from agents.evaluation.curves import Method
from agents.evaluation.splits import thresholds
from agents.evaluation.walk import run
from agents.routers.base import Threshold
from benchmarks import conditioned, noise, robustness, routers
from benchmarks.methods import LAMS, Fitted
from benchmarks.study import CURVE, Study, all_kept, average, curve_cells, shown, table
from trim_env.tables import decision_tables

STUDIES = ("conditioned", "little_data", "noise", "paper", "robustness", "routers", "shift")


def doubled(task, settings):
    """What a study fits, and a line for each time that it does."""
    with (settings.kept / "made").open("a", encoding="utf-8") as file:
        file.write(f"{task}\n")
    return 2 * task


def test_what_is_fitted_is_kept_by_name_and_by_store(tmp_path):
    settings = Study(kept=tmp_path, processes=1)
    tasks = {"first/1": 1, "second one": 2}
    with pytest.raises(SystemExit, match="2 of 2 are left"):
        all_kept(doubled, tasks, replace(settings, minutes=-1))
    assert all_kept(doubled, tasks, settings) == [2, 4]
    assert all_kept(doubled, {"second one": 5, "first/1": 1}, replace(settings, minutes=-1)) == [4, 2]
    with pytest.raises(SystemExit, match="1 of 2 are left"):
        all_kept(doubled, {"first/1": 1, "third": 3}, replace(settings, minutes=-1))
    with pytest.raises(SystemExit, match="2 of 2 are left"):
        all_kept(doubled, tasks, replace(settings, rollouts="another/store", minutes=-1))
    assert Counter((tmp_path / "made").read_text().split()) == {"1": 1, "2": 1}


def test_studies_keep_their_fits_apart():
    settings = [import_module(f"benchmarks.{name}").Settings() for name in STUDIES]
    assert all(isinstance(each, Study) for each in settings)
    assert len({each.kept for each in settings}) == len(STUDIES)
    benchmarks = Path(noise.__file__).parent
    assert {file.stem for file in benchmarks.glob("*.py") if "(Study)" in file.read_text("utf-8")} == set(STUDIES)


def test_tables_and_intervals():
    assert table(["a", "b"], [["x", "1"], ["y", "2"]]) == ["| a | b |", "|---|---:|", "| x | 1 |", "| y | 2 |"]
    assert table(["a"], [], left=0) == ["| a |", "|---:|"]
    each = Estimate(0.12345, -0.01, 0.2, 0.0)
    assert shown(each) == "+0.1235 [-0.0100, +0.2000]" and shown(each, ".1f", 100) == "12.3 [-1.0, 20.0]"
    assert shown(Estimate(np.nan, np.nan, np.nan, 1.0)) == "–"


def test_cells_of_a_curve_mark_what_mixing_alone_reaches():
    """From 0.4 at no cost over 0.7 at 50 % to 0.8 at 100 %: 80 % of the gap are 0.72, between the last two."""
    cells = curve_cells(Method([(0.1, level(0.7, 50))], (0,)), references(), resample_weights(1))
    assert len(cells) == len(CURVE) and cells[0] == "33.3 [33.3, 33.3]" and cells[1] == "60.0 [60.0, 60.0] †"
    assert cells[2].endswith(" †") and cells[3].startswith("0.")


def test_outcomes_are_averaged_problem_by_problem():
    method, _ = simulated(20, (0.2, 0.5), 2)
    (_, one), (_, other) = method.points
    assert (average([one, other]).correct == (one.correct + other.correct) / 2).all()
    assert average([one, one]).problem_ids == one.problem_ids


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "s"
    scripted_store(path, 90)
    return str(path)


@pytest.fixture(scope="module")
def threshold(store):
    """A fit of thresholds that all methods of the comparison are said to be."""
    return routers.measure(("threshold", 0), routers.Settings(rollouts=store))


def test_routers_that_are_the_same_do_not_differ(store, threshold):
    cells = [replace(threshold, method=name) for name in (*routers.METHODS, *routers.LEARNED)]
    lines = routers.report(routers.Settings(rollouts=store, seeds=2), cells).splitlines()
    rows = [line.split(" | ")[1:-1] for line in lines if line.startswith(tuple(f"| `{m}`" for m in routers.METHODS))]
    assert len(rows) == len(routers.METHODS) + len(routers.LEARNED) and all(row == rows[0] for row in rows[:4])
    differences = [line for line in lines if line.startswith("- `")]
    assert len(differences) == 6 and all(line.count("+0.0 [+0.0, +0.0]") >= 3 for line in differences)


def test_one_policy_that_is_the_eight_has_their_area(store, threshold):
    both = threshold.validation, threshold.test
    cells = 2 * [conditioned.Cell(both, both, both, 8.0, 2.0)]
    text = conditioned.report(conditioned.Settings(rollouts=store, seeds=2), cells)
    assert "+0.0000 [+0.0000, +0.0000]" in text and "25 % of that of the eight" in text
    _, *areas, _, _ = next(line for line in text.splitlines() if line.startswith("| 0 |")).strip("| ").split(" | ")
    assert len(set(areas)) == 1 and 0 < float(areas[0]) < 1


def test_a_threshold_is_not_above_the_best_one(store, threshold):
    """On validation, where the best one was chosen."""
    settings = robustness.Settings(rollouts=store, seeds=1, lams=(1e-3, 5e-3))
    tables = decision_tables(store, "validation")
    one = run(Threshold(0.4), tables)
    cells = [robustness.Cell(lam, 0, one, one, "level with", 1, 2.0) for lam in settings.lams]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "_tables", lambda settings, split: tables)
        lines = robustness.report(settings, cells).splitlines()
    assert "2 trainings (1 seeds, 2 λ, schema agg+), 2.0 s each" in lines[4]
    gains = [line.split(" | ")[4] for line in lines if line.startswith(("| 0.001 |", "| 0.005 |"))]
    assert len(gains) == 2 and all(float(gain.split()[0]) <= 0 for gain in gains)


def test_damage_that_keeps_the_order_costs_only_where_it_comes_after_the_fit(store, monkeypatch):
    """Thresholds are quantiles, so that miscalibrated scores have the same ones."""

    def best_of_some(method, data, seed):
        tables = decision_tables(data.trees, "validation")
        tried = [(each, run(each, tables)) for each in map(Threshold, thresholds(tables, 12))]
        return Fitted({lam: max(tried, key=lambda one: one[1].returns(lam).mean())[0] for lam in LAMS}, 0.0)

    monkeypatch.setattr(noise, "fit", best_of_some)
    settings, levels = noise.Settings(rollouts=store, methods=("some",)), {"none": (0.0,), "miscalibration": (0.8,)}
    clean = noise.fit_clean("some", settings)
    good, bad = (noise.measure(("some", kind, *own, clean), settings) for kind, own in levels.items())
    assert good.fitted == good.surprised == pytest.approx(bad.fitted) and bad.surprised < bad.fitted
    monkeypatch.setattr(noise, "LEVELS", levels)
    row = f"| miscalibration | 0.8 | {bad.fitted:.4f} / {bad.surprised:.4f} |"
    assert row in noise.report(settings, [good, bad])
