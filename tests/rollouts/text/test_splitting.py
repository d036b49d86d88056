"""Cutting texts by every splitting: what is cut is all there, however it came, and settings say what they do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollouts.config import StepsConfig, parse_family
from rollouts.errors import ConfigError
from rollouts.text.splitting import BLANK_LINE, VERSIONS, Splitting, splitting_of
from rollouts.text.steps import CLOSE, DELIMITER, Segment, cut_segments

THINK, OTHER = ("<think>\n", "</think>\n\n"), ("[THINK]", "[/THINK]")
CUES = ("Wait", "Alternatively")
PARTS = st.sampled_from(
    [
        "a=1",
        "So 3.",
        " It is 2.5!",
        "Wait",
        " Wait",
        "wait",
        "Alternatively, b",
        "e.g. c",
        "1. d",
        " ",
        "  ",
        "\n",
        "\n\n",
    ]
    + [
        "\r\n",
        "\n \n",
        "---",
        "?",
        '."',
        "</think>",
        "</think>\n\n",
        "\n</think>\n\n",
        "[/THINK]",
        "</thi",
        "\u00a0",
        "x",
    ]
)
TEXTS = st.lists(PARTS, max_size=16).map("".join)
SPLITTINGS = {
    "blank-line": StepsConfig(),
    "thinking": StepsConfig(split="thinking"),
    "cues": StepsConfig(split="thinking", cues=CUES),
    "packed": StepsConfig(split="thinking", cues=CUES, sentences=2),
    "sentence": StepsConfig(split="sentence"),
    "sentences": StepsConfig(split="sentence", sentences=3, cues=CUES),
}


class Semicolons:
    """A splitter of a user's own."""

    def __init__(self, mark: str = ";", **others: Any) -> None:
        self.mark, self.version, self.stops = mark, 3, (mark,)

    def end(self, text: str, tokens: Any) -> int | None:
        return text.find(self.mark) + 1 or None


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "my_splitters", SimpleNamespace(Semicolons=Semicolons))
    return "my_splitters:Semicolons"


def cut(steps: StepsConfig, pieces: Any, marks: tuple[str, str] = THINK) -> list[Segment]:
    splitting = Splitting(steps)
    return cut_segments(pieces, splitting.cutter(thinking=splitting.thinks, marks=marks))


def texts(steps: StepsConfig, pieces: Any, marks: tuple[str, str] = THINK) -> list[str]:
    return [segment.text for segment in cut(steps, pieces, marks)]


@pytest.mark.parametrize("name", SPLITTINGS)
@pytest.mark.parametrize("marks", [THINK, OTHER], ids=["think", "other"])
@given(text=TEXTS)
def test_steps_hold_all_words_of_a_text(name: str, marks: tuple[str, str], text: str) -> None:
    """Joined they are it, but for the white space of blank lines, and marks, which are all written in one way."""
    words = "".join(text.split())
    if Splitting(SPLITTINGS[name]).thinks:
        before, mark, after = words.partition(marks[1].strip())
        words = before + CLOSE * bool(mark) + after
    assert "".join("".join(texts(SPLITTINGS[name], text, marks)).split()) == words


@pytest.mark.parametrize("name", SPLITTINGS)
@given(words=st.lists(st.sampled_from(["So 3.", "It is 2.", "Wait, no.", "a = 1", "b?"]), min_size=1, max_size=8),
       blanks=st.lists(st.sampled_from([" ", "\n", "\n\n"]), min_size=8, max_size=8),
       close=st.integers(0, 9))  # fmt: skip
def test_joined_steps_of_a_tidy_text_are_that_text(name: str, words: list[str], blanks: list[str], close: int) -> None:
    text = "".join(word + blank for word, blank in zip(words, blanks, strict=False))
    if close < len(words) and Splitting(SPLITTINGS[name]).thinks:
        place = sum(len(word + blank) for word, blank in zip(words[:close], blanks, strict=False))
        text = text[:place] + CLOSE + DELIMITER + text[place:]
    assert "".join(texts(SPLITTINGS[name], text)) == text


