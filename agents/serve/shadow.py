"""What the policy would have done with a request that one model answers alone (``serve --shadow``).

A shadow is a route like any other, which nobody is given. Where it stands at the same prefix as the served one, the
step of the model that serves is the one that the client got, so that nothing is written twice.

- **large** serves: the shadow is the policy's whole solution, with all that it costs; every figure is exact.
- **small** serves: the large model writes nothing. What the policy decides is exact up to the first step that it
  would have given to the large model, that decision included. There the client's path leaves the policy's; decisions
  beyond are those at the prefixes of the client's answer: an estimate.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from agents.serve.models import Models
from agents.serve.route import Route, RouteFailed
from agents.serve.upstreams import Unavailable
from rollouts.tasks.answers import final_answer
from rollouts.text.steps import LARGE, SMALL, Step

MARK = "X-Trim-Shadow"
"""Header of answers that one model gave alone while the policy only watched; its name."""
EXACT, ESTIMATE = "exact", "estimate"


class _NothingMore(Exception):
    """Raised when the served answer has ended before the shadow has."""


@dataclass(eq=False, kw_only=True)
class Shadow(Route):
    """The policy's route beside a served one.

    Attributes:
        news: Set whenever there is another step of that, or its end.
        refused: Places of steps that the large model would have written, and was not asked for.
    """

    served: Route
    news: asyncio.Event = field(default_factory=asyncio.Event)
    traced: bool = False
    refused: list[int] = field(default_factory=list)
    _span = "shadow step"

    async def run(self, models: Models, deadline: float) -> None:
        """Decide until the solution ends, time is up, or no model that could go on answers."""
        with suppress(RouteFailed, _NothingMore):
            async for _ in self.steps(models, deadline):
                pass

    async def _write(self, models: Models, role: str, most: int | None = None) -> Step:
        place = len(self.written)
        if role == self.served.only and most is None and self.accepted == self.served.accepted[:place]:
            return await self._of_served(place)
        if self.served.only == SMALL:
            self.refused.append(place)
            raise Unavailable(LARGE, "not asked", "it only would have been")
        return await super()._write(models, role, most)

    async def _of_served(self, place: int) -> Step:
        while len(self.served.accepted) <= place:
            if self.served.ended is not None:
                raise _NothingMore
            await self.news.wait()
            self.news.clear()
        step = self.served.accepted[place]
        self.drawn.append((place, str(self.served.only), step))
        return step

    @property
    def complete(self) -> bool:
        """Whether the solution has come to its end."""
        return self.ended not in (None, "time")

    @property
    def same_answer(self) -> bool | None:
        """Whether the policy's answer is the one that was served, as a text; None if that is not known."""
        if not self.complete or self.served.ended is None or self.refused:
            return None
        return final_answer(self.text) == final_answer(self.served.text)

    def decided(self) -> list[tuple[str, int, str, str]]:
        """Return of each step who would write it, its tokens, and whether each of both is exact or an estimate.

        The tokens of a step that the large model was not asked for are those of the small model's.
        """
        left = self.refused[0] if self.refused else len(self.written)
        return [
            (
                LARGE if place in self.refused else step.author,
                self.counted(step),
                EXACT if place <= left else ESTIMATE,
                EXACT if place < left else ESTIMATE,
            )
            for place, step in enumerate(self.written)
        ]

    def report(self) -> dict[str, Any]:
        """Return what the policy would have done, as far as it is known by now."""
        decided = self.decided()
        large = [each for each in decided if each[0] == LARGE]
        return {
            "served": self.served.only,
            "complete": self.complete,
            "exact": not self.refused,
            "exact_steps": sum(exact == EXACT for *_, exact, _ in decided),
            "steps": len(decided),
            "large_steps": len(large),
            "large_token_share": sum(each[1] for each in large) / max(sum(each[1] for each in decided), 1),
            "answer": None if self.same_answer is None else final_answer(self.text),
            "same_answer": self.same_answer,
            "fallbacks": [
                f"step {step.step}: {step.fallback}"
                for place, step in enumerate(self.written)
                if step.fallback and place not in self.refused
            ],
            **({"trace": [step.plain(text=not self.refused) for step in self.written]} if self.traced else {}),
        }
