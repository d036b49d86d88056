"""Reward models from trees alone: what `python -m rollouts train-prm` reaches on the bundled rollouts.

    python -m benchmarks.train_prm --variants head all-large --out results/train_prm.md

Models learn from the training problems and are judged on validation; nothing else of the store is looked at.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.methods import write
from rollouts.cli.prm import TrainPrm
from rollouts.cli.train_prm import evaluate
from rollouts.config import load_family
from rollouts.store.store import Store

VARIANTS: dict[str, dict[str, Any]] = {
    "head": {},
    "head-large": {"trunk": "large"},
    "all": {"unfreeze": 2},
    "all-large": {"trunk": "large", "unfreeze": 4},
    "added-large": {"trunk": "large", "added": 2, "unfreeze": 4},
}
SPLIT = "validation"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        variants: Which to train, of `VARIANTS`.
        seed: Of training.
        epochs: Most passes over the problems.
        rollouts: The store.
        out: Report; default: print only.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    seed: int = 0
    epochs: int = 20
    rollouts: str = "quickstart"
    out: Path | None = None


def part_of(whole: Store, path: Path) -> Store:
    """Return a new store with the validation problems, their steps and grades."""
    part = Store.create(path, whole.manifest["process"])
    problems = whole.problems(SPLIT)
    part.add_problems(problems)
    grades = part.attach("grades", "exact", whole.table_manifest("grades", "exact")["process"])
    for source, target in ((whole.steps, part.steps), (whole.grades("exact"), grades)):
        for table in source.read({problem.id for problem in problems}):
            empty = [None] * table.num_rows  # of columns that the bundled tables are older than
            rows = {
                name: table[name].to_pylist() if name in table.schema.names else empty for name in target.schema.names
            }
            target.append(rows, {}, target.next_shard())
    return part


def main(settings: Settings) -> None:
    """Train, judge and print."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        judged = part_of(Store(settings.rollouts), Path(scratch) / "judged")
        family = load_family("tinymath:transformers")
        bundled = family.scorer
        assert bundled is not None and bundled.model is not None
        single = bundled.model.model_copy(update={"dtype": "float32"})
        found = evaluate(
            judged, family.model_copy(update={"scorer": bundled.model_copy(update={"model": single})}), None
        )
        rows.append(("bundled", "exact labels of steps", found, ""))
        for name in settings.variants:
            started = time.monotonic()
            command = TrainPrm(
                store=Path(settings.rollouts),
                out=Path(scratch) / name,
                models="tinymath:transformers",
                epochs=settings.epochs,
                seed=settings.seed,
                **VARIANTS[name],
            )
            trained = command.train()
            seconds = time.monotonic() - started
            options = " ".join(f"--{key} {value}" for key, value in VARIANTS[name].items())
            rows.append((name, options or "(defaults)", evaluate(judged, trained, None), f"{seconds:.0f}"))
    lines = ["| model | options | AUC, solutions | AUC, steps | seconds |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {how} | {f['solution']:.3f} | {f['step']:.3f} | {took} |" for name, how, f, took in rows]
    write("\n".join(lines) + "\n", settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
