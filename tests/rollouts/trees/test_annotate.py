"""`score` and `grade`: done exactly when nothing is left, no row twice, and parts of one's own that miscount."""

from __future__ import annotations

import dis
import json
import random
import sys
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from types import CodeType

import pytest
from handmade import ScriptedScorer, ScriptedWriter, problem
from made_stores import grown, rows_of
from test_safety import MoodyWriter, grow, truncate

from rollouts.__main__ import main
from rollouts.cli.generate import run_grading, run_scoring
from rollouts.errors import BackendError, ConfigError, StoreError
from rollouts.files.atomic import write_atomically
from rollouts.files.parquet import write_parquet
from rollouts.files.sealed import write_sealed
from rollouts.scoring.base import Failed
from rollouts.store.rows import Rows
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import ROLES
from rollouts.trees import annotate
from rollouts.trees.annotate import grade_store, left, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from rollouts.trees.verify import verify_store


class NamedScorer(ScriptedScorer):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def of(self, question, steps):
        return super().of(self.name, steps)


class Opened:
    """Stands for a family: counts how often its scorer had to be loaded."""

    def __init__(self, name: str) -> None:
        self.scorer_name, self.opened = name, 0

    @contextmanager
    def open_scorer(self, store):
        self.opened += 1
        yield NamedScorer(self.scorer_name)


def regrow(store: Store, seed: int, cap: int = 1) -> None:
    grow(store.path, cap, 1, who={role: MoodyWriter(role, seed) for role in ROLES}, flush_rows=20)


@pytest.mark.parametrize("seed", range(6))
def test_they_end_exactly_when_nothing_is_left_whatever_happened_to_the_store(tmp_path, seed):
    """Damage to any table, orphans, other draws, compaction, two scorers and graders, one process after the other."""
    generator = random.Random(seed)
    path = tmp_path / "s"
    regrow(grow(path, 1, 1, who={role: MoodyWriter(role, -1) for role in ROLES}, flush_rows=20), 0)
    for turn in range(6):
        for _ in range(generator.randrange(3)):
            table = generator.choice(Store(path).tables())
            if table.shards():
                truncate(generator.choice(table.shards()))
        Store(path).repair()
        if generator.random() < 0.7:  # else orphans stay
            regrow(Store(path), turn + 1)
        if generator.random() < 0.3:
            for table in Store(path).tables():
                table.compact()
        for name in ("one", "two"):
            family, store = Opened(name), Store(path)
            wanted = sum(1 for _ in left(store, Rows(store.scores(name))))
            before = store.scores(name).keys().num_rows
            run_scoring(store, family, None)
            assert family.opened == (wanted > 0)
            assert Store(path).scores(name).keys().num_rows == before + wanted
            run_scoring(Store(path), family, None)  # the next process has nothing to do
            assert family.opened == (wanted > 0) and Store(path).scores(name).keys().num_rows == before + wanted
        for name in ("exact", "numeric"):
            run_grading(Store(path), make_grader(name), None)
            before = Store(path).grades(name).keys().num_rows
            run_grading(Store(path), make_grader(name), None)
            assert Store(path).grades(name).keys().num_rows == before
        for line in verify_store(Store(path)).problems:
            assert "not closed" in line  # what nobody grew again; never "unscored", "ungraded" or "duplicate"
    regrow(Store(path), 99)
    for name in ("one", "two"):
        run_scoring(Store(path), Opened(name), None)
        for grader in ("exact", "numeric"):
            run_grading(Store(path), make_grader(grader), None)
            compile_store(Store(path), name, grader, cache=False)
    assert not verify_store(Store(path)).problems


# Where Python looks for signals: where a call returns, where a function begins and where a loop goes round.
_LOOKS = {"RESUME", "JUMP_BACKWARD", "CALL", "CALL_FUNCTION_EX", "FOR_ITER"}


