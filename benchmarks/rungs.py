"""The rungs of the ladder (`benchmarks.ladder`): what they see, how they are fitted and kept, and what they come to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from agents.evaluation.curves import Method, Points
from agents.evaluation.forest import Forest
from agents.evaluation.oracle import tree_oracle
from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.splits import Candidates, Validation, halves, two_numbers
from agents.evaluation.walk import measured, references, run
from agents.learners import settings
from agents.learners.exact import fit as fit_exact
from agents.learners.exact import neighbours
from agents.learners.loop import Training
from agents.learners.pomdp.fit import estimate
from agents.learners.ppo import PPOAgg
from agents.learners.settings import ExactSettings, PPOSettings
from agents.routers.artefact import load, save
from agents.routers.base import AnyRouter
from agents.routers.mlp import at
from benchmarks.robustness import LAMS
from benchmarks.study import average
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from trim_env.costs import CostModel, TokenPrices, cost_model
from trim_env.tables import DecisionTables, decision_tables

PAPER = PPOSettings(**settings.PAPER)
"""The paper's settings of TRIM-Agg; what it does not tell (batches, epochs, number of decisions) is ours."""
PRICED = TokenPrices("signals charged", large_prefill=0.2, large_cached=0.02, scorer_prefill=0.02)
"""In tokens that the large model decodes."""
CLASS = "label.score,least(label.score),tokens,step,terminal,has_answer"


@dataclass(frozen=True)
class Rung:
    """One way to route.

    Attributes:
        kind: ``threshold``, ``two numbers``, ``exact``, ``ppo``, ``paper``, ``pomdp`` or ``oracle``.
        schema: What it sees.
        rule: Of the exact learner.
    """

    kind: str
    schema: str
    rule: str = ""

    @property
    def name(self) -> str:
        """As in tables."""
        names = {"threshold": "TRIM-Thr", "ppo": "TRIM-Agg", "paper": "TRIM-Agg, the paper's settings"}
        names |= {"pomdp": "TRIM-POMDP", "oracle": "tree oracle", "exact": self.rule}
        return names.get(self.kind, self.kind)

    @property
    def reads(self) -> str:
        """What it sees, in a word."""
        return {CLASS: "exact class", "agg/1": "score"}.get(self.schema, self.schema)

    @property
    def told(self) -> str:
        """Name and what it sees."""
        return f"{self.name} on {self.reads}" if self.schema else self.name

    @property
    def group(self) -> str:
        """Whose numbers it sees: ``score``, ``free``, ``prefill``, ``all``, ``exact class``, or none."""
        table = self.reads.split(".")[0]
        return {"agg": "score", "agg+": "score", "small": "free", "large": "prefill"}.get(table, table)


SIGNALS = ("small.min_logprob", "small.mean_logprob", "small.max_entropy", "large.min_logprob", "large.mean_logprob")
DEFAULT, POMDP, PAPER_RUNG = Rung("ppo", "agg+"), Rung("pomdp", "score"), Rung("paper", "agg")
FREE = Rung("ppo", "free")
PRM, KNOWING = Rung("exact", "agg+", "quadratic"), Rung("exact", CLASS, "quadratic")
RUNGS = (
    *(Rung("threshold", schema) for schema in ("agg/1", *SIGNALS)),
    Rung("two numbers", "agg/1"),
    PAPER_RUNG,
    POMDP,
    DEFAULT,
    *(Rung("exact", s, rule) for s in ("agg+", "free", "prefill", "all") for rule in ("linear", "quadratic", "mlp")),
    KNOWING,
    Rung("oracle", ""),
)
COSTS: dict[str, CostModel] = {"decode-only": cost_model("decode-only"), "priced": PRICED}
UNPRICED = ("ppo", "paper", "pomdp")  # the POMDP knows large tokens alone; PPO would have to be trained again


