"""How trajectories go on, measured from trees: step accuracies, repair, ends and tokens, with counts and intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.learners.pomdp.latent import Latent
from agents.learners.pomdp.sample import Sample
from agents.routers.pomdp.belief import RIGHT, WRONG, Floats
from rollouts.errors import DataError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, Trees, graph_of

LEAST_STEPS = 30  # fewer steps of both models below right prefixes tell nothing of their accuracies
_SHRINK = 20.0  # pseudo-steps of the coarser estimate behind each finer one
_Z = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A probability measured as a share, with its 95 % interval (Wilson).

    Attributes:
        count: (Expected) number of cases behind it.
    """

    value: float
    count: float
    low: float
    high: float


def wilson(successes: float, count: float) -> Rate:
    """Return a share with its Wilson interval; 0.5 in [0, 1] where there are no cases."""
    if count <= 0:
        return Rate(0.5, 0.0, 0.0, 1.0)
    share, extra = successes / count, _Z**2 / count
    centre = (share + extra / 2) / (1 + extra)
    half = _Z * np.sqrt(share * (1 - share) / count + extra / (4 * count)) / (1 + extra)
    low, high = min(share, centre - half), max(share, centre + half)
    return Rate(float(share), float(count), float(max(low, 0.0)), float(min(high, 1.0)))


@dataclass(frozen=True, eq=False)
class Dynamics:
    """Everything but the scores. T steps, K kinds of proposals (`agents.routers.pomdp.model.Kinds`).

    Attributes:
        small_right: P(the small step is right | prefix right).
        large_right: P(the large step is right | prefix right).
        large_right_if_right: The same where the small step is right.
        large_right_if_wrong: The same where the small step is wrong.
        repair: P(a large step mends a broken prefix): by how much it raises the share of broken prefixes that the
            small model ends correctly.
        salvage: P(a broken prefix ends correctly | the small model goes on).
        p_small: (T, K) P(small step right | prefix right, step, kind), shrunk to that of the kind.
        p_large: (2, K) P(large step right | prefix right, small step right or wrong, kind), shrunk likewise.
        hazard: T rates: P(the small model's proposal ends the episode | step t is reached).
        kind: (T, K) P(kind of the proposal | step).
        large_ends: (T, K) P(the large step ends the episode | step, kind of the small model's proposal).
        end_value: (2, 2) P(correct | trajectory right or wrong, proposal with or without an answer that ends it).
        token_line: (T, K, 2) intercept and slope of E[large tokens | step, kind, small tokens].
        small_tokens: (K,) mean tokens of the small model's proposals of a kind.
    """

    small_right: Rate
    large_right: Rate
    large_right_if_right: Rate
    large_right_if_wrong: Rate
    repair: Rate
    salvage: Rate
    p_small: Floats
    p_large: Floats
    hazard: tuple[Rate, ...]
    kind: Floats
    large_ends: Floats
    end_value: Floats
    token_line: Floats
    small_tokens: Floats
    mean_large_tokens: float


def measure(seen: Sample, latent: Latent) -> Dynamics:
    """Measure the dynamics from (weights of) what is hidden at the nodes of a sample.

    Raises:
        DataError: Too few steps below right prefixes, or none after wrong ones.
    """
    weight = latent.weight
    pair = weight[:, RIGHT]  # (M, small, large) below right prefixes
    small, large = pair.sum(axis=2), pair.sum(axis=1) * seen.present[:, [ESCALATE_LARGE]]
    small = small * seen.present[:, [CONTINUE_SMALL]]
    joint = pair * _both(seen)[:, None, None]
    _need(small.sum(axis=0), "the small model's")
    _need(large.sum(axis=0), "the large model's")
    everywhere = np.ones(len(pair), bool)
    right, whole = (_cells(seen, everywhere, each) for each in (small[:, RIGHT], small.sum(axis=1)))
    overall = right.sum() / max(whole.sum(), 1e-12)
    rates, p_large = [], []
    for given in (RIGHT, WRONG):
        own = joint[:, given]
        rates.append(wilson(own[:, RIGHT].sum(), own.sum()))
        part, total = (np.bincount(seen.kind, each, seen.kinds.count) for each in (own[:, RIGHT], own.sum(axis=1)))
        p_large.append(_shrunk(part, total, rates[-1].value))
    hazard, kind = _ends(seen)
    repair, salvage = _repair(seen, latent.prefix[:, WRONG])
    return Dynamics(
        small_right=wilson(small[:, RIGHT].sum(), small.sum()),
        large_right=wilson(large[:, RIGHT].sum(), large.sum()),
        large_right_if_right=rates[RIGHT],
        large_right_if_wrong=rates[WRONG],
        repair=repair,
        salvage=salvage,
        p_small=_shrunk(right, whole, _shrunk(right.sum(axis=0), whole.sum(axis=0), overall)),
        p_large=np.stack(p_large),
        hazard=hazard,
        kind=kind,
        large_ends=_large_ends(seen),
        end_value=_end_value(seen, latent),
        **_tokens(seen),
    )


def _both(seen: Sample) -> NDArray[np.bool_]:
    return seen.present[:, CONTINUE_SMALL] & seen.present[:, ESCALATE_LARGE]


def _need(found: Floats, whose: str) -> None:
    if found.sum() < LEAST_STEPS:
        raise DataError(
            f"Too few steps with known correctness to measure the dynamics: {found.sum():.0f} of {whose} steps below "
            f"right prefixes ({found[RIGHT]:.0f} right, {found[WRONG]:.0f} wrong), expected at least {LEAST_STEPS}. "
            "Label more solutions, or generate rollouts of more problems."
        )


