"""Which policy of a training to keep, and what the scorer costs; on validation.

    python -m benchmarks.retraining --out results/retraining
    python -m benchmarks.retraining --parts endings --kinds ppo-agg --seeds 6    # a piece of it
    python -m benchmarks.retraining --parts scorer

``endings``: trainings of one attempt; the return of the checkpoint
that is best on one half of validation, on the other half, mean over both ways round, beside that of the mean of the
last k policies on both halves, which chooses nothing. ``scorer``: tokens that the reward model reads for a solution.
What another training seed changes: `benchmarks.routers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from agents.evaluation.splits import Validation
from agents.evaluation.walk import references, run
from agents.learners.loop import Trainable, checked_at, learner
from agents.learners.settings import PPOSettings, SeqSettings
from agents.report.walks import follow
from agents.routers.mlp import at
from benchmarks.methods import RANGE, Data, fit
from benchmarks.study import heading, table, write
from rollouts.config import load_family
from rollouts.family import Family
from rollouts.trees.compile import compile_store
from trim_env.episodes import Lam
from trim_env.features import DEFAULT_SCHEMA
from trim_env.tables import decision_tables

KEPT = (1, 2, 4, 8, 16)
KINDS: dict[str, PPOSettings] = {
    "ppo-agg": PPOSettings(),
    "ppo-agg, λ range": PPOSettings(),
    "ppo-seq": SeqSettings(),
}
Part = Literal["endings", "scorer"]


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        parts: What to measure.
        seeds: Number of training seeds of the endings.
        kinds: Learners whose endings are compared.
        lams: λ of those.
        rollouts: The store.
        out: Report, without suffix; default: print only.
    """

    parts: tuple[Part, ...] = ("scorer", "endings")
    seeds: int = 6
    kinds: tuple[str, ...] = tuple(KINDS)
    lams: tuple[float, ...] = (1.1e-3, 3e-3, 8.5e-3)
    rollouts: str = "quickstart"
    out: Path | None = None


def scorer(settings: Settings) -> list[str]:
    """Say how many tokens the reward model reads for a solution of the default agent, one request for each decision."""
    trees, prompts = compile_store(settings.rollouts), Family(load_family("tinymath")).reward_prompts
    tables = decision_tables(trees, "validation")
    fitted = fit("TRIM-Agg, λ range", Data.of(trees), 0)
    assert prompts is not None and not isinstance(fitted, str)
    spared = float(references(tables).large.large_tokens.mean())
    rows = []
    for lam, router in fitted.routers.items():
        paths = follow(router, tables)
        whole = new = 0
        for tree, nodes, actions in zip(tables.indices, paths.rows.tolist(), paths.actions.tolist(), strict=True):
            question, steps = trees.questions[trees.problem[tree]], list[str]()
            before: tuple[int, ...] = ()
            for row, action in zip(nodes, actions, strict=True):
                if row < 0:
                    break
                ids = prompts.ids(question, [*steps, trees.proposal(row, 0)])
                shared = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
                whole, new, before = whole + len(ids), new + len(ids) - shared, ids
                steps.append(trees.proposal(row, int(action == 1)))
        count = len(tables.indices)
        large, all_read, new_read = float(paths.large_tokens.mean()), whole / count, new / count
        saved = spared - large
        tokens = [f"{paths.steps.mean():.1f}", f"{large:.1f}", f"{saved:.1f}", f"{all_read:.0f}", f"{new_read:.0f}"]
        rows.append([f"{lam:g}", *tokens, f"{all_read / saved:.1f}; {new_read / saved:.1f}"])
    read = ["read, whole path each time", "read, prefixes cached", "read / saved"]
    return [
        "## What the scorer costs",
        "",
        f"Tokens for a solution; always-large writes {spared:.1f}. Saved: those that the large model does not write. "
        "The reward model reads a proposal with all that stands before it; with prefixes cached only what is new.",
        "",
        *table(["λ", "decisions", "large tokens", "saved", *read], rows, left=0),
    ]


def averaged(policies: Sequence[Trainable]) -> Trainable:
    """Return the policy whose weights are the means of those of several policies of one training."""
    weights = {
        name: np.mean([each.weights[name] for each in policies], axis=0, dtype=np.float64).astype(np.float32)
        for name in policies[0].weights
    }
    return replace(policies[0], weights=weights)  # type: ignore[arg-type]


def ending(schema: str, lam: Lam, own: PPOSettings, seed: int, store: str) -> tuple[float, list[float]]:
    """Return the mean over both halves of the best checkpoint's return on the other one, and of the last k's means."""
    trees = compile_store(store)
    validation = Validation(lambda i: decision_tables(trees, schema=schema, indices=i), trees)
    halves = validation.choice, validation.verdict

    def returned(policy: Trainable) -> list[float]:
        lams = checked_at(lam)
        return [float(np.mean([run(at(policy, each), half).returns(each).mean() for each in lams])) for half in halves]

    training, policies = learner(decision_tables(trees, "train", schema=schema), lam, own, seed), list[Trainable]()
    while not training.done:
        training.iterate()
        policies.append(training.router())
    reached = np.array([returned(policy) for policy in policies])
    best = reached.argmax(axis=0)
    crossed = (reached[best[0], 1] + reached[best[1], 0]) / 2
    return float(crossed), [float(np.mean(returned(averaged(policies[-kept:])))) for kept in KEPT]


def endings(settings: Settings) -> list[str]:
    """Say what the best checkpoint and the means of the last policies return."""
    rows = []
    for kind in settings.kinds:
        schema = "seq" if kind == "ppo-seq" else DEFAULT_SCHEMA
        lams: Sequence[Lam] = (RANGE,) if kind.endswith("range") else settings.lams
        for lam in lams:
            found = [ending(schema, lam, KINDS[kind], seed, settings.rollouts) for seed in range(settings.seeds)]
            values = np.array([[best, *last] for best, last in found])
            cells = [f"{mean:.4f} ± {std:.4f}" for mean, std in zip(values.mean(0), values.std(0, ddof=1), strict=True)]
            name = f"{lam[0]:g} to {lam[1]:g}" if isinstance(lam, tuple) else f"{lam:g}"
            rows.append([kind, name, *cells])
    lines = table(["learner", "λ", "best checkpoint", *(f"mean of {kept}" for kept in KEPT)], rows, left=2)
    note = f"Return, mean ± standard deviation over {settings.seeds} seeds; settings by default, one attempt."
    return ["## Which policy of a training", "", note, "", *lines]


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    lines = heading("Which policy of a training, and what the scorer costs", "retraining")
    for part in settings.parts:
        lines += [*(endings(settings) if part == "endings" else scorer(settings)), ""]
    write("\n".join(lines), settings.out)


if __name__ == "__main__":
    main()
