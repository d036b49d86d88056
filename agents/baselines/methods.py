"""All baselines by name: each is fitted by one call, and gives settings to choose from.

A method that is added here is in every table that compares the field (`evaluate.py --baselines`, `benchmarks.field`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.baselines import automix, predict, routellm, smoothie
from agents.baselines.examples import Examples, questions_of
from agents.baselines.vote import Vote
from agents.evaluation.curves import Method, References
from agents.evaluation.outcomes import Floats, Outcomes
from agents.evaluation.splits import OPERATING_POINTS, spread, thresholds
from agents.evaluation.suite import Compared
from agents.evaluation.walk import alone, references, run
from agents.routers.base import AnyRouter, Knob, Threshold
from agents.routers.text import CharTfidf, TextRouter
from agents.routers.whole import Whole
from rollouts.errors import ConfigError, DataError, StoreError, require
from trim_env.tables import DecisionTables

STEP, CASCADE, QUERY, REFERENCE = "step-level", "cascade", "query-level", "reference"
GROUPS = (STEP, CASCADE, QUERY, REFERENCE)
SELF_VERIFIED = "AutoMix (self-verification)"  # needs a store that the small model has verified
ENVELOPES = {CASCADE: "best of the cascades", QUERY: "best of the query-level routers"}
SETTINGS = 64  # thresholds tried of a query-level router
_SAME = 1e-9  # what questions are worth is rounded otherwise where they come alone
STRATEGIES = (0.15, 0.4)  # shares of always-large's cost that thresholds on steps, as arms, come to in training


class Setting(NamedTuple):
    """One setting of a method, as something that runs.

    Attributes:
        run: From the tables of a split to what it comes to there.
    """

    knob: float
    run: Callable[[DecisionTables], Outcomes]


@dataclass(frozen=True, eq=False)
class Fitting:
    """What methods are fitted on.

    Attributes:
        choosing: Problems on which settings are laid out and chosen; what is fitted reads no outcome of theirs.
        features: Features of questions, fitted on the training ones; default: `CharTfidf`.
    """

    train: DecisionTables
    choosing: DecisionTables
    features: routellm.Features | None = None
    seed: int = 0

    @cached_property
    def examples(self) -> Examples:
        """The training problems as query-level methods see them."""
        return Examples.of(self.train)

    @cached_property
    def embed(self) -> routellm.Features:
        """Features of questions."""
        return self.features or CharTfidf.fit(self.examples.questions)

    @cached_property
    def by(self) -> References:
        """Always-small and always-large where settings are chosen."""
        return references(self.choosing)

    @cached_property
    def strategies(self) -> dict[str, AnyRouter]:
        """Thresholds on steps, as arms beside the two models."""
        tried = [(Threshold(level), run(Threshold(level), self.train)) for level in thresholds(self.train, 64)]
        nearest = [min(tried, key=lambda each, c=c: abs(self._trained.share(each[1]) - c))[0] for c in STRATEGIES]  # type: ignore[misc]
        return {f"threshold {each.threshold:.3f}": each for each in nearest}

    @cached_property
    def of_models(self) -> predict.Predictor:
        """Accuracies and costs of the two models."""
        both = alone(self.train)
        return self._predicting({predict.SMALL: both.small, predict.LARGE: both.large})

    @cached_property
    def predictor(self) -> predict.Predictor:
        """Accuracies and costs of the two models and of the strategies."""
        own = self._predicting({name: run(router, self.train) for name, router in self.strategies.items()})
        return predict.Predictor(
            self.embed, {**self.of_models.weights, **own.weights}, (*self.of_models.arms, *own.arms)
        )

    @cached_property
    def _trained(self) -> References:
        return references(self.train)

    def _predicting(self, arms: dict[str, Outcomes]) -> predict.Predictor:
        price = self._trained.large.cost.mean()
        told = {name: (outcomes.correct, outcomes.cost / price) for name, outcomes in arms.items()}
        return predict.fit(self.examples.questions, told, self.embed, self.seed)

    @cached_property
    def arms(self) -> Callable[[DecisionTables], tuple[list[Outcomes], Floats, Floats]]:
        """From a split to the outcomes of all arms and what is predicted of them, (P, a) accuracies and costs."""

        @cache
        def arms(tables: DecisionTables) -> tuple[list[Outcomes], Floats, Floats]:
            both, own = alone(tables), [run(router, tables) for router in self.strategies.values()]
            return [both.small, both.large, *own], *self.predictor(questions_of(tables))

        return arms


@dataclass(frozen=True)
class Baseline:
    """A method of the field.

    Attributes:
        fit: From what there is to fit on to settings.
        note: What a reader must know to take its row for what it is.
    """

    name: str
    group: str
    fit: Callable[[Fitting], Iterable[Setting]]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method with at most 16 settings that validation spread over the cost, and what they come to there.

    Attributes:
        choosing: Their outcomes where they were chosen.
        seconds: Processor time that fitting and trying settings took.
    """

    baseline: Baseline
    settings: list[Setting]
    choosing: list[Outcomes] = field(repr=False)
    seconds: float = 0.0

    def measured(self, tables: DecisionTables, choosing: References) -> Method:
        """Return its operating points on a split; `choosing` are the references where they were chosen."""
        points = [(setting.knob, setting.run(tables)) for setting in self.settings]
        elsewhere = [(setting.knob, each) for setting, each in zip(self.settings, self.choosing, strict=True)]
        return Method.chosen(points, elsewhere, choosing)


