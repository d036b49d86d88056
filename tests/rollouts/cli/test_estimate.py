"""What a dry run prints, and how many models it has in memory, on scripted models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from handmade import ScriptedWriter, problem, process
from rich.console import Console

from rollouts.cli.estimate import estimate
from rollouts.text.splitting import BLANK_LINE


@pytest.mark.parametrize("sequential", [False, True])
def test_a_dry_run_has_as_many_models_in_memory_as_the_run_would(sequential: bool) -> None:
    loaded, most = set[str](), [0]

    @contextmanager
    def opened(role: str, store: Any) -> Iterator[ScriptedWriter]:
        loaded.add(role)
        most[0] = max(most[0], len(loaded))
        yield ScriptedWriter(role)
        loaded.remove(role)

    model = SimpleNamespace(price_input=0.0, price_output=1e6)
    family: Any = SimpleNamespace(
        seed=0, process=process, open=opened, splitting=BLANK_LINE, config=SimpleNamespace(generator=lambda role: model)
    )
    screen = Console(record=True, width=200)
    problems = [problem(f"p{number}") for number in range(4)]
    estimate(screen, family, problems, 2, None, 16, sequential=sequential)
    printed = screen.export_text()
    assert most == [1 if sequential else 2] and not loaded
    assert "Estimate for 8 trees, from 4 problems" in printed and "100 % boxed" not in printed
    assert "price 0.00" not in printed.splitlines()[-1] and "minutes on this machine" in printed
