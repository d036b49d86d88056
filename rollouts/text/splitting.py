"""The one place that knows how texts are cut into steps, for every splitting that a store may have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from rollouts.config import StepsConfig
from rollouts.errors import ConfigError
from rollouts.plugins import build_plugin, is_plugin
from rollouts.text.steps import BLANK_RUN, CLOSE, DELIMITER, ROLES, STOPS, BlankLines, is_decorative, solution_text

VERSIONS = {"blank-line": 1, "thinking": 1, "sentence": 1}
"""Of the splittings of ours: raised when one begins to cut differently."""
Marks = tuple[str, str]
"""What opens and what closes a model's thinking block, with the white space that belongs to them."""
_LEADING = re.compile(r"(?:[^\S\n]*\n)*")  # blank lines before a step belong to the one before it and vanish
_NO_CLOSE = "< /think>"  # how a text reads that spells `CLOSE` and whose author's mark is another
# A full stop, question mark or exclamation mark, not of an enumeration or an abbreviation. The sentence ends before the
# blanks that follow it, as tokens begin with those, or behind a line end.
_SENTENCE = re.compile(
    r"(?<!^\d)(?<!^\d\d)(?<!\be\.g)(?<!\bi\.e)[.!?][\"')\]*$]*(?:(?=[^\S\n]+\S)|[^\S\n]*\n(?=[^\S\n]*\S))", re.MULTILINE
)
_BEFORE_CUE = r"(?:(?<=[.!?:])|(?<=[.!?:][\"')\]*$]))(?=[^\S\n]+(?:{0}))|\n(?=[^\S\n]*(?:{0}))"
_SENTENCE_STOPS = tuple(mark + blank for mark in ".?!" for blank in " \n")


class Splitter(Protocol):
    """Cuts texts; the interface for a splitting of one's own, ``split = "my_module:MySplitter"`` in ``[steps]``.

    The class, or function, is called as ``MySplitter(**options)`` with the table ``[steps.options]``.

    Attributes:
        version: A whole number, to be raised when it begins to cut differently; part of the manifest.
        stops: Strings at which a request for a single step ends, to be looked at; a step may end before or after one.
    """

    version: int
    stops: tuple[str, ...]

    def end(self, text: str, tokens: Callable[[int], int]) -> int | None:
        """Return where the first step of a decoded text ends, as soon as that is certain; None if it is not.

        Args:
            text: What was decoded so far, from the end of the last step on. Whatever follows must not change the
                answer, nor into which tokens the text was cut.
            tokens: From a length to the number of tokens that the text has up to there.
        """


@dataclass(frozen=True)
class _Paragraphs:
    """Steps end at blank lines, perhaps also at ends of sentences, before cues, and with the thinking block."""

    steps: StepsConfig
    close: str = ""  # the author's mark; empty outside of thinking
    lines = False

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Strings at which requests for single steps end."""
        cues = [blank + cue for cue in self.steps.cues for blank in " \n"]
        return (*STOPS, *(_SENTENCE_STOPS if self.steps.sentences else ()), *cues)

    @property
    def whole_stops(self) -> tuple[str, ...]:
        """Strings at which requests for whole paths end: they never go beyond the thinking block."""
        return (self.close,) if self.close else ()

    @cached_property
    def _cue(self) -> re.Pattern[str] | None:
        cues = "|".join(map(re.escape, self.steps.cues))
        return re.compile(_BEFORE_CUE.format(cues)) if cues else None

    def end(self, text: str, tokens: Callable[[int], int]) -> int | None:
        """See `rollouts.text.steps.Cutter`."""
        lead, closing = _LEADING.match(text).end(), -1  # type: ignore[union-attr]
        if self.close:
            closing = text.find(self.close.strip())
        for place, at_once in sorted(self._ends(text, lead)):
            if 0 <= closing < place:
                break
            if not is_decorative(text[:place]) and (at_once or tokens(place) >= self.steps.min_tokens):
                return place
        if closing < 0:
            return None
        behind = closing + len(self.close.strip())
        tail, rest = self.close[len(self.close.rstrip()) :], text[behind:]
        if rest.startswith(tail):
            return behind + len(tail)
        return None if tail.startswith(rest) else behind

    def _ends(self, text: str, lead: int) -> Iterator[tuple[int, bool]]:
        """Yield where a step may end, and whether it does however short it is."""
        yield from ((run.end(), False) for run in BLANK_RUN.finditer(text, lead))
        if self.steps.sentences:
            sentences = [each.end() for each in _SENTENCE.finditer(text, lead)]
            yield from ((place, False) for place in sentences[self.steps.sentences - 1 :])
        if self._cue:
            yield from ((cue.end(), True) for cue in self._cue.finditer(text, lead))

    def tidy(self, raw: str) -> str:
        """See `rollouts.text.steps.Cutter`; a mark that closes the block becomes `CLOSE`."""
        body, mark, _ = _LEADING.sub("", raw, count=1).partition(self.close.strip() or "\0")
        text = BLANK_RUN.sub(DELIMITER, body.replace(CLOSE, _NO_CLOSE) if self.close else body)
        return text + CLOSE + DELIMITER if mark else text

    def then(self, step: str) -> Any:
        """See `rollouts.text.steps.Cutter`."""
        return BlankLines() if self.close and CLOSE in step else self


@dataclass(frozen=True)
class _Own:
    """A splitter of the user's own."""

    splitter: Splitter
    lines = False
    whole_stops = ()

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.splitter.stops)

    def end(self, text: str, tokens: Callable[[int], int]) -> int | None:
        place = self.splitter.end(text, tokens)
        if place is not None and not 0 < place <= len(text):
            raise ConfigError(f"[steps] split: `end` gave {place} for a text of {len(text)} characters.")
        return place

    def tidy(self, raw: str) -> str:
        return BLANK_RUN.sub(DELIMITER, _LEADING.sub("", raw, count=1))

    def then(self, step: str) -> _Own:
        return self


