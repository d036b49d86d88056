"""Reading problems: the dialects of JSONL files, splits that leak nothing, and messages for broken files."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.errors import ConfigError, DataError
from rollouts.tasks.problems import Problem, load_problems, split_of
from rollouts.tinymath import SPLITS, generate_problems


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, or text and bytes as they are) into a file and return its path."""

    def write(*rows, name="apples.jsonl"):
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return write


def _questions(count):
    return [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


# --- dialects ---


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Q", "answer": "She has 2*3=<<2*3=6>>6.\n#### 6"}, "6"),
        ({"question": "Q", "answer": "So\n#### 1,234"}, "1,234"),
        ({"question": "Q", "answer": "#### <<6=6>>6"}, "6"),
        ({"problem": "Q", "answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
        ({"problem": "Q", "answer": 7}, "7"),
        ({"problem": "Q", "answer": 0}, "0"),
        ({"problem": "Q", "answer": 2.5}, "2.5"),
        ({"problem": "Q", "answer": "$\\boxed{8}$"}, "8"),
        ({"problem": "Q", "solution": "093"}, "093"),
        ({"problem": "Q", "solution": r"First \boxed{1}. So $x=\boxed{\frac{1}{2^{3}}}$."}, r"\frac{1}{2^{3}}"),
        ({"problem": "Q", "solution": "Thus $x^2 = \\boxed 9$."}, "9"),
        ({"problem": "Q", "solution": r"Thus \fbox{9}"}, "9"),
        ({"problem": "Q", "solution": r"Thus \boxed{5}", "answer": "6"}, "6"),
        ({"problem": "Q", "solution": r"Thus \boxed{5}", "answer": ""}, "5"),
        ({"problem": "Q", "solution": r"Thus \boxed{5}", "answer": None}, "5"),
        ({"problem": "Q", "solution": "10", "unknown": [1, {"nested": float("nan")}]}, "10"),
    ],
)
def test_the_answer_of_every_dialect(write, row, answer):
    (problem,) = load_problems(write(row))
    assert (problem.question, problem.answer) == ("Q", answer)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("id", "a1", "apples/a1"),
        ("ID", "1984-1", "apples/1984-1"),
        ("unique_id", "test/x.json", "apples/test/x.json"),
        ("idx", 0, "apples/0"),
    ],
)
def test_ids_carry_their_source(write, key, value, expected):
    path = write({"question": "Q", "answer": "1", key: value})
    assert load_problems(path)[0].id == expected
    (problem,) = load_problems(path, source="pears", licence="MIT")
    assert problem.id == "pears" + expected.removeprefix("apples")
    assert (problem.source, problem.licence) == ("pears", "MIT")


def test_without_an_id_the_question_gives_one(write):
    first = load_problems(write(*_questions(5)))
    second = load_problems(write(*reversed(_questions(9))))
    assert len({problem.id for problem in second}) == 9
    assert {problem.id for problem in first} < {problem.id for problem in second}


