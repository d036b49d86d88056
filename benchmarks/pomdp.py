"""Is TRIM-POMDP fast, and is it good? Times, and returns on test against thresholds and bounds.

    python -m benchmarks.pomdp --out results/pomdp

Everything is fitted on the training trees; thresholds, and the λ of the curves, are chosen on validation; all figures
are of test. Intervals are paired bootstraps over problems.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.bootstrap import holm, paired_curves, paired_means, resample_weights
from agents.evaluation.curves import BUDGETS, CPT_TARGETS, Curve, curve_metrics
from agents.evaluation.oracle import tree_oracle
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.splits import Candidates, spread
from agents.evaluation.walk import by_problem, measured, references, run, run_trees
from agents.learners.pomdp.fit import Estimates, estimate
from agents.learners.pomdp.latent import labelled
from agents.learners.pomdp.solver import solve
from agents.routers.pomdp.backup import after_score, backup
from agents.routers.pomdp.belief import S0
from agents.routers.pomdp.model import SCHEMA, Model, expected_tokens, tokens_in
from agents.routers.pomdp.router import PomdpRouter
from benchmarks.robustness import LAMS
from benchmarks.study import heading, shown, table, write
from rollouts.trees.arrays import CONTINUE_SMALL, Trees
from rollouts.trees.compile import compile_store
from trim_env.graph import Spent
from trim_env.tables import DecisionTables, decision_tables

BATCH = 4096
SWEEP = 48  # values of λ among which the operating points of a curve are chosen


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        lams: Values of λ.
        rollouts: The store.
        out: Report, without suffix; default: print only.
    """

    lams: tuple[float, ...] = LAMS
    rollouts: str = "quickstart"
    out: Path | None = None


class ExactLabels:
    """Plans as the measured POMDP does, but sees the exact class of every proposal instead of its score."""

    def __init__(self, model: Model, lam: float, tables: DecisionTables) -> None:
        """Solve the process with perfect scores."""
        kinds = model.kinds.count
        perfect = replace(
            model,
            edges=np.array([-1.0, 1.0], np.float32),
            level=np.zeros(3, np.int64),
            small=np.broadcast_to(np.eye(3), (1, kinds, 3, 3)).copy(),
            large=np.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]),
        )
        value = solve(perfect, [lam], points=3)
        rows = np.flatnonzero(np.isin(tables.trees.tree, tables.indices))
        classes = labelled(tables.trees, rows).classes(CONTINUE_SMALL)
        features = tables.in_schema(SCHEMA)[rows]
        kind, step = perfect.kinds.of(features), np.asarray(tables.trees.depth[rows], np.int64)
        self._escalate = np.zeros(tables.trees.nodes)
        for at in np.unique(step):
            for which in np.unique(kind[step == at]):
                own = np.flatnonzero((step == at) & (kind == which))
                leads = backup(perfect, at, which, 0, np.zeros(len(own), np.int64), classes[own], 3)
                small, large = leads.worth(value[:, at + 1], after_score(perfect, value[:, at + 1], [0]))
                price = lam * expected_tokens(perfect.token_line[at, which], tokens_in(features[own]))
                self._escalate[rows[own]] = large[0] - price > small[0]

    def decide(self, rows: NDArray[np.int64], spent: Spent) -> NDArray[np.float64]:
        """Return whether to escalate."""
        chosen: NDArray[np.float64] = self._escalate[rows]
        return chosen


