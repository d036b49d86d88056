"""What the page is told: the values that its scripts draw, by name. Nothing here knows how they look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from agents.evaluation.bootstrap import Estimate
from agents.evaluation.suite import AtLam
from agents.evaluation.table import Band


class Subject(TypedDict):
    """What was evaluated."""

    split: str
    problems: int
    cost: str  # name of the cost model
    transfer: bool  # a router may have been trained on other rollouts
    hash: str  # of the rollouts
    caps: str  # in words; empty without any
    rollouts: str
    small: str  # names of the models and the scorer
    large: str
    scorer: str
    trees: int
    left_out_trees: int  # for want of a score
    resamples: int  # of the bootstrap
    seed: int
    date: str
    version: str


class Point(TypedDict):
    """An operating point."""

    knob: float
    on_curve: bool
    c: float
    accuracy: Estimate
    pgr: Estimate
    large_tokens: float  # per problem, as the next
    escalations: float


class Method(TypedDict):
    """What the figure of curves draws of a method."""

    name: str
    kind: str  # oracle, random, threshold or trained
    band: Band
    knots: Sequence[tuple[float, float]]  # (c, accuracy)
    mixing_from: float  # c
    points: list[Point]  # by ascending cost
    cpt_80: Estimate


class Tables(TypedDict):
    """Tables as text, the first row a header."""

    headline: list[list[str]]
    all: list[list[str]]
    points: dict[str, list[list[str]]]  # by method
    notes: Sequence[str]


class Positions(TypedDict):
    """Where a router decides and escalates: by step number, and by tenth of the solution."""

    decisions: list[int]
    escalations: list[int]
    share: list[Estimate]  # escalations among the decisions of the step
    per_100: list[Estimate]  # escalations of the step in 100 solutions
    parts: list[Estimate]  # share of all escalations, by tenth


class Setting(TypedDict):
    """A router at one setting, through all trees of the split."""

    method: str
    knob: float | None  # None for a constant
    label: str
    counts: dict[str, int]  # solutions, by flag
    share: float  # large tokens as a share of always-large's
    positions: Positions


class Bin(TypedDict):
    """The scores in one of ten bins of equal width."""

    low: float
    high: float
    count: int
    score: float  # mean
    right: Estimate  # share of what they score that is right


class Reliability(TypedDict):
    """Scores against one thing that they should foretell."""

    name: str
    text: str
    bins: list[Bin]  # those that hold something
    error: float  # mean distance of score and share, weighted by counts: the expected calibration error
    auc: float  # P(a right one scores above a wrong one); NaN if all are alike
    count: int


class Proposal(TypedDict, total=False):
    """A step that a model proposed."""

    text: str
    score: float
    tokens: int
    label: bool | None  # None without exact labels
    next: int | None  # the node after it, None where no router went; not there where the solution ends:
    stop: str  # then why it does
    right: bool  # and whether it is solved


class End(TypedDict):
    """What a constant comes to in a tree."""

    right: bool
    large_tokens: int


class Run(End):
    """A router's path through a tree."""

    actions: str  # a digit for each step from node 0 on, as in `Paths.actions`
    flags: list[str]


class Problem(TypedDict):
    """A problem with every step that one of the routers accepted or rejected."""

    id: str
    replica: int
    question: str
    answer: str | None  # None where unknown
    small: End
    large: End
    nodes: list[list[Proposal | None]]  # the small model's and the large model's; None where no router saw it
    runs: list[Run]  # in the order of the settings


class Sampling(TypedDict):
    """Which problems are shown."""

    shown: int
    wanted: int
    megabytes: float  # most of the traces


class Page(TypedDict):
    """The whole page."""

    subject: Subject
    sentences: Sequence[str]
    caption: str
    methods: list[Method]
    references: dict[str, Mapping[str, Estimate]]  # `curves.point_metrics` of always-small and always-large
    tables: Tables
    at_lam: Sequence[AtLam]
    settings: list[Setting]
    first: int  # the setting that the page opens with
    flags: Mapping[str, str]  # what they mean
    reliability: list[Reliability]
    problems: list[Problem]
    sampling: Sampling


def plain(value: Any) -> Any:
    """Return values as scripts read them: estimates as [value, low, high], six digits, null for what is undefined."""
    if isinstance(value, Estimate):
        value = (value.value, value.low, value.high)
    elif hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
