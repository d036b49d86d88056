"""Which prefixes and proposals are right, where nobody has labelled them: EM over whole trees.

The hidden variables of a tree are its prefixes' states and its proposals' classes; what is seen are scores, final
outcomes of all paths, and where both models wrote the same step. Every prefix has one parent, so the expectations
are exact: one pass from the ends to the roots, one back. It starts from the large model's continuations: a prefix
that the large model ends correctly is probably right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.learners.pomdp.dynamics import Dynamics, ends_right, measure
from agents.learners.pomdp.latent import Latent
from agents.learners.pomdp.observation import ObservationModel, observations
from agents.learners.pomdp.sample import Sample
from agents.routers.pomdp.belief import RIGHT, S0, S1, S2, WRONG, Floats, Ints
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, Graph, graph_of

ITERATIONS = 40
TOLERANCE = 1e-4  # of the mean log-likelihood per node
_IF_RIGHT, _IF_WRONG = 0.95, 0.15  # P(prefix right) to start from, by how the large model's continuation ends


@dataclass(frozen=True, eq=False)
class Fitted:
    """What EM found.

    Attributes:
        latent: Posterior of what is hidden, at all nodes of the sample.
        log_likelihood: Mean per node, by iteration; the shrinking of finer estimates ends its rise.
    """

    latent: Latent
    observed: ObservationModel
    dynamics: Dynamics
    log_likelihood: list[float]


def em(seen: Sample) -> Fitted:
    """Fit the model without labels, on all nodes of some trees.

    Raises:
        DataError: Too few steps of a class are expected.
    """
    latent = first_guess(seen)
    graph = graph_of(seen.trees, seen.rows)
    history: list[float] = []
    while True:
        scores, dynamics = observations(seen, latent), measure(seen, latent)
        if len(history) >= ITERATIONS or (len(history) > 1 and history[-1] - history[-2] < TOLERANCE):
            return Fitted(latent, scores, dynamics, history)
        latent, likelihood = posterior(seen, graph, scores, dynamics, agreement_rates(seen, latent))
        history.append(likelihood)


def first_guess(seen: Sample) -> Latent:
    """Return weights from how the large model's continuations end; where there are none, the small model's."""
    after_large = ends_right(seen.trees, ESCALATE_LARGE)[seen.rows]
    after_small = ends_right(seen.trees, CONTINUE_SMALL)[seen.rows]
    after = np.where(np.isnan(after_large), after_small, after_large)
    right = np.where(np.isnan(after), 0.5, np.where(after > 0.5, _IF_RIGHT, _IF_WRONG))  # (M, 2) of proposals
    prefix = np.where(seen.step == 0, 1.0, right[:, ESCALATE_LARGE])
    weight = np.zeros((len(prefix), 2, 2, 2))
    share = np.stack([right, 1 - right], axis=2)
    weight[:, RIGHT] = prefix[:, None, None] * share[:, 0, :, None] * share[:, 1, None, :]
    weight[seen.same, RIGHT] *= np.eye(2)
    total = weight[:, RIGHT].sum(axis=(1, 2))
    weight[:, RIGHT] *= (prefix / np.where(total > 0, total, 1.0))[:, None, None]
    weight[:, WRONG, WRONG, WRONG] = 1 - prefix
    return Latent(seen.rows, weight)


def agreement_rates(seen: Sample, latent: Latent) -> Floats:
    """Return P(both models wrote the same step | both right; both wrong, prefix right; both wrong, prefix wrong)."""
    both = seen.present[:, CONTINUE_SMALL] & seen.present[:, ESCALATE_LARGE]
    weight = latent.weight[both][:, [RIGHT, RIGHT, WRONG], [RIGHT, WRONG, WRONG], [RIGHT, WRONG, WRONG]]
    rates: Floats = (weight[seen.same[both]].sum(axis=0) + 0.5) / (weight.sum(axis=0) + 1.0)
    return rates


def posterior(
    seen: Sample, graph: Graph, observed: ObservationModel, dynamics: Dynamics, same: Floats
) -> tuple[Latent, float]:
    """Return the posterior of what is hidden and the mean log-likelihood per node; `same` is of `agreement_rates`."""
    local, ends = _local(seen, dynamics, same), _ends(seen, dynamics)
    likelihood = observed.small[seen.context, seen.kind, :, seen.bin[:, 0]]  # (M, 3)
    likelihood = np.where(seen.present[:, [0]], likelihood, 1.0)
    tells = seen.present[:, 1] & ~seen.same & ~seen.ends[:, 1]
    large_likelihood = np.where(tells[:, None], observed.large[seen.context, :, seen.bin[:, 1]], 1.0)  # (M, 2)
    joint = np.zeros_like(local)  # (M, prefix, small, large): likelihood of all that is below a node
    scale = np.empty((len(local), 1))

    def up(at: Ints, later: Floats) -> Floats:
        after = ends[at] * later  # (m, action, trajectory right or wrong)
        small = np.zeros((len(at), 2, 2))  # by prefix, trajectory
        small[:, RIGHT, RIGHT] = likelihood[at, S0] * after[:, 0, RIGHT]
        small[:, RIGHT, WRONG] = likelihood[at, S2] * after[:, 0, WRONG]
        small[:, WRONG, WRONG] = likelihood[at, S1] * after[:, 0, WRONG]
        large = np.where(seen.same[at, None], 1.0, large_likelihood[at] * after[:, 1])
        joint[at] = local[at] * small[:, :, :, None] * large[:, None, None, :]
        own: Floats = joint[at].sum(axis=(2, 3))
        scale[at] = own.max(axis=1, keepdims=True)
        joint[at] /= scale[at][:, :, None, None]
        return own / scale[at]

    below = graph.backward(up, np.ones(2))[:-1]  # of a right and of a wrong prefix, up to the factor `scale`
    weight = np.empty_like(joint)

    def down(at: Ints, prefix: Floats) -> Floats:
        weight[at] = joint[at] * (prefix / np.maximum(below[at], 1e-300))[:, :, None, None]
        on = np.stack([weight[at].sum(axis=(1, 3)), weight[at].sum(axis=(1, 2))], axis=1)
        on[seen.same[at], ESCALATE_LARGE] = 0.0  # the one state that both lead to is told once
        return on

    start = np.zeros_like(below)
    start[graph.roots, RIGHT] = 1.0
    graph.forward(down, start)
    likely = np.log(scale).sum() + np.log(below[graph.roots, RIGHT]).sum()
    return Latent(seen.rows, weight), float(likely) / len(local)


def _local(seen: Sample, dynamics: Dynamics, same: Floats) -> Floats:
    """Return (M, prefix, small, large) P(states of both proposals, and whether they are the same | prefix)."""
    p_small, p_large = dynamics.p_small[seen.step, seen.kind], dynamics.p_large[:, seen.kind]
    local = np.zeros((len(p_small), 2, 2, 2))
    for state, chance in ((RIGHT, p_small), (WRONG, 1 - p_small)):
        local[:, RIGHT, state, RIGHT] = chance * p_large[state]
        local[:, RIGHT, state, WRONG] = chance * (1 - p_large[state])
    local[:, WRONG, WRONG, RIGHT] = dynamics.repair.value
    local[:, WRONG, WRONG, WRONG] = 1 - dynamics.repair.value
    both = seen.present[:, CONTINUE_SMALL] & seen.present[:, ESCALATE_LARGE]
    told = np.zeros((2, 2, 2, 2))  # P(different, the same | states)
    told[0] = 1.0
    for rate, (prefix, both_are) in zip(same, ((RIGHT, RIGHT), (RIGHT, WRONG), (WRONG, WRONG)), strict=True):
        told[:, prefix, both_are, both_are] = 1 - rate, rate
    return np.where(both[:, None, None, None], local * told[seen.same.astype(int)], local)


def _ends(seen: Sample, dynamics: Dynamics) -> Floats:
    """Return (M, action, trajectory) P(grade | trajectory) of proposals that end an episode, 1 of others."""
    chance = np.clip(dynamics.end_value, 1e-4, 1 - 1e-4)[:, 1 - seen.answered.astype(int)]  # (trajectory, M, action)
    chance = np.moveaxis(chance, 0, 2)
    correct = (seen.trees.correct[seen.rows] == 1)[:, :, None]
    return np.where(seen.ends[:, :, None], np.where(correct, chance, 1 - chance), 1.0)


@dataclass(frozen=True)
class Agreement:
    """How posteriors agree with exact labels, over the small model's proposals whose class is labelled.

    Attributes:
        share: Share of them whose likeliest class is the labelled one.
        always_s0: What calling all of them S0 would reach.
        by_class: For each class the share of its steps that are recognised; NaN where it has none.
    """

    steps: int
    share: float
    always_s0: float
    by_class: tuple[float, float, float]


def agreement(fitted: Latent, exact: Latent) -> Agreement | None:
    """Compare posteriors with exact labels of the same nodes; None where nothing is labelled."""
    truth, found = exact.classes(CONTINUE_SMALL), fitted.classes(CONTINUE_SMALL).argmax(axis=1)
    known: NDArray[np.bool_] = truth.max(axis=1) > 0.99
    if not known.any():
        return None
    name, hit = truth[known].argmax(axis=1), truth[known].argmax(axis=1) == found[known]
    shares = [float(hit[name == each].mean()) if (name == each).any() else float("nan") for each in (S0, S1, S2)]
    return Agreement(int(known.sum()), float(hit.mean()), float((name == S0).mean()), (shares[0], shares[1], shares[2]))
