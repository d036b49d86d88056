"""Routers of whole problems are charged what they cause, token by token."""

import numpy as np
import pytest
from made_whole import Retries, Sends, three_problems

from agents.deploy.session import Session, decide_together
from agents.evaluation.outcomes import mix
from agents.evaluation.walk import references, run
from agents.routers.base import Constant, Threshold
from agents.routers.whole import Cascade, QueryRouter
from rollouts.errors import ConfigError
from trim_env.tables import decision_tables

DOLLARS = "prices:large_out=1000000,large_in=100000,small_out=10000,small_in=1000,scorer_in=100"


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return three_problems(tmp_path_factory.mktemp("whole") / "s")


@pytest.fixture(scope="module")
def tables(trees):
    return decision_tables(trees, "test")


def of(outcomes):
    assert outcomes.problem_ids == ("p0", "p1", "p2")
    names = ("correct", "cost", "large_tokens", "small_tokens", "discarded_tokens", "escalations", "steps")
    return {name: getattr(outcomes, name).tolist() for name in names}


def test_a_question_that_is_sent_costs_the_large_models_solution_and_no_proposals(tables):
    found = run(Sends((0.0, 1.0, 0.25)), tables)
    assert of(found) == {
        "correct": [1, 1, 0],
        "cost": [0, 16, 2.25],
        "large_tokens": [0, 16, 2.25],
        "small_tokens": [7, 0, 3],
        "discarded_tokens": [0, 0, 0],
        "escalations": [0, 3, 0.25],
        "steps": [2, 3, 1],
    }
    assert found.scorer_calls is not None and found.serial_calls is not None
    assert found.scorer_calls.tolist() == [0, 0, 0] and found.serial_calls.tolist() == [1, 1, 1]


def test_a_retry_pays_the_small_solution_the_scorer_and_the_whole_large_one(tables):
    found = run(Retries(0.5), tables)  # p1 alone is below
    assert of(found) == {
        "correct": [1, 1, 0],
        "cost": [0, 16, 0],
        "large_tokens": [0, 16, 0],
        "small_tokens": [7, 5, 4],
        "discarded_tokens": [0, 5, 0],
        "escalations": [0, 3, 0],
        "steps": [2, 3, 1],
    }
    assert found.scorer_calls is not None and found.serial_calls is not None
    assert found.scorer_calls.tolist() == [1, 1, 1] and found.serial_calls.tolist() == [2, 3, 2]


def test_one_request_reads_its_prompt_once(trees):
    tables = decision_tables(trees, "test", cost=DOLLARS)
    sent = [7 * 0.01 + 20 * 0.001, 16 + 20 * 0.1, 9 + 20 * 0.1]
    assert run(Sends((0.0, 1.0, 1.0)), tables).cost == pytest.approx(sent)
    drafted = [tokens * 0.01 + 20 * 0.001 + (20 + tokens) * 1e-4 for tokens in (7, 5, 4)]
    again = [0, 16 + 20 * 0.1, 0]
    assert run(Retries(0.5), tables).cost == pytest.approx(np.add(drafted, again))


def test_what_a_cascade_does_not_read_it_does_not_pay(trees):
    tables = decision_tables(trees, "test", cost=DOLLARS)
    free = Retries(0.5, schema="tokens")  # the last step's, all but scaled: below 0.5
    found = run(free, tables)
    assert found.cost == pytest.approx(
        [each + tokens * 0.01 + 20 * 0.001 for each, tokens in zip([11, 16, 9], [7, 5, 4], strict=True)]
        + np.full(3, 20 * 0.1)
    )
    assert found.scorer_calls is not None and not found.scorer_calls.any()


def test_constants_are_the_ends(tables):
    both = references(tables)
    small, large = run(Sends((0.0,)), tables), run(Sends((1.0,)), tables)
    for one, other in ((small, both.small), (large, both.large)):
        for name in ("correct", "cost", "large_tokens", "steps", "escalations"):
            assert (getattr(one, name) == getattr(other, name)).all()
    assert (small.small_tokens == both.small.small_tokens).all() and not large.small_tokens.any()
    half = mix(small, large, 0.5)
    assert of(run(Sends((0.5,)), tables)) == of(half)
    assert half.serial_calls is not None and half.serial_calls.tolist() == [1, 1, 1]


def test_calls_of_routers_of_steps(tables):
    both = references(tables)
    assert both.small.serial_calls is not None and both.large.serial_calls is not None
    assert both.small.scorer_calls is not None
    assert both.small.serial_calls.tolist() == [2, 2, 1] and not both.small.scorer_calls.any()
    assert both.large.serial_calls.tolist() == [4, 6, 2]
    thresholds = run(Threshold(0.0), tables)
    assert thresholds.scorer_calls is not None and thresholds.serial_calls is not None
    assert thresholds.scorer_calls.tolist() == [2, 2, 1] and thresholds.serial_calls.tolist() == [4, 4, 2]


def test_caps(trees):
    capped = decision_tables(trees, "test", max_escalations=0)
    assert run(Sends((1.0,)), capped).large_tokens.tolist() == [11, 16, 9]  # exempt, as always-large is
    hard = decision_tables(trees, "test", max_large_tokens=10)
    for router in (Sends((1.0,)), Retries(0.5)):
        with pytest.raises(ConfigError, match=f"{router.name}.*cannot keep a cap of 10"):
            run(router, hard)


def test_protocols_are_told_apart():
    assert isinstance(Sends((0.0,)), QueryRouter) and not isinstance(Sends((0.0,)), Cascade)
    assert isinstance(Retries(0.5), Cascade) and not isinstance(Retries(0.5), QueryRouter)
    assert not isinstance(Constant(0), QueryRouter | Cascade)


def test_sessions_refuse_cascades_by_name():
    router = Retries(0.5)
    with pytest.raises(ConfigError, match="retries decides once.*streamed"):
        Session(router, router.knob, 16, (None, None), None)


def begun(*chances, seed=0):
    router = Sends(chances)
    return Session(router, router.knob, 16, (None, None), np.random.default_rng(seed))


def test_a_session_of_a_query_level_router_is_one_decision():
    session = begun(1.0)
    for told in (
        {"score": 0.5, "tokens": 3},
        {"text": "x"},
        {"question": "Question p", "score": 0.5},
        {"question": 7},
        {},
    ):
        with pytest.raises(ConfigError, match=r"sends decides once for a whole problem.*decide\(question=...\)"):
            session.decide(**told)
    assert session.decide(question="Question p") == 1 and session.chance == 1 and session.ended
    with pytest.raises(ConfigError, match="it has; begin a new session"):
        session.decide(question="Question p")
    with pytest.raises(ConfigError, match="nothing to accept"):
        session.accept()
    assert begun(0.0).decide(question="Question p") == 0
    drawn = [begun(0.5, seed=seed).decide(question="Question p") for seed in range(200)]
    assert 0.35 < np.mean(drawn) < 0.65


def test_sessions_decide_together_on_questions():
    questions = [{"question": f"Question p{i}"} for i in range(3)]
    router = Sends((1.0, 0.0, 1.0))
    sessions = [Session(router, router.knob, 16, (None, None), None) for _ in questions]
    with pytest.raises(ConfigError, match="decides once"):
        decide_together(sessions, [*questions[:2], {"score": 0.5}])
    assert not any(session.ended for session in sessions)  # all of them, or none
    assert decide_together(sessions, questions) == [1, 0, 1] and all(session.ended for session in sessions)
