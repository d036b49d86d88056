r"""Verdicts over many answers: each is itself, is none of its neighbours, and stays right when written otherwise.

The answers here are made in the shapes of MATH and GSM8K. To run over such files themselves, name their folder:
``TRIM_PROBLEM_FILES=/path/to/data pytest tests/rollouts/tasks/test_answers_kept.py``.
"""

import os
import re
from pathlib import Path

import pytest

from rollouts.tasks.grading import make_grader
from rollouts.tasks.problems import load_problems

MADE = [
    *("18", "2,125", "-7", "0", "3.5", "0.08", "460,000", "1450000", r"\$18.90", r"25\%", "5.25", "1e-05", "3.2e5"),
    *(r"\frac{3}{7}", r"-\frac{13}{6}", r"\dfrac{22}{5}", "9/16", r"3\frac{1}{8}", r"\frac{4\sqrt{3}}{9}", r"\frac 59"),
    *(r"3\sqrt{17}", r"\sqrt{71}", r"6 - 5i", r"11\sqrt2", r"\pi", r"\frac{\pi}{5}", "70^\\circ", r"\cot x", "e^{-4}"),
    *(
        r"\left( 3, \frac{\pi}{2} \right)",
        "(6,31,-1)",
        r"(-\infty, 9)",
        r"[-2,7)",
        r"(-\infty,-4]\cup[6,\infty)",
        r"(2, 8]",
    ),
    *("x^3 + 3x - 6", "2k+2", "(x - 5)(x^2 + 5)", "p - q", "y = 2x + 3", "7 \\pm 2\\sqrt{19}", r"x \le -11", "10, 14"),
    *(r"\text{Evelyn}", r"\text{(E)}", r"\text{June 20}", r"\text{ellipse}", "B", r"\text{odd}", "1,-2", "-3, 5, 8"),
    *(r"\begin{pmatrix} -2 \\ 1 \\ 9 \end{pmatrix}", r"\begin{pmatrix} 1 & 5 \\ 2 & -2 \end{pmatrix}", r"\{1, 4, 10\}"),
    *(
        "2516_8",
        "1A5_{16}",
        "110_2",
        r"1, 3, \ldots, 2n-1",
        r"2, 4, \ldots, 2n",
        r"15\text{ cm}^2",
        r"12\text{ inches}",
    ),
    *(
        r"1 \pm \sqrt{19}",
        r"7.0 \times 10^{-8}",
        r"6.02 \times 10^{23}",
        r"\frac{1}{3^{80}}",
        r"\frac{1}{3^{81}}",
        "0.0000004",
    ),
    *("0.0000006", r"\frac{243}{625}", "6r^2-4r-24", r"\log_2 5", r"\binom{19}{2}", r"\sin^2 x", r"x \in [3,4]", "11!"),
]


def _mixed(match):
    top, bottom = int(match[1]), int(match[2])
    return f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}" if top > bottom and top % bottom else match[0]


def _scientific(match):
    mantissa = match[0].rstrip("0") or "0"
    return f"{mantissa}\\times 10^{{{len(match[0]) - len(mantissa)}}}" if mantissa != match[0] != "0" else match[0]


REWRITINGS = {
    "dollars": lambda text: f"${text}$",
    "blanks": lambda text: f"  {text} ",
    "full stop": lambda text: f"{text}.",
    "display style": lambda text: f"\\displaystyle {text}",
    "dfrac": lambda text: re.sub(r"\\[dt]?frac", r"\\dfrac", text),
    "tfrac": lambda text: re.sub(r"\\[dt]?frac", r"\\tfrac", text),
    "left and right": lambda text: (
        re.sub(r"(?<!right)([)\]])", r"\\right\1", re.sub(r"(?<!left)([(\[])", r"\\left\1", text))
        if "text" not in text
        else text
    ),
    "no left and right": lambda text: re.sub(r"\\(?:left|right)(?=[^a-z])", "", text),
    "thin spaces": lambda text: re.sub(r",\s(?![\\.])", r",\\ ", text),
    "thousands in braces": lambda text: re.sub(r"^(\d{1,3}),(\d{3})$", r"\1{,}\2", text),
    "no thousands": lambda text: re.sub(r"^(\d{1,3}),(\d{3})$", r"\1\2", text),
    "decimal": lambda text: f"{text}.0" if text.isdigit() else text,
    "scientific": lambda text: re.sub(r"^\d+$", _scientific, text),
    "e notation": lambda text: f"{int(text):.12e}" if text.isdigit() and len(text) < 12 else text,
    "slash": lambda text: re.sub(r"^(-?)\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text),
    "mixed number": lambda text: re.sub(r"(?<=^)\\d?frac\{(\d+)\}\{(\d+)\}$", _mixed, text),
    "mixed number in a line": lambda text: (
        re.sub(r"\\frac\{(\d+)\}\{(\d+)\}$", r" \1/\2", re.sub(r"^\\d?frac\{(\d+)\}\{(\d+)\}$", _mixed, text))
        if re.match(r"\d+\\frac|\\d?frac\{\d+\}\{\d+\}$", text)
        else text
    ),
    "units": lambda text: f"{text}\\text{{ cm}}" if text.isdigit() else text,
    "a name": lambda text: f"x = {text}" if text.lstrip("-").isdigit() else text,
    "base in braces": lambda text: re.sub(r"_(\d)$", r"_{\1}", text),
    "choice with text": lambda text: f"\\textbf{{({text})}}\\ 12" if text in [*"ABCDEFGHIJ"] else text,
}


@pytest.fixture(scope="module")
def exact():
    grader = make_grader("exact")
    yield grader
    grader.close()


FOLDER = os.environ.get("TRIM_PROBLEM_FILES")
SETS = [
    pytest.param(MADE, id="made"),
    *(
        pytest.param([problem.answer for problem in load_problems(path)], id=path.stem)
        for path in (sorted(Path(FOLDER).glob("*.jsonl")) if FOLDER else ())
    ),
]


def _wrong(exact, pairs, box="boxed"):
    grades = exact.grade_many([(gold, f"So \\{box}{{{final}}}") for gold, final in pairs], workers=2)
    assert not [(pair, grade.error) for pair, grade in zip(pairs, grades, strict=True) if grade.error]
    return [pair for pair, grade in zip(pairs, grades, strict=True) if not grade.correct]


@pytest.mark.parametrize("answers", SETS)
def test_an_answer_equals_itself(exact, answers):
    assert not _wrong(exact, [(answer, answer) for answer in answers])
    assert not _wrong(exact, [(answer, answer) for answer in answers], box="fbox")


def _same(one, other):
    bare = [re.sub(r"^\w=|\\%|\^\\circ|\\text\{[^}]*\}(?=$|\^)|[$\s]", "", text) for text in (one, other)]
    return bare[0] == bare[1]


@pytest.mark.parametrize("answers", SETS)
def test_an_answer_is_none_of_its_neighbours(exact, answers):
    pairs = [(one, other) for n, one in enumerate(answers) for other in answers[n + 1 : n + 4] if not _same(one, other)]
    assert set(pairs) - set(_wrong(exact, pairs)) == set()


@pytest.mark.parametrize("rewriting", REWRITINGS)
@pytest.mark.parametrize("answers", SETS)
def test_an_answer_stays_right_however_it_is_written(exact, answers, rewriting):
    pairs = [(answer, REWRITINGS[rewriting](answer)) for answer in answers]
    assert not _wrong(exact, pairs)
    assert any(one != other for one, other in pairs) or answers is not MADE, "this rewriting changes nothing"
