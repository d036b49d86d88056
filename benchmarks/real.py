"""Routers of real language models: what the bundled GSM8K trees hold, which signals tell anything, what is saved.

    python -m benchmarks.real                                     # on the half of validation that chooses nothing
    python -m benchmarks.real --split test --out results/real     # real.md and real.png, fits included

Everything is fitted on training trees and chosen on validation, as in `benchmarks.ladder`, whose parts these are. The
store is small, so intervals are wide, and what they do not tell is said not to be told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from agents.evaluation.bootstrap import estimate, paired_means, resample_weights
from agents.evaluation.curves import References
from agents.evaluation.oracle import query_oracle, tree_oracle
from agents.evaluation.outcomes import Floats, Outcomes
from benchmarks.ladder import WHOSE, by_lam, curves, draw, fit_all, returns
from benchmarks.rungs import DEFAULT, FREE, SIGNALS, Ground, Ladder, Measured, Rung
from benchmarks.study import heading, shown, table, write
from rollouts.store.store import Store
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, Trees
from rollouts.trees.compile import compile_store
from rollouts.trees.stats import (
    small_outcomes,
    small_path_min_scores,
    split_statistics,
    store_statistics,
)
from trim_env.features import schema_named
from trim_env.tables import decision_tables

PRM = "gsm8k-prm.score"
LAMS = (1e-4, 2e-4, 4e-4, 6e-4, 9e-4, 1.3e-3, 2e-3, 3e-3)
PRM_RULE, SMALL_RULE = Rung("threshold", "agg/1"), Rung("threshold", "small.min_logprob")
RUNGS = (
    *(Rung("threshold", schema) for schema in ("agg/1", *SIGNALS)),
    Rung("two numbers", "agg/1"),
    *(Rung("exact", s, rule) for s in ("agg+", "free", "prefill", "all") for rule in ("linear", "quadratic")),
    DEFAULT,
    FREE,
    Rung("oracle", ""),
)
SHOWN = (PRM_RULE, SMALL_RULE, FREE, *(Rung("exact", s, "linear") for s in ("free", "all")))
READ = {
    "score": "learned reward model", "small.min_logprob": "small: least log-probability",
    "small.mean_logprob": "small: mean log-probability", "small.max_entropy": "small: greatest entropy",
    "large.min_logprob": "large: least log-probability", "large.mean_logprob": "large: mean log-probability",
    "tokens": "length of the step",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        split: What figures of routers are of.
        seeds: Independent fits of what is drawn.
        rollouts: The store.
        fits: Folder in which fits are kept, and looked up.
        processes: Fits side by side.
        prices: US dollars for a million tokens of the small and of the large model, in and out alike.
        milliseconds: Of one core for a token that the small and the large model decode.
        out: Report and picture, without suffix; default: print only.
    """

    split: Literal["validation", "test"] = "validation"
    seeds: int = 1
    rollouts: str = "gsm8k"
    fits: Path = Path("runs/real")
    processes: int = 1
    prices: tuple[float, float] = (0.30, 1.20)
    milliseconds: tuple[float, float] = (8.8, 19.8)
    out: Path | None = None


def holdings(trees: Trees) -> list[str]:
    """Return the table of what the store holds, by split."""
    splits = [split for split in ("train", "validation", "test") if split in trees.splits[trees.problem]]
    found = [split_statistics(trees, split) for split in (*splits, None)]
    rows: dict[str, list[str]] = {}

    def row(name: str, of: object) -> None:
        assert callable(of)
        rows[name] = [of(each) for each in found]

    row("problems / decision nodes", lambda own: f"{own.problems:,} / {own.nodes:,}")
    row("always-small right", lambda own: str(own.small_accuracy))
    row("always-large right", lambda own: str(own.large_accuracy))
    row("best path within the cap right (hindsight)", lambda own: str(own.oracle_accuracy))
    row("steps, small / large", lambda own: f"{own.small_steps:.1f} / {own.large_steps:.1f}")
    row("tokens, small / large", lambda own: f"{own.small_tokens:.0f} / {own.large_tokens:.0f}")
    return table(["", *splits, "all"], ([name, *cells] for name, cells in rows.items()))


