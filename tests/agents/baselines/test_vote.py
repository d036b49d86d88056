"""Votes keep the answer that most give, pay for all, and start again where too few agree."""

import numpy as np
import pytest
from made_whole import three_problems

from agents.baselines.vote import Vote
from agents.evaluation.walk import references, run
from agents.routers.whole import Attempts, VotingCascade
from trim_env.tables import decision_tables


def attempts(*answers):
    """Return attempts at problems, of each a list of answers."""
    flat = [(f"p{i}", answer) for i, own in enumerate(answers) for answer in own]
    texts = ["nothing" if answer is None else f"so \\boxed{{{answer}}}" for _, answer in flat]
    names = np.array([name for name, _ in flat])
    return Attempts(
        names, ("?",) * len(flat), np.zeros(len(flat), int), np.zeros((len(flat), 0), np.float32), texts.__getitem__
    )


def test_the_first_of_those_that_most_agree_with_is_kept():
    seen = attempts([1, 2, 2, 3], [4, 5, 5, 4], [None, None, 6, 7])
    assert Vote(1.0).keeps(seen).tolist() == [1] * 4 + [4] * 4 + [8] * 4
    assert Vote(0.5).retries(seen).tolist() == [0] * 8 + [1] * 4
    assert Vote(0.25).retries(seen).tolist() == [0] * 12
    assert Vote(1.0).retries(seen).tolist() == [1] * 12
    assert isinstance(Vote(0.5), VotingCascade)


def test_problems_may_come_in_any_order():
    seen = attempts([1, 2, 2], [4, 5, 5])
    order = np.array([3, 0, 4, 1, 5, 2])
    mixed = Attempts(
        seen.problems[order], seen.questions, seen.replicas, seen.features, lambda place: seen.last(int(order[place]))
    )
    assert Vote(1.0).keeps(mixed).tolist() == [2, 3, 2, 3, 2, 3]


def test_where_all_agree_it_never_retries_and_pays_all_samples(tmp_path):
    tables = decision_tables(three_problems(tmp_path / "s", replicas=2), "test")
    found, small = run(Vote(1.0), tables), references(tables).small
    assert not found.large_tokens.any() and not found.discarded_tokens.any()
    assert found.correct.tolist() == small.correct.tolist() == [1, 0, 0]
    assert found.small_tokens.tolist() == [14, 10, 8]
    assert found.scorer_calls is not None and not found.scorer_calls.any()
    assert found.serial_calls is not None and found.serial_calls.tolist() == [1, 1, 1]


def test_a_retry_throws_all_samples_away(tmp_path):
    trees = three_problems(tmp_path / "s", replicas=2)
    found = run(Vote(1.5), decision_tables(trees, "test"))
    assert found.large_tokens.tolist() == [11, 16, 9] and found.correct.tolist() == [1, 1, 0]
    assert found.discarded_tokens.tolist() == found.small_tokens.tolist() == [14, 10, 8]
    priced = run(Vote(1.5), decision_tables(trees, "test", cost="prices:large_out=1000000,small_out=10000,scorer_in=7"))
    assert priced.cost == pytest.approx([11 + 0.14, 16 + 0.1, 9 + 0.08])