class Interrupt:
    """A SIGINT at the n-th place of some functions where Python would see it."""

    def __init__(self, number: int, *functions) -> None:
        self.left = number
        codes = [function.__code__ for function in functions]
        for code in codes:
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]  # functions in functions
        self.codes = {code: self._places(code) for code in codes}

    @staticmethod
    def _places(code) -> set[int]:
        """Offsets of the instructions at or after which a signal is seen."""
        found, after = set(), False
        for instruction in dis.get_instructions(code):
            if after or instruction.opname in ("RESUME", "JUMP_BACKWARD"):
                found.add(instruction.offset)
            after = instruction.opname in _LOOKS
        return found

    def __enter__(self):
        sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _called(self, frame, event, argument):
        if frame.f_code not in self.codes:
            return None
        frame.f_trace_opcodes = True
        return self._traced

    def _traced(self, frame, event, argument):
        if event == "opcode" and frame.f_lasti in self.codes[frame.f_code]:
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._traced


def test_an_interrupt_anywhere_between_append_and_clear_loses_and_doubles_no_row(tmp_path):
    """At each place of `put`, `flush` and what they call, once: afterwards all is there, in one process or the next."""
    table = grown(tmp_path / "s", replicas=1).scores("mine")
    watched = (Rows.flush, Rows.flush_if_due, Rows._encoded)
    watched += (type(table).encode, type(table).write, write_parquet, write_atomically)
    number, seen = 0, True
    while seen:
        number += 1
        store = Store.create(tmp_path / f"{number}", {"labels": False, "max_escalations": None})
        rows = Rows(store.scores("mine"), rows=3)
        keys = [("p", 0, prefix, "small", prefix) for prefix in range(8)]
        with Interrupt(number, *watched) as interrupt:
            try:
                for key in keys:
                    rows.put(key, score=0.5)
                    rows.count({"requests": 1})
                    rows.flush_if_due()
            except KeyboardInterrupt:
                pass
        seen = interrupt.left <= 0
        rows.flush()  # as whoever was interrupted does at the end
        rows.flush()
        put = keys.index(key) + 1
        found = [tuple(row.values())[:5] for part in store.scores("mine").read() for row in part.to_pylist()]
        assert sorted(found) == keys[:put], number
        assert store.scores("mine").counters() == {"requests": put}
    assert number > 60


@pytest.mark.parametrize("what", ["grow", "score", "grade"])
def test_an_interrupt_anywhere_in_a_run_leaves_what_the_same_command_completes(tmp_path, what, monkeypatch):
    problems = [problem("p0"), problem("p1")]
    whole = grown(tmp_path / "whole", 1, 1, problems=problems)
    score_store(whole, ScriptedScorer())
    grade_store(whole, make_grader("exact"))
    monkeypatch.setattr(annotate, "_ROWS", 4)

    def run(store: Store) -> None:
        if what == "grow":
            trees = load_trees(store, problems, 1, 1)
            Grower({role: ScriptedWriter(role) for role in ROLES}, StepBuffer(store.steps, rows=4)).run(trees)
        elif what == "score":
            score_store(store, ScriptedScorer())
        else:
            grade_store(store, make_grader("exact"))

    functions = {
        "grow": (Grower.run, Grower._take, Grower._record, Grower._ask, StepBuffer.add, Rows.put, Rows.flush),
        "score": (annotate.score_store, annotate.score_paths, annotate.ask_all, annotate.paths, Rows.put, Rows.flush),
        "grade": (annotate.grade_store, annotate.grade_places, Rows.put, Rows.flush),
    }[what]
    number, seen = 1, True
    while seen:
        store = Store.create(tmp_path / f"{number}", whole.manifest["process"])
        store.add_problems(problems)
        if what != "grow":
            grown(store.path, 1, 1, problems=problems)
        with Interrupt(number, *functions) as interrupt:
            try:
                run(store)
            except KeyboardInterrupt:
                pass
        seen = interrupt.left <= 0
        run(Store(store.path))
        one, other = (
            {"grow": each.steps, "score": each.scores("scripted"), "grade": each.grades("exact")}[what]
            for each in (Store(store.path), whole)
        )
        assert rows_of(one) == rows_of(other), number  # which has no key twice
        number += 17 if number > 30 else 1
    assert number > 60