def test_windows_lines_a_byte_order_mark_and_blank_lines_are_read(write):
    rows = [b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r" for row in _questions(1)]
    assert load_problems(write(*rows, "", "  ", *_questions(3)[1:]))[0].question == "What is 0 + 0?"


def test_the_limit_takes_the_first(write):
    path = write(*_questions(9))
    assert load_problems(path, limit=4) == load_problems(path)[:4]
    assert len(load_problems(path, limit=100)) == 9


# --- the embedded set ---


def test_the_embedded_set_and_its_splits():
    problems = load_problems("tinymath:test", limit=3)
    assert problems == [
        Problem(tiny.id, "test", tiny.question, tiny.answer, "tinymath", "MIT") for tiny in generate_problems("test", 3)
    ]
    assert load_problems("tinymath", split="test", limit=3) == problems
    assert Counter(problem.split for problem in load_problems("tinymath", limit=2)) == dict.fromkeys(SPLITS, 2)


# --- splits ---


def test_hashing_gives_the_shares_asked_for(write):
    path = write(*_questions(2000))
    shares = Counter(problem.split for problem in load_problems(path))
    assert abs(shares["train"] - 1400) < 100 and abs(shares["validation"] - 300) < 75
    halves = Counter(problem.split for problem in load_problems(path, fractions=(0.0, 0.5, 0.5)))
    assert halves["train"] == 0 and abs(halves["test"] - 1000) < 100


@given(
    questions=st.lists(st.text("abc $x\n", min_size=1).filter(str.strip), min_size=1, max_size=8, unique=True),
    more=st.lists(st.text("abc $x\n", min_size=1).filter(str.strip), max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_a_problem_stays_in_its_split_when_others_are_added(tmp_path_factory, questions, more, order):
    def splits(texts, name):
        path = tmp_path_factory.mktemp("split") / name
        path.write_text("\n".join(json.dumps({"question": t, "answer": "1", "id": n}) for n, t in enumerate(texts)))
        return {problem.question: problem.split for problem in load_problems(path)}

    everything = questions + more
    order.shuffle(everything)
    before, after = splits(questions, "a.jsonl"), splits(everything, "b.jsonl")
    assert all(after[question] == split for question, split in before.items())


def test_one_question_is_in_one_split_whatever_its_id_case_and_blanks(write):
    for n in range(30):
        rows = [
            {"question": f"Find {n}.", "answer": "1", "id": "a"},
            {"question": f" find\t {n}. ", "answer": "1", "id": "b"},
        ]
        problems = load_problems(write(*rows))
        assert problems[0].split == problems[1].split == load_problems(write(rows[1], name="pears.jsonl"))[0].split
        assert problems.repeated == 1


def test_splits_do_not_depend_on_the_process():
    code = "from rollouts.tasks.problems import split_of; print([split_of(f'Find {n}.') for n in range(20)])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str([split_of(f"Find {n}.") for n in range(20)])


def test_a_rows_own_split_is_respected_unless_overruled(write):
    names = ["train", "val", "dev", "test", "Validation", None, "ood"]
    path = write(*({**row, "split": name} for row, name in zip(_questions(7), names, strict=True)))
    own = [problem.split for problem in load_problems(path)]
    hashed = [split_of(row["question"]) for row in _questions(7)]
    assert own == ["train", "validation", "validation", "test", "validation", hashed[5], "ood"]
    assert [problem.split for problem in load_problems(path, split="hash")] == hashed
    assert {problem.split for problem in load_problems(path, split="test")} == {"test"}


def test_a_question_in_two_named_splits_is_refused(write):
    row = {"question": "Q", "answer": "1"}
    path = write({**row, "id": 1, "split": "train"}, {**row, "id": 2, "split": "test"})
    with pytest.raises(DataError, match=r"lines 1 and 2.*'train' and 'test'.*hash"):
        load_problems(path)
    assert len(load_problems(path, split="hash")) == 2


# --- duplicates and broken files ---


def test_exact_duplicates_are_skipped_and_counted(write):
    rows = [{"question": "Q", "answer": "1", "id": 1}, {"question": "P", "answer": "1", "id": 2}]
    problems = load_problems(write(*rows, *rows, rows[0]))
    assert (len(problems), problems.skipped, problems.repeated) == (2, 3, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no problems"),
        (["", " "], "no problems"),
        ([b'{"question": "caf\xe9"}'], r"line 1: byte 0xe9 at position 17.*UTF-8.*iconv"),
        (['{"question": "Q", "answer": "1"}', "{broken"], r"line 2: not JSON.*'\{broken'.*one JSON object per line"),
        (["[", '{"question": "Q"}', "]"], r"line 1: not JSON.*jq -c"),
        (["[" * 100_000], "line 1: not JSON"),
        (['"text"'], r"line 1: 'text' is not an object"),
        (["3"], r"line 1: 3 is not an object"),
        ([{"answer": "1", "prompt": "Q"}], r"line 1: no question.*'prompt'.*'question' or 'problem'"),
        ([{"question": "  ", "answer": "1"}], "line 1: no question"),
        ([{"question": ["Q"], "answer": "1"}], r"line 1: 'question' is \['Q'\]; expected text"),
        ([{"question": "Q", "answer": True}], r"line 1: 'answer' is True; expected text or a number"),
        ([{"question": "Q", "answer": "\ud800"}], r"line 1: 'answer' is '\\ud800'; expected valid Unicode"),
        ([{"question": "Q"}], r"line 1: no final answer; 'answer' is None and 'solution' is None"),
        ([{"question": "Q", "answer": "So\n#### "}], "line 1: no final answer"),
        ([{"question": "Q", "solution": "It is\nobvious."}], "line 1: no final answer.*boxed"),
        ([{"question": "Q", "solution": "obvious " * 50}], "line 1: no final answer"),
        ([{"question": "Q", "answer": "1", "id": {"a": 1}}], "line 1: 'id' is"),
        ([{"question": "Q", "answer": "1", "split": "holdout"}], "line 1: split 'holdout'; expected one of train"),
        (
            [{"question": "Q", "answer": "1", "id": 7}, {"question": "P", "answer": "1", "id": 7}],
            r"lines 1 and 2: the same id 'apples/7' with the questions 'Q' and 'P'",
        ),
        (
            [{"question": "Q", "answer": "1"}, "", {"question": "q", "answer": "2"}],
            r"lines 1 and 3: the same id .* with the answers '1' and '2'",
        ),
    ],
)
def test_a_broken_file_is_refused_by_file_and_line(write, rows, message):
    path = write(*rows)
    with pytest.raises(DataError, match=message) as caught:
        load_problems(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file.*tinymath"):
        load_problems(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_problems(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spec": "tinymath:tset"}, "Did you mean 'test'"),
        ({"spec": "tinymath", "split": "hash"}, "unknown split 'hash' of tinymath"),
        ({"spec": "tinymath:test", "split": "train"}, "name one of the two"),
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"limit": 0}, "expected 1 or more"),
        ({"fractions": (0.7, 0.2, 0.2)}, "sum to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "sum to 1"),
    ],
)
def test_impossible_settings_are_refused(write, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_problems(**{"spec": write(*_questions(2)), **settings})
