"""Grading of final answers: is the answer at the end of a solution the right one?

``exact`` asks math-verify whether the answer equals the gold one as a mathematical object; ``numeric``
compares the last number with the gold one (GSM8K-like sets). math-verify runs in processes of its own,
under limits on processor time and memory: a hostile answer costs seconds, never the run. This module knows
nothing of problems, steps or stores, and importing it imports neither math-verify nor SymPy. Those processes
need a POSIX system.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from multiprocessing.connection import wait
from typing import Any, Protocol

from rollouts.errors import BackendError, ConfigError, did_you_mean
from rollouts.plugins import build_plugin, is_plugin
from rollouts.tasks.answers import final_answer, last_number, plain_numbers, quick_equal
from rollouts.tasks.forms import as_symbols, choice

GRADERS = ("exact", "numeric")
# All of these go into `describe`. RULES is to be raised when this file or answers.py starts to grade differently.
RULES = 2
MAX_ANSWER = 2000  # characters of a gold or final answer; a longer one is an error
MAX_TAIL = 4000  # last characters of a solution in which an unmarked answer is looked for
TOLERANCE = Fraction(1, 10**6)  # absolute difference of equal numbers where one is written as a decimal
RELATIVE_TOLERANCE = Fraction(1, 10**5)  # and the relative one, for gold numbers below 0.1
# math-verify's own defaults. Its digits after the point become more with each zero that a gold number starts with.
VERIFY = {"float_rounding": 6, "numeric_precision": 15, "strict": True}
MEMORY_BYTES = 4 << 30
_PLACEHOLDER = re.compile(r"\\f?box(?:ed)?\s*\{[\s.]*\}")
_MEMO_ENTRIES = 200_000


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one solution.

    Attributes:
        correct: Whether the final answer is right; never with an error.
        extracted: The final answer that was found; empty where the solution has none.
        error: Why there is no verdict (time limit, unreadable gold answer ...); None without a fault.
    """

    correct: bool
    extracted: str
    error: str | None = None


def _grade_numeric(answer: str, text: str, extracted: str) -> Grade:
    try:
        gold, found = last_number(answer), last_number(text)
    except ValueError as error:
        return Grade(False, extracted, f"number too long: {error}")
    if gold is None:
        return Grade(False, extracted, f"gold answer holds no number: {answer[:80]!r}")
    if found is None:
        return Grade(False, extracted)
    rounded = "." in gold[1] + found[1]
    allowed = min(TOLERANCE, RELATIVE_TOLERANCE * abs(gold[0])) if rounded else 0
    return Grade(abs(gold[0] - found[0]) <= allowed, found[1])


class Grader(Protocol):
    """Grades solutions; the interface that stores are graded through.

    For a grader of one's own, ``my_module:MyGrader`` stands where ``exact`` and ``numeric`` could stand. The class, or
    function, is called without arguments. A ``close`` method, if there is one, may be called when the grader is no
    longer needed.

    Attributes:
        name: Name of the grade table: letters, digits, ``-``, ``_`` and ``.``.
    """

    name: str

    def grade_many(self, pairs: Sequence[tuple[str, str]], workers: int = 1) -> list[Grade]:
        r"""Grade pairs of (gold answer, whole solution).

        Args:
            pairs: P pairs; the answer as the problem file has it, the solution as all its steps in one text. Every
                solution that ended comes, with or without an answer in it.
            workers: Most processes at work at once, for graders that need some.

        Returns:
            P grades, in order. The same pair always gets the same grade. A fault on one pair makes that grade wrong,
            with its `error` set, and the others go on; an exception ends the run.
        """

    def describe(self) -> Mapping[str, Any]:
        """Return all that decides the grades, such as rules, versions and limits, as JSON takes it.

        It goes into the table's manifest. A grader that says something else is refused for that table.
        """


_Key = tuple[str, str, bool]  # gold answer, final answer or tail of the solution, which of the two it is