@dataclass(frozen=True)
class Ladder:
    """What is compared, and where.

    Attributes:
        rollouts: The store.
        fits: Folder in which fits are kept, and looked up.
        seeds: Independent fits of what is drawn.
        lams: Values of λ that all are fitted for, and measured at.
        rungs: The rungs.
        costs: Cost models that the exact learner is fitted for.
    """

    rollouts: str
    fits: Path
    seeds: int
    lams: tuple[float, ...] = LAMS
    rungs: tuple[Rung, ...] = RUNGS
    costs: tuple[str, ...] = ("decode-only", "priced")

    def under(self, cost: str) -> list[Rung]:
        """Return the rungs that are measured under a cost model."""
        return [rung for rung in self.rungs if cost == "decode-only" or rung.kind not in UNPRICED]

    def tasks(self) -> Iterator[Task]:
        """Yield all fits that are kept, a seed after the other, the quick ones first."""
        for seed in range(self.seeds):
            for cost in self.costs:
                yield from (
                    Task(self, rung, cost, seed, self.lams) for rung in self.under(cost) if rung.kind == "exact"
                )
            for lam in self.lams:
                slow = (rung for rung in (DEFAULT, FREE, PAPER_RUNG) if rung in self.rungs)
                yield from (Task(self, rung, "decode-only", seed, (lam,)) for rung in slow)


def labelled(trees: Trees) -> Trees:
    """Return trees with whether steps are right as one more signal."""
    right = np.where(trees.label < 0, np.float32("nan"), trees.label).astype(np.float32)
    return replace(trees, signals={**trees.signals, "label.score": right})


@cache
def _trees(rollouts: str, split: str | None = None) -> Trees:
    return labelled(compile_store(rollouts, split=split))


@cache
def _train(rollouts: str, schema: str, cost: str) -> DecisionTables:
    return decision_tables(_trees(rollouts), "train", schema=schema or "agg+", cost=COSTS[cost])


@cache
def _validation(rollouts: str, schema: str, cost: str) -> Validation:
    trees, kind = _trees(rollouts), {"schema": schema, "cost": COSTS[cost]}
    return Validation(lambda indices: decision_tables(trees, indices=indices, **kind), trees)


@dataclass(frozen=True)
class Task:
    """A fit that is kept: of one rung, seed and λ; of the exact learner for all λ together."""

    ladder: Ladder
    rung: Rung
    cost: str
    seed: int
    lams: tuple[float, ...]

    def place(self, lam: float) -> Path:
        """Return where the router for a λ is kept."""
        rung = self.rung
        kind = "-".join(filter(None, [rung.kind, rung.rule, rung.reads.replace(" ", "-")]))
        return self.ladder.fits / self.cost / kind / f"seed-{self.seed}" / f"lam-{lam:g}"

    @property
    def done(self) -> bool:
        """Whether all its routers are there."""
        return all((self.place(lam) / "policy.json").exists() for lam in self.lams)

    def fit(self) -> dict[float, AnyRouter]:
        """Return its routers by λ."""
        rung, own = self.rung, (self.ladder.rollouts, self.rung.schema, self.cost)
        key = (self.seed, *(self.ladder.lams.index(lam) for lam in self.lams))
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        if rung.kind == "exact":
            choice, found = _validation(*own).choice, dict[float, AnyRouter]()
            for group in neighbours(self.lams):
                frontier = fit_exact(_train(*own), choice, group, ExactSettings(rung.rule), seed)
                found |= {lam: at(frontier.router(lam), lam) for lam in group}
            return found
        (lam,) = self.lams
        if rung.kind == "ppo":
            return {lam: at(Training(_train(*own), _validation(*own), lam, PPOSettings(), seed).run().router, lam)}
        learner = PPOAgg(_train(*own), lam, PAPER, seed)
        while not learner.done:
            learner.iterate()
        return {lam: at(learner.router(), lam)}


def keep(task: Task, end: float) -> bool:
    """Fit, unless time is up; return whether it was done."""
    if time.time() > end:
        return False
    begin = time.process_time()
    found = task.fit()
    seconds = (time.process_time() - begin) / len(found)
    for lam, router in found.items():
        if not (task.place(lam) / "policy.json").exists():
            save(router, task.place(lam), {"seconds": seconds})
    return True