def weighted_auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return areas under the ROC curve of n items, ties half.

    Args:
        scores: (n,) scores.
        positive: (n,) what they should tell.
        weights: (n,), or (R, n) for R areas.
    """
    order = np.argsort(scores, kind="stable")
    steps = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    right, wrong = (
        np.add.reduceat(weights[..., order] * kind[order], steps, axis=-1) for kind in (positive, ~positive)
    )
    below = wrong.cumsum(axis=-1) - wrong / 2
    total = right.sum(axis=-1) * wrong.sum(axis=-1)
    area: Floats = (right * below).sum(axis=-1) / np.where(total > 0, total, np.nan)
    return area


def auc_over(trees: Trees, problems: NDArray[np.int64], scores: Floats, positive: NDArray[np.bool_]) -> str:
    """Return an AUC with its interval, resampled over problems; empty where there is nothing to tell."""
    known = np.isfinite(scores)
    own, place = np.unique(problems[known], return_inverse=True)
    scores, positive = scores[known], positive[known]
    if positive.all() or not positive.any():
        return ""
    weights = resample_weights(len(own))
    value = weighted_auc(scores, positive, np.ones(len(scores)))
    samples = np.concatenate([weighted_auc(scores, positive, part[:, place]) for part in np.array_split(weights, 40)])
    return shown(estimate(float(value), samples), ".3f")


def telling(trees: Trees) -> list[str]:
    """Return the table of how well each signal of a small model's proposal tells what becomes of it."""
    tables = decision_tables(trees)
    after = small_outcomes(trees)
    both = ~np.isnan(after).any(axis=1)
    split = trees.splits[trees.problem]

    def rows() -> Iterator[Sequence[str]]:
        for name, words in READ.items():
            if not readable(name, trees.signals):
                continue
            trees_of = np.flatnonzero(split != "train") if name == "score" else np.arange(len(trees.root))
            inside = np.isin(trees.tree, trees_of)
            values = tables.in_schema(name)[:, 0].astype(float)
            known = inside & ~np.isnan(after[:, CONTINUE_SMALL])
            of = trees.problem[trees.tree]
            least = small_path_min_scores(replace(trees, score=np.stack([values, values], 1)), trees_of)
            ends = after[trees.root[trees_of], CONTINUE_SMALL] == 1
            pays = after[:, ESCALATE_LARGE] > after[:, CONTINUE_SMALL]
            chosen = inside & both
            yield [
                words,
                f"{len(np.unique(trees.problem[trees_of]))}",
                auc_over(trees, of[known], values[known], after[known, CONTINUE_SMALL] == 1),
                auc_over(trees, trees.problem[trees_of], least, ends),
                auc_over(trees, of[chosen], -values[chosen], pays[chosen]),
            ]

    head = ["signal", "problems", "the small model alone ends right after it", "the least of a solution: it is right"]
    return table([*head, "escalating here pays"], rows())


def paying(trees: Trees) -> str:
    """Say how often it matters who writes one step, if the small model goes on after it."""
    after = small_outcomes(trees)
    rows = np.flatnonzero(~np.isnan(after).any(axis=1))
    of, place = np.unique(trees.problem[trees.tree[rows]], return_inverse=True)
    weights, total = resample_weights(len(of)), np.bincount(place)
    pays, harms = (
        np.bincount(place, after[rows, one] > after[rows, other])
        for one, other in ((ESCALATE_LARGE, CONTINUE_SMALL), (CONTINUE_SMALL, ESCALATE_LARGE))
    )

    def share(counts: Floats) -> str:
        samples = (weights @ counts) / (weights @ total)
        return shown(estimate(100 * counts.sum() / total.sum(), 100 * samples), ".1f") + " %"

    return (
        f"Of {len(rows):,} proposals at which the large model wrote too, escalating pays at {share(pays)} and does "
        f"harm at {share(harms)}; at all others the small model ends the same way after either step."
    )


def oracles(ground: Ground, weights: Floats) -> list[str]:
    """Return the table of reference points at the least λ: as good as they get."""
    lam = ground.ladder.lams[0]
    named: dict[str, Outcomes] = {
        "always-small": ground.both.small,
        "always-large": ground.both.large,
        "query oracle": query_oracle(ground.measured, lam),
        "best path within the cap": tree_oracle(ground.measured, lam),
    }

    def rows() -> Iterator[Sequence[str]]:
        for name, own in named.items():
            right, cost = (estimate(each.mean(), weights @ each) for each in (100 * own.correct, own.large_tokens))
            yield [name, shown(right, ".1f"), shown(cost, ".0f")]

    return table(["", "right, %", "large-model tokens for a problem"], rows())