def fit(baseline: Baseline, fitting: Fitting, count: int = OPERATING_POINTS) -> Fitted:
    """Fit a method and choose its operating points by what they cost on validation.

    Raises:
        DataError: Its data do not suffice.
    """
    begin = time.process_time()
    candidates = [(setting, setting.run(fitting.choosing)) for setting in baseline.fit(fitting)]
    chosen = spread(candidates, fitting.by.large, count)
    if not chosen:
        raise DataError(f"{baseline.name}: no setting costs more than always-small and less than always-large.")
    settings, outcomes = zip(*chosen, strict=True)
    return Fitted(baseline, list(settings), list(outcomes), time.process_time() - begin)


def envelope(name: str, several: Sequence[Fitted]) -> Fitted:
    """Return one method with the settings of several: the hull that validation chooses says which of them are used."""
    members = ", ".join(each.baseline.name for each in several)
    baseline = Baseline(name, several[0].baseline.group, lambda _: [], f"validation chooses among {members}")
    settings = [setting for each in several for setting in each.settings]
    return Fitted(baseline, settings, [outcomes for each in several for outcomes in each.choosing])


def fit_all(methods: Iterable[Baseline], fitting: Fitting) -> tuple[list[Fitted], list[str]]:
    """Fit methods, and an envelope of the query-level ones and of the cascades; return what some lacked as well."""
    found, lacking = list[Fitted](), list[str]()
    for method in methods:
        try:
            found.append(fit(method, fitting))
        except (DataError, StoreError) as error:  # such as scores that the store does not have
            lacking.append(f"{method.name} was not fitted. {error}")
    for group, name in ENVELOPES.items():
        if len(own := [each for each in found if each.baseline.group == group]) > 1:
            found.append(envelope(name, own))
    return sorted(found, key=lambda each: GROUPS.index(each.baseline.group)), lacking


def field_beside(
    train: DecisionTables, choosing: DecisionTables, split: DecisionTables
) -> tuple[list[Compared], list[str]]:
    """Return the field on a split, and what could not be fitted, as `agents.evaluation.suite.evaluate` takes it.

    Raises:
        ConfigError: There is a cap on large tokens, which they cannot keep, or scikit-learn is not installed.
    """
    require("baselines", "sklearn")
    if split.max_large_tokens is not None:
        raise ConfigError(
            f"--baselines: routers of whole problems cannot keep a cap of {split.max_large_tokens} large tokens for a "
            "problem. Leave one of the two out."
        )
    fitting, found = Fitting(train, choosing), []
    fitted, lacking = fit_all(BASELINES, fitting)
    for each in fitted:
        name, group = each.baseline.name, each.baseline.group
        try:
            found.append(Compared(name, group, each.measured(split, fitting.by), name in ENVELOPES.values()))
        except DataError as error:  # such as a budget that was enough for the problems that choose
            lacking.append(f"{name} was not measured. {error}")
    return found, lacking


def of_routers(routers: Iterable[Whole | AnyRouter]) -> list[Setting]:
    """Return routers as settings."""
    return [Setting(router.knob.value, partial(run, router)) for router in routers]


