"""What people see while they wait: a console on stderr, and bars with rate and remaining time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def console() -> Console:
    """Return the console that people read; piped output stays free of it."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(description: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show a bar with rate and remaining time; yields ``advance(count=1, note="")``."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    screen = console()
    with Progress(*columns, console=screen, refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str | None = None, completed: int | None = None) -> None:
            fields = {} if note is None else {"note": note}
            bar.update(task, advance=count if completed is None else None, completed=completed, **fields)  # type: ignore[arg-type]

        yield advance