def best_of(found: dict[Rung, Measured], groups: Sequence[str] = ("score", "free", "prefill", "all")) -> Rung:
    """Return the learned or simple rule that validation names, of those that read these numbers."""
    return max((rung for rung in found if rung.group in groups), key=lambda rung: found[rung].chosen_by)


def saved(settings: Settings, ground: Ground, found: dict[Rung, Measured], weights: Floats) -> list[str]:
    """Return the table of what two routers cost at each λ beside the constants: tokens, money, seconds."""
    cheap, dear = settings.prices
    quick, slow = settings.milliseconds
    small, large = ground.both.small, ground.both.large
    whole = np.zeros(len(large))
    named = [("always-small", small, small.small_tokens), ("always-large", large, whole)]
    for rung in dict.fromkeys([best_of(found), best_of(found, ["free"])]):
        for alike in runs_of(found[rung].by_lam):
            span = " to ".join(f"{LAMS[place]:g}" for place in dict.fromkeys([alike[0], alike[-1]]))
            each = found[rung].by_lam[alike[0]]
            named.append((f"{rung.told}, λ = {span}", each, each.small_tokens))

    def rows() -> Iterator[Sequence[str]]:
        for name, each, decoded in named:
            gain, loss = (paired_means(100 * each.correct, 100 * other.correct, weights) for other in (small, large))
            money = (cheap * decoded + dear * each.large_tokens) / 1e6
            seconds = (quick * decoded + slow * each.large_tokens) / 1e3
            yield [
                name,
                f"{100 * each.correct.mean():.1f}",
                shown(gain, "+.1f") if each is not small else "",
                shown(loss, "+.1f") if each is not large else "",
                f"{decoded.mean():.0f} / {each.large_tokens.mean():.0f}",
                f"{100 * each.large_tokens.sum() / large.large_tokens.sum():.0f} %",
                f"{1000 * money.mean():.3f}",
                f"{seconds.mean():.2f}",
            ]

    head = ["", "right, %", "minus always-small", "minus always-large", "tokens, small / large", "large tokens"]
    return table([*head, "dollars for 1,000", "core seconds each"], rows())


def runs_of(by_lam: Sequence[Outcomes]) -> list[list[int]]:
    """Return the places of neighbouring λ at which a rule does the same."""
    runs: list[list[int]] = []
    for place, each in enumerate(by_lam):
        before = by_lam[place - 1] if place else None
        if before is not None and (each.cost == before.cost).all() and (each.correct == before.correct).all():
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def conclusions(settings: Settings, ground: Ground, found: dict[Rung, Measured], weights: Floats) -> list[str]:
    """Return what the intervals allow to be said, and what they do not."""
    both = ground.both
    gap = paired_means(100 * both.large.correct, 100 * both.small.correct, weights)
    best = best_of(found)
    own = found[best]

    def constant(lams: Sequence[float]) -> Floats:
        values: Floats = np.mean([better(ground.chosen_by, both, lam).returns(lam) for lam in lams], axis=0)
        return values

    over = paired_means(own.returns, constant(own.lams), weights)
    alone = paired_means(own.returns, ground.both.small.correct, weights)
    baseline = baseline_of(found)
    simple = paired_means(own.returns, found[baseline].returns, weights)
    verdicts = [
        f"The large model solves {shown(gap, '+.1f')} points more than the small one."
        if gap.low > 0 or gap.high < 0
        else f"Between the two models no gap is shown: {shown(gap, '+.1f')} points.",
        f"Validation names {best.told}. Its mean return over the λ, less that of the constant that validation names "
        f"for each λ: {shown(over, '+.4f')} (p = {over.p_value:.2g})"
        + (": something is gained." if over.low > 0 else ": it loses." if over.high < 0 else ": no gain is shown."),
        f"Less always-small's: {shown(alone, '+.4f')}"
        + (": something is gained." if alone.low > 0 else ": it loses." if alone.high < 0 else ": no gain is shown."),
        f"Against {baseline.told}: {shown(simple, '+.4f')}"
        + ("." if simple.low > 0 or simple.high < 0 else ": no difference is shown."),
    ]
    return [f"{number}. {verdict}" for number, verdict in enumerate(verdicts, 1)]