@pytest.mark.parametrize("name", SPLITTINGS)
@pytest.mark.parametrize("marks", [THINK, OTHER], ids=["think", "other"])
@given(data=st.data(), text=TEXTS)
def test_texts_are_cut_alike_however_they_come(name: str, marks: tuple[str, str], data: Any, text: str) -> None:
    """Pieces may end anywhere but within a step's end: what such a token has behind it is cut, as servers cut it."""
    letters = texts(SPLITTINGS[name], text, marks)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    splitting = Splitting(SPLITTINGS[name])
    cutter, found, rest = splitting.cutter(thinking=splitting.thinks, marks=marks), list[str](), ""
    for piece in pieces:
        rest += piece
        while (end := cutter.end(rest, lambda length: 1)) is not None:
            found.append(cutter.tidy(rest[:end]))
            cutter, rest = cutter.then(found[-1]), rest[end:]
    found += [cutter.tidy(rest)] * bool(rest)
    # Blanks of a blank line that came late stay before a step that ends at blank lines alone.
    assert [step.lstrip() for step in found if step.strip()] == [step.lstrip() for step in letters if step.strip()]


@pytest.mark.parametrize("name", SPLITTINGS)
@given(pieces=st.lists(PARTS, max_size=12))
def test_every_token_belongs_to_one_step(name: str, pieces: list[str]) -> None:
    segments = cut(SPLITTINGS[name], pieces)
    assert [each.start for each in segments] == [0, *(each.end for each in segments[:-1])][: len(segments)]
    assert (segments[-1].end if segments else 0) == len(pieces)
    assert all(each.complete for each in segments[:-1]) and all(each.end > each.start for each in segments)


def test_a_thinking_block_is_cut_at_blank_lines_and_ends_with_its_mark() -> None:
    text = "First.\n\nSecond\n \nthird.\n</think>\n\nAnswer.\n\nIt is \\boxed{3}."
    found = texts(SPLITTINGS["thinking"], text)
    assert found == ["First.\n\n", "Second\n\n", "third.\n</think>\n\n", "Answer.\n\n", "It is \\boxed{3}."]
    assert texts(SPLITTINGS["thinking"], "x\n</think>Answer") == ["x\n</think>\n\n", "Answer"]
    assert texts(SPLITTINGS["thinking"], "x\n</think>\nAnswer") == ["x\n</think>\n\n", "Answer"]
    assert texts(SPLITTINGS["thinking"], "x[/THINK]Answer", OTHER) == ["x</think>\n\n", "Answer"]


def test_a_mark_of_others_is_no_mark() -> None:
    found = texts(SPLITTINGS["thinking"], "The tag </think> ends.\n\ny[/THINK]z", OTHER)
    assert found == ["The tag < /think> ends.\n\n", "y</think>\n\n", "z"]
    assert texts(SPLITTINGS["thinking"], "The tag [/THINK] ends.\n\ny") == ["The tag [/THINK] ends.\n\n", "y"]


def test_the_end_of_the_block_is_cut_where_its_tokens_end() -> None:
    found = cut(SPLITTINGS["thinking"], ["a", "\n", "</think>", "\n\n", "b", "\n\n"])
    assert [(each.text, each.start, each.end) for each in found] == [("a\n</think>\n\n", 0, 4), ("b\n\n", 4, 6)]
    found = cut(SPLITTINGS["thinking"], ["a", "</think>", "b", "c"])  # no blank line follows: seen one token later
    assert [(each.text, each.start, each.end) for each in found] == [("a</think>\n\n", 0, 2), ("bc", 2, 4)]


def test_short_paragraphs_go_together_and_cues_begin_steps() -> None:
    steps = StepsConfig(split="thinking", min_tokens=4, cues=CUES)
    pieces = [
        "a",
        "\n\n",
        "b",
        "\n\n",
        "c",
        "\n\n",
        "d",
        "e",
        " f",
        ".",
        " Wait",
        ",",
        " no",
        ".",
        "\n",
        "Wait",
        " x",
        "\n\n",
    ]
    assert texts(steps, pieces) == ["a\n\nb\n\n", "c\n\nde f.", " Wait, no.\n", "Wait x\n\n"]
    assert texts(steps, ["a", "\n\n", "Wait", " b", "\n\n", "c"]) == ["a\n\n", "Wait b\n\nc"]
    answer = ["x", "</think>\n\n", "a", "\n\n", "b"]
    assert texts(steps, answer) == ["x</think>\n\n", "a\n\n", "b"]  # after the block every blank line ends a step


