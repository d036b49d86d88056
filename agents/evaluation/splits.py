"""What is chosen on validation: choices on one half and the verdict on the other (docs/design.md, section 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.bootstrap import resample_weights
from agents.evaluation.curves import TOLERANCE, References, per_cost
from agents.evaluation.forest import Forest, linear_rule
from agents.evaluation.health import Health, assess
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.walk import Settings, references, run
from agents.routers.base import Constant, Knob, Router, Threshold
from rollouts.errors import StoreError
from rollouts.trees.arrays import PART, Trees
from trim_env.features import DEFAULT_SCHEMA, schema_named
from trim_env.tables import DecisionTables

CANDIDATES = 200
OPERATING_POINTS = 16
Record = dict[str, float]
Setting = TypeVar("Setting")


def halves(trees: Trees) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tree indices of the choice half and of the verdict half of validation, told apart by hash of problem.

    Raises:
        StoreError: The split is empty, or all of its problems fall into one half.
    """
    indices = trees.select("validation")
    second = np.array([_bit(problem) for problem in trees.problem_ids])[trees.problem[indices]]
    if second.all() or not second.any():
        raise StoreError(
            f"Split 'validation' has {len(np.unique(trees.problem[indices]))} problems, too few to be split in two "
            "(one half for choices, one for the verdict). Generate rollouts for more validation problems."
        )
    return indices[~second], indices[second]


def _bit(problem: str) -> bool:
    return bool(hashlib.blake2b(problem.encode("utf-8"), digest_size=1, person=b"trim-halves").digest()[0] & 1)


def thresholds(tables: DecisionTables, count: int = CANDIDATES, schema: str = Threshold.schema) -> list[float]:
    """Return candidate thresholds: quantiles of the first feature, the proposals' score, and one above all."""
    scores = tables.in_schema(schema)[tables.trees.rows_of(tables.indices), 0]
    levels = np.unique(np.quantile(scores[~np.isnan(scores)], np.linspace(0, 1, count)).astype(np.float32))
    return [*levels.tolist(), float(np.nextafter(np.float32(levels[-1]), np.float32(np.inf)))]


def spread(
    candidates: Sequence[tuple[Setting, Outcomes]], large: Outcomes, count: int = OPERATING_POINTS
) -> list[tuple[Setting, Outcomes]]:
    """Choose operating points that spread over c in (0, 1).

    Targets are `count` equally spaced costs i / (count + 1). Each gets a candidate of its own such that the total
    distance between targets and candidates is least. Candidates with the same c (as neighbouring thresholds that
    decide alike) count as one: the one with the higher accuracy, then the first. Candidates outside (0, 1) are
    never chosen. Knobs chosen here on validation are then evaluated on other problems.

    Args:
        candidates: (knob or router, outcomes on validation), in any order.
        large: Always escalating on the same problems.
        count: Points to choose at most.

    Returns:
        Chosen candidates by ascending c, fewer than `count` where there are fewer distinct ones.

    Raises:
        DataError: A candidate is on other problems than `large`.
    """
    for _, outcomes in candidates:
        outcomes.paired_with(large)
    c = np.array([float(per_cost(outcomes.cost.sum(), large.cost.sum())) for _, outcomes in candidates])
    accuracy = np.array([outcomes.correct.mean() for _, outcomes in candidates])
    order = [i for i in np.lexsort((-accuracy, c)) if TOLERANCE < c[i] < 1 - TOLERANCE]
    distinct = [i for n, i in enumerate(order) if n == 0 or c[i] - c[order[n - 1]] > TOLERANCE]
    if len(distinct) > count:
        from scipy.optimize import linear_sum_assignment

        targets = np.arange(1, count + 1) / (count + 1)
        _, taken = linear_sum_assignment(np.abs(targets[:, None] - c[distinct]))
        distinct = [distinct[j] for j in sorted(taken)]
    return [candidates[i] for i in distinct]