class AnswerGrader:
    """Grades final answers; the same inputs give the same grades.

    Limits count processor time, so that a busy machine changes no verdict. Processes start when math-verify
    is first needed and end with `close` or with the grader. It can be used from any thread, in daemonic and
    in forked processes, and pickles as its settings.

    Args:
        name: ``exact`` or ``numeric``.
        time_limit: Processor seconds for one answer, at least (the system counts whole ones).

    Raises:
        ConfigError: The name is unknown or the limit is not positive.
    """

    def __init__(self, name: str, time_limit: float = 5.0) -> None:
        """See the class."""
        if name not in GRADERS:
            raise ConfigError(f"unknown grader {name!r}.{did_you_mean(name, [*GRADERS, 'module:object'])}")
        if not 0 < time_limit < math.inf:
            raise ConfigError(f"time limit of the grader is {time_limit}; expected seconds above 0")
        self.name, self.time_limit = name, time_limit
        self._memo: dict[_Key, Grade] = {}
        self._fresh()

    def _fresh(self) -> None:
        self._pid, self._lock, self._workers = os.getpid(), threading.Lock(), list[_Worker]()
        weakref.finalize(self, _stop_all, self._workers, self._pid)

    def __reduce__(self) -> tuple[type[AnswerGrader], tuple[str, float]]:
        """Pickle the settings, not the processes."""
        return AnswerGrader, (self.name, self.time_limit)

    def close(self) -> None:
        """End the processes; the grader can be used again."""
        _stop_all(self._workers, self._pid)

    def describe(self) -> dict[str, Any]:
        """What decides its verdicts (rules, library versions, limits), for a manifest."""
        facts = {"name": self.name, "rules": RULES, "answer_chars": MAX_ANSWER, "tail_chars": MAX_TAIL}
        if self.name == "numeric":
            return {**facts, "library": None, "tolerance": float(TOLERANCE), "relative": float(RELATIVE_TOLERANCE)}
        packages = {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}
        limits = {"time_limit_cpu_s": self.time_limit, "memory_limit_bytes": MEMORY_BYTES}
        return {**facts, "library": packages, "settings": VERIFY, **limits}

    def grade(self, answer: str, solution: str) -> Grade:
        """Grade one whole solution against the gold answer; see `grade_many`."""
        return self.grade_many([(answer, solution)])[0]

    def grade_many(self, pairs: Sequence[tuple[str, str]], workers: int = 1) -> list[Grade]:
        """Grade pairs of (gold answer, whole solution), in order.

        A fault on one pair makes that answer wrong, with its `error` set. Equal pairs are graded once.

        Args:
            pairs: Of a solution only the final answer counts: its last closed box, else its last line
                ``#### x``, else what the grader finds last in its text.
            workers: Most processes at work at once.

        Raises:
            ConfigError: `workers` is below 1.
            BackendError: A process cannot be started.
        """
        if workers < 1:
            raise ConfigError(f"workers of the grader is {workers}; expected 1 or more")
        if os.getpid() != self._pid:  # after a fork the processes, and perhaps a held lock, are the parent's
            self._fresh()
        with self._lock:
            asked: dict[_Key, list[int]] = {}
            grades: dict[int, Grade] = {}
            for index, (answer, solution) in enumerate(pairs):
                final = final_answer(solution)
                key = (answer, solution.strip()[-MAX_TAIL:] if final is None else final.strip(), final is not None)
                grade = self._memo.get(key) or self._quick(*key)
                if grade is None:
                    asked.setdefault(key, []).append(index)
                else:
                    grades[index] = grade
            if len(self._memo) + len(asked) > _MEMO_ENTRIES:
                self._memo.clear()
            try:
                for key, grade in self._ask(list(asked), workers):
                    self._memo[key] = grade
                    grades.update(dict.fromkeys(asked[key], grade))
            except BaseException:  # Ctrl-C among others: leave no process with a question under way
                self.close()
                raise
            return [grades[index] for index in range(len(pairs))]

    def _quick(self, answer: str, text: str, marked: bool) -> Grade | None:
        """The grade, where no process is needed for it."""
        extracted = text if marked else ""
        if len(extracted) > MAX_ANSWER:
            return Grade(False, extracted[:MAX_ANSWER], f"final answer of more than {MAX_ANSWER} characters")
        if not 0 < len(answer.strip()) <= MAX_ANSWER:
            return Grade(False, extracted, f"gold answer is empty or has more than {MAX_ANSWER} characters")
        if not text:
            return Grade(False, "")
        if self.name == "numeric":
            return _grade_numeric(answer, text, extracted)
        equal = quick_equal(answer, text) if marked else None
        return None if equal is None else Grade(equal, extracted)

    def _ask(self, keys: list[_Key], workers: int) -> Iterator[tuple[_Key, Grade]]:
        waiting, pool = keys[::-1], self._workers
        while waiting or any(worker.key for worker in pool):
            for lost in [worker for worker in pool if not worker.busy and worker.process.poll() is not None]:
                lost.stop()
                pool.remove(lost)
            wanted = len(waiting) + sum(worker.key is not None for worker in pool)
            pool += [_Worker(self.time_limit) for _ in range(min(workers, wanted) - len(pool))]
            for worker in pool[:workers]:
                if waiting and not worker.busy:
                    worker.send(waiting.pop(), 30 + 12 * self.time_limit)
            busy = {worker.out.fileno(): worker for worker in pool if worker.busy}
            pause = max(0.0, min(worker.deadline for worker in busy.values()) - time.monotonic())
            ready = wait(list(busy), pause)
            for descriptor, worker in busy.items():
                if descriptor in ready or time.monotonic() >= worker.deadline:
                    key, grade = worker.key, worker.receive()
                    if key is not None and grade is not None:
                        yield key, grade


