r"""Straight-line arithmetic programs: their text, their solutions and the random problems of each split.

A question is ``Let a=70+33, b=a+49, c=b%60. Find c.``; its solution writes one value per step, with the
scratch work a person would write (``c=b%60=152%60=152-120=32``), and closes with
``The answer is \boxed{32}``. Every definition uses the one before it, so one wrong value spoils the rest.
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rollouts.errors import ConfigError

Operator = Literal["+", "-", "*", "%"]
Operand = int | str

SEED = 20261
#: Default number of problems of each split.
SPLITS: Mapping[str, int] = {"train": 2000, "validation": 400, "test": 1000, "ood": 500}
#: Likewise of splits drawn after all choices were made, which are generated only where they are named.
FRESH: Mapping[str, int] = {"test2": 1000}
#: The delimiter that ends every step but the last.
STEP_DELIMITER = "\n\n"

# Disjoint by construction, whatever the counts: the hash of a question's text says who may use it. Only `ood` and
# `test2` share a bucket: they can meet in programs of nine definitions alone, which do not repeat by chance.
_BUCKETS = {"model": range(0, 12), "train": range(12, 16), "validation": range(16, 17), "test": range(17, 19),
            "ood": range(19, 20), "test2": range(19, 20)}  # fmt: skip
_BUCKET_COUNT = 20
_MAX_CHARACTERS = 480

_DEFINITION = re.compile(r"([a-z])=([a-z]|[0-9]{1,9})([-+*%])([a-z]|[0-9]{1,9})")
_QUESTION = re.compile(r"Let (.+)\. Find ([a-z])\.")


@dataclass(frozen=True)
class TinyProblem:
    """One problem: its id (``tinymath-test-00017``), the question and the answer, a decimal integer."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Definition:
    """``name=left operator right``; an operand is a number or the name of an earlier definition."""

    name: str
    left: Operand
    operator: Operator
    right: Operand

    def __str__(self) -> str:
        """The definition as it stands in the question."""
        return f"{self.name}={self.left}{self.operator}{self.right}"


@dataclass(frozen=True)
class Program:
    """The definitions in the order of the question, and the name that is asked for."""

    definitions: tuple[Definition, ...]
    asked: str

    @property
    def question(self) -> str:
        """The text of the problem."""
        return f"Let {', '.join(map(str, self.definitions))}. Find {self.asked}."


def apply(sign: str, left: int, right: int) -> int | None:
    """The value of ``left sign right``; None for a remainder by zero."""
    operation = {"+": operator.add, "-": operator.sub, "*": operator.mul, "%": operator.mod}[sign]
    return None if sign == "%" and not right else operation(left, right)


def parse_question(question: str) -> Program | None:
    """Read a question back into its program; None where the text is not one of ours."""
    outer = _QUESTION.fullmatch(question.strip())
    if outer is None:
        return None
    definitions: dict[str, Definition] = {}
    for part in outer[1].split(", "):
        match = _DEFINITION.fullmatch(part)
        if match is None or match[1] in definitions:
            return None
        operands = [int(text) if text.isdigit() else text for text in (match[2], match[4])]
        if any(isinstance(operand, str) and operand not in definitions for operand in operands):
            return None
        definitions[match[1]] = Definition(match[1], operands[0], match[3], operands[1])  # type: ignore[arg-type]
    return Program(tuple(definitions.values()), outer[2]) if outer[2] in definitions else None


def scratch(operator: str, left: int, right: int) -> str:
    """What is written between the operands and the value, every part of it with that value.

    ``=112-9`` for 152-49, ``=210+28`` for 34*7, ``=780+90+27=870+27`` for 39*23, ``=1287-1260`` for
    1287%60; nothing for sums and where the numbers are round.
    """
    left_units, units = left % 10, right % 10
    if operator == "-" and right > 10 and units and left >= right:
        return f"={left - right + units}-{units}"
    if operator == "*" and left > 10 and left_units and units:
        tens, ones = (left - left_units) * units, left_units * units
        if right < 10:
            return f"={tens}+{ones}"
        whole = left * (right - units)
        return f"={whole}+{tens}+{ones}={whole + tens}+{ones}"
    if operator == "%" and right and left >= right:
        return f"={left}-{left - left % right}"
    return ""


def render_step(definition: Definition, values: Mapping[str, int]) -> tuple[str, int] | None:
    """The right step for a definition, given the values already written, without delimiter.

    Returns:
        The step's text and the value it writes; None where an operand has no value or it is divided by zero.
    """
    operands = [values.get(side) if isinstance(side, str) else side for side in (definition.left, definition.right)]
    left, right = operands
    if left is None or right is None:
        return None
    value = apply(definition.operator, left, right)
    if value is None:
        return None
    copied = f"={left}{definition.operator}{right}" if operands != [definition.left, definition.right] else ""
    return f"{definition}{copied}{scratch(definition.operator, left, right)}={value}", value


def answer_step(value: int) -> str:
    """The last step of a solution."""
    return f"The answer is \\boxed{{{value}}}"


def solution_steps(question: str) -> list[str]:
    """The reference solution: one text per step, all but the last ending with the delimiter.

    Raises:
        ConfigError: The question is not a program of this family.
    """
    program = parse_question(question)
    if program is None:
        raise ConfigError(f"not a tinymath question: {question!r}; expected 'Let a=70+33, b=a+49. Find b.'")
    return continue_solution(program, {}, 0)