def seconds(what: Callable[[], Any], times: int = 3) -> float:
    """Return the median time that a call takes."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        what()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def decision_time(router: PomdpRouter, tables: DecisionTables) -> float:
    """Return seconds per decision, filter included, in a batch of proposals of all steps and kinds."""
    rows = np.resize(np.flatnonzero(np.isin(tables.trees.tree, tables.indices)), BATCH)
    features, scores = tables.in_schema(router.schema)[rows], tables.trees.score[rows, 0]
    state, actions = router.start(BATCH), np.arange(BATCH) % 2
    state[:, 0] = tables.trees.depth[rows]

    def both() -> None:
        _, after = router.decide(features, state)
        router.accept(after, actions, scores, actions)

    return seconds(both, 20) / BATCH


def times(trees: Trees, test: DecisionTables, lams: tuple[float, ...]) -> list[str]:
    """Return a table of times."""
    found = estimate(trees)
    model, paper = found.model(), found.model("paper")
    rows = [
        ("fitting with labels", f"{seconds(lambda: estimate(trees)):.2f} s"),
        ("fitting by EM, without labels", f"{seconds(lambda: estimate(trees, labels='em')):.2f} s"),
        (f"solving {len(lams)} λ, measured", f"{seconds(lambda: solve(model, lams)):.2f} s"),
        (f"solving {len(lams)} λ, paper", f"{seconds(lambda: solve(paper, lams)):.2f} s"),
        (f"a decision and its filter in a batch of {BATCH}",
         f"{1e6 * decision_time(found.routers(lams[:1])[0], test):.1f} µs"),
    ]  # fmt: skip
    return table(["what", "time"], rows)


def methods(
    fitted: dict[str, Estimates], candidates: Candidates, test: DecisionTables, lams: tuple[float, ...]
) -> dict[str, list[Outcomes]]:
    """Return the outcomes of every method for each λ, worst information first."""
    found = {"TRIM-Thr": [run(candidates.best(lam).threshold, test) for lam in lams]}
    for name, (labels, kind) in {
        "paper": ("labels", "paper"),
        "measured, scores independent": ("independent", "measured"),
        "measured, by EM": ("EM", "measured"),
        "measured": ("labels", "measured"),
    }.items():
        found[name] = [run(router, test) for router in fitted[labels].routers(lams, kind)]
    model = fitted["labels"].model()
    exact = [ExactLabels(model, lam, test) for lam in lams]
    found["exact classes"] = [by_problem(test, run_trees(test, each.decide)) for each in exact]
    found["tree oracle"] = [tree_oracle(test, lam) for lam in lams]
    return found


def returns_table(found: dict[str, list[Outcomes]], lams: tuple[float, ...], weights: NDArray[np.float64]) -> list[str]:
    """Return mean returns by λ and, below, the differences of the measured POMDP with their intervals."""
    rows = [
        [f"{lam:g}", *(f"{each[number].returns(lam).mean():.4f}" for each in found.values())]
        for number, lam in enumerate(lams)
    ]
    means = {
        name: np.mean([o.returns(lam) for o, lam in zip(each, lams, strict=True)], 0) for name, each in found.items()
    }
    rows.append(["mean", *(f"**{each.mean():.4f}**" for each in means.values())])
    lines = table(["λ", *found], rows, left=0)
    others = [name for name in found if name not in ("measured", "tree oracle")]
    lines += ["", "Measured minus the others, 95 %; p by Holm over all λ and methods of the table:", ""]
    cells_at = []
    for number, lam in enumerate(lams):
        own = found["measured"][number].returns(lam)
        cells_at.append([paired_means(own, found[name][number].returns(lam), weights) for name in others])
    corrected = holm([each.p_value for row in cells_at for each in row]).reshape(len(lams), -1)
    rows = [
        [f"{lam:g}", *(f"{shown(each)} (p {p:.2g})" for each, p in zip(row, ps, strict=True))]
        for lam, row, ps in zip(lams, cells_at, corrected, strict=True)
    ]
    overall = [shown(paired_means(means["measured"], means[name], weights)) for name in others]
    return [*lines, *table(["λ", *others], [*rows, ["mean", *(f"**{each}**" for each in overall)]], left=0)]


def curves(
    fitted: dict[str, Estimates], candidates: Candidates, validation: DecisionTables, test: DecisionTables,
    weights: NDArray[np.float64],
) -> list[str]:  # fmt: skip
    """Return curve metrics of POMDP and thresholds at 16 operating points each, spread on validation."""
    choosing, both = references(validation), references(test)
    points = {"TRIM-Thr": measured(candidates.spread_over(choosing.large), choosing, test)}
    lams = np.geomspace(1e-5, 0.1, SWEEP)
    for name, (labels, kind) in {
        "measured": ("labels", "measured"), "measured, by EM": ("EM", "measured"), "paper": ("labels", "paper"),
    }.items():  # fmt: skip
        plans = fitted[labels].routers(lams, kind)
        chosen = spread([(router, run(router, validation)) for router in plans], choosing.large)
        points[name] = measured(chosen, choosing, test)
    metrics = {name: curve_metrics(Curve.of(each, both)) for name, each in points.items()}
    wanted = [*(f"cpt_{x}" for x in CPT_TARGETS), "delta_ibc", *(f"accuracy_at_{budget}" for budget in BUDGETS)]
    rows = [[key, *(f"{float(each[key]):.3f}" for each in metrics.values())] for key in wanted]
    lines = [*table(["metric", *points], rows), ""]
    for name in ("TRIM-Thr", "paper"):
        difference = paired_curves(points["measured"], points[name], both, weights)
        cells = [f"CPT({x} %) {shown(difference[f'cpt_{x}_percent'], '+.1f')} %" for x in CPT_TARGETS]
        lines.append(f"- measured against {name}: {'; '.join(cells)}")
    return lines


def report(settings: Settings) -> str:
    """Return the report in Markdown."""
    trees = compile_store(settings.rollouts)
    test, validation = (decision_tables(trees, split, schema="agg+") for split in ("test", "validation"))
    candidates = Candidates(validation)
    fitted = {
        "labels": estimate(trees, labels="exact"),
        "EM": estimate(trees, labels="em"),
        "independent": estimate(trees, labels="exact", levels=1),
    }
    found = methods(fitted, candidates, test, settings.lams)
    weights = resample_weights(len(found["measured"][0]))
    agreed = fitted["EM"].agreement
    assert agreed is not None
    classes = ", ".join(f"{100 * share:.1f} % of S{each}" for each, share in enumerate(agreed.by_class, S0))
    return "\n".join([
        *heading("TRIM-POMDP", "pomdp"),
        f"Rollouts `{settings.rollouts}`: fitted on training trees, thresholds chosen on validation, figures of test.",
        "",
        "## Time",
        "",
        *times(trees, test, settings.lams),
        "",
        "## Mean return",
        "",
        "`scores independent`: the observation model knows nothing of the score before. `exact classes`: the measured "
        "dynamics, with the true class of each proposal instead of the filter. The tree oracle knows how all ends.",
        "",
        *returns_table(found, settings.lams, weights),
        "",
        f"EM agrees with the exact labels on {100 * agreed.share:.1f} % of {agreed.steps:,} training proposals "
        f"({classes}); calling all of them S0 on {100 * agreed.always_s0:.1f} %.",
        "",
        "## Curves",
        "",
        *curves(fitted, candidates, validation, test, weights),
        "",
    ])  # fmt: skip


def main() -> None:
    """Run the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    write(report(settings), settings.out)


if __name__ == "__main__":
    main()
