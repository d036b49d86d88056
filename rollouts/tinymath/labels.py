"""Exact labels: which steps of a solution are right, given what was written before them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rollouts.tinymath.problems import Program, answer_step, apply, parse_question, render_step

# At most 12 digits: no value of the family comes near, and int() refuses strings of thousands of digits.
_NUMBER = r"-?[0-9]{1,12}"
_WRITES = re.compile(rf"([a-z])=(?:.*=)?({_NUMBER})")
_PRODUCT = re.compile(rf"({_NUMBER})([*%])({_NUMBER})")
_SUM = re.compile(rf"{_NUMBER}(?:[-+]{_NUMBER})*")
_TERM = re.compile(rf"([-+]?)({_NUMBER})")
_ANSWER = re.compile(rf"The answer is \\boxed\{{({_NUMBER})\}}")


class SolutionReader:
    """Reads a solution step by step and keeps the values that it has written.

    A step is right if it defines the next variable, repeats its definition, copies the operands' values as
    they were *written* (right or wrong) and every part of it has the same, right value. The next variable
    is the one after the last that was written. A wrong step still writes its value if it ends in one
    (``b=...=152``); a malformed one writes nothing, and what needs a value that was never written is wrong,
    as is everything after the answer.
    """

    def __init__(self, program: Program) -> None:
        """Begin before the first step."""
        self.program = program
        self.values: dict[str, int] = {}
        self.position = 0
        self.finished = False

    def expected(self) -> str | None:
        """The right next step, without delimiter; None where there is none."""
        if self.finished:
            return None
        if self.position < len(self.program.definitions):
            rendered = render_step(self.program.definitions[self.position], self.values)
            return rendered[0] if rendered else None
        value = self.values.get(self.program.asked)
        return None if value is None else answer_step(value)

    def read(self, step: str) -> bool:
        """Take one step, with or without its delimiter; whether it is right."""
        text = step.strip()
        right = not self.finished and self._is_right(text)
        if "boxed" in text:
            self.finished = True
        elif (match := _WRITES.fullmatch(text)) is not None:
            for number, definition in enumerate(self.program.definitions):
                if definition.name == match[1]:
                    self.values[match[1]] = int(match[2])
                    self.position = number + 1
        return right

    def _is_right(self, text: str) -> bool:
        if self.position == len(self.program.definitions):
            match = _ANSWER.fullmatch(text)
            return match is not None and self.values.get(self.program.asked) == int(match[1])
        definition = self.program.definitions[self.position]
        rendered = render_step(definition, self.values)
        if rendered is None or not text.startswith(f"{definition}="):
            return False
        parts = text[len(str(definition)) + 1 :].split("=")
        if isinstance(definition.left, str) or isinstance(definition.right, str):
            copied = rendered[0].split("=")[2]
            if len(parts) < 2 or parts[0] != copied:
                return False
        return parts[-1] == str(rendered[1]) and all(_value(part) == rendered[1] for part in parts)


def _value(expression: str) -> int | None:
    if (match := _PRODUCT.fullmatch(expression)) is not None:
        return apply(match[2], int(match[1]), int(match[3]))
    if _SUM.fullmatch(expression) is None:
        return None
    return sum(int(number) * (-1 if sign == "-" else 1) for sign, number in _TERM.findall(expression))


def label_steps(question: str, steps: Sequence[str]) -> list[bool]:
    """For each step whether it is *locally* right: right given the values that earlier steps wrote.

    Args:
        question: The problem's text; where it is not one of this family, every step is wrong.
        steps: The steps in order, with or without their delimiter; any text is allowed.

    Returns:
        One label per step; `SolutionReader` says what makes a step right. Never raises on garbage.
    """
    program = parse_question(question)
    if program is None:
        return [False] * len(steps)
    reader = SolutionReader(program)
    return [reader.read(step) for step in steps]
