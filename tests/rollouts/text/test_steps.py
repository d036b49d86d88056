"""Cutting decoded text into steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.config import Limits
from rollouts.models.stepwise import close_step
from rollouts.text.steps import (
    DELIMITER,
    Prefix,
    Segment,
    StopReason,
    closes_box,
    cut_segments,
    is_decorative,
    normalise,
    prefix_hash,
)


@pytest.mark.parametrize(
    ("raw", "text", "complete"),
    [
        ("a = 1\n\n", "a = 1\n\n", True),
        ("a = 1\n\n\n\nb", "a = 1\n\n", True),  # a run of blank lines is one delimiter
        ("\n\na = 1\n\n", "a = 1\n\n", True),  # it belongs to the step before
        ("\na = 1\n\n", "a = 1\n\n", True),
        ("---\n\n## Step 1\n\n", "---\n\n## Step 1\n\n", True),  # decoration joins the step that follows
        ("---\n\n", "---\n\n", False),
        ("\\[\n\nx^2\n\n\\]\n\n", "\\[\n\nx^2\n\n", True),
        ("the end", "the end", False),
        ("", "", False),
        ("line one\nline two\n\n", "line one\nline two\n\n", True),
        ("a = 1\n \nb", "a = 1\n\n", True),  # a blank line may hold blanks
        ("a = 1\n\t \u00a0\n \n\n  b", "a = 1\n\n", True),
        ("a = 1\r\n\r\nb", "a = 1\n\n", True),
        ("line one\r\nline two\r\n \r\n", "line one\r\nline two\n\n", True),
        ("a = 1 \n\n", "a = 1 \n\n", True),
        ("a = 1\n  b = 2\n", "a = 1\n  b = 2\n", False),
        ("a = 1\n  ", "a = 1\n  ", False),
        ("\n \n\t\n  a = 1\n \n", "  a = 1\n\n", True),
        ("---\n \nb = 2\n \n", "---\n\nb = 2\n\n", True),
    ],
)
def test_first_step_of_a_text(raw, text, complete):
    got, done = normalise(raw)
    assert done is complete
    assert got.rstrip("\n") == text.rstrip("\n")
    if complete:
        assert got.endswith(DELIMITER) and not got.endswith("\n\n\n")


def test_segments_follow_tokens_not_characters():
    pieces = ["a", "=1", "\n", "\n", "\n", "b", "=2.\n\n", "---", "\n\n", "c", ""]
    segments = cut_segments(pieces)
    assert [(s.text, s.start, s.end, s.complete) for s in segments] == [
        ("a=1\n\n", 0, 4, True),
        ("b=2.\n\n", 4, 7, True),  # the third newline is decoded after the delimiter, so it counts here
        ("---\n\nc", 7, 11, False),
    ]


@pytest.mark.parametrize(
    ("blank", "length"),
    [("\n\n", 2), ("\n \n", 3), ("\n\t\t\n", 4), ("\r\n\r\n", 4), ("\n\u3000\n\n", 3), ("\n \r\n \n", 4)],
)
def test_every_kind_of_blank_line_cuts_at_the_token_that_completes_it(blank, length):
    first = cut_segments(["a", *blank, "b"])[0]
    assert (first.text, first.end, first.complete) == ("a\n\n", 1 + length, True)
    assert cut_segments(["a" + blank + "b"])[0].text == "a\n\n"


def test_end_of_sequence_after_a_delimiter_is_a_step_of_its_own():
    segments = cut_segments(["a", "\n\n", ""])
    assert [(s.text, s.end - s.start, s.complete) for s in segments] == [("a\n\n", 2, True), ("", 1, False)]


def test_text_behind_a_delimiter_in_the_same_token_is_cut():
    segments = cut_segments(["a", "\n", "\nb", "c\n\n"])  # as servers cut at a stop string
    assert [(s.text, s.start, s.end) for s in segments] == [("a\n\n", 0, 3), ("c\n\n", 3, 4)]


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[ab1 \-\t\r]{0,3}\n{0,3}", fullmatch=True), max_size=30))
def test_every_token_belongs_to_one_segment_and_words_are_kept(pieces):
    segments = cut_segments(pieces)
    assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])][: len(segments)]
    assert (segments[-1].end if segments else 0) == len(pieces)
    assert all(not s.complete or s.text.endswith(DELIMITER) for s in segments)
    kept = "".join(s.text for s in segments)
    assert "".join(kept.split()) == "".join("".join(pieces).split())  # the blanks of blank lines go with them


@settings(deadline=None)
@given(st.lists(st.sampled_from(["x", "y=1", "---", "\\["]), min_size=1, max_size=6))
def test_cutting_a_normalised_solution_gives_its_steps_back(blocks):
    segments = cut_segments([block + DELIMITER for block in blocks])
    for segment in segments:
        if segment.complete:
            assert normalise(segment.text) == (segment.text, True)


def test_decoration():
    assert is_decorative("--- \n*") and is_decorative("") and not is_decorative("- 1")


def test_box_must_be_closed():
    assert closes_box("so \\boxed{\\frac{1}{2}}")
    assert not closes_box("so \\boxed{\\frac{1}{2}")
    assert not closes_box("boxed 3")
    assert closes_box("so \\fbox{42}")
    assert not closes_box("I will put it in \\boxed{}.") and not closes_box("\\boxed{\\text{ }}")


def test_hash_is_of_the_list_not_of_the_text():
    assert prefix_hash(["ab", "c"]) != prefix_hash(["a", "bc"])
    assert prefix_hash(["a", "b"]) == prefix_hash(("a", "b"))


def _close(text, tokens, complete, *, used=0, steps=(), ending=StopReason.EOS, limits=None, fits=True):
    prefix = Prefix("p", "q", 0, tuple(steps), used)
    segment = Segment(text, 0, tokens, complete)
    return close_step(prefix, (), segment, ending, limits or Limits(), lambda q, s: fits, 7)


def test_why_a_step_ends():
    assert _close("a\n\n", 5, True).stop_reason is StopReason.DELIMITER
    assert _close("a \\boxed{1}\n\n", 5, True).stop_reason is StopReason.BOXED
    assert _close("a", 5, False).stop_reason is StopReason.EOS
    assert _close("a", 5, False, ending=StopReason.LENGTH).stop_reason is StopReason.LENGTH
    assert _close("a\n\n", 5, True, used=2043).stop_reason is StopReason.LENGTH
    assert _close("a\n\n", 5, True, used=2042).stop_reason is StopReason.DELIMITER
    assert _close("a\n\n", 5, True, steps=["s\n\n"] * 29).stop_reason is StopReason.MAX_STEPS
    assert _close("a\n\n", 5, True, steps=["s\n\n"] * 28).stop_reason is StopReason.DELIMITER
    assert _close("a\n\n", 5, True, fits=False).stop_reason is StopReason.CONTEXT
    assert all(_close("a", 5, False, ending=reason).terminal for reason in (StopReason.EOS, StopReason.FAILED))
    assert _close("a\n\n", 5, True).prompt_tokens == 7
