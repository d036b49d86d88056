"""What a cap on escalations costs: test curves on complete trees and on the same trees cut to K = 1, 2, 3.

    python -m benchmarks.cap --out results/cap --picture results/cap

For each cap routers are trained under it (the environment masks escalations beyond K) and evaluated under it;
always-large is exempt, so all curves have the same ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from agents.evaluation.plots import cost_accuracy
from agents.evaluation.splits import Candidates, Validation
from agents.evaluation.table import MIXING_MARK, MethodSummary, summarise
from agents.evaluation.walk import measured, references, run
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings
from agents.routers.mlp import at
from benchmarks.study import percent, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

METRICS = ("cpt_50", "cpt_80", "cpt_95", "accuracy_at_10", "accuracy_at_20", "accuracy_at_30")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        caps: Caps to compare with none.
        lams: λ of the routers.
        rollouts: A store of complete trees.
        out: Where to write the table, without suffix.
        picture: Where to draw the curves, without suffix.
    """

    caps: tuple[int, ...] = (1, 2, 3)
    lams: tuple[float, ...] = (7e-4, 1.4e-3, 2.8e-3, 5.6e-3)
    rollouts: str = "quickstart"
    out: Path | None = None
    picture: Path | None = None


def main() -> None:
    """Run the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    trees = compile_store(settings.rollouts)
    summaries: list[MethodSummary] = []
    thresholds: list[MethodSummary] = []
    for cap in (None, *settings.caps):
        train, whole, test = (
            decision_tables(trees, split, max_escalations=cap) for split in ("train", "validation", "test")
        )
        validation = Validation(lambda i, cap=cap: decision_tables(trees, indices=i, max_escalations=cap), trees)
        both = references(test)
        name = "no cap" if cap is None else f"K = {cap}"
        routers = {
            lam: at(Training(train, validation, lam, PPOSettings(), 0).run().router, lam) for lam in settings.lams
        }
        choosing = references(whole)
        own = [(router, run(router, whole)) for router in routers.values()]
        simple = Candidates(whole).spread_over(choosing.large)
        summaries.append(summarise(f"TRIM-Agg, {name}", measured(own, choosing, test), both))
        thresholds.append(summarise(f"TRIM-Thr, {name}", measured(simple, choosing, test), both))
        print(f"{name}: done")
    rows = []
    for summary in [*summaries, *thresholds]:
        marks = (f" {MIXING_MARK}" if name in summary.by_mixing else "" for name in METRICS)
        cells = (percent(summary.metrics[name]) + mark for name, mark in zip(METRICS, marks, strict=True))
        rows.append([summary.name, *cells])
    write("\n".join([*table(["", *METRICS], rows), ""]), settings.out)
    if settings.picture:
        cost_accuracy(summaries, f"{settings.rollouts}, test", settings.picture)


if __name__ == "__main__":
    main()