def at_thresholds(router: TextRouter, fitting: Fitting) -> list[TextRouter]:
    """Return a router at quantiles of what questions are worth to it, each between two of them, and one above all."""
    worth = np.sort(router.preference(questions_of(fitting.choosing)))
    worth = worth[np.diff(worth, prepend=worth[0] - 1) > _SAME]
    place = np.unique(np.linspace(0, len(worth), SETTINGS).round().astype(int))
    between = np.concatenate([worth[:1] - 1, (worth[1:] + worth[:-1]) / 2, worth[-1:] + 1])
    return [TextRouter(router.name, Knob("threshold", level), router.preference) for level in between[place].tolist()]


def _text(make: Callable[[Fitting], TextRouter]) -> Callable[[Fitting], list[Setting]]:
    return lambda fitting: of_routers(at_thresholds(make(fitting), fitting))


def _by_arms(
    choose: Callable[[Floats, Floats, float], NDArray[np.int64]], knobs: Floats
) -> Callable[[Fitting], list[Setting]]:
    """Return how settings are made that choose one of the arms for each question, given what is predicted of them."""

    def made(fitting: Fitting) -> list[Setting]:
        def ran(knob: float, tables: DecisionTables) -> Outcomes:
            arms, right, cost = fitting.arms(tables)
            return predict.chosen(arms, choose(right, cost, knob))

        return [Setting(knob, partial(ran, knob)) for knob in knobs.tolist()]

    return made


def _within(right: Floats, cost: Floats, share: float) -> NDArray[np.int64]:
    """Return the best arms of a whole batch, the split, within a budget."""
    return predict.allocate(right, cost, share * len(right))


def _verified(rule: str) -> Callable[[Fitting], list[Setting]]:
    return lambda fitting: of_routers(automix.thresholds(rule, fitting.choosing))


def _self_verified(fitting: Fitting) -> list[Setting]:
    return of_routers(
        [*automix.thresholds(automix.SELF, fitting.choosing), *automix.pomdp(automix.SELF, fitting.train)]
    )


def _votes(fitting: Fitting) -> list[Setting]:
    replicas = np.bincount(fitting.choosing.trees.problem[fitting.choosing.indices]).max()
    if replicas < 2:
        raise DataError("vote: there is one replica for a problem, nothing to vote on. Generate more.")
    return of_routers(Vote(agreement) for agreement in np.arange(2, replicas + 1) / replicas)


TEXT: dict[str, Callable[[Fitting], TextRouter]] = {
    "classifier (RouteLLM)": lambda data: routellm.classifier(data.examples, data.embed),
    "matrix factorisation (RouteLLM)": lambda data: routellm.matrix_factorisation(data.examples, data.embed, data.seed),
    "SW-ranking (RouteLLM)": lambda data: routellm.ranking(data.examples, data.embed),
    "50 neighbours": lambda data: routellm.neighbours(data.examples, data.embed),
    "Smoothie": lambda data: smoothie.fit(data.choosing, data.embed),
    "refusal (SATER)": lambda data: predict.doubt(data.of_models),
    "gain over cost (RTR, CONCUR)": lambda data: predict.gain_over_cost(data.of_models),
}
"""Query-level routers by name: from what there is to fit on to a router, whose threshold is left open."""
NOTES = {
    "Smoothie": "compares the outputs for validation questions, without labels: training problems have one replica"
}
ARMS = "chooses for each question among the two models and two settings of TRIM-Thr"
BASELINES = (
    Baseline("TRIM-Thr (RSD)", STEP, lambda data: of_routers(map(Threshold, thresholds(data.choosing)))),
    Baseline("best arm (RTR, CONCUR)", STEP, _by_arms(predict.best_arm, np.linspace(0.05, 0.98, 32)), ARMS),
    Baseline(
        "best arms in a budget (CONCUR)",
        STEP,
        _by_arms(_within, np.linspace(0.06, 0.96, OPERATING_POINTS)),
        f"{ARMS}; sees all questions before the first answer",
    ),
    *(Baseline(f"AutoMix-PRM ({rule})", CASCADE, _verified(rule)) for rule in automix.RULES),
    Baseline("AutoMix-PRM (last, POMDP)", CASCADE, lambda data: of_routers(automix.pomdp("last", data.train))),
    Baseline(SELF_VERIFIED, CASCADE, _self_verified, "thresholds and the POMDP; pays eight samples"),
    Baseline("vote (SATER)", CASCADE, _votes, "pays all replicas of the small model"),
    *(Baseline(name, QUERY, _text(make), NOTES.get(name, "")) for name, make in TEXT.items()),
)
"""The field; what is fitted by `agents.learners` comes beside it in `benchmarks.field`."""
