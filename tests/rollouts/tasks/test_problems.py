"""Reading problems: the dialects of JSONL files, splits that leak nothing, and messages for broken files."""

import csv
import gzip
import json
import lzma
import re
import subprocess
import sys
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.errors import ConfigError, DataError
from rollouts.tasks.problems import Problem, combined, load_problems, split_of
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
        ({"problem": "Q", "solution": r"So \boxed{3} and \boxed{5}"}, "3, 5"),
        ({"problem": "Q", "solution": r"So $\boxed{7}$, and not \boxed{}"}, "7"),
        ({"problem": "Q", "answer": "7", "solution": r"So \boxed{5}", "target": ["5"], "ground_truth": {"a": 5}}, "7"),
        ({"problem": "Q", "final_answer": "7", "solution": "Adding 3 gives 10"}, "7"),
        ({"problem": "Q", "ground_truth": 7, "solution": "Adding 3 gives 10"}, "7"),
        ({"problem": "Q", "target": "7", "solution": "Adding 3 gives 10"}, "7"),
        ({"problem": "Q", "Final Answer": "7", "answer": "First\nwe add 3 to 4."}, "7"),
        ({"problem": "Q", "answer": "First\nwe add 3 to 4.", "final-answer": "7"}, "7"),
        ({"problem": "Q", "answer": "First\nwe add 3 to 4.", "solution": r"\boxed{7}"}, "7"),
        ({"ID": 4, "Problem": "Q", "Answer": "7"}, "7"),
        ({"QUESTION": "Q", "ANSWER": "So\n#### 7"}, "7"),
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
    (problem,) = load_problems(
        write({"question": "Q", "answer": "1", key: value, "License": "MIT"}, name="pears.jsonl")
    )
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


@pytest.mark.parametrize("written", ["0.00001", "1e-05", "3.2E5", "2.50", "12345678901234567890123", "1e400"])
def test_numbers_of_json_keep_their_digits(write, written):
    (problem,) = load_problems(write(f'{{"question": "Q", "answer": {written}}}'))
    assert Decimal(problem.answer) == Decimal(written)
    if "e" not in written.lower():
        assert problem.answer == written


# --- LaTeX that an escape sequence of JSON has bitten ---

BITTEN = [
    r"\frac{3}{2}",
    r"\boxed{3}",
    r"\text{yes}",
    r"\theta",
    r"3 \times 4",
    r"\rho",
    r"\tan x",
    r"x \to 0",
    r"\beta",
    r"\binom{3}{2}",
]
BITTEN += [
    r"\right)",
    r"\rangle",
    r"a \neq b",
    r"\nabla f",
    r"\begin{cases}",
    r"\forall x",
    r"\tfrac12",
    r"\textbf{(C)}",
    r"\bar{x}",
    r"\tau",
]


@pytest.mark.parametrize("latex", BITTEN)
@pytest.mark.parametrize("key", ["question", "answer", "solution"])
def test_latex_without_its_backslash_is_refused_by_line_and_column(write, latex, key):
    good = '{"question": "P\\\\\\\\frac", "answer": "1"}'
    row = {"question": "Q", "answer": "" if key == "solution" else "1", key: "HERE"}
    line = json.dumps(row).replace("HERE", f"so {latex}")
    with pytest.raises(DataError) as caught:
        load_problems(write(good, line))
    column = line.index("\\") + 1
    assert f"apples.jsonl, line 2, column {column}: {key!r} holds the control character" in str(caught.value)
    command = re.search(r"\\[a-z]+", latex)[0]
    assert f"{command} was meant" in str(caught.value) and "\\" + command in str(caught.value)
    assert load_problems(write(good, line.replace("\\", "\\\\")))[1]


@pytest.mark.parametrize("latex", [r"\sqrt{2}", r"\underline{x}", r"\left("])
def test_escapes_that_json_does_not_have_are_refused_with_the_same_remedy(write, latex):
    with pytest.raises(DataError, match=r"line 1: not JSON.*backslash written twice"):
        load_problems(write(f'{{"question": "Q", "answer": "{latex}"}}'))


@pytest.mark.parametrize(
    "text",
    [
        "a\tb",
        "one\r\ntwo",
        "Take\tan apple",
        "page\fTwo",
        "e\nequal",
        "\tTo be",
        "n\nu = 3",
        "a)\tan n-gon",
        "a)\tau contraire",
        "1\nless than 2",
        "\to livro",
    ],
)
def test_honest_control_characters_stay(write, text):
    assert load_problems(write({"question": f"Q: {text}", "answer": "1"}))[0].question == f"Q: {text}"


# --- formats ---