def baseline_of(found: dict[Rung, Measured]) -> Rung:
    """Return the rule that others are compared with: thresholds on the reward model's score, if there is one."""
    return PRM_RULE if PRM_RULE in found else SMALL_RULE


def better(choosing: References, both: References, lam: float) -> Outcomes:
    """Return the constant that other problems name for a λ."""
    small, large = (float(each.returns(lam).mean()) for each in (choosing.small, choosing.large))
    return both.large if large > small else both.small


def ladder_of(settings: Settings) -> Ladder:
    """Return what is compared."""
    there = compile_store(settings.rollouts).signals
    scores = {"score", "agg", "agg/1", "agg+"} if PRM not in there else set()
    kept = (rung for rung in RUNGS if rung.kind == "two numbers" or rung.schema not in scores)
    rungs = tuple(rung for rung in kept if readable(rung.schema, there))
    return Ladder(settings.rollouts, settings.fits, settings.seeds, LAMS, rungs, ("decode-only",))


def readable(schema: str, there: Collection[str]) -> bool:
    """Return whether a store has all columns of score tables that a schema reads."""
    if schema == "score":
        return PRM in there
    return not schema or set(schema_named(schema).signals) <= set(there)


def report(settings: Settings, left: int) -> tuple[str, Ground, dict[Rung, Measured]]:
    """Return the report, and what the picture shows."""
    trees = compile_store(settings.rollouts)
    ground = Ground(ladder_of(settings), settings.split, "decode-only")
    found = ground.all()
    weights = resample_weights(len(ground.both.small))
    counts = store_statistics(Store(settings.rollouts))
    decoded = {role: counts["requests"].get(f"decoded_{role}", 0) for role in ("small", "large")}
    best = best_of(found)
    measured = f"Split `{settings.split}`" if settings.split == "test" else "Half of `validation`"
    lines = heading("Real language models: GSM8K", f"real --split {settings.split}")
    lines += [
        *conclusions(settings, ground, found, weights),
        "",
        *WHAT,
        "",
        f"K = {trees.meta['max_escalations']}: routers escalate at most so often in a solution, always-large is "
        f"exempt. {counts['steps']:,} steps; decoded tokens {decoded['small']:,} small, {decoded['large']:,} large. "
        "Intervals here and below: 95 %, bootstrap over problems.",
        "",
        *holdings(trees),
        "",
        "## What the signals tell",
        "",
        "AUC of signals of the small model's proposals, over problems of all splits"
        + (", of the learned reward model over those that it did not learn from" if PRM in trees.signals else "")
        + ". The value of a step is one Monte Carlo rollout: whether the small model "
        "alone ends right after it. *Pays*: it does so after the large model's step and not after its own (a low "
        "signal is to tell it). 0.5 is a coin.",
        "",
        *telling(trees),
        "",
        paying(trees),
        "",
        "## Routers",
        "",
        f"{measured}, {len(ground.both.small)} problems. Rules and names as in [the ladder](ladder.md): fitted on the "
        "training trees, thresholds, hulls and the rule that is named chosen on validation, λ = "
        f"{', '.join(f'{lam:g}' for lam in LAMS)}; {settings.seeds} seeds of what is drawn are averaged. p-values: "
        "sign flips, Holm over the table."
        + ("" if PRM in trees.signals else " `score` is the probability of the least likely token of a proposal."),
        *(["", f"{left} fits were not made."] if left else []),
        "",
        *oracles(ground, weights),
        "",
        *returns(found, baseline_of(found), weights),
        "",
        "Curves, costs in % of always-large's tokens; † only by mixing with always-large:",
        "",
        *curves(ground, found, weights),
        "",
        "Return by λ:",
        "",
        *by_lam(found),
        "",
        "## What is saved",
        "",
        f"{best.told}, which validation names, and the best rule that needs no other model's look, beside the "
        "constants. Points of accuracy are paired differences. "
        "Dollars for decoded tokens at {:g} and {:g} for a million of the small and of the large model; ".format(
            *settings.prices
        )
        + "seconds of one core at {:g} and {:g} ms a token.".format(*settings.milliseconds),
        "",
        *saved(settings, ground, found, weights),
        "",
        *MONEY,
        "",
        "## Three problems",
        "",
        *LOOKED_AT,
        "",
    ]
    return "\n".join(lines), ground, found


