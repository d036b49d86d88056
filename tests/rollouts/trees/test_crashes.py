"""Kills and repairs, a few of them; ``python -m benchmarks.crashes`` goes through many."""

from __future__ import annotations

from benchmarks.crashes import Settings, crash
from rollouts.store.rows import Rows


def test_after_kills_and_repairs_with_other_draws_everything_is_of_its_own_text(tmp_path, seed):
    figures = crash(Settings(kills=4, repairs=2, seed=seed), tmp_path / "s")
    assert figures.faults == 0, figures
    assert figures.kills.total() == 4 and figures.repairs == 2
    assert figures.compared > 1000 and figures.unclaimed > 0


def test_it_would_be_seen(tmp_path, monkeypatch):
    """Rows that are joined by place alone are found to be wrong."""
    monkeypatch.setattr(Rows, "_found", lambda rows, key: next(
        (held for held in rows._values[key[:2]] if held[:4] == key[:4]), key
    ))  # fmt: skip
    figures = crash(Settings(kills=0, repairs=1), tmp_path / "s")
    assert figures.wrong > 0