@dataclass(frozen=True)
class TwoNumbers:
    """Escalates if the score of the proposal is below one number and no accepted step's is below another."""

    score: float
    least: float
    lam: float
    name: str = "two numbers"
    schema: str = "agg/1"

    @property
    def knob(self) -> Knob:
        """λ that it was chosen for."""
        return Knob("lam", self.lam)

    def probability(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return (n,) of 0 and 1."""
        below = features[:, 0] < np.float32(self.score)
        return (below & (features[:, 1] >= np.float32(self.least))).astype(np.float64)


@dataclass(frozen=True)
class Baselines:
    """Simple rules for one λ."""

    constant: Constant
    threshold: Threshold
    best: Router

    @property
    def named(self) -> dict[str, Router]:
        """The rules by what they are called in sentences, the best first."""
        return {words(rule): rule for rule in (self.best, self.threshold, self.constant)}


def words(rule: Router) -> str:
    """Return what a simple rule is called in a sentence."""
    if isinstance(rule, Threshold):
        return f"the best threshold ({rule.threshold:.3f})"
    if isinstance(rule, TwoNumbers):
        return f"the best two-number rule (score < {rule.score:.3f}, least score so far >= {rule.least:.3f})"
    return rule.name if isinstance(rule, Constant) else f"a {rule.name} rule"


class Candidates:
    """Simple rules: both constants and all thresholds, run once for all λ, and rules that are fitted for each."""

    def __init__(
        self,
        tables: DecisionTables,
        fitted_on: Callable[[], DecisionTables] | None = None,
        *,
        schema: str = Threshold.schema,
    ) -> None:
        """Run constants and thresholds.

        Args:
            tables: The choice half.
            fitted_on: The training split, for a two-number rule and a linear one; default: do without them.
            schema: Thresholds are those on its first feature.
        """
        self._tables, self._fitted_on = tables, fitted_on
        levels = thresholds(tables, schema=schema)
        self.thresholds: list[tuple[Router, Outcomes]] = [
            (router, run(router, tables)) for router in (Threshold(level, schema=schema) for level in levels)
        ]
        self._constants: list[tuple[Router, Outcomes]] = [
            (router, run(router, tables)) for router in (Constant(0), Constant(1))
        ]
        self._best: dict[float, Baselines] = {}

    def spread_over(self, large: Outcomes) -> Settings:
        """Return 16 thresholds that spread over the cost of always-large on the same trees."""
        return spread(self.thresholds, large)

    def best(self, lam: float) -> Baselines:
        """Return those with the greatest mean return."""
        if lam not in self._best:

            def greatest(rules: Sequence[tuple[Router, Outcomes]]) -> tuple[Router, Outcomes]:
                return max(rules, key=lambda item: float(item[1].returns(lam).mean()))

            constant, threshold = greatest(self._constants), greatest(self.thresholds)
            fitted = [(rule, run(rule, self._tables)) for rule in self._fitted(lam)]
            assert isinstance(constant[0], Constant) and isinstance(threshold[0], Threshold)
            best, _ = greatest([constant, threshold, *fitted])
            self._best[lam] = Baselines(constant[0], threshold[0], best)
        return self._best[lam]

    @cached_property
    def _grown(self) -> tuple[DecisionTables, Forest] | None:
        """The training trees, if rules can be fitted on them: all that the caps allow was generated."""
        tables = self._fitted_on and self._fitted_on().sample(PART // 4)  # rules of so few numbers
        return None if tables is None or tables.graph.missing.any() else (tables, Forest(tables, DEFAULT_SCHEMA))

    def _fitted(self, lam: float) -> list[Router]:
        if self._grown is None:
            return []
        tables, forest = self._grown
        schema = schema_named(DEFAULT_SCHEMA).id
        return [two_numbers(tables, forest, lam), linear_rule(forest, schema, lam, tables.max_large_tokens)]


def two_numbers(tables: DecisionTables, forest: Forest, lam: float) -> TwoNumbers:
    """Return the two-number rule with the greatest return on some trees, of a grid of quantiles."""
    score, least = tables.in_schema("agg")[forest.graph.rows, :2].T
    uppers = [*np.unique(np.quantile(score, np.linspace(0, 1, 48))), np.nextafter(score.max(), np.float32(np.inf))]
    lowers = np.unique(np.quantile(least, np.linspace(0, 1, 16)))
    enough = least[:, None] >= lowers
    found = np.array([forest.returns((score < upper)[:, None] & enough, lam) for upper in uppers])
    upper, lower = np.unravel_index(int(found.argmax()), found.shape)
    return TwoNumbers(float(uppers[upper]), float(lowers[lower]), lam)


class Validation:
    """Both halves of the validation split, with what simple rules reach on them."""

    def __init__(self, tables: Callable[[Any], DecisionTables], trees: Trees) -> None:
        """Prepare the halves; `tables` makes those of given tree indices."""
        choice, verdict = halves(trees)
        self.choice, self.verdict = tables(choice), tables(verdict)
        self.references: tuple[References, References] = (references(self.choice), references(self.verdict))
        fitting = "train" in trees.splits[trees.problem]  # else it is generated while a router is trained
        self.candidates = Candidates(self.choice, (lambda: tables(trees.select("train"))) if fitting else None)
        self._on = {Threshold.schema: self.candidates}
        self._weights = tuple(resample_weights(len(each.small), 1000) for each in self.references)

    def thresholds_on(self, schema: str) -> Candidates:
        """Return the candidates whose thresholds are on the first feature of a schema."""
        if schema not in self._on:
            self._on[schema] = Candidates(self.choice, schema=schema)
        return self._on[schema]

    def assess(self, router: Any, lam: float, *, final: bool) -> Health:
        """Assess a router on the choice half or, finally, on the verdict half, on which no rule was chosen."""
        tables, which = (self.verdict, 1) if final else (self.choice, 0)
        rules = {name: run(rule, tables) for name, rule in self.candidates.best(lam).named.items()}
        return assess(run(router, tables), rules, self.references[which].large, lam, self._weights[which])

    def measure(self, outcomes: Outcomes, lam: float) -> Record:
        """Return mean return, accuracy, large-token share and escalation rate on the choice half."""
        large = max(float(self.references[0].large.cost.sum()), 1e-12)
        return {
            "return": float(outcomes.returns(lam).mean()),
            "accuracy": float(outcomes.correct.mean()),
            "share": float(outcomes.cost.sum()) / large,
            "escalation_rate": float(outcomes.escalations.sum() / outcomes.steps.sum()),
        }
