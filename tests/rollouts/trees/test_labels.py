"""Values of steps: a tree walked by hand, random trees against brute force, and rows in others' layouts."""

from __future__ import annotations

import numpy as np
import pytest
from handmade import problem, process
from scripted_store import scripted_store

from rollouts.errors import StoreError
from rollouts.models.stepwise import Generation
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL, Step, StopReason
from rollouts.trees.annotate import grade_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import StepBuffer, load_trees
from rollouts.trees.labels import labelled_solutions, rows
from rollouts.trees.stats import small_outcomes
from rollouts.trees.tree import RolloutTree

RIGHT, WRONG = "so \\boxed{7}", "so \\boxed{8}"
BOTH_REPLICAS = [  # steps accepted, what the small and what the large model write there
    [
        ((), "a\n\n", "b\n\n"),
        (("a\n\n",), WRONG, "y \\boxed{7}"),
        (("b\n\n",), RIGHT, RIGHT),
    ],
    [
        ((), "a\n\n", "a\n\n"),
        (("a\n\n",), "x \\boxed{7}", "c\n\n"),
        (("a\n\n", "c\n\n"), None, RIGHT),
    ],
]


def as_step(text):
    if text is None:
        return Step("", 0, StopReason.FAILED)
    return Step(text, 3, StopReason.DELIMITER if text.endswith("\n\n") else StopReason.BOXED)


@pytest.fixture
def by_hand(tmp_path):
    store = Store.create(tmp_path / "store", process())
    store.add_problems([problem()])
    buffer = StepBuffer(store.steps)
    for replica, nodes in enumerate(BOTH_REPLICAS):
        tree = RolloutTree(problem(), replica, None)
        for accepted, *texts in nodes:
            node = next(node for node in tree.nodes.values() if node.steps == accepted)
            for role, text in zip(ROLES, texts, strict=True):
                step = as_step(text)
                tree.insert(node, role, step)
                buffer.add(tree, role, [(node, step)], Generation((step,), step.tokens))
    buffer.flush()
    return store


@pytest.fixture
def graded(by_hand):
    grade_store(by_hand, make_grader("exact"))
    return by_hand


def solutions_of(store):
    [(_, solutions)] = labelled_solutions(store, "exact", store.problems())
    return solutions


def facts(step):
    return (step.small.right, step.small.count, step.large.right, step.large.count, step.advantage, step.roles)


def test_a_tree_by_hand(graded):
    steps = {choice.step.text: choice.step for solution in solutions_of(graded) for choice in solution}
    assert {text: facts(step) for text, step in steps.items()} == {
        # one replica goes on to 8, one to 7; the large model goes on to 7 in both. Escalating leads to 7 in both.
        "a\n\n": (1, 2, 2, 2, 0.5, (SMALL, LARGE)),
        "b\n\n": (1, 1, 1, 1, None, (LARGE,)),
        # after "a" one large step ends at 7, and of the other nothing is known
        WRONG: (0, 1, 0, 1, 1.0, (SMALL,)),
        "y \\boxed{7}": (1, 1, 1, 1, None, (LARGE,)),
        "x \\boxed{7}": (1, 1, 1, 1, 0.0, (SMALL,)),
        # both models wrote it, in one replica: one rollout
        RIGHT: (1, 1, 1, 1, 0.0, (SMALL, LARGE)),
    }
    assert [step.label(0.0) for step in steps.values()] == [True, False, True, True, True, True]
    assert [step.label(0.5) for step in steps.values()] == [False, False, True, True, True, True]


def test_solutions_by_hand(graded):
    solutions = solutions_of(graded)
    assert [[choice.step.text for choice in solution] for solution in solutions] == [
        ["a\n\n", WRONG],
        ["a\n\n", "y \\boxed{7}"],
        ["a\n\n", "x \\boxed{7}"],  # "c" is left out: the small model failed after it
        ["b\n\n", RIGHT],
    ]
    assert [step.text for step in solutions[0][1].among] == [WRONG, "y \\boxed{7}", "x \\boxed{7}"]


def test_rows_for_trl(graded):
    [first, second, *_, last] = rows(problem(), solutions_of(graded), "trl", 0.0)
    assert first == {
        "prompt": "Question p0?",
        "completions": ["a", WRONG],
        "labels": [True, False],
        "values": [0.5, 0.0],
        "counts": [2, 1],
        "large_values": [1.0, 0.0],
        "large_counts": [2, 1],
        "advantages": [0.5, 1.0],
        "roles": ["small+large", "small"],
        "problem": "p0",
        "split": "train",
        "shared": 0,
    }
    assert (second["labels"], second["shared"], last["shared"]) == ([True, True], 1, 0)


