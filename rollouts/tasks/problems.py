r"""Problems: from the embedded set, or from JSONL files in the dialects that people have.

One object per line. The question is in ``question`` or ``problem``. The answer is in ``answer`` or, where that
is missing or empty, in ``solution``; of a worked text only the last ``\boxed{...}``, else what follows ``####``,
is taken. The id is in ``id``, ``ID``, ``unique_id`` or ``idx``. Other keys are passed over.

Splits: a row's own ``split`` is respected; every other row is placed by a hash of its question's text alone
(Unicode-normalised, without regard to case and blanks). So a problem never moves when others are added, and
one question is never in two splits, whatever files it comes from and whatever ids it has there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rollouts.errors import ConfigError, DataError, did_you_mean
from rollouts.tasks.answers import last_boxed

EMBEDDED = "tinymath"
SPLITS = ("train", "validation", "test", "ood")
#: Shares of train, validation and test among problems that are split by hash.
FRACTIONS = (0.7, 0.15, 0.15)
#: `split` that has every row placed by its hash, whatever split it names itself.
BY_HASH = "hash"

_SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train"}
_ID_KEYS = ("id", "ID", "unique_id", "idx")
_LONGEST_PLAIN_SOLUTION = 200
_CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K: "9 * 2 = $<<9*2=18>>18"
_UNBRACED_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+?)[.$]*(?:\s|$)")  # MATH: "$x^2 = \boxed 9$."


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        id: Unique across sources: ``<source>/<id in the file>``, or ``<source>/q-<hash of the question>``.
        split: ``train``, ``validation``, ``test`` or ``ood``.
        question: The text, as it was read.
        answer: The final answer only, as it was read (thousands separators, units and LaTeX included).
        source: Where it comes from: a file's name without suffix, unless said otherwise.
        licence: As stated by whoever loaded it.
    """

    id: str
    split: str
    question: str
    answer: str
    source: str
    licence: str


class ProblemSet(list[Problem]):
    """The problems that were read, in the order of the file, and what was noticed.

    Attributes:
        skipped: Rows left out because an earlier row has the same id, question and answer.
        repeated: Rows kept although an earlier row asks the same question under another id.
    """

    skipped: int = 0
    repeated: int = 0


