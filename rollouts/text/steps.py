"""Steps of a solution: where one ends, when it is the last, and how many tokens it cost."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from typing import Protocol

from rollouts.tasks.answers import boxed_answer, has_answer

SMALL, LARGE = "small", "large"  # who writes a step
ROLES = (SMALL, LARGE)  # position = action
DELIMITER = "\n\n"
USUAL_SPLIT = "blank-line"  # how steps are split where nothing else is said (`rollouts.text.splitting` has the others)
ROOT_HASH = 0  # the empty prefix
STOPS = (DELIMITER, "\n \n", "\n\t\n", "\n\r\n")  # the usual blank lines; what goes on beyond another one is cut
CLOSE = "</think>"  # in steps: the end of the thinking block, whatever mark their author has for it
BLANK_RUN = re.compile(r"\r?\n(?:[^\S\n]*\n)+")  # a blank line may hold blanks, tabs, carriage returns
_LEADING = re.compile(r"(?:\r?\n(?:[^\S\n]*\n)*)?")


class StopReason(StrEnum):
    """Why a step ended; every reason but `DELIMITER` and `FORCED` makes the step terminal."""

    DELIMITER = "delimiter"  # where steps are cut, such as a blank line: the solution goes on
    BOXED = "boxed"  # the step closed a \boxed{...}
    EOS = "eos"  # the model stopped by itself
    LENGTH = "length"  # the step or the solution reached its token limit
    CONTEXT = "context"  # no room is left in some role's window
    MAX_STEPS = "max_steps"  # the horizon: this was the last step allowed
    FAILED = "failed"  # the request failed or exceeded its time
    FORCED = "forced"  # a limit was reached within the thinking block, which was closed by force: the answer follows


@dataclass(frozen=True, slots=True)
class Step:
    r"""One step as it was generated.

    Attributes:
        text: Normalised text, with its delimiter ``"\n\n"`` where it ended at one.
        tokens: Tokens decoded for it, its delimiter or end-of-sequence token included, as the backend counted.
        stop_reason: Why it ended.
        prompt_tokens: Tokens of the prompt that it was decoded from (its node's prefix with the problem).
        statistics: Of its tokens under its author (`rollouts.text.likelihood.STATISTICS`); None if that did not tell.
        thinking: Whether it is part of a thinking block, in which nothing is an answer.
    """

    text: str
    tokens: int
    stop_reason: StopReason
    prompt_tokens: int = 0
    statistics: tuple[float, ...] | None = field(default=None, compare=False)
    thinking: bool = field(default=False, compare=False)

    @property
    def terminal(self) -> bool:
        """Whether accepting this step ends the episode."""
        return self.stop_reason not in (StopReason.DELIMITER, StopReason.FORCED)

    @property
    def has_answer(self) -> bool:
        """Whether it states a final answer; stored steps that ended with an empty box, as they once did, count too."""
        return self.stop_reason is StopReason.BOXED or (not self.thinking and has_answer(self.text))


@dataclass(frozen=True, slots=True)
class Prefix:
    """A partial solution that a model is asked to continue."""

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
    *closed, tail = BLANK_RUN.split(_LEADING.sub("", raw, count=1))
    for block in closed:
        blocks.append(block)
        if not is_decorative(block):
            return DELIMITER.join(blocks) + DELIMITER, True
    return DELIMITER.join([*blocks, tail]), False


@dataclass(frozen=True, slots=True)
class Segment:
    """A step cut out of a longer generation.

    Attributes:
        start: Index of its first token in the generation.
        end: Index one past its last token.
    """

    text: str
    start: int
    end: int
    complete: bool


class Cutter(Protocol):
    """Finds where the first step of a text ends (`rollouts.text.splitting` has all kinds).

    Attributes:
        lines: Whether only a token with a line end can complete a step.
    """

    @property
    def lines(self) -> bool: ...  # noqa: D102

    def end(self, text: str, tokens: Callable[[int], int]) -> int | None:
        """Return where the first step of a decoded text ends, as soon as that is certain.

        Args:
            text: What was decoded so far; whatever follows must not change the answer.
            tokens: From a length to the number of tokens that the text has up to there.
        """

    def tidy(self, raw: str) -> str:
        """Return a step as it is kept."""

    def then(self, step: str) -> Cutter:
        """Return what cuts the text after a complete step."""


class BlankLines:
    """Steps end at blank lines (`normalise`)."""

    lines = True
    stops, whole_stops = STOPS, ()  # strings at which requests for single steps, and for whole paths, end

    def end(self, text: str, tokens: Callable[[int], int]) -> int | None:
        """See `Cutter`."""
        if "\n" in text:
            for run in BLANK_RUN.finditer(text, _LEADING.match(text).end()):  # type: ignore[union-attr]
                if not is_decorative(text[: run.start()]):
                    return run.end()
        return None

    def tidy(self, raw: str) -> str:
        """See `Cutter`."""
        return normalise(raw)[0]

    def then(self, step: str) -> Cutter:
        """See `Cutter`."""
        return self


def cut_segments(pieces: Iterable[str], cutter: Cutter = BlankLines()) -> list[Segment]:  # noqa: B008
    """Cut a decoded generation into steps.

    Args:
        pieces: The text that each token added, in order; tokens that only complete a character with a later
            one add ``""``.
        cutter: What finds the ends of steps.

    Returns:
        The steps. The last one is incomplete: it ended where the generation did, and is present (perhaps
        with empty text) only if tokens followed the last delimiter. A token that an end falls into belongs to the step
        that ends; its text behind that is lost.
    """
    segments: list[Segment] = []
    text, start, ends = "", 0, list[int]()  # of the step under way: its text, its first token, where its tokens end
    for piece in pieces:
        text += piece
        ends.append(len(text))
        while ends and not (cutter.lines and "\n" not in piece):
            end = cutter.end(text, lambda length: bisect_left(ends, length) + 1)  # noqa: B023
            if end is None:
                break
            count = bisect_left(ends, end) + 1
            step, behind = cutter.tidy(text[:end]), ends[count - 1]
            segments.append(Segment(step, start, start + count, True))
            cutter = cutter.then(step)
            text, start, ends = text[behind:], start + count, [each - behind for each in ends[count:]]
    if ends:
        segments.append(Segment(cutter.tidy(text), start, start + len(ends), False))
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