@dataclass(frozen=True)
class Splitting:
    """How solutions are cut into steps; part of a store's process, and of policies that are trained on it.

    With ``thinking`` a solution is a thinking block and then the answer. Steps of the block are told by `CLOSE`, which
    stands in the last of them; nothing before it is an answer.
    """

    steps: StepsConfig = StepsConfig()

    @property
    def thinks(self) -> bool:
        """Whether solutions begin with a thinking block."""
        return self.steps.split == "thinking"

    @cached_property
    def _own(self) -> _Own:
        return _Own(build_plugin(self.steps.split, "[steps] split", Splitter, **self.steps.options))

    def thinking(self, steps: Sequence[str]) -> bool:
        """Whether what follows some steps is part of the thinking block."""
        return self.thinks and not any(CLOSE in step for step in steps)

    def author(self, *, thinking: bool) -> str | None:
        """Return the role that alone writes what follows; None where a router decides."""
        return self.steps.answer_by if self.thinks and not thinking and self.steps.answer_by in ROLES else None

    def answer(self, steps: Sequence[str]) -> str:
        """Return the text of a solution that is graded: without the thinking block, empty if that was never closed."""
        text = solution_text(steps)
        return text.partition(CLOSE)[2].lstrip("\n") if self.thinks else text

    def said(self, step: str) -> str:
        """Return a step as others than its author read it: without what closes the thinking block."""
        return step.replace(CLOSE, "", 1) if self.thinks else step

    def cutter(self, *, thinking: bool, marks: Marks | None = None) -> Any:
        """Return the `rollouts.text.steps.Cutter` of a text.

        Args:
            thinking: Whether it begins within the thinking block.
            marks: What its author opens and closes the block with.
        """
        if is_plugin(self.steps.split):
            return self._own
        if self.steps.split == "sentence" or thinking:
            return _Paragraphs(self.steps, marks[1] if thinking and marks else "")
        return BlankLines()

    def described(self) -> dict[str, Any]:
        """Return name, version and settings, as manifests hold them."""
        name = self.steps.split
        version = self._own.splitter.version if is_plugin(name) else VERSIONS[name]
        told = self.steps.model_dump(mode="json", exclude={"split"}, exclude_defaults=name == "blank-line")
        if not is_plugin(name):
            told.pop("options", None)
        if name == "sentence":
            told = {key: told[key] for key in ("min_tokens", "cues", "sentences")}
        return {"name": name, "version": version, **(told if not is_plugin(name) else {"options": told["options"]})}


BLANK_LINE = Splitting()
"""What stores have whose manifest does not name one."""


def splitting_of(described: Mapping[str, Any] | None) -> Splitting:
    """Return the splitting of a manifest's ``splitting``; None is `BLANK_LINE`. No module is imported.

    Raises:
        ConfigError: This version does not know it.
    """
    if described is None:
        return BLANK_LINE
    told = {name: value for name, value in described.items() if name not in ("name", "version")}
    name, version = described.get("name"), described.get("version")
    try:
        found = Splitting(StepsConfig(split=name, **told))  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"Steps are split by {dict(described)}, which this version does not know.") from error
    if not is_plugin(str(name)) and version != VERSIONS[str(name)]:
        raise ConfigError(
            f"Steps are split by version {version!r} of {name!r}; here that is version {VERSIONS[str(name)]}."
        )
    return found