class Miscounting(ScriptedScorer):
    def __init__(self, results) -> None:
        super().__init__()
        self.results = results

    def submit(self, question, steps):
        future: Future = Future()
        future.set_result(self.results(super().submit(question, steps).result()))
        return future


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda scores: scores[:-1], r"gave \d results, expected \d: one for each of the steps of a path of 'p0'"),
        (lambda scores: [*scores, 0.5], r"gave \d results, expected \d.*'p0'"),
        (lambda scores: [], r"gave 0 results.*'p0'"),
        (lambda scores: None, r"gave None, expected a list.*'p0'"),
        (lambda scores: 0.5, r"gave 0\.5, expected a list.*'p0'"),
    ],
)
def test_a_scorer_that_miscounts_is_named_with_the_problem(tmp_path, results, message):
    store = grown(tmp_path / "s", 0, 1)
    with pytest.raises(ConfigError, match=f"Scorer 'scripted' {message}"):
        score_store(store, Miscounting(results))


def test_results_may_be_any_sequence(tmp_path):
    store = grown(tmp_path / "s", 0, 1)
    assert score_store(store, Miscounting(tuple)).rows == store.steps.keys().num_rows


class MiscountingGrader:
    name = "mine"

    def describe(self):
        return {}

    def grade_many(self, pairs, workers=1):
        return make_grader("exact").grade_many(pairs)[1:]


def test_a_grader_that_miscounts_is_named_with_the_problems(tmp_path):
    store = grown(tmp_path / "s", 0, 1)
    with pytest.raises(
        ConfigError, match=r"Grader 'mine' gave \d+ results, expected \d+: one.*solutions of 'p0', 'p1'"
    ):
        grade_store(store, MiscountingGrader())
    assert store.grades("mine").keys().num_rows == 0


def test_a_store_with_grades_of_older_rules_says_what_to_do(tmp_path, capsys):
    store = grown(tmp_path / "s", 0, 1)
    grade_store(store, make_grader("exact"))
    file = store.path / "grades" / "exact" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["process"]["rules"] = 1
    write_sealed(file, manifest)
    assert main(["grade", str(store.path)]) == 2
    told = capsys.readouterr().err
    assert "rules is 1 there and 2 here" in told and f"Remove the folder {file.parent}" in told
    assert "the same command then makes it anew" in told
    for part in file.parent.iterdir():
        part.unlink()
    file.parent.rmdir()
    assert main(["grade", str(store.path)]) == 0
    with pytest.raises(StoreError, match=r"another `name` under \[scorer\], or remove the folder .*scores/scripted"):
        score_store(store, ScriptedScorer())
        store.attach("scores", "scripted", {"kind": "other"})


class Incremental(NamedScorer):
    """Notes what it is asked, and gives nothing for steps that are scored already."""

    incremental = True

    def __init__(self, failing: int = 0) -> None:
        super().__init__("own")
        self.asked: list[tuple[str, tuple[str, ...], int]] = []
        self.failing = failing

    def submit(self, question, steps, known):
        self.asked.append((question, tuple(steps), known))
        future = super().submit(question, steps)
        scores = [None] * known + future.result()[known:]
        if self.failing and len(self.asked) % self.failing == 0:
            scores[-1] = Failed("no answer")
        future = Future()
        future.set_result(scores)
        return future


