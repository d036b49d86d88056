"""What a router may read: curves of feature schemas, with and without a reward model, on the bundled rollouts.

    OMP_NUM_THREADS=1 python -m benchmarks.schemas --out results/schemas

For each schema one rule by the exact learner for a range of λ, with 16 operating points that validation chose.
Differences are paired on the test problems.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import paired_curves, resample_weights
from agents.evaluation.budgets import SETTINGS
from agents.evaluation.curves import CPT_TARGETS, Curve, Method
from agents.evaluation.splits import Validation, spread
from agents.evaluation.walk import measured, references, run
from agents.learners.exact import fit
from agents.learners.settings import ExactSettings
from agents.routers.mlp import at
from benchmarks.methods import RANGE
from benchmarks.study import heading, shown, table, write
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

AGAINST = "agg+"


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        schemas: Feature schemas.
        rollouts: The store.
        out: Report, without suffix; default: print only.
    """

    schemas: tuple[str, ...] = ("agg", "agg+prod", AGAINST, "free", "prefill", "all")
    rollouts: str = "quickstart"
    out: Path | None = None


def measure(trees: Trees, schema: str) -> tuple[Method, float]:
    """Return the curve of a schema on test, and the processor time of its fit."""
    train, whole, test = (decision_tables(trees, split, schema=schema) for split in ("train", "validation", "test"))
    choice = Validation(lambda i: decision_tables(trees, schema=schema, indices=i), trees).choice
    begin = time.process_time()
    policy = fit(train, choice, np.geomspace(*RANGE, 5).tolist(), ExactSettings(), 0).router(RANGE)
    seconds = time.process_time() - begin
    routers = {lam: at(policy, lam) for lam in np.geomspace(*RANGE, SETTINGS).tolist()}
    choosing = references(whole)
    chosen = spread([(router, run(router, whole)) for router in routers.values()], choosing.large)
    return measured(chosen, choosing, test), seconds


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    trees = compile_store(settings.rollouts)
    both = references(decision_tables(trees, "test"))
    found = {schema: measure(trees, schema) for schema in settings.schemas}
    weights = resample_weights(len(both.small))
    lines = heading("What a router may read", "schemas")
    lines += [
        f"`exact` for λ from {RANGE[0]:g} to {RANGE[1]:g}, one training; test split of `{settings.rollouts}`, costs in "
        f"% of always-large's tokens; CPT(80 %) against `{AGAINST}` in %, 95 %, paired; seconds of processor time.",
        "`free` reads no reward model; `prefill` and `all` have the large model read every proposal: not counted.",
        "",
    ]
    rows = []
    for schema, (method, seconds) in found.items():
        curve = Curve.of(method, both)
        row = [f"`{schema}`", *(f"{100 * float(curve.cpt(x)):.1f}" for x in CPT_TARGETS)]
        row.append(f"{100 * float(curve.accuracy_at(np.array([0.1]))[0]):.1f}")
        change = paired_curves(method, found[AGAINST][0], both, weights)["cpt_80_percent"]
        rows.append([*row, "" if schema == AGAINST else shown(change, "+.1f"), f"{seconds:.1f}"])
    head = ["schema", *(f"CPT({x} %)" for x in CPT_TARGETS), "accuracy at 10 %", f"against `{AGAINST}`", "seconds"]
    write("\n".join([*lines, *table(head, rows), ""]), settings.out)


if __name__ == "__main__":
    main()
