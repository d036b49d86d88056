r"""Problems: from the embedded set, or from files in the dialects that people have.

One object per line of JSON, or one row of CSV or Parquet (`rollouts.tasks.files`). The question is in ``question`` or
``problem``. The answer is in the first of ``final_answer``, ``ground_truth``, ``answer``, ``target`` and ``solution``
that states one: alone, or of a worked text its last ``\boxed{...}``, else what follows ``####``. The id is in ``id``,
``unique_id`` or ``idx``. Keys are read without regard to case, blanks and hyphens (``Final Answer``); other keys are
passed over.

Splits: a row's own ``split`` is respected; every other row is placed by a hash of its question's text alone
(Unicode-normalised, without regard to case and blanks). So a problem never moves when others are added, and
one question is never in two splits, whatever files it comes from and whatever ids it has there.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

from rollouts.errors import ConfigError, DataError, did_you_mean
from rollouts.tasks.answers import boxed_answer
from rollouts.tasks.files import Row, bare_name, read_rows, shown

EMBEDDED = "tinymath"
SPLITS = ("train", "validation", "test", "ood", "test2")
#: Shares of train, validation and test among problems that are split by hash.
FRACTIONS = (0.7, 0.15, 0.15)
#: `split` that has every row placed by its hash, whatever split it names itself.
BY_HASH = "hash"

_SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train"}
_ID_KEYS = ("id", "unique_id", "idx")
_ANSWER_KEYS = ("final_answer", "ground_truth", "answer", "target", "solution")
_PLAIN_KEYS = ("answer", "solution")
_LONGEST_PLAIN_SOLUTION = 200
_CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K: "9 * 2 = $<<9*2=18>>18"
_UNBRACED_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]+?)[.$]*(?:\s|$)")  # MATH: "$x^2 = \boxed 9$."


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        id: Unique across sources: ``<source>/<id in the file>``, or ``<source>/q-<hash of the question>``.
        split: ``train``, ``validation``, ``test``, ``ood`` or ``test2`` (drawn after all choices were made).
        question: The text, as it was read.
        answer: The final answer only, as it was read (thousands separators, units and LaTeX included).
        source: Where it comes from: a file's name without suffix.
        licence: As its row states it in ``licence`` or ``license``, else ``unknown``.
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
) -> ProblemSet:
    """Read problems.

    Args:
        spec: ``tinymath`` or ``tinymath:test`` for the embedded set or one split of it, else a file
            (`rollouts.tasks.files`).
        split: Of a file: the split that all its problems belong to, or ``hash``. Of the embedded set: the one
            split that is wanted.
        limit: Most problems, the first ones (of ``tinymath`` without a split: of each split).

    Raises:
        DataError: The file or a row of it cannot be used; names file, line, what was found and what to do.
        ConfigError: A setting is impossible.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit on problems is {limit}; expected 1 or more")
    if isinstance(spec, str) and spec.partition(":")[0] == EMBEDDED:
        return _embedded(spec.partition(":")[2], split, limit)
    if split is not None and split not in (*SPLITS, BY_HASH):
        raise ConfigError(f"unknown split {split!r}.{did_you_mean(split, (*SPLITS, BY_HASH))}")
    path = Path(spec)
    problems = ProblemSet()
    by_id: dict[str, tuple[int, str, Problem]] = {}
    by_question: dict[str, tuple[int, Problem]] = {}
    for row in read_rows(path):
        problem = _problem(row, split)
        text = normalise_question(problem.question)
        if problem.id in by_id:
            earlier_number, earlier_text, earlier = by_id[problem.id]
            if (earlier_text, earlier.answer) != (text, problem.answer):
                _refuse_same_id(row, (earlier_number, earlier), problem, same_question=text == earlier_text)
            problems.skipped += 1
            continue
        by_id[problem.id] = (row.number, text, problem)
        first_number, first = by_question.setdefault(text, (row.number, problem))
        if first.split != problem.split:
            raise DataError(
                f"{path}, {row.unit}s {first_number} and {row.number}: the same question in the splits "
                f"{first.split!r} and {problem.split!r}; a question belongs to one split: remove one of the rows, or "
                f"let hashes decide with split={BY_HASH!r}"
            )
        problems.repeated += first is not problem
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: no problems in it; expected one JSON object per line")
    if limit is not None:
        del problems[limit:]
    return problems


def combined(problems: Iterable[Problem], known: Iterable[Problem] = ()) -> list[Problem]:
    """Return the problems of several files, identical ones once.

    Args:
        problems: The problems.
        known: Others, in whose splits they may be, too.

    Raises:
        DataError: Two have the same id and differ, or one question is in two splits.
    """
    by_id: dict[str, Problem] = {}
    by_question = {normalise_question(item.question): item for item in known}
    for item in problems:
        if (other := by_id.setdefault(item.id, item)) != item:
            raise DataError(
                f"the id {item.id!r} stands for two problems, {shown(other.question)} and {shown(item.question)}: ids "
                "begin with the name of the file; rename one of two files of one name"
            )
        first = by_question.setdefault(normalise_question(item.question), item)
        if first.split != item.split:
            raise DataError(
                f"{first.id!r} of {first.split!r} and {item.id!r} of {item.split!r} are the same question; a question "
                "belongs to one split: remove one of the rows"
            )
    return list(by_id.values())


