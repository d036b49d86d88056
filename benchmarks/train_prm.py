"""Reward models from trees alone: what `python -m rollouts train-prm` reaches on the bundled rollouts.

    python -m benchmarks.train_prm --variants head fresh-large --out results/train_prm

Models learn from the training problems and are judged on validation; nothing else of the store is looked at.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.study import heading, table, write
from rollouts.cli.prm import TrainPrm
from rollouts.cli.train_prm import evaluate
from rollouts.config import load_family
from rollouts.models.hf.recipe import Recipe
from rollouts.store.store import Store

FRESH = {"added": 2, "epochs": 6, "rate": 3e-3, "trunk_rate": 3e-4}  # rates for models as narrow as these
VARIANTS: dict[str, tuple[Literal["small", "large"], dict[str, Any]]] = {
    "head": ("small", {}),
    "head-large": ("large", {}),
    "all": ("small", {**FRESH, "unfreeze": 2}),
    "fresh-large": ("large", FRESH),
    "fresh-large-after": ("large", {**FRESH, "after": "large"}),
    "all-large": ("large", {**FRESH, "unfreeze": 4}),
    "all-large-after": ("large", {**FRESH, "unfreeze": 4, "after": "large", "epochs": 8, "batch_tokens": 1024}),
}
SPLIT = "validation"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        variants: Which to train, of `VARIANTS`.
        seed: Of training.
        rollouts: The store.
        out: Report, without suffix; default: print only.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    seed: int = 0
    rollouts: str = "quickstart"
    out: Path | None = None


def part_of(whole: Store, path: Path) -> Store:
    """Return a new store with the validation problems, their steps and grades."""
    part = Store.create(path, whole.manifest["process"])
    problems = whole.problems(SPLIT)
    part.add_problems(problems)
    grades = part.attach("grades", "exact", whole.table_manifest("grades", "exact")["process"])
    for source, target in ((whole.steps, part.steps), (whole.grades("exact"), grades)):
        for read in source.read({problem.id for problem in problems}):
            empty = [None] * read.num_rows  # of columns that the bundled tables are older than
            rows = {
                name: read[name].to_pylist() if name in read.schema.names else empty for name in target.schema.names
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
            trunk, changes = VARIANTS[name]
            started = time.monotonic()
            recipe = {key: value for key, value in changes.items() if key != "after"}
            command = TrainPrm(
                store=Path(settings.rollouts),
                out=Path(scratch) / name,
                models="tinymath:transformers",
                trunk=trunk,
                after=changes.get("after", "small"),
                recipe=Recipe(seed=settings.seed, **recipe),
            )
            trained = command.train()
            seconds = f"{time.monotonic() - started:.0f}"
            options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in changes.items())
            rows.append((name, f"--trunk {trunk} {options}", evaluate(judged, trained, None), seconds))
    told = ([name, how, f"{found['solution']:.3f}", f"{found['step']:.3f}", took] for name, how, found, took in rows)
    lines = heading("Reward models from trees alone", "train_prm")
    lines += table(["model", "options", "AUC, solutions", "AUC, steps", "seconds"], told, left=2)
    write("\n".join([*lines, ""]), settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
