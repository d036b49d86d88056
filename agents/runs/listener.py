"""Who watches a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agents.evaluation.health import Health
    from agents.evaluation.splits import Record
    from agents.learners.loop import Training
    from rollouts.trees.live import Generated
    from trim_env.episodes import Lam


class Listener:
    """What a run tells whoever watches; every method may be overridden."""

    def compiling(self, trees: int) -> None:
        """Some more trees were compiled."""

    def opening(self, role: str) -> None:
        """A model of a live training is being loaded: ``small``, ``large`` or ``scorer``."""

    def generating(self, generated: Generated) -> None:
        """A live training is under way, about once a second."""

    def begin(self, lam: Lam, training: Training) -> None:
        """A training begins."""

    def iteration(self, lam: Lam, training: Training, record: Record) -> None:
        """An iteration is done, and on disk."""

    def end(self, lam: float, health: Health, attempts: int) -> None:
        """A training has ended."""
