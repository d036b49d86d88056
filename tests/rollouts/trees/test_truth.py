"""Is the cache true? Episodes walked in trees against live episodes, and the same test on a store that lies.

The size is the least at which a store of spliced trees is found with a probability of 0.998 (`test_the_size_is_enough`
computes it), while a true store is suspected in less than one of a thousand runs. With ``-m release`` the tests run at
a size that finds deviations of half as much.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
from live import fill, next_steps, run_live
from reference_walk import walk
from scipy import stats

from rollouts.models.stepwise import Generation
from rollouts.scoring.base import score_paths
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL, Prefix
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees

pytestmark = pytest.mark.vllm

THRESHOLD, RATE = 0.5, 0.4
WALKS = 16  # of a random router through each tree: they cost nothing
LEVEL = 1e-3  # of all comparisons of one store together
COMPARISONS = 6
EFFECT = 0.154  # of splicing on the accuracy of the random router


@dataclass(frozen=True)
class Size:
    """How many problems, trees of each, and live episodes of each, by router."""

    problems: int
    replicas: int
    episodes: dict[str, int]

    def power(self, effect: float = EFFECT) -> float:
        """Probability that the accuracy of the random router convicts spliced trees.

        Measured on 60 problems with 4 trees each, at rate 0.4: the effect, and its variance of 0.025 between problems,
        0.021 between trees of a problem and 0.085 between live episodes of a problem.
        """
        error = np.sqrt((0.025 + 0.021 / self.replicas + 0.085 / self.episodes["random"]) / self.problems)
        critical = stats.t.ppf(1 - LEVEL / COMPARISONS / 2, self.problems - 1)
        return float(stats.nct.sf(critical, self.problems - 1, effect / error))


LEAST = Size(120, 2, {"random": 4, "threshold": 2})
FULL = Size(200, 8, {"random": 8, "threshold": 8})


def test_the_size_is_enough():
    assert LEAST.power() > 0.998 > Size(100, LEAST.replicas, LEAST.episodes).power()
    assert FULL.power(effect=EFFECT / 2) > 0.95


@pytest.fixture(
    scope="module",
    params=[pytest.param(LEAST, id="least"), pytest.param(FULL, id="full", marks=pytest.mark.release)],
)
def size(request):
    return request.param


@pytest.fixture(scope="module")
def problems(embedded, size):
    return embedded.problems[: size.problems]


@pytest.fixture(scope="module")
def store(embedded, size, problems, tmp_path_factory):
    path = tmp_path_factory.mktemp("true") / "store"
    return fill(path, embedded.family, problems, embedded.writers, embedded.scorer, size.replicas, None)


@pytest.fixture(scope="module")
def live(embedded, size, problems):
    """Mean outcomes of live episodes, (measure, problem), by router."""
    generator = np.random.default_rng(5)
    grader = make_grader("exact")
    routers = {
        "threshold": (lambda scores: scores < THRESHOLD, embedded.scorer),
        "random": (lambda scores: generator.random(len(scores)) < RATE, None),
    }
    outcomes = {}
    for name, (decide, scorer) in routers.items():
        count = size.episodes[name]
        repeated = [problem for problem in problems for _ in range(count)]
        values = run_live(repeated, embedded.writers, decide, grader, scorer)
        outcomes[name] = np.stack(values).reshape(3, -1, count).mean(axis=2)
    return outcomes


def walked(store, replicas):
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
        got = walk(trees, np.repeat(trees.select()[order], WALKS), policy)
        values = np.stack([got.correct, got.large_tokens, got.steps]).astype(float)
        outcomes[name] = values.reshape(3, -1, replicas * WALKS).mean(axis=2)
    return outcomes


def p_values(trees, live):
    """Paired by problem: p-value of each router's mean difference in accuracy, large tokens and steps."""
    found = {}
    for router in live:
        for measure, name in enumerate(("accuracy", "large tokens", "steps")):
            difference = trees[router][measure] - live[router][measure]
            p_value = float(stats.ttest_1samp(difference, 0.0).pvalue) if difference.any() else 1.0
            found[router, name] = p_value, float(difference.mean())
    return found


def test_trees_give_the_distribution_of_live_episodes(store, size, live):
    found = p_values(walked(store, size.replicas), live)
    print(found)
    assert len(found) == COMPARISONS
    assert min(p for p, _ in found.values()) > LEVEL / len(found), found


def rests(writer, prefixes):
    """Return the rest of each prefix, asked for as one batch."""
    futures = [writer.submit(prefix, whole=True) for prefix in prefixes]
    return [future.result() for future in futures]


class SplicingWriter:
    """What must not be done: serves step t of an independent solution whatever the prefix says."""

    role = LARGE
    whole_paths = False

    def __init__(self, writer, problems, replicas):
        self.solutions = {}
        prefixes = [Prefix(p.id, p.question, replica, (), 0) for p in problems for replica in range(replicas)]
        for prefix, generation in zip(prefixes, rests(writer, prefixes), strict=True):
            self.solutions[prefix.problem, prefix.replica] = generation.steps

    def submit(self, prefix, *, whole):
        steps = self.solutions[prefix.problem, prefix.replica]
        future: Future = Future()
        future.set_result(Generation((steps[min(len(prefix.steps), len(steps) - 1)],), 0))
        return future


def test_the_same_comparison_convicts_spliced_trees(embedded, size, problems, live, tmp_path):
    spliced = SplicingWriter(embedded.writers[LARGE], problems, size.replicas)
    writers = {SMALL: embedded.writers[SMALL], LARGE: spliced}
    store = fill(tmp_path / "store", embedded.family, problems, writers, embedded.scorer, size.replicas, None)
    found = p_values(walked(store, size.replicas), live)
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
    for tree in load_trees(store, problems, 2, None):
        if tree.replica == replica:
            node, texts = tree.root, []
            while node is not None:
                texts.append(node.proposals[SMALL].text)
                node = tree.child(node, SMALL)
            found[tree.problem.id] = "".join(texts)
    return found


def test_replicas_agree_no_more_often_than_two_batches_of_one_engine(embedded, problems, store):
    first, second = (always_small(store, problems, replica) for replica in (0, 1))
    agree = np.array([first[p.id] == second[p.id] for p in problems])
    prefixes = [Prefix(p.id, p.question, 0, (), 0) for p in problems]
    texts = [
        ["".join(step.text for step in generation.steps) for generation in rests(embedded.writers[SMALL], prefixes)]
        for _ in range(2)
    ]
    batches = np.array([one == other for one, other in zip(*texts, strict=True)])
    test = stats.fisher_exact([[agree.sum(), (~agree).sum()], [batches.sum(), (~batches).sum()]], alternative="greater")
    assert test.pvalue > LEVEL, (agree.mean(), batches.mean())
    assert agree.mean() < 0.9  # and they are not the same draws


def test_an_engine_that_starts_again_draws_anew(embedded):
    """The first steps after two starts agree no more often than those of one start."""
    prefixes = [Prefix(p.id, p.question, 0, (), 0) for p in embedded.problems]
    draws = []
    for _ in range(2):
        with ExitStack() as stack:
            writer = embedded.open(stack, SMALL)
            draws += [[step.text for step in next_steps(writer, prefixes)] for _ in range(2)]
    assert len({start["seed"] for start in embedded.starts.manifest["engines"]}) == embedded.starts.next_start()
    first, again, second, _ = draws
    equal = [np.mean([a == b for a, b in zip(first, other, strict=True)]) for other in (second, again)]
    assert abs(equal[0] - equal[1]) < 0.2, equal
