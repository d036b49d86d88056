"""Grading: what counts as the final answer, what counts as right, and what hostile answers may cost."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.errors import ConfigError
from rollouts.tasks.answers import boxed_answer, final_answer, has_answer, quick_equal
from rollouts.tasks.grading import AnswerGrader, make_grader, unreadable_answers


@pytest.fixture(scope="module")
def exact():
    grader = make_grader("exact")
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def numeric():
    return make_grader("numeric")


# --- the final answer of a text ---


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{27}.", "27"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2^{3}}}", r"\frac{1}{2^{3}}"),
        (r"\boxed{\left\{ x \right.} and } more", r"\left\{ x \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{}", None),
        (r"I will use \boxed{}.", None),
        (r"\boxed{ }, \boxed{\,}, \boxed{\text{}}, \boxed{...}, \boxed{\ldots}, \boxed{\boxed{}}", None),
        (r"\boxed{4}, as asked in \boxed{}", "4"),
        (r"\boxed{\{\}}", r"\{\}"),
        (r"\boxed{\emptyset}", r"\emptyset"),
        (r"\boxed{-}", "-"),
        (r"\fbox{42}", "42"),
        (r"\boxed{1} but \fbox {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{5}", "3, 5"),
        (r"$x=\boxed{3}$ or $x = \boxed{-5}$", "3, -5"),
        (r"$\boxed{3}$, $\boxed{5}$, and $\boxed{700}$.", "3, 5, 700"),
        (r"\boxed{3}\text{ and }\fbox{5}", "3, 5"),
        (r"\boxed{3}, that is \boxed{3}, \boxed{3}", "3"),
        (r"\boxed{3}. \boxed{5}", "5"),
        (r"{ stray \boxed{6}", "6"),
        (r"\boxed{7} but then \boxed{8", "7"),
        (r"\boxed{9", None),
        (r"\boxed 9", None),
        (r"\boxed\{9\}", None),
        ("no box {9}", None),
        ("", None),
    ],
)
def test_boxed_answer(text, content):
    assert boxed_answer(text) == content
    assert has_answer(text) == (content is not None)


_plain = st.text("ab1 +\\$#\n", max_size=8).map(lambda text: text.replace("\\", r"\{ ").replace("#", r"\} "))
_balanced = st.recursive(
    _plain, lambda inner: st.lists(st.one_of(_plain, inner.map(lambda text: f"{{{text}}}")), max_size=4).map("".join)
)


@given(before=_balanced, inside=_balanced, after=_balanced, earlier=st.booleans())
def test_a_boxed_text_with_nested_braces_is_read_back(before, inside, after, earlier):
    text = (r"\boxed{0}" if earlier else "") + before
    if inside.strip("{} $\n"):
        assert boxed_answer(f"{text}\\boxed{{{inside}}}{after}") == inside
    assert boxed_answer(f"{text}\\boxed{{{inside}") == ("0" if earlier else None)


def test_reading_boxes_takes_linear_time():
    start = time.process_time()
    assert not has_answer(r"\boxed{" * 50_000 + "}" * 50_000)
    assert has_answer(r"\boxed{1}, " * 30_000)
    for hostile in (r"\boxed{" * 50_000, "\\boxed{" + "{" * 200_000 + "}" * 100_000, "####" * 100_000):
        assert not has_answer(hostile)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 9.\n#### 18", "18"),
        ("#### $1,234.50\n", "$1,234.50"),
        ("#### 1\n\n#### 2", "2"),
        ("#### 2 1/2", "2 1/2"),
        ("#### 1e-05", "1e-05"),
        ("#### 18\nI will use \\boxed{}", "18"),
        (r"#### \frac{3}{4}", r"\frac{3}{4}"),
        ("#### 18\n" + r"\boxed{17}", "17"),
        ("#### Step 2: add them up", None),
        ("#### Conclusion", None),
        ("##### 5", None),
        ("it is #### 18", None),
        ("####", None),
    ],
)
def test_hash_lines_mark_answers_and_headings_do_not(text, answer):
    assert final_answer(text) == answer
    assert has_answer(text) == (answer is not None)


# --- exact ---


@pytest.mark.parametrize(
    ("gold", "solution", "correct"),
    [
        ("27", r"\boxed{27}", True),
        ("27", r"\boxed{28}", False),
        ("27", r"First \boxed{27}, no: \boxed{28}", False),
        ("27", r"27 is wrong. \boxed{$ 27 $}", True),
        ("27", r"\boxed{27.0}", True),
        ("27", r"\boxed{27.}", True),
        ("2,125", r"\boxed{2125}", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        ("(x+1)^2", r"\boxed{x^2+2x+1}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
        (r"\{1,2\}", r"\boxed{\left\{2,1\right\}}", True),
        ("18", r"\boxed{x = 18}", True),
        ("18", r"\boxed{18 \text{ dollars}}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Angela}}", False),
        # math-verify alone takes both for "a +", with the rest as units
        ("a + b + c", r"\boxed{a + d + e}", False),
        ("a + b + c", r"\boxed{c+b+a}", True),
        # without a box
        ("18", "9 * 2\n#### 18", True),
        ("27", "I think it is 3 + 24 = 27", True),
        ("27", "I think it is $27$, not 3.", False),
        ("27", "The final answer is $27$.", True),
        ("27", "27 pages\n\n" * 900 + "and so $x = 5$", False),
        ("5", "27 pages\n\n" * 900 + "and so $x = 5$", True),
    ],
)
def test_exact_grading(exact, gold, solution, correct):
    grade = exact.grade(gold, solution)
    assert (grade.correct, grade.error) == (correct, None)
    assert grade.extracted


@pytest.mark.parametrize("solution", ["", "\n\n", "I do not know.", r"no: \boxed{}", r"\boxed{  }", r"\boxed{x"])
def test_a_solution_without_an_answer_is_wrong(exact, numeric, solution):
    for grader in (exact, numeric):
        grade = grader.grade("27", solution)
        assert (grade.correct, grade.extracted, grade.error) == (False, "", None)


@pytest.mark.parametrize(
    ("gold", "final", "correct"),
    [
        # scientific notation
        ("1e-05", "0.00001", True),
        ("1e-05", "10^{-5}", True),
        ("1e-05", "1e-06", False),
        ("320000", "3.2e5", True),
        ("320000", r"3.2 \times 10^5", True),
        ("320000", "3.2\u00d710\u2075", True),
        ("3.2E+5", r"3.2\cdot 10^{5}", True),
        ("3.2e5", "3.2e6", False),
        ("7000", r"7\times 10^3\text{ m}", True),
        (r"7\times 10^3", "10", False),
        # small and large numbers
        ("0.0000002", "0.0000004", False),
        ("0.0000002", r"2\times 10^{-7}", True),
        (r"0.0000002\text{ m}", r"0.0000004\text{ m}", False),
        ("(0.0000002, 1)", "(0.0000004, 1)", False),
        (r"\{0.0000002, 5\}", r"\{5, 0.0000004\}", False),
        (r"x \le 0.0000002", r"x \le 0.0000004", False),
        (r"\begin{pmatrix} 0.0000002 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 0.0000004 \\ 1 \end{pmatrix}", False),
        (r"2 \times 10^{-7}x", r"4 \times 10^{-7}x", False),
        (r"\sqrt{2}\cdot 10^{-28}", r"\sqrt{3}\cdot 10^{-28}", False),
        (r"\frac{1}{3^{80}}", r"\frac{1}{3^{81}}", False),
        (r"\frac{1}{3^{80}}", "3^{-80}", True),
        ("0", r"\frac{1}{3^{80}}", False),
        ("0", "0.0000001", False),
        (r"\frac{1+10^{30}}{10^{30}}", r"\frac{2+10^{30}}{10^{30}}", False),
        ("123456789012345678901/3", "123456789012345678902/3", False),
        ("1/3", "333333/1000000", False),
        ("1/3", "0.333333", True),
        ("1/30", "0.033333", True),
        ("1/3", "0.33", False),
        # mixed numbers
        ("5/2", "2 1/2", True),
        ("2 1/2", r"\frac{5}{2}", True),
        ("2 1/2", "2.5", True),
        ("-5/2", "-2 1/2", True),
        ("5/2", r"2\ \frac12", True),
        ("5/2", "2\u00bd", True),
        (r"5/2\text{ cups}", r"2 1/2\text{ cups}", True),
        ("(5/2, 3)", "(2 1/2, 3)", True),
        ("5/2", "2 1/3", False),
        # choices
        ("C", "C. 12 cm", True),
        ("C", r"\textbf{(C)}\ 12", True),
        ("C", r"\text{C. 12 cm}", True),
        ("C", "C) 12", True),
        ("C", "C: twelve", True),
        ("C", r"\mathrm{(C)}~12", True),
        ("C", r"(\text{C})", True),
        ("C", "Option C", True),
        ("C", "**(C)** 12", True),
        ("C", "(C) -5", True),
        (r"\text{(C)}", "C. 12", True),
        (r"\textbf{(C)}\ 12", "C", True),
        (r"\textbf{(C)}\ 12", "12", True),
        (r"12\text{ cm}", "C. 12 cm", True),
        ("C", "D. 12 cm", False),
        ("D. 12 cm", "C. 12 cm", False),
        ("C. 12", "C. 13", False),
        ("D", r"\textbf{(C)}\ 12", False),
        ("C", "12C", False),
        ("A", "A+1", False),
        ("a:b", "a:c", False),
        ("(a)+b", "(a)+c", False),
        ("a", "(a) - 5", False),
        # dots
        (r"1,3,\ldots,2n-1", r"1,2,\ldots,n", False),
        (r"1,2,\ldots,n", r"1,3,\ldots,2n-1", False),
        (r"1,2,\ldots,n", r"1, 2, \dots, n", True),
        (r"1,2,\ldots,n", "1, 2, ..., n", True),
        (r"1,2,\ldots,n", "1,2,n", False),
        (r"\{1,2,\ldots,n\}", r"\{1,2,\cdots,n\}", True),
        ("1+2+\\cdots+n", "1+3+\\cdots+n", False),
        # bases
        ("43_5", "43_7", False),
        ("43_5", "43_{5}", True),
        ("43_5", r"43_{\text{five}}", True),
        ("43_5", r"43\text{ (base 5)}", True),
        ("43_5", "43", True),
        ("1A_{16}", "1A_{12}", False),
        ("1A_{16}", "A1_{16}", False),
        ("43_5, 12_5", "43_5, 12_7", False),
        # an answer in two boxes that says one thing
        (r"\frac{639}{40}", r"15\frac{39}{40}} or \boxed{\frac{639}{40}", True),
        ("3,5", r"3} and \boxed{5", True),
        ("5", r"3} and \boxed{5", False),
    ],
)
def test_exact_grading_of_what_is_written_in_unusual_ways(exact, gold, final, correct):
    grade = exact.grade(gold, f"\\boxed{{{final}}}")
    assert (grade.correct, grade.error) == (correct, None)


@pytest.mark.parametrize(
    ("gold", "solution"),
    [
        ("27", r"I will use \boxed{}. The answer is 27."),
        ("27", r"The answer is $27$. I put it in \boxed{...}."),
        ("320000", "The answer is 3.2e5."),
        ("5/2", "The answer is 2 1/2."),
        ("42", r"\fbox{42}"),
    ],
)
def test_both_graders_read_unmarked_numbers_and_pass_over_empty_boxes(exact, numeric, gold, solution):
    for grader in (exact, numeric):
        grade = grader.grade(gold, solution)
        assert (grade.correct, grade.error) == (True, None)


def _by_math_verify(gold: str, final: str) -> bool:
    from math_verify import parse, verify

    parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, final)]
    return bool(verify(*parsed, timeout_seconds=None))


_integers = st.one_of(st.integers(-30, 30), st.integers(-(10**20), 10**20)).map(str)
_decimals = st.decimals(-200, 200, allow_nan=False, allow_infinity=False, places=3).map(str)
_nearly = st.sampled_from(["0000001", "0000004", "0000006", "000002", "00001", "00002"])
_variants = st.sampled_from(["{}", "{}", "0{}", "{}.0", "{}.00", "+{}", " {} ", "${}$"])


@given(data=st.data())
def test_the_quick_way_agrees_with_math_verify_on_numbers(data):
    gold = data.draw(st.one_of(_integers, _decimals))
    other = data.draw(st.one_of(st.just(gold), _integers, _decimals))
    if other[0] in "-0123456789" and "." not in other:
        other = data.draw(_variants).format(other) if other[0] != "-" else other
    if "." in other:
        other += data.draw(st.one_of(st.just(""), _nearly))
    quick = quick_equal(gold, other)
    if abs(Decimal(gold)) >= 1:  # math-verify takes all small numbers for equal
        assert quick is None or quick == _by_math_verify(gold, other)


@pytest.mark.parametrize(
    "text",
    [r"\frac{3}{4}", r"\left( 3, \frac{\pi}{2} \right)", "x^2+1", r"\text{Evelyn}", "50\\%", "[2,5)", "1,234", "p - q"],
)
def test_equal_texts_are_equal_to_math_verify_too(text):
    assert quick_equal(text, f" ${text}$. ") is True
    assert _by_math_verify(text, text)


# --- numeric ---


@pytest.mark.parametrize(
    ("gold", "solution", "correct"),
    [
        ("1234.5", r"\boxed{$1,234.50}", True),
        ("2,125", r"\boxed{\$2{,}125}", True),
        ("18", r"\boxed{18 \text{ dollars}} in 5 days", True),
        ("18", r"\boxed{18 \text{ cm}^2}", True),
        ("18", "She makes 9 * 2 = $18 every day.", True),
        ("18", "She makes 9 * 2 = $19 every day.", False),
        ("18", "17\n#### 18", True),
        ("50", r"\boxed{50\%}", True),
        ("0.75", r"\boxed{\frac{3}{4}}", True),
        ("3/4", r"\boxed{0.75}", True),
        ("-3/4", r"\boxed{-\dfrac34}", True),
        ("2.5", "about 2 1/2 hours", True),
        ("5", "and 10-5", True),
        ("-5", "x=-5", True),
        ("-3.5", r"a loss: -\$3.50", True),
        ("-4", "\u22124", True),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("1450000", "1450001", False),
        ("1e-05", "0.00001", True),
        ("1e-05", "1e-06", False),
        ("320000", r"\boxed{3.2e5}", True),
        ("7000", r"\boxed{7\times 10^3}", True),
        ("7000", "about 7 \u00d7 10\u00b3 km", True),
        ("100000", r"\boxed{10^5}", True),
        ("0.007", r"\boxed{7 \cdot 10^{-3}\text{ m}}", True),
        ("0.0000002", "0.0000004", False),
        ("0", "0.0000001", False),
        ("1/3", "333333/1000000", False),
        ("2.5", "2\u00bd", True),
        ("7", r"\boxed{x} for 7", False),
        ("3", "1/0", False),
    ],
)
def test_numeric_grading(numeric, gold, solution, correct):
    grade = numeric.grade(gold, solution)
    assert (grade.correct, grade.error) == (correct, None)


def test_a_number_too_large_to_write_out_is_an_error_of_that_answer(numeric):
    for written in ("1e9999", r"10^{999999999}"):
        grade = numeric.grade("5", f"\\boxed{{{written}}}")
        assert not grade.correct and "number too long" in grade.error
    assert numeric.grade("5", r"The last digit of 10^{2024} + 5 is \boxed{5}").correct


@given(st.fractions(-(10**7), 10**7, max_denominator=50), st.integers(0, 3))
def test_numbers_are_read_back_however_they_are_written(value, form):
    sign, size = ("-" if value < 0 else ""), abs(value)
    written = [
        f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}",
        f"{sign}{size.numerator:,} / {size.denominator:,}",
        f"{sign}\\${float(size):,.9f}",
        f"{sign}{float(size):.9f} units.",
    ][form]
    gold = f"{value.numerator}/{value.denominator}"
    assert make_grader("numeric").grade(gold, f"In 3 days: {written}").correct


# --- faults ---


def test_hostile_answers_are_errors_and_the_run_goes_on():
    grader = AnswerGrader("exact", time_limit=0.5)
    hostile = [
        r"\boxed{10^{10^{10}}}",
        "\\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
        "\\boxed{" + "{" * 50_000 + "1" + "}" * 50_000 + "}",
    ]
    innocent = [r"\boxed{\frac{2}{4}}", r"\boxed{\frac{3}{4}}"]
    grades = grader.grade_many([(r"\frac{1}{2}", text) for text in [*hostile, *innocent]])
    grader.close()
    assert [grade.correct for grade in grades] == [False, False, False, True, False]
    assert all(grade.error for grade in grades[:3]) and not any(grade.error for grade in grades[3:])
    assert all(len(grade.extracted) <= 2000 for grade in grades)


@pytest.mark.parametrize("hostile", ["{" * 100_000, "$" * 100_000, "9" * 100_000, "1 " * 50_000, "\ud800 1"])
def test_long_or_broken_texts_do_no_harm(exact, numeric, hostile):
    assert not exact.grade("27", hostile).correct
    assert not numeric.grade("27", hostile).correct


def test_unreadable_gold_answers_are_errors_and_are_listed(exact, numeric):
    for grader, gold in ((exact, r"\frac{"), (exact, ""), (exact, "x" * 3000), (numeric, "many")):
        grade = grader.grade(gold, r"\boxed{5}")
        assert not grade.correct and grade.error
        assert unreadable_answers(grader, ["5", gold, "5", r"\frac{1}{2}", gold]) == [gold]


def test_a_killed_process_is_replaced(exact):
    assert exact.grade("x+1", r"\boxed{1+x}").correct
    for worker in exact._workers:
        worker.process.kill()
        worker.process.wait()
    grade = exact.grade("x+2", r"\boxed{2+x}")
    assert (grade.correct, grade.error) == (True, None)


def test_an_interrupted_run_leaves_the_grader_usable(exact):
    def interrupt():
        raise KeyboardInterrupt

    assert exact.grade("x+1/7", r"\boxed{1/7+x}").correct  # in a process
    for worker in exact._workers:
        worker.receive = interrupt
    with pytest.raises(KeyboardInterrupt):
        exact.grade_many([("x+3", f"\\boxed{{{n}+x}}") for n in range(3)])
    assert exact._workers == []
    assert [grade.correct for grade in exact.grade_many([("x+4", r"\boxed{4+x}"), ("x+4", r"\boxed{x}")])] == [
        True,
        False,
    ]


# --- running ---


def test_many_pairs_keep_their_order_whatever_the_workers(exact):
    pairs = [(f"x+{n % 5}", f"\\boxed{{{n % 7}+x}}") for n in range(40)] + [("5", r"\boxed{5}"), ("5", "")]
    expected = [n % 5 == n % 7 for n in range(40)] + [True, False]
    parallel = make_grader("exact")
    for grader, workers in ((exact, 1), (parallel, 2)):
        grades = grader.grade_many(pairs, workers=workers)
        assert [grade.correct for grade in grades] == expected
    processes = [worker.process for worker in parallel._workers]
    assert len(processes) == 2
    parallel.close()
    assert all(process.poll() is not None for process in processes)


def test_trivial_answers_start_no_process():
    grader = make_grader("exact")
    grades = grader.grade_many([(str(n % 50), f"Some steps.\n\n\\boxed{{{n % 49}}}") for n in range(10_000)])
    assert sum(grade.correct for grade in grades) == sum(n % 50 == n % 49 for n in range(10_000))
    assert grader._workers == []


def _grade_sums(grader, start):
    pairs = [(f"x+{n}", f"\\boxed{{{n + n % 2}+x}}") for n in range(start, start + 30)]
    return [grade.correct for grade in grader.grade_many(pairs)] == [n % 2 == 0 for n in range(start, start + 30)]


def test_it_works_in_threads_and_in_forked_daemons(exact):
    assert _grade_sums(exact, 100)  # the parent's process is running when we fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    daemon = context.Process(target=lambda: (queue.put(_grade_sums(exact, 200)), exact.close()), daemon=True)
    with exact._lock:  # as if another thread were grading at the moment of the fork
        daemon.start()
    with ThreadPoolExecutor(3) as executor:
        assert all(executor.map(lambda start: _grade_sums(exact, start), (300, 330, 360)))
    assert queue.get(timeout=120)
    daemon.join()


def test_a_pickled_grader_is_the_same_grader(exact):
    assert exact.grade("x+8", r"\boxed{8+x}").correct
    copy = pickle.loads(pickle.dumps(exact))
    assert copy.describe() == exact.describe() and copy._workers == []


def test_a_description_names_library_versions_and_fits_json():
    description = json.loads(json.dumps(make_grader("exact").describe()))
    assert description["rules"] == 2  # what changes verdicts changes this, so that tables are not mixed
    assert description["name"] == "exact" and description["library"]["math-verify"]
    assert json.loads(json.dumps(make_grader("numeric").describe()))["tolerance"] == 1e-6


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'exact'"):
        make_grader("exakt")
    with pytest.raises(ConfigError, match="workers"):
        make_grader("exact").grade_many([], workers=0)
    with pytest.raises(ConfigError, match="time limit"):
        AnswerGrader("exact", time_limit=0)


def test_importing_it_does_not_import_sympy():
    code = "import sys, rollouts.tasks.grading; sys.exit('sympy' in sys.modules or 'math_verify' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