def _cells(seen: Sample, where: NDArray[np.bool_], weights: NDArray[Any] | None = None) -> Floats:
    """Add up (m,) weights, or count, at some nodes by step and kind: (T, K)."""
    steps, kinds = seen.max_steps, seen.kinds.count
    cell = seen.step[where] * kinds + seen.kind[where]
    return np.bincount(cell, weights, steps * kinds).reshape(steps, kinds).astype(np.float64)


def _shrunk(part: NDArray[Any], whole: NDArray[Any], towards: Any) -> Floats:
    result: Floats = (part + _SHRINK * towards) / (whole + _SHRINK)
    return result


def _ends(seen: Sample) -> tuple[tuple[Rate, ...], Floats]:
    """Hazard by step and P(kind | step); steps beyond those seen are as the last one seen, the last of all ends."""
    counts = _cells(seen, seen.present[:, CONTINUE_SMALL])
    ends = seen.kinds.terminal
    hazard = tuple(wilson(row[ends].sum(), row.sum()) for row in counts)
    whole = counts.sum(axis=0) / counts.sum()
    kind = np.empty_like(counts)
    for t in range(len(counts)):
        whole = (counts[t] + whole) / (counts[t].sum() + 1.0)  # one pseudo-step as at the step before
        kind[t] = whole
    last = kind[-1] * ends
    share = (counts * ends).sum(axis=0)
    kind[-1] = last / last.sum() if last.sum() > 0 else (share + ends) / (share + ends).sum()
    return hazard, kind


def _large_ends(seen: Sample) -> Floats:
    there = _both(seen)
    total, part = _cells(seen, there), _cells(seen, there, seen.ends[there, ESCALATE_LARGE])
    base = _shrunk(part.sum(axis=0), total.sum(axis=0), seen.kinds.terminal.astype(np.float64))
    result = _shrunk(part, total, base)
    result[-1] = 1.0
    return result


def _end_value(seen: Sample, latent: Latent) -> Floats:
    """P(correct) at ends; two pseudo-ends: a right trajectory with an answer is correct, anything else is not."""
    part = np.array([[2.0, 0.0], [0.0, 0.0]])
    total = np.full((2, 2), 2.0)
    correct = seen.trees.correct[seen.rows] == 1
    for action in (CONTINUE_SMALL, ESCALATE_LARGE):
        use = seen.ends[:, action] & ~(seen.same & (action == ESCALATE_LARGE))
        after = latent.weight.sum(axis=(1, 3 - action))  # of the trajectory
        for without in (0, 1):
            rows = use & (seen.answered[:, action] == (without == 0))
            part[:, without] += (after * correct[:, [action]])[rows].sum(axis=0)
            total[:, without] += after[rows].sum(axis=0)
    result: Floats = part / total
    return result


def ends_right(trees: Trees, author: int) -> Floats:
    """Return (N, 2): whether the solution ends correctly if a proposal is accepted and one model writes the rest.

    NaN where that was not generated.
    """
    now, graph = np.where(trees.child == MISSING, np.nan, trees.correct == 1), graph_of(trees)
    value = graph.backward(lambda rows, later: (now[rows] + later)[:, author])
    return now + value[graph.child]


def _repair(seen: Sample, wrong: Floats) -> tuple[Rate, Rate]:
    """What a large step changes for broken prefixes, in pairs from the same prefix, and how they end without it."""
    after = ends_right(seen.trees, CONTINUE_SMALL)[seen.rows]
    alone = ~np.isnan(after[:, CONTINUE_SMALL])
    salvage = wilson((wrong * after[:, CONTINUE_SMALL])[alone].sum(), wrong[alone].sum())
    both = ~np.isnan(after).any(axis=1)
    gain, weights = (after[:, ESCALATE_LARGE] - after[:, CONTINUE_SMALL])[both], wrong[both]
    count = weights.sum()
    if count < LEAST_STEPS:
        return Rate(0.0, float(count), 0.0, 1.0), salvage
    mean = (weights * gain).sum() / count
    half = _Z * np.sqrt((weights * (gain - mean) ** 2).sum() / count / count)
    room = max(1 - salvage.value, 1e-6)
    low, value, high = (float(np.clip(each / room, 0, 1)) for each in (mean - half, mean, mean + half))
    return Rate(value, float(count), low, high), salvage


def _tokens(seen: Sample) -> dict[str, Any]:
    """Fit E[large tokens | step, kind, small tokens]: one slope, an intercept for each kind and, shrunk, each step."""
    kinds, there = seen.kinds.count, _both(seen)
    kind, small, large = seen.kind[there], seen.tokens[there, CONTINUE_SMALL], seen.tokens[there, ESCALATE_LARGE]
    count = np.bincount(kind, minlength=kinds).astype(np.float64)
    means = [_shrunk(np.bincount(kind, v, kinds), count, v.mean()) for v in (small, large)]
    centred = small - means[0][kind]
    slope = float((centred * (large - means[1][kind])).sum() / max((centred**2).sum(), 1e-12)) if len(small) else 0.0
    slope = float(np.clip(slope, 0.0, 2.0))
    intercept = means[1] - slope * means[0]
    rest = large - intercept[kind] - slope * small
    line = intercept + _shrunk(_cells(seen, there, rest), _cells(seen, there), 0.0)
    return {
        "token_line": np.stack([line, np.full_like(line, slope)], axis=2),
        "small_tokens": means[0],
        "mean_large_tokens": float(large.mean()),
    }
