"""What it returns to ask only where it pays: never, always, or by a rule; prices and λ, on the bundled rollouts.

    python -m benchmarks.ask --out results/ask

Rules are fitted on training problems, kinds are chosen on held-out ones and the choice half of validation, and all
figures are of its verdict half.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from agents.evaluation.bootstrap import paired_returns, resample_weights
from agents.evaluation.splits import halves
from agents.evaluation.walk import run
from agents.learners.asking import fit_asking
from agents.learners.settings import ExactSettings
from benchmarks.study import heading, shown, write
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

STUDIES = (
    ("Free: tokens, step, ends, answers. Bought: the reward model's scores", "agg+", "scorer"),
    (
        "Read always, at the same price: the reward model's scores. Bought: the large model's prefill",
        "agg+,large.min_logprob",
        "large",
    ),
    ("Free: also the small model's own numbers. Bought: the reward model's scores", "free,score,min_score", "scorer"),
)


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        lams: λ.
        prices: Of a question, in large-model tokens.
        rollouts: The store.
        seed: Of folds.
        out: Report, without suffix; default: print only.
    """

    lams: tuple[float, ...] = (1.1e-3, 2.5e-3, 5.7e-3)
    prices: tuple[float, ...] = (5, 10, 20)
    rollouts: str = "quickstart"
    seed: int = 0
    out: Path | None = None


def rows(settings: Settings, schema: str, ask: str) -> Iterator[str]:
    """Yield the rows of a table."""
    trees = compile_store(settings.rollouts)
    choice, verdict = halves(trees)
    for price in settings.prices:
        train, choosing, judged = (
            decision_tables(trees, schema=schema, cost=f"calls:{price:g}", indices=indices)
            for indices in (trees.select("train"), choice, verdict)
        )
        begin = time.process_time()
        frontier = fit_asking(train, choosing, settings.lams, ask, ExactSettings(), settings.seed)
        seconds = time.process_time() - begin
        for lam in settings.lams:
            never, always = (run(frontier.routers[kind][lam], judged) for kind in ("never", "always"))
            own = run(frontier.router(lam), judged)
            weights = resample_weights(len(own))
            assert own.asked is not None
            returns = " | ".join(f"{each.returns(lam).mean():.4f}" for each in (never, always, own))
            gains = (paired_returns(own, other, lam, weights) for other in (never, always))
            over = " | ".join(shown(each) if each.value else "same" for each in gains)
            asked = 100 * own.asked.sum() / own.steps.sum()
            yield f"| {price:g} | {lam:g} | {returns} | {asked:.1f} | {over} | {frontier.kind[lam]} | {seconds:.0f} |"


def report(settings: Settings) -> str:
    """Return the tables."""
    trees = compile_store(settings.rollouts)
    count = len(np.unique(trees.problem[halves(trees)[1]]))
    lines = heading("Asking for what has a price", "ask")
    lines += [
        f"Return on the verdict half of validation ({count} problems), of the exact learner's rules: one that never "
        "asks, one that always does, and what `--ask` gives (one of the two, or a rule that asks at some steps, chosen "
        "on other problems). Prices of a question in large-model tokens; 95 % intervals paired on problems; seconds of "
        "processor time for all λ of a price.",
        "",
    ]
    for title, schema, ask in STUDIES:
        lines += [
            f"## {title}",
            "",
            f"`--agent exact --schema {schema} --ask {ask} --cost calls:PRICE`",
            "",
            "| price | λ | never | always | `--ask` | asks at, % | over never | over always | chosen | seconds |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
            *rows(settings, schema, ask),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    write(report(settings), settings.out)


if __name__ == "__main__":
    main()