WHAT = (
    "So no router is worth having here, and none comes with the package. With one escalation the cap is as tight as it "
    "can be (always-large is exempt from it), one step of the large model rescues little of what the small one goes on "
    "with, signals tell little of where it would (the learned reward model, from 110 problems with one rollout at each "
    "step, nothing), and 66 problems show large effects only. 42 of the test problems were looked at when the store "
    "had 140 problems, all of them twice since (the second time with the large model's table), when all choices were "
    "made.",
    "",
    "Qwen2.5-Coder-0.5B-Instruct proposes, Qwen2.5-Coder-1.5B-Instruct is the large model, problems are of GSM8K's "
    "test set, as one shuffle ordered them; [the card of the data](../rollouts/datasets/README.md#gsm8k) says how they "
    "were made, by which commands, and whose they are. Both are coding models of one family and of sizes close to each "
    "other: a pair that fits on a processor, not one that anybody would route between.",
)
LIST = "https://www.getmaxim.ai/bifrost/model-library/compare/together_ai/qwen2.5-72b-instruct-turbo"
MONEY = (
    f"The prices are an example, those of Qwen2.5-7B- and 72B-Instruct-Turbo at Together AI as [a list]({LIST}) had "
    "them on 2026-11-26 (`--prices`), one number for input and output alike. Input is not in the table: a router's "
    "requests read the prefix at every step, so that without a cache of prefixes a step of 45 tokens costs some 300 "
    "of input, several times what routing saves; with one, or on machines of one's own, each token is read once. "
    "Seconds are processor time of the two engines while 40 of the problems were grown on a machine busy with other "
    "things, 389 s for 44,076 tokens of the small and 390 s for 19,744 of the large model, prefill included "
    "(`--milliseconds`).",
)
LOOKED_AT = (
    "Three of the validation problems, as `python -m rollouts show gsm8k --problem ID` prints them:",
    "",
    "- `gsm8k/test-0677` (two sisters have 20 and 44 autographs and want 100). The small model announces three things "
    "to do, then *Let's start with the first step:*, then forgets one sister: *a total of 20 signatures*, 100 - 20 = "
    "80. What it writes before that is right and says nothing, and yet a large step in any of those three places ends "
    "right: twice it adds up 20 + 44 itself, once it announces much the same in other words. In the place of the "
    "mistake the large model does write 20 + 44 = 64, but the small one then computes 36 - 64 = -28 and answers 0; "
    "after the mistake the large model copies it. Three of six places rescue the solution, and nothing in the texts of "
    "the first two tells that they would: a step's value here is luck as much as what is written.",
    "- `gsm8k/test-1121` (Sofie walks twice as far as Brian). The small model is right alone (70 / 2 = 35). "
    "The large model's solution is wrong (it solves B + 2B = 70), and so is the small one's after either of its first "
    "two steps: the first leads to doubling, the second states the equation the wrong way round. Both are coding "
    "models and slip into Python; a blank line in a program is the end of a step, and what the program *outputs* is "
    "made up, once 35 where it would be 70, which happens to be the answer.",
    "- `gsm8k/test-0813` (35 marshmallows, two children eat 9 each, 3 are dropped, what has each of the rest). The "
    "small model forgets the 35: (9 + 9 - 3) / 2 = 7.5. Then it rounds down, with a long excuse, to 7, which is right "
    "(14 / 2). In the place of the excuse the large model says 7.5, so that escalating there does harm as the trees "
    "have it, where both are as wrong; alone it makes the same mistake and says 15.",
    "",
    "So the large model is better on average and not step by step. Its step is no repair of a mistake that stands, it "
    "may bring one in, and with one escalation the small model has the last word.",
)


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    left = fit_all(ladder_of(settings), float("inf"), settings.processes)
    text, ground, found = report(settings, left)
    write(text, settings.out)
    if settings.out:
        least = {} if PRM_RULE in found else {"score": "the probability of its least likely token"}
        draw(ground, found, settings.split, settings.out.with_suffix(".png"), SHOWN, WHOSE | least)


if __name__ == "__main__":
    main()
