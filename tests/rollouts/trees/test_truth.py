"""Is the cache true? Episodes walked in trees against live episodes, and the same test on a store that lies."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from live import run_live
from reference_walk import walk
from scipy import stats

from rollouts.models.stepwise import Generation, next_steps, rests
from rollouts.scoring.base import score_paths
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL, Prefix
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees

pytestmark = pytest.mark.vllm

REPLICAS = 8
THRESHOLD, RATE = 0.5, 0.3
LEVEL = 0.01  # of all comparisons of one store together


def grow(path, embedded, writers, replicas=REPLICAS, problems=None):
    problems = problems or embedded.problems
    store = Store.create(path, embedded.family.process(None))
    store.add_problems(problems)
    Grower(writers, StepBuffer(store.steps)).run(load_trees(store, problems, replicas, None))
    score_store(store, embedded.scorer)
    grade_store(store, make_grader("exact"))
    return store


@pytest.fixture(scope="module")
def store(embedded, tmp_path_factory):
    return grow(tmp_path_factory.mktemp("true") / "store", embedded, embedded.writers)


@pytest.fixture(scope="module")
def live(embedded):
    """Outcomes of live episodes, (measure, problem, repetition), by router."""
    generator = np.random.default_rng(5)
    problems = [problem for problem in embedded.problems for _ in range(REPLICAS)]
    grader = make_grader("exact")
    outcomes = {
        "threshold": run_live(problems, embedded.writers, lambda s: s < THRESHOLD, grader, embedded.scorer),
        "random": run_live(problems, embedded.writers, lambda s: generator.random(len(s)) < RATE, grader),
    }
    return {name: np.stack(values).reshape(3, -1, REPLICAS) for name, values in outcomes.items()}


def walked(store):
    """The same from a store's trees."""
    trees = compile_store(store, cache=False)
    generator = np.random.default_rng(6)
    order = np.lexsort((trees.replica, trees.problem))
    policies = {
        "threshold": lambda rows: (trees.score[rows, 0] < THRESHOLD).astype(int),
        "random": lambda rows: (generator.random(len(rows)) < RATE).astype(int),
    }
    outcomes = {}
    for name, policy in policies.items():
        got = walk(trees, trees.select()[order], policy)
        outcomes[name] = np.stack([got.correct, got.large_tokens, got.steps]).astype(float).reshape(3, -1, REPLICAS)
    return outcomes


def p_values(trees, live):
    """Paired by problem: p-value of each router's mean difference in accuracy, large tokens and steps."""
    found = {}
    for router in live:
        for measure, name in enumerate(("accuracy", "large tokens", "steps")):
            difference = trees[router][measure].mean(axis=1) - live[router][measure].mean(axis=1)
            p_value = float(stats.ttest_1samp(difference, 0.0).pvalue) if difference.any() else 1.0
            found[router, name] = p_value, float(difference.mean())
    return found


def test_trees_give_the_distribution_of_live_episodes(store, live):
    found = p_values(walked(store), live)
    print(found)
    assert len(found) == 6
    assert min(p for p, _ in found.values()) > LEVEL / len(found), found


class SplicingWriter:
    """What must not be done: serves step t of an independent solution whatever the prefix says."""

    role = LARGE
    whole_paths = False

    def __init__(self, writer, problems):
        self.solutions = {}
        prefixes = [Prefix(p.id, p.question, replica, (), 0) for p in problems for replica in range(REPLICAS)]
        for prefix, generation in zip(prefixes, rests(writer, prefixes), strict=True):
            self.solutions[prefix.problem, prefix.replica] = generation.steps

    def submit(self, prefix, *, whole):
        steps = self.solutions[prefix.problem, prefix.replica]
        future: Future = Future()
        future.set_result(Generation((steps[min(len(prefix.steps), len(steps) - 1)],), 0))
        return future


def test_the_same_comparison_convicts_spliced_trees(embedded, live, tmp_path):
    problems = embedded.problems[:80]  # a lie is so plain that fewer suffice
    spliced = SplicingWriter(embedded.writers[LARGE], problems)
    lying = grow(tmp_path / "store", embedded, {SMALL: embedded.writers[SMALL], LARGE: spliced}, problems=problems)
    found = p_values(walked(lying), {router: measured[:, :80] for router, measured in live.items()})
    print(found)
    assert min(p for p, _ in found.values()) < LEVEL / len(found), found


def test_text_of_a_path_is_its_steps_and_scores_equal_scoring_the_whole_path(embedded, store):
    trees = load_trees(store, embedded.problems[:4], 2, None)
    scores = {}
    for table in store.scores(embedded.scorer.name).read({problem.id for problem in embedded.problems[:4]}):
        for row in table.to_pylist():
            scores[row["problem"], row["replica"], row["prefix"], row["role"]] = row["score"]
    checked = 0
    for tree in trees:
        for _, leaf, role in tree.places():
            if (child := tree.child(leaf, role)) is not None and child.proposals:
                continue  # on the path of another
            texts = [*leaf.steps, leaf.proposals[role].text]
            (whole,) = score_paths(embedded.scorer, [(tree.problem.question, texts)])
            node = tree.root
            for text, score in zip(texts, whole, strict=True):
                writers = [name for name in ROLES if name in node.proposals and node.proposals[name].text == text]
                assert writers
                for name in writers:
                    stored = scores[tree.problem.id, tree.replica, node.key, name]
                    assert stored == pytest.approx(score, abs=embedded.scorer.tolerance)
                node = next((c for name in writers if (c := tree.child(node, name))), None)
                checked += 1
            assert all(text.endswith("\n\n") and text.count("\n\n") == 1 for text in texts[:-1])
    assert checked > 100


def always_small(store, problems, replica):
    found = {}
    for tree in load_trees(store, problems, REPLICAS, None):
        if tree.replica == replica:
            node, texts = tree.root, []
            while node is not None:
                texts.append(node.proposals[SMALL].text)
                node = tree.child(node, SMALL)
            found[tree.problem.id] = "".join(texts)
    return found


def test_replicas_agree_no_more_often_than_two_batches_of_one_engine(embedded, store):
    first, second = (always_small(store, embedded.problems, replica) for replica in (0, 1))
    agree = np.array([first[p.id] == second[p.id] for p in embedded.problems])
    prefixes = [Prefix(p.id, p.question, 0, (), 0) for p in embedded.problems]
    texts = [
        ["".join(step.text for step in generation.steps) for generation in rests(embedded.writers[SMALL], prefixes)]
        for _ in range(2)
    ]
    batches = np.array([one == other for one, other in zip(*texts, strict=True)])
    test = stats.fisher_exact([[agree.sum(), (~agree).sum()], [batches.sum(), (~batches).sum()]], alternative="greater")
    assert test.pvalue > LEVEL, (agree.mean(), batches.mean())
    assert agree.mean() < 0.9  # and they are not the same draws


def test_an_engine_that_starts_again_draws_anew(embedded):
    prefixes = [Prefix(p.id, p.question, 0, (), 0) for p in embedded.problems]
    one = [step.text for step in next_steps(embedded.writers[SMALL], prefixes)]
    with embedded.family.open(SMALL, embedded.starts) as writer:
        other = [step.text for step in next_steps(writer, prefixes)]
        again = [step.text for step in next_steps(writer, prefixes)]
    assert len({start["seed"] for start in embedded.starts.manifest["engines"]}) == embedded.starts.next_start()
    equal = [np.mean([a == b for a, b in zip(x, y, strict=True)]) for x, y in ((one, other), (other, again))]
    assert abs(equal[0] - equal[1]) < 0.2, equal