def normalise_question(question: str) -> str:
    """The text that is hashed: NFC, case folded, runs of blanks as one space."""
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def split_of(question: str) -> str:
    """The split a question belongs to: a SHA-256 of `normalise_question`, as a number in [0, 1)."""
    digest = hashlib.sha256(normalise_question(question).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < FRACTIONS[0]:
        return "train"
    return "validation" if position < FRACTIONS[0] + FRACTIONS[1] else "test"


def _embedded(named: str, split: str | None, limit: int | None) -> ProblemSet:
    from rollouts.tinymath import FRESH, generate_problems
    from rollouts.tinymath import SPLITS as EMBEDDED_SPLITS

    if named and split and named != split:
        raise ConfigError(f"problems {EMBEDDED}:{named} with split {split!r}; name one of the two")
    wanted = named or split
    if wanted and wanted not in (known := (*EMBEDDED_SPLITS, *FRESH)):
        raise ConfigError(f"unknown split {wanted!r} of {EMBEDDED}.{did_you_mean(wanted, known)}")
    return ProblemSet(
        Problem(tiny.id, name, tiny.question, tiny.answer, EMBEDDED, "MIT")
        for name in ([wanted] if wanted else EMBEDDED_SPLITS)
        for tiny in generate_problems(name, limit)
    )


def _by_name(row: Row) -> dict[str, tuple[str, object]]:
    """Each key and its value, under the key without regard to case, blanks and hyphens; ``id`` goes before ``ID``."""
    if not isinstance(row.values, Mapping):
        row.refuse(f"{shown(row.values)} is not an object", "a JSON object with a question and an answer")
    values: dict[str, tuple[str, object]] = {}
    for key in sorted(row.values, key=str.islower, reverse=True):
        if row.values[key] is not None:
            values.setdefault("_".join(key.casefold().replace("-", " ").split()), (key, row.values[key]))
    return values


def _text(row: Row, key: str, value: object) -> str:
    """A value as text without blanks around it; empty where null or not a number."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if not isinstance(value, (str, int, float, Decimal)) or isinstance(value, bool):
        row.refuse(f"{key!r} is {shown(value)}", "text or a number")
    text = str(value)
    row.refuse_eaten(key, text)
    try:
        text.encode()
    except UnicodeEncodeError:
        row.refuse(f"{key!r} is {shown(value)}", "valid Unicode: half a surrogate pair cannot be stored")
    return text.strip()


def _problem(row: Row, split: str | None) -> Problem:
    values = _by_name(row)

    def text(name: str) -> str:
        return _text(row, *values.get(name, (name, None)))

    question = text("question") or text("problem")
    if not question:
        row.refuse(f"no question; the keys are {shown(list(row.values))}", "text in 'question' or 'problem'")
    # Of keys that have other meanings too, only texts and numbers count.
    keys = [
        key
        for key in _ANSWER_KEYS
        if key in _PLAIN_KEYS or not isinstance(values.get(key, (key, None))[1], (list, dict))
    ]
    answer = next(filter(None, (_final_of_solution(text(key)) for key in keys)), "") or _final(text("answer"))
    if not answer:
        answered = [shown(values.get(key, (key, None))[1]) for key in _PLAIN_KEYS]
        row.refuse(
            f"no final answer; 'answer' is {answered[0]} and 'solution' is {answered[1]}",
            "it in 'answer', 'final_answer', 'ground_truth' or 'target', or in 'solution': alone, in \\boxed{...} or "
            "after ####",
        )
    own_id = next(filter(None, map(text, _ID_KEYS)), None)
    if own_id is None:
        own_id = "q-" + hashlib.sha256(normalise_question(question).encode()).hexdigest()[:16]
    if split is None:
        named = text("split").lower()
        split = _SPLIT_ALIASES.get(named, named) or BY_HASH
        if split not in (*SPLITS, BY_HASH):
            row.refuse(
                f"split {named!r}",
                f"one of {', '.join(SPLITS)}, or a split given for the whole file ({BY_HASH!r} or one)",
            )
    source = bare_name(row.path)
    return Problem(
        id=f"{source}/{own_id}",
        split=split_of(question) if split == BY_HASH else split,
        question=question,
        answer=answer,
        source=source,
        licence=text("licence") or text("license") or "unknown",
    )


def _final(text: str) -> str:
    text = _CALCULATOR.sub("", text)
    boxed = boxed_answer(text)
    return (text.rpartition("####")[2] if boxed is None else boxed).strip()


def _final_of_solution(text: str) -> str:
    """The answer of a worked solution, or of a plain one; empty where it has no end that could be one."""
    final = _final(text)
    unbraced = _UNBRACED_BOX.findall(text)
    if final == text and unbraced:
        return str(unbraced[-1])
    return final if "\n" not in final and len(final) <= _LONGEST_PLAIN_SOLUTION else ""


def _refuse_same_id(row: Row, earlier: tuple[int, Problem], later: Problem, *, same_question: bool) -> NoReturn:
    what = "answer" if same_question else "question"
    values = [shown(getattr(problem, what)) for problem in (earlier[1], later)]
    raise DataError(
        f"{row.path}, {row.unit}s {earlier[0]} and {row.number}: the same id {later.id!r} with the {what}s {values[0]} "
        f"and {values[1]}; expected one problem per id: correct or remove one of the rows"
    )
