"""Studies: what is fitted is kept by name, and their reports say of the same router that it is the same."""

from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from made_outcomes import level, references, simulated

from agents.evaluation.bootstrap import Estimate, resample_weights
from agents.evaluation.curves import Method
from benchmarks import conditioned, noise, robustness, routers
from benchmarks.study import CURVE, Study, all_kept, average, curve_cells, shown, table

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
def threshold():
    """A fit of thresholds that all methods of the comparison are said to be."""
    return routers.measure(("threshold", 0), routers.Settings())


def test_routers_that_are_the_same_do_not_differ(threshold):
    settings = routers.Settings(seeds=2)
    cells = [replace(threshold, method=name) for name in (*routers.METHODS, *routers.LEARNED)]
    lines = routers.report(settings, cells).splitlines()
    rows = [line.split(" | ")[1:-1] for line in lines if line.startswith(tuple(f"| `{m}`" for m in routers.METHODS))]
    assert len(rows) == len(routers.METHODS) + len(routers.LEARNED) and all(row == rows[0] for row in rows[:4])
    differences = [line for line in lines if line.startswith("- `")]
    assert len(differences) == 6 and all(line.count("+0.0 [+0.0, +0.0]") >= 3 for line in differences)


def test_one_policy_that_is_the_eight_has_their_area(threshold):
    both = threshold.validation, threshold.test
    text = conditioned.report(conditioned.Settings(seeds=2), 2 * [conditioned.Cell(both, both, both, 8.0, 2.0)])
    assert "+0.0000 [+0.0000, +0.0000]" in text and "25 % of that of the eight" in text
    _, *areas, _, _ = next(line for line in text.splitlines() if line.startswith("| 0 |")).strip("| ").split(" | ")
    assert len(set(areas)) == 1 and 0.6 < float(areas[0]) < 0.8


def test_thresholds_are_not_above_thresholds(threshold):
    settings = robustness.Settings(seeds=1, lams=(1.7e-3, 3.8e-3))
    cells = [
        robustness.Cell(lam, 0, test[1], validation[1], "ok", 1, 2.0)
        for lam, test, validation in zip(settings.lams, threshold.test[3:], threshold.validation[3:], strict=False)
    ]
    text = robustness.report(settings, cells)
    assert "2 trainings (1 seeds, 2 λ, schema agg+), 2.0 s each" in text and "| ΔIBC |" in text
    assert all(" | -" in line for line in text.splitlines() if line.startswith(("| 0.0017 |", "| 0.0038 |")))


def test_damage_costs_more_where_it_comes_after_the_fit(monkeypatch):
    settings = noise.Settings(methods=("TRIM-Thr",))
    clean = noise.fit_clean("TRIM-Thr", settings)
    levels = {"none": (0.0,), "miscalibration": (0.8,)}
    cells = [noise.measure(("TRIM-Thr", kind, *own, clean), settings) for kind, own in levels.items()]
    assert cells[0].fitted == cells[0].surprised == pytest.approx(cells[1].fitted) and cells[1].surprised < 0.6
    monkeypatch.setattr(noise, "LEVELS", levels)
    assert "| miscalibration | 0.8 | 0.6560 / 0.5208 |" in noise.report(settings, cells)