def make_grader(name: str) -> Grader:
    """The grader ``exact``, ``numeric`` or ``module:object`` with its default limits.

    Raises:
        ConfigError: The name is unknown, or what it stands for is no `Grader`.
    """
    if not is_plugin(name):
        return AnswerGrader(name)
    grader: Grader = build_plugin(name, "grader", Grader)
    if not (isinstance(grader.name, str) and re.fullmatch(r"[\w-][\w.-]*", grader.name)):
        raise ConfigError(f"grader {name!r}: `name` is {grader.name!r}; expected letters, digits, '-', '_' and '.'.")
    return grader


def unreadable_answers(grader: Grader, answers: Sequence[str]) -> list[str]:
    """The gold answers (each once) that a grader cannot read: all that is graded against them is an error."""
    unique = list(dict.fromkeys(answers))
    grades = grader.grade_many([(answer, "\\boxed{0}") for answer in unique])
    return [answer for answer, grade in zip(unique, grades, strict=True) if grade.error is not None]


class _Worker:
    """A process that asks math-verify, one answer at a time.

    A plain subprocess rather than one of multiprocessing's: those start neither in daemonic processes
    (vectorised environments) nor in scripts without a main guard. It dies at its limit of processor time; the
    deadline, in wall time, is for one that is stuck without using any.
    """

    def __init__(self, time_limit: float) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from rollouts.tasks.grading import _serve; _serve({time_limit})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            encoding="ascii",
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # for the type checker
        self._into, self.out = self.process.stdin, self.process.stdout
        self.key: _Key | None = None
        self.busy, self.deadline = True, time.monotonic() + 300  # until it says that it is ready

    def send(self, key: _Key, seconds: float) -> None:
        self.key, self.busy, self.deadline = key, True, time.monotonic() + seconds
        with suppress(OSError):  # it just died: so says its answer
            print(json.dumps(key), file=self._into, flush=True)

    def receive(self) -> Grade | None:
        """The grade of what was sent last; None when it only says that it is ready."""
        if time.monotonic() >= self.deadline:
            self.process.kill()
        line, key = self.out.readline(), self.key
        self.key, self.busy = None, False
        if line.endswith("\n"):
            return Grade(*json.loads(line)) if key else None
        self.stop()
        status = self.process.returncode
        if key:
            error = "time limit" if status == -signal.SIGXCPU else f"grading process ended, status {status}"
            return Grade(False, key[1] if key[2] else "", error)
        raise BackendError(
            f"the grading process ended with status {status} before it was ready; to see why, run: "
            f"{sys.executable} -c 'import math_verify, rollouts.tasks.grading'"
        )

    def stop(self) -> None:
        with suppress(OSError), self.process:
            self.process.kill()


def _stop_all(workers: list[_Worker], pid: int) -> None:
    while workers and os.getpid() == pid:
        workers.pop().stop()


# What follows runs inside that process.