@dataclass(frozen=True, eq=False)
class Measured:
    """A rung on the split.

    Attributes:
        rung: The rung.
        lams: Values of λ.
        by_lam: Outcomes for each λ, averaged over seeds.
        method: Its curve.
        seeds: Mean returns of the single seeds.
        chosen_by: Mean return where choices are made.
    """

    rung: Rung
    lams: tuple[float, ...]
    by_lam: list[Outcomes]
    method: Method
    seeds: list[float]
    chosen_by: float

    @property
    def returns(self) -> Floats:
        """(P,) returns, averaged over the λ."""
        return mean_return(self.by_lam, self.lams)


def mean_return(by_lam: Sequence[Outcomes], lams: Sequence[float]) -> Floats:
    """Return (P,) returns, averaged over the λ."""
    values: Floats = np.mean([one.returns(lam) for one, lam in zip(by_lam, lams, strict=True)], axis=0)
    return values


class Ground:
    """Where choices are made and where figures come from, under one cost model."""

    def __init__(self, ladder: Ladder, split: str, cost: str) -> None:
        """Build the tables."""
        self.ladder, self.cost = ladder, cost
        trees, model = _trees(ladder.rollouts), COSTS[cost]
        choice, verdict = halves(trees)
        if split == "validation":
            self.choosing = decision_tables(trees, indices=choice, cost=model)
            self.measured = decision_tables(trees, indices=verdict, cost=model)
        else:
            self.choosing = decision_tables(trees, "validation", cost=model)
            self.measured = decision_tables(_trees(ladder.rollouts, split), split, cost=model)
        self.both, self.chosen_by = references(self.measured), references(self.choosing)
        self._thresholds: dict[Rung, Candidates] = {}

    def settings_of(self, rung: Rung) -> Iterator[list[AnyRouter]]:
        """Yield for each seed the routers of all λ."""
        lams, rollouts = self.ladder.lams, self.ladder.rollouts
        if rung.kind == "threshold":
            yield [self.thresholds(rung).best(lam).threshold for lam in lams]
        elif rung.kind == "two numbers":
            train = _train(rollouts, rung.schema, self.cost)
            forest = Forest(train)
            yield [two_numbers(train, forest, lam) for lam in lams]
        elif rung.kind == "pomdp":
            yield list(estimate(_trees(rollouts)).routers(lams))
        else:
            for seed in range(self.ladder.seeds):
                task = Task(self.ladder, rung, self.cost, seed, lams)
                if task.done:
                    routers = [load(task.place(lam)).router for lam in lams]
                    yield [at(router, lam) for router, lam in zip(routers, lams, strict=True)]

    def thresholds(self, rung: Rung) -> Candidates:
        """Return the thresholds on what a rung reads."""
        if rung not in self._thresholds:
            self._thresholds[rung] = Candidates(self.choosing, schema=rung.schema)
        return self._thresholds[rung]

    def measure(self, rung: Rung) -> Measured | None:
        """Return a rung on the split; None if nothing of it is fitted."""
        lams = self.ladder.lams
        routers = list(self.settings_of(rung)) if rung.kind != "oracle" else []

        def outcomes(tables: DecisionTables) -> list[list[Outcomes]]:
            if rung.kind == "oracle":
                return [[tree_oracle(tables, lam) for lam in lams]]
            return [[run(router, tables) for router in own] for own in routers]

        def points(seeds: list[list[Outcomes]]) -> Points:
            return [(lam, average(list(own))) for lam, own in zip(lams, zip(*seeds, strict=True), strict=True)]

        if not (each := outcomes(self.measured)):
            return None
        own, elsewhere = points(each), points(outcomes(self.choosing))
        method = Method.chosen(own, elsewhere, self.chosen_by)
        if rung.kind == "threshold":
            method = measured(self.thresholds(rung).spread_over(self.chosen_by.large), self.chosen_by, self.measured)
        by_lam, chosen_by = [outcomes for _, outcomes in own], [outcomes for _, outcomes in elsewhere]
        seeds = [float(mean_return(outcomes, lams).mean()) for outcomes in each]
        return Measured(rung, lams, by_lam, method, seeds, float(mean_return(chosen_by, lams).mean()))

    def all(self) -> dict[Rung, Measured]:
        """Return all rungs of which something is fitted."""
        found = {rung: self.measure(rung) for rung in self.ladder.under(self.cost)}
        return {rung: measured for rung, measured in found.items() if measured}