def _packed(how, content):
    if how == "utf-16":
        return content.decode().encode("utf-16")
    if how in ("utf-16-le", "utf-16-be", "utf-32"):
        return content.decode().encode(how)
    if how == "pzstd":  # which writes a frame to be skipped first
        return b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + _packed("zstd", content)
    with pa.BufferOutputStream() as sink:
        with pa.CompressedOutputStream(sink, how) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("how", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gzip", "bz2", "zstd", "pzstd", "lz4"])
def test_compressed_files_and_other_unicode_encodings_are_read(write, how):
    plain = write(*_questions(5), {"question": "caf\u00e9?", "answer": "1"})
    suffix = {"gzip": ".gz", "bz2": ".bz2", "zstd": ".zst", "pzstd": ".zst", "lz4": ".lz4"}.get(how, "")
    path = plain.parent / "packed" / f"apples.jsonl{suffix}"
    path.parent.mkdir()
    path.write_bytes(_packed(how, plain.read_bytes()))
    assert load_problems(path) == load_problems(plain)


def test_parquet_and_csv_are_read(write, tmp_path):
    rows = [{"ID": n, "Problem": f'What, "is" {n}?\nSay it.', "Answer": r"\frac{1}{2}"} for n in range(4)]
    expected = load_problems(write(*rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "apples.parquet")
    assert load_problems(tmp_path / "apples.parquet") == expected
    for name, delimiter in (("apples.csv", ","), ("apples.tsv", "\t"), ("apples.CSV", ";")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, rows[0], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
        assert load_problems(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"PK\x03\x04 and more", "ZIP archive or a spreadsheet.*CSV"),
        ("a.jsonl", b"\xfd7zXZ\x00", "xz -d"),
        ("a.jsonl.xz", lzma.compress(b"{}"), "compressed with xz.*xz -d"),
        ("a.jsonl.lzma", lzma.compress(b"{}", lzma.FORMAT_ALONE), "compressed with lzma.*xz -d"),
        ("a.jsonl.Z", b"\x1f\x9d\x90{}", "uncompress"),
        ("a.jsonl.lz4", b"\x02\x21\x4c\x18{}", "lz4 -d"),
        ("a.rar", b"Rar!\x1a\x07\x00", "RAR archive: unpack it"),
        ("a.tar", bytes(257) + b"ustar", "tar archive: unpack it"),
        ("a.tar.gz", gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar", mtime=0), "tar archive: unpack it"),
        ("a.jsonl", b"ARROW1\x00\x00", "Arrow file: write it as Parquet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"question": "Q", "answer": "1"}' * 9, mtime=0)[:30],
            "damaged gzip data.*fetch it again",
        ),
        ("a.parquet", b"PAR1 but not really", "damaged Parquet data.*fetch it again"),
        ("a.jsonl", b"\xff\xfe\x00", "begins like UTF-16"),
        ("a.csv", b"question,answer\nQ,1\nP\n", "line 3: not as many fields as the header's 2"),
        ("a.csv", b"question,answer\nQ,1,2\n", "line 2: not as many fields"),
        ("a.csv", b'question,answer\n"Q,1\n', "not CSV"),
        ("a.csv", b"question,answer\ncaf\xe9,1\n", "line 2: byte 0xe9.*iconv"),
    ],
)
def test_files_of_other_kinds_are_named_with_the_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_problems(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_faulty_row_of_parquet_is_named(tmp_path):
    rows = [{"question": "Q", "answer": "1"}, {"question": "P", "answer": "\frac{1}{2}".replace("\\f", "\f")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 2: 'answer' holds the control character.*\\frac was meant"):
        load_problems(tmp_path / "a.parquet")


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
    assert {problem.split for problem in load_problems("tinymath:test2", limit=2)} == {"test2"}


# --- splits ---


def test_hashing_gives_the_shares_asked_for(write):
    path = write(*_questions(2000))
    shares = Counter(problem.split for problem in load_problems(path))
    assert abs(shares["train"] - 1400) < 100 and abs(shares["validation"] - 300) < 75
    assert abs(shares["test"] - 300) < 75


@settings(deadline=None)
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


def test_files_that_clash_are_refused(write):
    first = load_problems(write({"question": "Q one", "answer": "1", "id": 1, "split": "train"}))
    assert combined([*first, *first], first) == first
    same_id = load_problems(write({"question": "Q two", "answer": "1", "id": 1, "split": "train"}))
    with pytest.raises(DataError, match="'apples/1' stands for two problems, 'Q one' and 'Q two'"):
        combined([*first, *same_id])
    same_question = load_problems(write({"question": " q  ONE", "answer": "1", "split": "test"}, name="pears.jsonl"))
    for problems, known in (([*first, *same_question], ()), (same_question, first)):
        with pytest.raises(DataError, match="'apples/1' of 'train' and 'pears/q-.* of 'test' are the same question"):
            combined(problems, known)


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
    ],
)
def test_impossible_settings_are_refused(write, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_problems(**{"spec": write(*_questions(2)), **settings})
