"""``train.py --agent query-level``: for each λ the query-level router, and its threshold, that return most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agents.baselines.methods import TEXT, Fitting, at_thresholds
from agents.evaluation.outcomes import Outcomes
from agents.evaluation.walk import run
from agents.routers.text import TextRouter
from rollouts.errors import DataError
from trim_env.tables import DecisionTables

NAME = "query-level"


@dataclass(frozen=True, eq=False)
class QueryLevel:
    """All settings of all query-level routers (`agents.baselines.methods.TEXT`).

    Attributes:
        settings: Name of the method, router, and what it comes to on the choice half of validation.
        lacking: What could not be fitted, and why.
    """

    settings: list[tuple[str, TextRouter, Outcomes]]
    lacking: list[str]

    def router(self, lam: float) -> TextRouter:
        """Return the setting with the greatest return."""
        _, best, _ = max(self.settings, key=lambda each: float(each[2].returns(lam).mean()))
        return TextRouter(NAME, best.knob, best.preference)

    def report(self) -> dict[str, Any]:
        """Return whose settings there are, as JSON holds it."""
        return {"methods": list(dict.fromkeys(name for name, *_ in self.settings)), "lacking": self.lacking}


def fit(tables: DecisionTables, choice: DecisionTables, seed: int) -> QueryLevel:
    """Fit all methods on training trees; their settings are tried on the choice half of validation.

    Raises:
        ConfigError: There is a cap on large tokens, which they cannot keep.
    """
    data, found, lacking = Fitting(tables, choice, seed=seed), list[tuple[str, TextRouter, Outcomes]](), list[str]()
    for name, make in TEXT.items():
        try:
            found += [(name, router, run(router, choice)) for router in at_thresholds(make(data), data)]
        except DataError as error:  # such as one replica, where several are compared
            lacking.append(f"{name} was not fitted. {error}")
    return QueryLevel(found, lacking)