def _serve(seconds: float) -> None:
    import resource

    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import math_verify  # noqa: F401  # now, not in the time of the first answer

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        answer, text, marked = json.loads(line)
        # Not math-verify's own alarm: antlr swallows what its handler raises. This also ends orphans.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))
        try:
            verdict = _judge(answer, text, marked)
        except Exception as fault:  # without its message: to print an expression may take forever
            verdict = (False, text if marked else "", f"math-verify failed: {type(fault).__name__}")
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        print(json.dumps(verdict), file=answers, flush=True)


def _judge(answer: str, text: str, marked: bool) -> tuple[bool, str, str | None]:
    """Whether the answer is right, as what it was read, and the fault if there was one."""
    gold = _parse_marked(as_symbols(plain_numbers(answer), "")[0])
    if gold is None:
        return False, text if marked else "", f"gold answer cannot be parsed: {answer[:80]!r}"
    if marked:
        return _equal(answer, text), text, None
    found, written = _parse(plain_numbers(_PLACEHOLDER.sub("", text)))
    if found is None:
        return quick_equal(answer, written) is True, written, None
    return _verify(gold, found), written, None


def _equal(gold: str, final: str) -> bool:
    """Whether two marked answers are equal; of choices (``C``, ``(C) 12 cm``) one may lack the letter or the text."""
    options = [choice(text) for text in (gold, final)]
    if options[0] and options[1]:
        texts = [option[1] for option in options if option]
        return options[0][0] == options[1][0] and (not all(texts) or _equal(*texts))
    if _equal_expressions(gold, final):
        return True
    parts = final.split(", ")  # boxes joined to one answer: "15\frac{1}{2}, \frac{31}{2}" says one thing twice
    if 1 < len(parts) < 4 and "," not in gold and all(_equal(gold, part) for part in parts):
        return True
    texts = [option[1] if option else text for option, text in zip(options, (gold, final), strict=True)]
    return texts != [gold, final] and all(texts) and _equal(*texts)


def _equal_expressions(gold: str, final: str) -> bool:
    quick = quick_equal(gold, final)
    if quick is not None:
        return quick
    expected, found = map(_parse_marked, as_symbols(plain_numbers(gold), plain_numbers(final)))
    # What no grammar reads is right only if it is the gold text.
    return expected is not None and found is not None and _verify(expected, found)


def _verify(gold: Any, found: Any) -> bool:
    """Ask math-verify, with a precision that tells small numbers apart; fractions are compared exactly."""
    from math_verify import verify
    from sympy import Float, UnevaluatedExpr

    zeros = _zeros(gold)
    settings = {
        **VERIFY,
        "float_rounding": VERIFY["float_rounding"] + max(0, zeros - 1),
        "numeric_precision": VERIFY["numeric_precision"] + zeros,
    }
    if not gold.has(Float, UnevaluatedExpr) and not found.has(Float, UnevaluatedExpr):
        values = [expression.doit() for expression in (gold, found)]
        if all(getattr(value, "is_Rational", False) for value in values):
            return bool(values[0] == values[1])
    return bool(verify(gold, found, timeout_seconds=None, raise_on_error=True, **settings))


def _zeros(expression: Any) -> int:
    """How many zeros follow the point before the first other digit of the smallest number in an expression."""
    from sympy import floor, log, preorder_traversal

    most, parts = 0, preorder_traversal(expression)
    for part in parts:
        if getattr(part, "is_number", False):
            parts.skip()
            size = abs(part.evalf(5))
            if size.is_Float and 0 < size < 1:
                most = max(most, -1 - int(floor(log(size, 10))))
    return min(most, 1000)


@functools.lru_cache(maxsize=64)
def _parse_marked(answer: str) -> Any:
    # Removing units leaves "a +" of "a + b + c", which no grammar reads.
    boxed = f"\\boxed{{{answer}}}"
    expression = _parse(boxed)[0]
    return _parse(boxed, units=False)[0] if expression is None else expression


def _parse(text: str, units: bool = True) -> tuple[Any, str]:
    """The expression that math-verify finds (None: none) and how it is written (empty: nothing found)."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig()
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=units))
    found = parse(text, [latex, ExprExtractionConfig()], parsing_timeout=None, raise_on_error=True)
    expression = found[0] if found and not isinstance(found[0], str) else None
    return expression, next((item for item in found if isinstance(item, str)), "")
