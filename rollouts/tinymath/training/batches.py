"""Turns programs into rows of tokens of one fixed shape, with what the loss needs beside them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch

from rollouts.text.prompts import PromptFormat
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import STEP_TAG
from rollouts.tinymath.labels import SolutionReader
from rollouts.tinymath.problems import STEP_DELIMITER, Program, continue_solution, render_step, training_programs
from rollouts.tinymath.training.folders import WEIGHTS

IGNORE = -100
ROW_LENGTH = 512


class Encoder:
    """Text to token ids, one for each character; the same ids as the tokenizer's for the family's texts."""

    def __init__(self) -> None:
        """Take the ids from the family's tokenizer."""
        self._prompts = PromptFormat(load_tokenizer(str(WEIGHTS / "prm")))
        tokenizer, encode = self._prompts.tokenizer, self._prompts.encode
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        (self.tag,), (self.delimiter,) = encode(STEP_TAG), encode(STEP_DELIMITER)
        self._characters = {character: encode(character)[0] for character in "\n" + "".join(map(chr, range(32, 127)))}

    def text(self, text: str) -> list[int]:
        """Ids of an ASCII text that ends in the delimiter, or has none; what is not ASCII becomes ``?``."""
        body = text.removesuffix(STEP_DELIMITER)
        ids = [self._characters.get(character, self._characters["?"]) for character in body]
        return ids if len(body) == len(text) else [*ids, self.delimiter]

    def prompt(self, question: str) -> list[int]:
        """Ids of the chat template's text for a question, up to where the first step begins."""
        return list(self._prompts.ids(question))


@dataclass
class Document:
    """One training text: ``targets[i]`` is the label at token i (a next token or a class), or ``IGNORE``."""

    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def extend(self, tokens: list[int], targets: list[int]) -> None:
        """Add tokens with one target each."""
        self.tokens += tokens
        self.targets += targets


def corrupt_value(value: int, generator: random.Random) -> int:
    """A wrong value of the kind that models write: one digit off, or a slip of a carry."""
    while True:
        if generator.random() < 0.5:
            digits = list(str(value))
            place = generator.randrange(len(digits))
            if digits[place].isdigit():
                digits[place] = str(generator.randrange(10))
            wrong = int("".join(digits))
        else:
            wrong = value + generator.choice([-1, 1]) * 10 ** generator.randrange(len(str(value)))
        if wrong != value and wrong >= 0:
            return wrong


def corrupted_solution(program: Program, generator: random.Random) -> tuple[list[str], int]:
    """A solution with one wrong step, from which the later ones follow; and that step's number."""
    place = generator.randrange(len(program.definitions))
    every: dict[str, int] = {}
    steps = continue_solution(program, every, 0)[:place]
    values = dict(islice(every.items(), place))
    definition = program.definitions[place]
    misread = dict(values)
    if values and generator.random() < 0.3:  # an operand copied wrongly, or read off another variable
        name = definition.left if isinstance(definition.left, str) else str(definition.right)
        misread[name] = generator.choice([corrupt_value(values[name], generator), *values.values()])
    step, value = render_step(definition, misread)  # type: ignore[misc]
    if misread == values:
        value = corrupt_value(value, generator)
        step = f"{step[: step.rindex('=')]}={value}"
    values[definition.name] = value
    return [*steps, step + STEP_DELIMITER, *continue_solution(program, values, place + 1)], place


def language_documents(encoder: Encoder, generator: random.Random, corrupted_share: float) -> Iterator[Document]:
    """Endless solutions to predict, token by token; a corrupted step is read but never predicted."""
    for program in training_programs(generator):
        if generator.random() < corrupted_share:
            steps, wrong = corrupted_solution(program, generator)
        else:
            steps, wrong = continue_solution(program, {}, 0), -1
        prompt = encoder.prompt(program.question)
        document = Document(prompt, [IGNORE] * (len(prompt) - 1))
        for number, step in enumerate(steps):
            tokens = encoder.text(step)
            document.extend(tokens, [IGNORE] * len(tokens) if number == wrong else tokens)
        document.extend([encoder.end], [encoder.end])
        document.targets.append(IGNORE)  # targets stand one place before their tokens
        yield document


def reward_document(encoder: Encoder, program: Program, steps: list[str]) -> Document:
    """A solution as the process reward model reads it, with a label at every token of it.

    The label at a tag is 1 if all steps so far are right. At the other tokens of a step it is 1 while the
    text is still the start of the right step, which tells the model *where* a step went wrong.
    """
    prompt = encoder.prompt(program.question)
    document = Document(prompt, [IGNORE] * len(prompt))
    reader = SolutionReader(program)
    right = True
    for step in steps:
        text = step.strip()
        expected = reader.expected() if right else None
        step_right = reader.read(text) and right
        labels = [0] * len(text)
        if expected is not None and right:
            same = next((i for i, (x, y) in enumerate(zip(text, expected, strict=False)) if x != y), len(text))
            labels = [1] * same + [int(step_right)] * (len(text) - same)
        right = step_right
        document.extend([*encoder.text(text), encoder.tag], [*labels, int(right)])
    document.extend([encoder.end, encoder.pad], [IGNORE, IGNORE])
    return document


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents: tokens, targets (rows, length) and the mask (rows, 1, length, length)."""

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def pack(documents: Iterator[Document], rows: int, pad: int, waiting_room: int = 160) -> Iterator[Batch]:
    """Fill rows of ``ROW_LENGTH`` tokens with whole documents that do not see each other.

    Every batch has the same shape, which is what makes compiled training fast. The longest waiting
    document that fits comes next; rows are about 97 % full.
    """
    waiting: list[Document] = []
    causal = torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool).tril()
    while True:
        tokens = torch.full((rows, ROW_LENGTH), pad)
        targets = torch.full((rows, ROW_LENGTH), IGNORE)
        owners = torch.zeros(rows, ROW_LENGTH, dtype=torch.long)
        for row in range(rows):
            used, number = 0, 1
            waiting += [next(documents) for _ in range(waiting_room - len(waiting))]
            waiting.sort(key=lambda document: len(document.tokens))
            # The first one is any of them, so that long and short ones keep their shares.
            chosen: Document | None = waiting.pop(row * 7919 % len(waiting))
            while chosen is not None:
                end = used + len(chosen.tokens)
                tokens[row, used:end] = torch.tensor(chosen.tokens)
                targets[row, used:end] = torch.tensor(chosen.targets)
                owners[row, used:end] = number
                used, number = end, number + 1
                fitting = [i for i, waits in enumerate(waiting) if len(waits.tokens) <= ROW_LENGTH - used]
                chosen = waiting.pop(fitting[-1]) if fitting else None
        mask = (owners[:, None, :, None] == owners[:, None, None, :]) & causal
        yield Batch(tokens, targets, mask)
