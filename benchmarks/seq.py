"""TRIM-Seq against TRIM-Agg: ``python -m benchmarks.seq``.

Trains both with the defaults of `train.py` for every λ and seed, one attempt each, and prints what they return on test
problems, with the paired difference of the two (mean over seeds) and its 95 % bootstrap interval over problems, and the
processor time of a training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import tyro

from agents.evaluation.bootstrap import paired_returns, resample_weights
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Validation
from agents.evaluation.walk import run
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings, SeqSettings
from benchmarks.study import average, shown
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        lams: λ.
        seeds: Number of seeds.
        rollouts: The store.
        agg: Settings of TRIM-Agg.
        seq: Settings of TRIM-Seq.
    """

    lams: tuple[float, ...] = (1.7e-3, 3.8e-3, 8.5e-3)
    seeds: int = 2
    rollouts: str = "quickstart"
    agg: PPOSettings = field(default_factory=PPOSettings)
    seq: SeqSettings = field(default_factory=SeqSettings)


def trained(trees: Trees, settings: PPOSettings, lam: float, seed: int) -> tuple[Outcomes, float]:
    """Return what one training reaches on test problems, and its seconds of processor time."""
    schema = "seq" if isinstance(settings, SeqSettings) else "agg+"
    tables = decision_tables(trees, "train", schema=schema)
    validation = Validation(lambda indices: decision_tables(trees, indices=indices, schema=schema), trees)
    begin = time.process_time()
    result = Training(tables, validation, lam, settings, seed, attempts=1).run()
    spent = time.process_time() - begin
    return run(result.router, decision_tables(trees, "test", schema=schema)), spent  # type: ignore[arg-type]


def main() -> None:
    """Run the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    trees = compile_store(settings.rollouts)
    print("| λ | TRIM-Agg | TRIM-Seq | difference [95 %] | processor time |\n|---:|---:|---:|---:|---:|", flush=True)
    for lam in settings.lams:
        mean: list[Outcomes] = []
        cells, seconds = [], []
        for kind in (settings.agg, settings.seq):
            found = [trained(trees, kind, lam, seed) for seed in range(settings.seeds)]
            mean.append(average([outcomes for outcomes, _ in found]))
            cells.append(" ".join(f"{outcomes.returns(lam).mean():.4f}" for outcomes, _ in found))
            seconds.append(np.mean([spent for _, spent in found]))
        gain = paired_returns(mean[1], mean[0], lam, resample_weights(len(mean[0])))
        print(
            f"| {lam:g} | {cells[0]} | {cells[1]} | {shown(gain)} | {seconds[0]:.0f} s, {seconds[1]:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
