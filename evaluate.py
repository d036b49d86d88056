"""Evaluate trained routers against reference points: table, curves, and what was gained in one sentence.

    python evaluate.py runs/ppo-agg-quickstart-seed0-20261121-120000
    python evaluate.py runs/first runs/second --split ood --out results/ood
    python evaluate.py runs/first --baselines         # beside query-level routers and cascades
    python evaluate.py runs/first --report page       # page/report.html: curves, traces and filters for a browser

Reads nothing of a run but its ``policy`` folders. Every setting is a field of
`agents.evaluation.suite.EvaluateConfig`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # more only wait for each other

import tyro

from agents.escape import terminal
from rollouts.errors import ConfigError, TrimError, require, said

if TYPE_CHECKING:
    from agents.evaluation.suite import Evaluation, Others


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        from rich.console import Console

        from agents.evaluation.suite import EvaluateConfig, evaluate, save

        config = tyro.cli(EvaluateConfig, args=arguments, description=__doc__)
        if config.out and config.out.is_file():
            raise ConfigError(f"--out {config.out} is a file, expected a folder.")
        with Console(stderr=True).status("evaluating"):
            evaluation = evaluate(config, _others() if config.baselines else None)
            folder = config.out or config.runs[0] / f"evaluation-{config.split}"
            files = save(evaluation, folder)
            if config.report:
                from agents.report.gather import gather
                from agents.report.render import write

                files.append(write(gather(config, evaluation), (config.out or Path()) / config.report))
    except (ModuleNotFoundError, TrimError, OSError) as error:
        print(f"error: {terminal(said(error, 'train'))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    show(evaluation, files)
    return 0


def _others() -> Others:
    require("baselines", "sklearn")  # said before anything is computed
    from agents.baselines.methods import field_beside

    return field_beside


def _by_group(rows: list[list[str]]) -> list[list[str]]:
    """Return the table of the field for a terminal: groups as rows of their own, intervals below values."""
    left_out = ("CPT(50 %), %", "CPT(95 %), %", "discarded")
    kept = [place for place, name in enumerate(rows[0]) if place and name not in left_out]
    table, last = [[rows[0][place] for place in kept]], ""
    for row in rows[1:]:
        if row[0] != last:
            last = row[0]
            table.append([last, *[""] * (len(kept) - 1)])
        name, *cells = (row[place] for place in kept)
        table.append([f"  {name}", *(cell.replace(" [", "\n[") for cell in cells)])
    return table


def show(evaluation: Evaluation, files: list[Path]) -> None:
    """Print tables, files and sentences."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agents.evaluation.table import FIELD_NOTE, NOTES, caption, field_rows, headline_rows, limits, rich_table

    console = Console()
    console.width = max(console.width, 110)
    methods = [*evaluation.methods, *evaluation.oracles]
    console.print(rich_table(headline_rows(methods), caption(methods, limits(evaluation.subject))))
    console.print("\n".join(NOTES), style="dim", highlight=False)
    if evaluation.field:
        console.print(rich_table(_by_group(field_rows(evaluation.field)), "The field"))
        console.print(FIELD_NOTE, style="dim", highlight=False)
    if evaluation.at_lam:
        table = Table(title="Return against the best threshold for the same λ, paired on problems")
        for name in ("method", "λ", "threshold", "difference [95 %]", "p (Holm)"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in evaluation.at_lam:
            gain = f"{row.difference.value:+.4f} \\[{row.difference.low:+.4f}, {row.difference.high:+.4f}]"
            table.add_row(Text(terminal(row.method)), f"{row.lam:g}", f"{row.threshold:.3f}", gain, f"{row.holm:.3g}")
        console.print(table)
    for file in files:
        print(file)
    for sentence in evaluation.sentences:
        console.print(Text(terminal(sentence), style="bold"))


if __name__ == "__main__":
    sys.exit(main())