@pytest.mark.parametrize(
    ("text", "count", "found"),
    [
        ("So 3. Then 4! Done?", 1, ["So 3.", " Then 4!", " Done?"]),
        ("So 3. Then 4! Done? Yes.", 2, ["So 3. Then 4!", " Done? Yes."]),
        ("It is 3.5 or e.g. 4.\nThen", 1, ["It is 3.5 or e.g. 4.\n", "Then"]),
        ("1. Add them.\n2. Done.", 1, ["1. Add them.\n", "2. Done."]),
        ('He said "yes." So', 1, ['He said "yes."', " So"]),
        ("a = 1\n\nSo 3. x", 1, ["a = 1\n\n", "So 3.", " x"]),
        ("So 3.\n\nThen 4.", 1, ["So 3.\n\n", "Then 4."]),
    ],
)
def test_sentences(text: str, count: int, found: list[str]) -> None:
    assert texts(StepsConfig(split="sentence", sentences=count), text) == found


def test_a_splitter_of_ones_own(own: str) -> None:
    steps = StepsConfig(split=own, options={"mark": ";"})
    assert texts(steps, "a;b; c") == ["a;", "b;", " c"]
    described = Splitting(steps).described()
    assert described == {"name": own, "version": 3, "options": {"mark": ";"}}
    assert splitting_of(described).steps == steps  # without importing anything
    assert texts(splitting_of(described).steps, "a;b") == ["a;", "b"]
    with pytest.raises(ConfigError, match="cannot be imported"):
        texts(StepsConfig(split="no_such_module:Splitter"), "a")


@pytest.mark.parametrize("name", SPLITTINGS)
def test_manifests_tell_a_splitting(name: str) -> None:
    described = Splitting(SPLITTINGS[name]).described()
    assert described["name"] == SPLITTINGS[name].split and described["version"] == VERSIONS[described["name"]]
    assert splitting_of(described).described() == described
    if name != "blank-line":
        assert splitting_of(described) != BLANK_LINE
    with pytest.raises(ConfigError, match="version 99"):
        splitting_of({**described, "version": 99})
    with pytest.raises(ConfigError, match="does not know"):
        splitting_of({**described, "name": "by-hand"})


def test_a_store_without_a_splitting_has_blank_lines() -> None:
    assert splitting_of(None) is BLANK_LINE and BLANK_LINE.described() == {"name": "blank-line", "version": 1}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"split": "paragraph"}, "module:object"),
        ({"min_tokens": 3}, "min_tokens: split 'blank-line' knows no settings"),
        ({"split": "sentence", "answer_by": "small"}, "answer_by: split 'sentence' knows"),
        ({"split": "sentence", "sentences": 0}, "at least one"),
        ({"split": "thinking", "options": {"a": 1}}, "options"),
        ({"split": "thinking", "cues": [""]}, "at least 1 character"),
        ({"split": "thinking", "answer_by": "both"}, "'small', 'large' or 'router'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        StepsConfig(**settings)


def test_a_family_that_cannot_think_so_is_refused() -> None:
    roles = {role: {"backend": "server", "model": "m", "url": "http://localhost/v1"} for role in ("small", "large")}
    steps = {"split": "thinking"}
    parse_family({**roles, "steps": steps})
    for role in roles:
        with pytest.raises(ConfigError, match=rf"\[{role}\] .*continues a partial answer"):
            parse_family({**roles, role: {**roles[role], "chat_only": True}, "steps": steps})
    with pytest.raises(ConfigError, match="max_thinking_tokens"):
        parse_family({**roles, "steps": {**steps, "max_thinking_tokens": 2048}})
    with pytest.raises(ConfigError, match="steps.min_token: unknown key. Did you mean 'min_tokens'"):
        parse_family({**roles, "steps": {"min_token": 2}})
