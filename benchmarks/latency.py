"""How long solutions take: a model of serial calls, fitted to the service, checked against it, and read off trees.

    OMP_NUM_THREADS=1 python -m benchmarks.latency --out results/latency     # a minute

A step costs a call of the small model and one of the scorer, one after the other, and where it is escalated one of the
large model: nothing of one solution is done side by side. So a solution takes a constant, a time for each step, and one
for each escalation. The three are fitted by least squares to requests to the service, whose upstreams are stand-ins
that think a stated time (`benchmarks.upstream`), under two thresholds; the mean time of requests under others is then
predicted. Routers that cannot be served are read off the trees by the same model, with times by token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.outcomes import Outcomes
from agents.evaluation.walk import references, run, walked
from agents.routers.base import AnyRouter, Threshold
from benchmarks.methods import Data
from benchmarks.rivals import fitted
from benchmarks.stage import body, chunks, connected, stage
from benchmarks.study import heading, table, write
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

Floats = NDArray[np.float64]
FITTED, CHECKED = (0.1, 0.7), (0.4,)  # thresholds: of the requests that the model is fitted to, and of others
SPREAD = 0.1  # by which stand-ins' times vary, either way
PAPER = {"always-large": 17.1, 0.1: 6.2, 0.4: 9.0, 0.7: 12.1}
"""Seconds a problem, Qwen2.5-1.5B / Qwen3-32B on two H100 with vLLM and prefix caching: the paper's TRIM-Thr."""


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        requests: Requests under each threshold.
        think: Seconds of a call of the small model's, the large model's and the scorer's stand-in.
        small: Milliseconds of a token of the small model, of trees.
        large: Of the large one.
        scorer: Of a score.
        call: Of each call besides, as the service was found to take.
        rollouts: The store.
        out: Report, without suffix; default: print only.
    """

    requests: int = 30
    think: tuple[float, float, float] = (0.05, 0.15, 0.03)
    small: float = 4.0
    large: float = 20.0
    scorer: float = 25.0
    call: float = 5.0
    rollouts: str = "quickstart"
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class Requests:
    """n requests to the service: (n, 3) ones, steps and escalations of each, and the (n,) seconds that they took."""

    calls: Floats
    seconds: Floats


def fit(requests: Requests) -> Floats:
    """Return the constant, the seconds of a step and those of an escalation."""
    found: Floats = np.linalg.lstsq(requests.calls, requests.seconds, rcond=None)[0]
    return found


def serve(settings: Settings) -> dict[float, Requests]:
    """Return what requests took under each threshold; one is under way at a time, and thresholds take turns."""
    small, large, scorer = settings.think
    thresholds = (*FITTED, *CHECKED)
    with stage(SPREAD, small=small, large=large, prm=scorer) as on, ExitStack() as stack:
        policies = [on.policy(Threshold(each)) for each in thresholds]
        urls = [stack.enter_context(on.service(policy=policy)).url for policy in policies]
        return dict(zip(thresholds, asyncio.run(load(urls, settings.requests)), strict=True))


async def load(urls: Sequence[str], count: int) -> list[Requests]:
    """Return what the requests to some services took, of which each gets the same, in turns."""
    async with connected() as session:

        async def ask(url: str, number: int) -> tuple[list[int], float]:
            begun = time.monotonic()
            told = [chunk.get("trim", {}) async for _, chunk in chunks(session, url, body(number, trace=True))]
            authors = [each["author"] for each in told if "author" in each]
            return [1, len(authors), authors.count("large")], time.monotonic() - begun

        for url in urls:
            await ask(url, -1)  # connections and caches
        rows = [[await ask(url, number) for url in urls] for number in range(1, count + 1)]
    return [
        Requests(np.array([calls for calls, _ in own], float), np.array([seconds for _, seconds in own]))
        for own in zip(*rows, strict=True)
    ]


def solution_seconds(router: AnyRouter, tables: DecisionTables, settings: Settings, *, reads_scorer: bool) -> float:
    """Return the mean seconds of a solution on trees: of calls one after the other, by token."""
    total, trees, goes_on = 0.0, tables.trees, getattr(router, "goes_on", False)
    for done, undrafted in walked(tables, router):
        draft = settings.call + settings.small * trees.tokens[done.rows, 0]
        draft += reads_scorer * (settings.call + settings.scorer)
        glimpse = 0.0 if goes_on else settings.call + settings.small  # of the first token, which was enough
        large = settings.call * ~(undrafted & goes_on) + settings.large * trees.tokens[done.rows, 1]
        total += float(done.mass @ (np.where(undrafted, glimpse, draft) + done.moved.accepted * large))
    return total / 1000 / len(tables.indices)


def alone_seconds(tokens: Floats, token: float, settings: Settings) -> float:
    """Return the mean seconds of solutions of so many tokens that one model writes in one call."""
    return float(settings.call + token * tokens.mean()) / 1000


def _checks(found: dict[float, Requests], settings: Settings) -> list[str]:
    several = [found[threshold] for threshold in FITTED]
    times = fit(Requests(*(np.concatenate([getattr(each, name) for each in several]) for name in ("calls", "seconds"))))
    small, large, scorer = settings.think
    stated = np.array([0, small + scorer, large])
    lines = [
        "## The service",
        "",
        f"{settings.requests} requests under each threshold, in turns and one at a time; stand-ins think "
        f"{1000 * small:g} ms (small), {1000 * large:g} (large) and {1000 * scorer:g} (scorer), each ± "
        f"{100 * SPREAD:g} %. Fitted to k = {' and '.join(f'{each:g}' for each in FITTED)}: {1000 * times[1]:.0f} ms "
        f"for a step (its calls think {1000 * stated[1]:.0f}), {1000 * times[2]:.0f} ms for an escalation "
        f"({1000 * stated[2]:.0f}), {1000 * times[0]:.0f} ms besides. The last column is what the stand-ins thought by "
        "the same count of calls: the rest is the service, its connections, and waiting for the processors, on which "
        "other jobs ran.",
        "",
    ]
    rows = []
    for threshold, own in sorted(found.items()):
        said, mean = float((own.calls @ times).mean()), float(own.seconds.mean())
        note = " (fitted)" if threshold in FITTED else ""
        spread = 1.96 * own.seconds.std(ddof=1) / len(own.seconds) ** 0.5
        counts = [f"{own.calls[:, 1].mean():.2f}", f"{own.calls[:, 2].mean():.2f}"]
        times_ = [f"{mean:.3f} ± {spread:.3f}", f"{said:.3f}", f"{100 * (said / mean - 1):+.1f} %"]
        rows.append([f"{threshold:g}{note}", *counts, *times_, f"{float((own.calls @ stated).mean()):.3f}"])
    head = ["threshold", "steps", "escalations", "seconds, measured", "predicted", "error", "thinking"]
    return [*lines, *table(head, rows), ""]


def _read_off(settings: Settings) -> list[str]:
    trees = compile_store(settings.rollouts)
    data, tables = Data.of(trees), decision_tables(trees, "test")
    both = references(tables)
    large = alone_seconds(both.large.large_tokens, settings.large, settings)
    small = alone_seconds(both.small.small_tokens, settings.small, settings)
    lines = [
        "## On trees",
        "",
        f"Test split of `{settings.rollouts}`, with {settings.small:g} ms a token of the small model, "
        f"{settings.large:g} of the large one, {settings.scorer:g} for a score and {settings.call:g} for each call: "
        "assumed, not measured. Routers at the operating point that solves nearest to 80 % of the gap on validation; "
        "models alone write in one call.",
        "",
    ]

    def row(name: str, outcomes: Outcomes, seconds: float) -> list[str]:
        share = 100 * outcomes.cost.sum() / both.large.cost.sum()
        solves = f"{100 * outcomes.correct.mean():.1f}"
        return [name, solves, f"{share:.1f}", f"{seconds:.2f}", f"{seconds / large:.2f}"]

    rows = [row("always-small", both.small, small), row("always-large", both.large, large)]
    for threshold in (0.1, 0.4, 0.7):
        router = Threshold(threshold)
        paper = f" (paper: {PAPER[threshold] / PAPER['always-large']:.2f} of always-large)"
        seconds = solution_seconds(router, tables, settings, reads_scorer=True)
        rows.append(row(f"TRIM-Thr, k = {threshold:g}{paper}", run(router, tables), seconds))
    for name, reads in (("TRIM-Thr (RSD)", True), ("takeover", True), ("GlimpRouter", False), ("exact", True),
                        ("Arbitrage", True), ("Arbitrage, free", False),
                        ("one-deviation advantage", True), ("one-deviation advantage, free", False)):  # fmt: skip
        chosen = fitted(name, data)
        gap = [chosen.choosing.small.correct.mean(), chosen.choosing.large.correct.mean()]
        wanted = gap[0] + 0.8 * (gap[1] - gap[0])
        router, _ = min(chosen.points, key=lambda point: abs(point[1].correct.mean() - wanted))
        rows.append(row(name, run(router, tables), solution_seconds(router, tables, settings, reads_scorer=reads)))
    return [*lines, *table(["router", "solves", "cost", "seconds", "of always-large"], rows), ""]


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    lines = [
        *heading("How long solutions take", "latency"),
        *_checks(serve(settings), settings),
        *_read_off(settings),
        "The paper measures 17.1 s a problem for its 32B model alone and 6.2, 9.0 and 12.1 s for TRIM-Thr at 0.1, 0.4 "
        "and 0.7 (two H100, vLLM, prefix caching; arXiv 2601.10245).",
        "",
    ]
    write("\n".join(lines), settings.out)


if __name__ == "__main__":
    main()