@pytest.mark.parametrize("cap", [None, 2])
def test_each_step_is_asked_about_once_and_each_leaf_takes_one_request(tmp_path, cap):
    """No path is scored twice, and none takes a request of its own that the path to a leaf below it covers."""
    store, scorer = grown(tmp_path / "s", cap, replicas=1), Incremental()
    score_store(store, scorer)
    asked = [
        (question, steps[:end]) for question, steps, known in scorer.asked for end in range(known + 1, len(steps) + 1)
    ]
    assert len(asked) == len(set(asked))
    texts = {
        (tree.problem.question, (*node.steps, node.proposals[role].text))
        for tree in load_trees(store, store.problems(), None, None)
        for _, node, role in tree.places()
    }
    assert set(asked) == texts
    leaves = [each for each in texts if not any(other[0] == each[0] and other[1][:-1] == each[1] for other in texts)]
    assert len(scorer.asked) == len(leaves)
    whole = grown(tmp_path / "whole", cap, replicas=1)
    score_store(whole, NamedScorer("own"))
    assert rows_of(store.scores("own")) == rows_of(whole.scores("own"))


def test_rows_are_stored_as_answers_come_even_if_the_first_is_late(tmp_path, monkeypatch):
    """What a run has been told is on the disk within seconds, so that one that is killed has done something."""
    monkeypatch.setattr(annotate, "_ROWS", 1)
    store = grown(tmp_path / "s", 1, replicas=1)
    total = sum(1 for _ in left(store, Rows(store.scores("scripted"))))
    late: list[tuple[Future, list[float]]] = []
    stored: list[int] = []

    class Late(ScriptedScorer):
        def submit(self, question, steps):
            future = super().submit(question, steps)
            if not late:
                late.append((Future(), future.result()))
                return late[0][0]
            return future

    def on_progress(_: int) -> None:
        stored.append(Store(store.path).scores("scripted").keys().num_rows)
        if not late[0][0].done() and stored[-1] >= total // 2:
            late[0][0].set_result(late[0][1])

    give_up = threading.Timer(20, lambda: late[0][0].set_exception(BackendError("nothing was stored")))
    give_up.start()
    assert score_store(store, Late(), in_flight=4, on_progress=on_progress).rows == total
    give_up.cancel()
    whole = grown(tmp_path / "whole", 1, replicas=1)
    score_store(whole, ScriptedScorer())
    assert rows_of(store.scores("scripted")) == rows_of(whole.scores("scripted"))


def test_failed_scores_have_no_row_are_counted_and_asked_for_again(tmp_path):
    store = grown(tmp_path / "s", 1, replicas=1)
    total = sum(1 for _ in left(store, Rows(store.scores("own"))))
    report = score_store(store, Incremental(failing=3))
    missing = report.failed["no answer"]
    assert missing and report.rows + sum(1 for _ in left(store, Rows(store.scores("own")))) == total
    assert any("unscored" in line for line in verify_store(Store(store.path)).problems)
    again = Incremental()
    score_store(Store(store.path), again)
    assert len(again.asked) == missing and all(len(steps) == known + 1 for _, steps, known in again.asked)
    assert not any("unscored" in line for line in verify_store(Store(store.path)).problems)


def test_scores_given_up_on_are_not_asked_for_again_and_leave_their_trees_out(tmp_path):
    store = grown(tmp_path / "s", 1, replicas=1)
    grade_store(store, make_grader("exact"))
    trees = sum(1 for _ in load_trees(store, store.problems(), None, None))
    report = score_store(store, Incremental(failing=12), give_up=True)
    assert report.failed["no answer"] and not list(left(store, Rows(store.scores("own"))))
    assert not verify_store(Store(store.path)).problems
    compiled = compile_store(store.path, cache=False)
    assert 0 < compiled.meta["left_out_trees"] == trees - len(compiled.root) < trees


def test_where_a_score_is_needed_at_once_a_failed_one_is_an_error(tmp_path):
    store, scorer = grown(tmp_path / "s", 1, replicas=1), Incremental(failing=1)
    annotate.attach(store, scorer)
    rows = store.score_rows(scorer.name)
    with pytest.raises(BackendError, match="Scorer 'own': no score for a step of .*'p0'.*: no answer"):
        for tree in load_trees(store, store.problems()[:1], None, None, along=[rows]):
            annotate.score_paths(scorer, rows, annotate.paths(rows, tree.places()))
