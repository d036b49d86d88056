"""Scripted models that think: stores whose trees have a thinking block and an answer, where no model is the point."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from handmade import ScriptedWriter

from rollouts.config import StepsConfig
from rollouts.models.stepwise import Generation
from rollouts.text.splitting import Splitting
from rollouts.text.steps import CLOSE, DELIMITER, Prefix, Step, StopReason, prefix_hash


def splitting(**settings: Any) -> dict[str, Any]:
    """A manifest's entry."""
    return Splitting(StepsConfig(split="thinking", **settings)).described()


class ThinkingWriter(ScriptedWriter):
    """Thinks for one to three steps, in which it boxes wrong answers, and answers in one or two."""

    def step(self, prefix: Prefix, steps: tuple[str, ...]) -> Step:
        made = super().step(prefix, steps)
        draw = prefix_hash((prefix.problem, str(prefix.replica), "thinks", *steps)) >> 11
        if any(CLOSE in step for step in steps):
            if made.terminal or CLOSE not in steps[-1]:
                return replace(made, text=f"so \\boxed{{{7 if made.tokens % 2 else 8}}}", stop_reason=StopReason.BOXED)
            return made
        if len(steps) == 2 or draw % 3 == 0:
            reason = StopReason.FORCED if draw % 2 else StopReason.DELIMITER
            return Step(f"{self.role[0]} \\boxed{{9}}\n{CLOSE}{DELIMITER}", made.tokens, reason, 20, thinking=True)
        text = f"perhaps \\boxed{{{made.tokens}}}{DELIMITER}"
        return Step(text, made.tokens, StopReason.DELIMITER, 20, thinking=True)

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """A path ends with the thinking block."""
        future = super().submit(prefix, whole=whole)
        steps = future.result().steps
        end = next((place + 1 for place, step in enumerate(steps) if CLOSE in step.text), len(steps))
        ended: Future[Generation] = Future()
        ended.set_result(replace(future.result(), steps=steps[:end]))
        return ended