def load_problems(
    spec: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    source: str | None = None,
    licence: str = "unknown",
    fractions: tuple[float, float, float] = FRACTIONS,
) -> ProblemSet:
    """Read problems.

    Args:
        spec: ``tinymath`` or ``tinymath:test`` for the embedded set or one split of it, else a JSONL file.
        split: Of a file: the split that all its problems belong to, or ``hash``. Of the embedded set: the one
            split that is wanted.
        limit: Most problems, the first ones (of ``tinymath`` without a split: of each split).
        source: Name that goes into the ids; default: the file's name without suffix.
        licence: Licence of the problems; default: a row's own ``licence`` or ``license``, else ``unknown``.
        fractions: Shares of train, validation and test for rows that are split by hash.

    Raises:
        DataError: The file or a row of it cannot be used; names file, line, what was found and what to do.
        ConfigError: A setting is impossible.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit on problems is {limit}; expected 1 or more")
    if isinstance(spec, str) and spec.partition(":")[0] == EMBEDDED:
        return _embedded(spec.partition(":")[2], split, limit, source or EMBEDDED, licence)
    _check(split, fractions)
    path = Path(spec)
    problems = ProblemSet()
    by_id: dict[str, tuple[int, str, Problem]] = {}
    by_question: dict[str, tuple[int, Problem]] = {}
    for number, row in _rows(path):
        problem = _problem(_Row(path, number, row), split, source or path.stem, licence, fractions)
        text = normalise_question(problem.question)
        if problem.id in by_id:
            earlier_number, earlier_text, earlier = by_id[problem.id]
            if (earlier_text, earlier.answer) != (text, problem.answer):
                _refuse_same_id(path, (earlier_number, earlier), (number, problem), same_question=text == earlier_text)
            problems.skipped += 1
            continue
        by_id[problem.id] = (number, text, problem)
        first_number, first = by_question.setdefault(text, (number, problem))
        if first.split != problem.split:
            raise DataError(
                f"{path}, lines {first_number} and {number}: the same question in the splits {first.split!r} and "
                f"{problem.split!r}; a question belongs to one split: remove one of the rows, or let hashes decide "
                f"with split={BY_HASH!r}"
            )
        problems.repeated += first is not problem
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: no problems in it; expected one JSON object per line")
    if limit is not None:
        del problems[limit:]
    return problems


def normalise_question(question: str) -> str:
    """The text that is hashed: NFC, case folded, runs of blanks as one space."""
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def split_of(question: str, fractions: tuple[float, float, float] = FRACTIONS) -> str:
    """The split a question belongs to: a SHA-256 of `normalise_question`, as a number in [0, 1)."""
    digest = hashlib.sha256(normalise_question(question).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < fractions[0]:
        return "train"
    return "validation" if position < fractions[0] + fractions[1] else "test"


def _embedded(named: str, split: str | None, limit: int | None, source: str, licence: str) -> ProblemSet:
    from rollouts.tinymath import SPLITS as EMBEDDED_SPLITS
    from rollouts.tinymath import generate_problems

    if named and split and named != split:
        raise ConfigError(f"problems {EMBEDDED}:{named} with split {split!r}; name one of the two")
    wanted = named or split
    if wanted and wanted not in EMBEDDED_SPLITS:
        raise ConfigError(f"unknown split {wanted!r} of {EMBEDDED}.{did_you_mean(wanted, EMBEDDED_SPLITS)}")
    return ProblemSet(
        Problem(tiny.id, name, tiny.question, tiny.answer, source, "MIT" if licence == "unknown" else licence)
        for name in ([wanted] if wanted else EMBEDDED_SPLITS)
        for tiny in generate_problems(name, limit)
    )


def _check(split: str | None, fractions: tuple[float, float, float]) -> None:
    if split is not None and split not in (*SPLITS, BY_HASH):
        raise ConfigError(f"unknown split {split!r}.{did_you_mean(split, (*SPLITS, BY_HASH))}")
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
        raise ConfigError(f"fractions of train, validation and test are {fractions}; expected three that sum to 1")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Every row that is not blank, with its line number (from 1)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a JSONL file, or {EMBEDDED!r} for the embedded set") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: byte {error.object[error.start]:#04x} at position {error.start} is not "
                f"UTF-8; expected UTF-8: convert the file, for instance with iconv -f LATIN1 -t UTF-8"
            ) from None
        if text:
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error}): {_shown(text)}; expected one JSON object per line "
                    f"(of a JSON array: jq -c '.[]' {path.name})"
                ) from None


@dataclass(frozen=True, slots=True)
class _Row:
    """A row and where it stands, for messages."""

    path: Path
    number: int
    values: Any

    def refuse(self, found: str, expected: str) -> NoReturn:
        raise DataError(f"{self.path}, line {self.number}: {found}; expected {expected}")

    def text(self, key: str) -> str:
        """The value of a key as text without blanks around it; empty where missing, null or not a number."""
        value = self.values.get(key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            self.refuse(f"{key!r} is {_shown(value)}", "text or a number")
        text = str(value).strip()
        try:
            text.encode()
        except UnicodeEncodeError:
            self.refuse(f"{key!r} is {_shown(value)}", "valid Unicode: half a surrogate pair cannot be stored")
        return text


def _problem(row: _Row, split: str | None, source: str, licence: str, fractions: tuple[float, float, float]) -> Problem:
    if not isinstance(row.values, Mapping):
        row.refuse(f"{_shown(row.values)} is not an object", "a JSON object with a question and an answer")
    question = row.text("question") or row.text("problem")
    if not question:
        row.refuse(f"no question; the keys are {_shown(list(row.values))}", "text in 'question' or 'problem'")
    answer = _final(row.text("answer")) or _final_of_solution(row.text("solution"))
    if not answer:
        row.refuse(
            f"no final answer; 'answer' is {_shown(row.values.get('answer'))} and 'solution' is "
            f"{_shown(row.values.get('solution'))}",
            "it in 'answer', or in 'solution': alone, in \\boxed{...} or after ####",
        )
    own_id = next(filter(None, map(row.text, _ID_KEYS)), None)
    if own_id is None:
        own_id = "q-" + hashlib.sha256(normalise_question(question).encode()).hexdigest()[:16]
    if split is None:
        named = row.text("split").lower()
        split = _SPLIT_ALIASES.get(named, named) or BY_HASH
        if split not in (*SPLITS, BY_HASH):
            row.refuse(
                f"split {named!r}",
                f"one of {', '.join(SPLITS)}, or a split given for the whole file ({BY_HASH!r} or one)",
            )
    if licence == "unknown":
        licence = row.text("licence") or row.text("license") or licence
    return Problem(
        id=f"{source}/{own_id}",
        split=split_of(question, fractions) if split == BY_HASH else split,
        question=question,
        answer=answer,
        source=source,
        licence=licence,
    )


def _final(text: str) -> str:
    text = _CALCULATOR.sub("", text)
    boxed = last_boxed(text.replace("\\fbox", "\\boxed"))
    return (text.rpartition("####")[2] if boxed is None else boxed).strip()


def _final_of_solution(text: str) -> str:
    """The answer of a worked solution, or of a plain one; empty where it has no end that could be one."""
    final = _final(text)
    unbraced = _UNBRACED_BOX.findall(text)
    if final == text and unbraced:
        return str(unbraced[-1])
    return final if "\n" not in final and len(final) <= _LONGEST_PLAIN_SOLUTION else ""


def _refuse_same_id(
    path: Path, earlier: tuple[int, Problem], later: tuple[int, Problem], *, same_question: bool
) -> NoReturn:
    what = "answer" if same_question else "question"
    shown = [_shown(getattr(problem, what)) for _, problem in (earlier, later)]
    raise DataError(
        f"{path}, lines {earlier[0]} and {later[0]}: the same id {later[1].id!r} with the {what}s {shown[0]} and "
        f"{shown[1]}; expected one problem per id: correct or remove one of the rows"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
