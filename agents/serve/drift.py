"""Whether traffic looks like the held-out problems that a policy was judged by: scores, and how often it escalates."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from agents.routers.base import Knob
from agents.serve.metrics import Metrics

WINDOW, FEWEST, EVERY = 2000, 500, 50  # decisions that are looked at, from which on, how often
SCORES, ESCALATIONS = 0.15, 0.1  # from where a distance between histograms, a difference of shares, is worth a warning
_log = logging.getLogger("trim.serve")


class _Window:
    """The last decisions at one setting, against those on held-out problems there."""

    def __init__(self, policy: str, lam: float, expected: Mapping[str, Any], metrics: Metrics) -> None:
        self._of = f"{policy!r} (λ = {lam:g})"
        self._scores, self._share = [float(each) for each in expected["scores"]], float(expected["escalated"])
        self._gauges = {what: metrics.drift.labels(policy, f"{lam:g}", what) for what in ("scores", "escalations")}
        self._last: deque[tuple[int | None, int]] = deque(maxlen=WINDOW)
        self._seen, self._told = 0, set[str]()

    def saw(self, score: float | None, action: int) -> None:
        bins = len(self._scores)
        self._last.append((None if score is None else min(int(score * bins), bins - 1), action))
        self._seen += 1
        if len(self._last) >= FEWEST and self._seen % EVERY == 0:
            self._compare()

    def _compare(self) -> None:
        share = sum(action for _, action in self._last) / len(self._last)
        self._tell("escalations", share - self._share, ESCALATIONS, f"it escalates {100 * share:.0f} % of the steps, "
                   f"{100 * self._share:.0f} % there")  # fmt: skip
        counts = Counter(place for place, _ in self._last if place is not None)
        if (total := counts.total()) < FEWEST:
            return
        now = [counts[place] / total for place in range(len(self._scores))]
        distance = sum(abs(one - other) for one, other in zip(now, self._scores, strict=True)) / 2
        low, half = sum(now[: len(now) // 2]), sum(self._scores[: len(now) // 2])
        words = f"{100 * low:.0f} % of the proposals' scores are below one half, {100 * half:.0f} % there"
        self._tell("scores", distance, SCORES, words)

    def _tell(self, what: str, value: float, most: float, words: str) -> None:
        self._gauges[what].set(value)
        if abs(value) <= most:
            self._told.discard(what)
        elif what not in self._told:
            self._told.add(what)
            _log.warning(
                "Drift of %s: in the last %d decisions %s, on the held-out problems of its training (distance %.2f, "
                "expected at most %g). Are problems, models or the scorer others than those that it was trained for?",
                self._of, len(self._last), words, abs(value), most,
            )  # fmt: skip


class Drift:
    """The decisions of one policy against those that its artefact tells; nothing where it tells none."""

    def __init__(self, name: str, about: Mapping[str, Any], metrics: Metrics) -> None:
        """Take what `agents.runs` has written under ``held_out``."""
        told = {float(each["lam"]): each["decisions"] for each in about.get("held_out", ()) if each.get("decisions")}
        self._windows = {lam: _Window(name, lam, each, metrics) for lam, each in told.items() if lam > 0}

    def saw(self, knob: Knob, score: float | None, action: int) -> None:
        """Take a decision at a setting: it counts for the λ that is nearest."""
        if not self._windows:
            return
        if len(self._windows) == 1:
            lam = next(iter(self._windows))
        elif knob.name == "lam" and knob.value > 0:
            lam = min(self._windows, key=lambda each: abs(math.log(each / knob.value)))
        else:
            return
        self._windows[lam].saw(score, action)
