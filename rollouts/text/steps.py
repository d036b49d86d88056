"""Steps of a solution: where one ends, when it is the last, and how many tokens it cost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce

from rollouts.tasks.answers import boxed_answer, has_answer

SMALL, LARGE = "small", "large"  # who writes a step
ROLES = (SMALL, LARGE)  # position = action
DELIMITER = "\n\n"
ROOT_HASH = 0  # the empty prefix
STOPS = (DELIMITER, "\n \n", "\n\t\n", "\n\r\n")  # the usual blank lines; what goes on beyond another one is cut
_BLANK_RUN = re.compile(r"\r?\n(?:[^\S\n]*\n)+")  # a blank line may hold blanks, tabs, carriage returns
_LEADING = re.compile(r"(?:\r?\n(?:[^\S\n]*\n)*)?")


class StopReason(StrEnum):
    """Why a step ended; every reason but `DELIMITER` makes the step terminal."""

    DELIMITER = "delimiter"  # a blank line: the solution goes on
    BOXED = "boxed"  # the step closed a \boxed{...}
    EOS = "eos"  # the model stopped by itself
    LENGTH = "length"  # the step or the solution reached its token limit
    CONTEXT = "context"  # no room is left in some role's window
    MAX_STEPS = "max_steps"  # the horizon: this was the last step allowed
    FAILED = "failed"  # the request failed or exceeded its time


@dataclass(frozen=True, slots=True)
class Step:
    r"""One step as it was generated.

    Attributes:
        text: Normalised text, with its delimiter ``"\n\n"`` where it ended at one.
        tokens: Tokens decoded for it, its delimiter or end-of-sequence token included, as the backend counted.
        stop_reason: Why it ended.
        prompt_tokens: Tokens of the prompt that it was decoded from (its node's prefix with the problem).
        statistics: Of its tokens under its author (`rollouts.text.likelihood.STATISTICS`); None if that did not tell.
    """

    text: str
    tokens: int
    stop_reason: StopReason
    prompt_tokens: int = 0
    statistics: tuple[float, ...] | None = field(default=None, compare=False)

    @property
    def terminal(self) -> bool:
        """Whether accepting this step ends the episode."""
        return self.stop_reason is not StopReason.DELIMITER

    @property
    def has_answer(self) -> bool:
        """Whether it states a final answer; stored steps that ended with an empty box, as they once did, count too."""
        return self.stop_reason is StopReason.BOXED or has_answer(self.text)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A partial solution that a model is asked to continue.

    Attributes:
        problem: Problem id.
        question: Problem text.
        replica: Index of the sample.
        steps: Accepted steps.
        used_tokens: Tokens of the accepted steps, against the solution's limit.
    """

    problem: str
    question: str
    replica: int
    steps: tuple[str, ...]
    used_tokens: int


def is_decorative(text: str) -> bool:
    r"""Whether a piece of text holds neither letter nor digit (``---``, ``\[``, nothing at all)."""
    return not any(character.isalnum() for character in text)


def normalise(raw: str) -> tuple[str, bool]:
    """Return the first step of a decoded text, normalised, and whether a delimiter completed it.

    Runs of blank lines, of those too that hold blanks, become one delimiter; blank lines before the step belong to
    the step before it and vanish; decorative blocks are merged into the block that follows.
    """
    blocks: list[str] = []
    *closed, tail = _BLANK_RUN.split(_LEADING.sub("", raw, count=1))
    for block in closed:
        blocks.append(block)
        if not is_decorative(block):
            return DELIMITER.join(blocks) + DELIMITER, True
    return DELIMITER.join([*blocks, tail]), False


@dataclass(frozen=True, slots=True)
class Segment:
    """A step cut out of a longer generation.

    Attributes:
        text: Normalised text.
        start: Index of its first token in the generation.
        end: Index one past its last token.
        complete: Whether a delimiter completed it.
    """

    text: str
    start: int
    end: int
    complete: bool


def cut_segments(pieces: Iterable[str]) -> list[Segment]:
    """Cut a decoded generation into steps.

    Args:
        pieces: The text that each token added, in order; tokens that only complete a character with a later
            one add ``""``.

    Returns:
        The steps. The last one is incomplete: it ended where the generation did, and is present (perhaps
        with empty text) only if tokens followed the last delimiter.
    """
    segments: list[Segment] = []
    text, start, index = "", 0, -1
    for index, piece in enumerate(pieces):
        line = max(0, text.rfind("\n"))
        text += piece
        if "\n" in piece and _BLANK_RUN.search(text, line):
            step, complete = normalise(text)
            if complete:
                segments.append(Segment(step, start, index + 1, True))
                text, start = "", index + 1
    if index + 1 > start:
        segments.append(Segment(normalise(text)[0], start, index + 1, False))
    return segments


def closes_box(text: str) -> bool:
    r"""Whether a step contains a completely closed ``\boxed{...}`` or ``\fbox{...}`` with something in it."""
    return boxed_answer(text) is not None


def solution_text(steps: Sequence[str]) -> str:
    """Return the whole solution as graded: the concatenation of its steps."""
    return "".join(steps)


def extend_hash(parent: int, step: str) -> int:
    """Return the 64-bit key of the prefix that extends the one with key `parent` by `step`.

    Chained, so that it is a hash of the *list* of steps: two lists with one concatenation have two keys. Keys
    are only compared within one problem and replica.
    """
    digest = hashlib.blake2b(parent.to_bytes(8, "little") + step.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def prefix_hash(steps: Sequence[str]) -> int:
    """Return the 64-bit key of a list of steps."""
    return reduce(extend_hash, steps, ROOT_HASH)