def continue_solution(program: Program, values: dict[str, int], start: int) -> list[str]:
    """The right steps from definition number ``start`` on; fills ``values`` with what they write."""
    steps = []
    for definition in program.definitions[start:]:
        rendered = render_step(definition, values)
        if rendered is None:
            raise ConfigError(f"definition '{definition}' has no value, given {values}")
        values[definition.name] = rendered[1]
        steps.append(rendered[0] + STEP_DELIMITER)
    return [*steps, answer_step(values[program.asked])]


# How often each kind of operation is tried, by temperament of the problem: difficulty is uneven on purpose.
# A kind is a sign, the values that it is tried on, and the least and the most that may stand on its right.
_KINDS: Mapping[str, tuple[Operator, range, int, int]] = {
    "add": ("+", range(500), 11, 99),
    "subtract": ("-", range(25, 10_000), 11, 99),
    "times_digit": ("*", range(2, 100), 2, 9),
    "times_two_digits": ("*", range(11, 100), 11, 29),
    "remainder": ("%", range(100, 10_000), 20, 90),
}
_TEMPERAMENTS: Mapping[str, tuple[int, ...]] = {
    "mild": (6, 3, 3, 0, 2),
    "mixed": (4, 3, 3, 3, 4),
    "harsh": (2, 4, 3, 6, 5),
}
_MODULI = (20, 25, 30, 40, 50, 60, 70, 80, 90)
_LENGTHS = {3: 3, 4: 4, 5: 4, 6: 4, 7: 3, 8: 2, 9: 1}
_LONG_LENGTHS = {9: 2, 10: 2, 11: 2}


def _draw_operation(
    generator: random.Random, weights: tuple[int, ...], earlier: list[tuple[str, int]]
) -> tuple[Operand, Operator, Operand]:
    """One operation on the latest value that keeps values between 0 and 9,999."""
    name, value = earlier[-1]
    kinds = list(_KINDS.values())
    shares = [weight * (value in kind[1]) for weight, kind in zip(weights, kinds, strict=True)]
    sign, _, least, most = generator.choices(kinds, shares)[0]
    if sign in "+-" and len(earlier) > 1 and generator.random() < 0.2:
        other, other_value = earlier[generator.randrange(len(earlier) - 1)]
        if sign == "+" and value + other_value <= 9999:
            return (other, "+", name) if generator.random() < 0.5 else (name, "+", other)
        if sign == "-":
            return (name, "-", other) if value >= other_value else (other, "-", name)
    if sign == "%":
        return name, "%", generator.choice([modulus for modulus in _MODULI if modulus <= value])
    return name, sign, generator.randint(least, min(value, most) if sign == "-" else most)


def draw_program(generator: random.Random, *, long: bool = False) -> Program:
    """Draw one program: 3 to 9 definitions, or 9 to 11 of the harsher temperaments where ``long``."""
    while True:
        temperament = generator.choice(["mixed", "harsh"] if long else list(_TEMPERAMENTS))
        lengths = _LONG_LENGTHS if long else _LENGTHS
        count = generator.choices(list(lengths), list(lengths.values()))[0]
        left, right = generator.randint(11, 99), generator.randint(11, 99)
        sign: Operator = "-" if left - right >= 11 and generator.random() < 0.4 else "+"
        definitions = [Definition("a", left, sign, right)]
        values = {"a": left + right if sign == "+" else left - right}
        for name in "bcdefghijk"[: count - 1]:
            definition = Definition(name, *_draw_operation(generator, _TEMPERAMENTS[temperament], list(values.items())))
            definitions.append(definition)
            values[name] = render_step(definition, values)[1]  # type: ignore[index]  # what is drawn has a value
        program = Program(tuple(definitions), definitions[-1].name)
        length = len(program.question) + sum(map(len, continue_solution(program, {}, 0)))
        if length <= _MAX_CHARACTERS:
            return program


def _bucket(question: str) -> int:
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest(), "big") % _BUCKET_COUNT


def _stream(owner: str, draw: Callable[[], Program]) -> Iterator[Program]:
    while True:
        program = draw()
        if _bucket(program.question) in _BUCKETS[owner]:
            yield program


def training_programs(generator: random.Random) -> Iterator[Program]:
    """Endless programs to train the models on, none of which can occur in a split.

    A small share is as long as those of the ``ood`` split, so that those lengths lie in the range of
    positions that the models have seen.
    """
    return _stream("model", lambda: draw_program(generator, long=generator.random() < 0.08))


def generate_problems(split: str, count: int | None = None) -> list[TinyProblem]:
    """The first ``count`` problems of a split (its default count, see ``SPLITS`` and ``FRESH``, where None).

    The same call gives the same problems, a shorter list is a prefix of a longer one, and no question
    occurs twice, in another split or among those that the models were trained on.

    Raises:
        ConfigError: The split does not exist, or the count is negative.
    """
    sizes = {**SPLITS, **FRESH}
    if split not in sizes:
        raise ConfigError(f"unknown tinymath split {split!r}; expected one of {', '.join(sizes)}")
    wanted = sizes[split] if count is None else count
    if wanted < 0:
        raise ConfigError(f"count of problems is {wanted}; expected 0 or more")
    generator = random.Random(f"tinymath-{split}-{SEED}")
    programs = _stream(split, lambda: draw_program(generator, long=split == "ood"))
    questions: dict[str, str] = {}
    while len(questions) < wanted:
        program = next(programs)
        values: dict[str, int] = {}
        continue_solution(program, values, 0)
        questions.setdefault(program.question, str(values[program.asked]))
    return [
        TinyProblem(f"tinymath-{split}-{number:05d}", question, answer)
        for number, (question, answer) in enumerate(questions.items())
    ]