def test_rows_for_prm800k(graded):
    [first, *_] = rows(problem(), solutions_of(graded), "prm800k", 0.0)
    assert first["question"] == {"problem": "Question p0?", "ground_truth_answer": "7"}
    assert first["label"]["finish_reason"] == "found_error"
    path = [step["completions"][step["chosen_completion"]] for step in first["label"]["steps"]]
    assert [(step["text"], step["rating"], step["value"]) for step in path] == [("a", 1, 0.5), (WRONG, -1, 0.0)]
    ratings = [[each["rating"] for each in step["completions"]] for step in first["label"]["steps"]]
    assert ratings == [[1, 1], [-1, 1, 1]]
    assert {step["human_completion"] for step in first["label"]["steps"]} == {None}


def brute_force(trees, accepted, text, after):
    """(right, count) over replicas that have a step at a prefix, walking each on with one model."""
    found = []
    for tree in trees:
        node = next((node for node in tree.nodes.values() if node.steps == accepted), None)
        if node is None or text not in {step.text for step in node.proposals.values()}:
            continue
        steps, at = (*accepted, text), text
        while at.endswith("\n\n"):
            node = next(node for node in tree.nodes.values() if node.steps == steps)
            if after not in node.proposals:
                break
            at = node.proposals[after].text
            steps = (*steps, at)
        else:
            found.append("{7}" in at)
    return sum(found), len(found)


@pytest.mark.parametrize("most", [None, 1])
def test_values_against_brute_force(tmp_path, most):
    store = scripted_store(tmp_path / "store", problems=12, max_escalations=most, replicas=3)
    checked = missing = 0
    for item, solutions in labelled_solutions(store, "exact", store.problems()):
        trees = list(load_trees(store, [item], None, most))
        for solution in solutions:
            accepted = ()
            for step, among in solution:
                assert step in among
                for role, estimate in ((SMALL, step.small), (LARGE, step.large)):
                    assert (estimate.right, estimate.count) == brute_force(trees, accepted, step.text, role)
                    missing += estimate.count == 0
                accepted = (*accepted, step.text)
                checked += 1
        texts = ["".join(choice.step.text for choice in solution) for solution in solutions]
        assert len(set(texts)) == len(texts)  # a solution of several replicas is told once
        if most is None:
            ends = {
                "".join((*node.steps, node.proposals[role].text))
                for tree in trees
                for _, node, role in tree.places()
                if node.proposals[role].terminal
            }
            assert set(texts) == ends
    assert checked > 100 and (missing > 0) == (most is not None)


@pytest.mark.parametrize("most", [None, 1])
def test_outcomes_in_compiled_trees_are_the_same(tmp_path, most):
    store = scripted_store(tmp_path / "store", problems=9, max_escalations=most, replicas=1)
    trees = compile_store(store)
    after = small_outcomes(trees)
    estimates = {}
    for item, solutions in labelled_solutions(store, "exact", store.problems()):
        for solution in solutions:
            texts = [choice.step.text for choice in solution]
            for length, choice in enumerate(solution, 1):
                estimates[item.question, *texts[:length]] = choice.step.small.value
    path_of = {int(trees.root[tree]): (trees.questions[problem],) for tree, problem in enumerate(trees.problem)}
    compared = 0
    for row in sorted(range(trees.nodes), key=lambda row: trees.depth[row]):
        for action in (0, 1):
            path = (*path_of[row], trees.proposal(row, action))
            path_of.setdefault(int(trees.child[row, action]), path)
            if path in estimates:
                assert after[row, action] == estimates[path]
                compared += 1
            elif path[:-1] in estimates:  # else a step before it is of unknown value
                assert np.isnan(after[row, action])
    assert compared > 50


def test_what_cannot_be_labelled_is_refused(by_hand):
    by_hand.attach("grades", "exact", make_grader("exact").describe())
    with pytest.raises(StoreError, match=r"'p0', replica 0 has a solution without a grade by 'exact'.*rollouts grade"):
        list(labelled_solutions(by_hand, "exact", by_hand.problems()))
    by_hand.add_problems([problem("p1")])
    buffer = StepBuffer(by_hand.steps)
    tree = RolloutTree(problem("p1"), 0, None)
    tree.insert(tree.root, SMALL, as_step(RIGHT))
    buffer.add(tree, SMALL, [(tree.root, as_step(RIGHT))], Generation((as_step(RIGHT),), 3))
    buffer.flush()
    grade_store(by_hand, make_grader("exact"))
    with pytest.raises(StoreError, match=r"'p1', replica 0 is not complete"):
        list(labelled_solutions(by_hand, "exact", by_hand.problems()))
