"""AutoMix is charged token by token, and its meta-verifiers do what a perfect and a useless verifier must lead to."""

import numpy as np
import pytest
from made_whole import three_problems, verified

from agents.baselines.automix import SELF, AutoMix, Bins, pomdp, thresholds
from agents.evaluation.walk import run
from agents.routers import artefact
from agents.routers.base import Knob
from agents.routers.whole import Cascade, VerifiedCascade, VotingCascade
from rollouts.errors import ArtefactError, DataError, StoreError
from trim_env.tables import decision_tables

# Scores: p0 0.9 0.8, p1 0.9 0.2, p2 0.6; large solutions of 11, 16 and 9 tokens, small ones of 7, 5 and 4.
V = {"min": (0.8, 0.2, 0.6), "last": (0.8, 0.2, 0.6), "product": (0.72, 0.18, 0.6)}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return three_problems(tmp_path_factory.mktemp("automix") / "s")


@pytest.mark.parametrize("rule", V)
def test_three_problems_by_hand(trees, rule):
    tables = decision_tables(trees, "test")
    for level, again in ((0.1, (0, 0, 0)), (0.5, (0, 1, 0)), (0.61, (0, 1, 1)), (0.75, (rule == "product", 1, 1))):
        router = AutoMix(rule, Knob("threshold", level))
        found = run(router, tables)
        assert found.large_tokens.tolist() == np.multiply(again, (11, 16, 9)).tolist()
        assert found.cost.tolist() == found.large_tokens.tolist()
        assert found.small_tokens.tolist() == [7, 5, 4]
        assert found.discarded_tokens.tolist() == np.multiply(again, (7, 5, 4)).tolist()
        assert found.correct.tolist() == [1, again[1], 0]
        assert found.scorer_calls is not None and found.serial_calls is not None
        assert found.scorer_calls.tolist() == [1, 1, 1] and found.serial_calls.tolist() == np.add(again, 2).tolist()
        assert (
            isinstance(router, Cascade)
            and not isinstance(router, VotingCascade)
            and router.name == f"AutoMix-PRM ({rule})"
        )


def test_thresholds_are_laid_between_all_values(trees):
    tables = decision_tables(trees, "test")
    spent = sorted({float(run(router, tables).cost.sum()) for router in thresholds("last", tables)})
    assert spent == [0, 16, 25, 36]


def test_prices_are_those_of_training_problems(trees):
    found = pomdp("last", decision_tables(trees, "test"))
    best = max(found, key=lambda router: run(router, decision_tables(trees, "test")).returns(0.01).mean())
    outcomes = run(best, decision_tables(trees, "test"))
    assert outcomes.large_tokens.tolist() == [0, 16, 0]  # the one needy problem


def made(seed, count=4000):
    draw = np.random.default_rng(seed)
    small, large = (draw.random(count) < 0.5).astype(float), (draw.random(count) < 0.8).astype(float)
    return draw, small, large


def routed(bins, v, price, small, large):
    again = bins(v) > price
    return np.where(again, large, small).mean(), again.mean()


def test_a_perfect_verifier_solves_what_either_model_does():
    _, small, large = made(0)
    bins = Bins.fit(small, small, large)
    accuracy, share = routed(bins, small, 0.0, small, large)
    assert accuracy == np.maximum(small, large).mean() and share == pytest.approx(1 - small.mean())


def test_a_useless_verifier_is_the_line_of_mixing():
    draw, small, large = made(0)
    v, new = draw.random(len(small)), draw.random(len(small))
    bins = Bins.fit(v, small, large)
    for price in np.quantile(bins.gain, [0.2, 0.5, 0.8]):
        accuracy, share = routed(bins, new, price, small, large)
        assert 0.05 < share < 0.95
        assert accuracy == pytest.approx(small.mean() + share * (large.mean() - small.mean()), abs=0.02)


def test_hopeless_problems_are_given_up_by_the_pomdp_and_retried_by_a_threshold():
    draw = np.random.default_rng(0)
    v = draw.random(6000)
    hopeless, needy = v < 0.3, (v >= 0.3) & (v < 0.6)
    small = (~hopeless & ~needy).astype(float)
    large = (~hopeless).astype(float)
    bins = Bins.fit(v, small, large, 20)
    again = bins(v) > 0
    assert not again[v < 0.24].any() and again[hopeless < (v < 0.6)].all() and not again[v > 0.66].any()
    below = v < 0.6  # the threshold that reaches as much
    assert np.where(below, large, small).mean() == np.where(again, large, small).mean() == large.mean()
    assert below[hopeless].all() and below.mean() > 1.4 * again.mean()


def test_few_values_make_few_bins():
    bins = Bins.fit(np.array([0.5, 0.5, 0.5]), np.array([0.0, 1, 1]), np.array([1.0, 1, 1]))
    assert bins.edges.tolist() == [] and bins(np.array([0.1, 0.9])) == pytest.approx([1 / 3, 1 / 3])
    with pytest.raises(DataError):
        Bins.fit(np.zeros(0), np.zeros(0), np.zeros(0))
    with pytest.raises(DataError, match="unknown rule 'mim'"):
        AutoMix("mim", Knob("threshold", 0.5))


def test_cascades_are_not_stored(tmp_path):
    with pytest.raises(ArtefactError, match=r"AutoMix-PRM \(last\) decides once.*comparison only"):
        artefact.save(AutoMix("last", Knob("threshold", 0.5)), tmp_path / "policy", {})
    assert not (tmp_path / "policy").exists()


def test_self_verification_by_hand(trees):
    tables = decision_tables(verified(trees, np.array([6.0, 2.0, 0.0])), "test")  # v: 0.75, 0.25, 0
    for level, again in ((0.0, (0, 0, 0)), (0.25, (0, 0, 1)), (0.26, (0, 1, 1)), (1.0, (1, 1, 1))):
        router = AutoMix(SELF, Knob("threshold", level))
        found = run(router, tables)
        assert found.large_tokens.tolist() == np.multiply(again, (11, 16, 9)).tolist()
        assert found.small_tokens.tolist() == [7 + 80, 5 + 80, 4 + 80]  # what it decodes to verify is its own
        assert found.correct.tolist() == [1, again[1], 0]
        assert found.scorer_calls is not None and found.serial_calls is not None
        assert found.scorer_calls.tolist() == [8, 8, 8] and found.serial_calls.tolist() == np.add(again, 2).tolist()
    dollars = decision_tables(tables.trees, "test", cost="prices:large_out=1000000,small_out=10000,small_in=1000")
    paid = run(AutoMix(SELF, Knob("threshold", 0.0)), dollars).cost
    assert paid == pytest.approx(np.array([87, 85, 84]) * 0.01 + (800 + 20) * 0.001)
    assert isinstance(router, VerifiedCascade) and router.name == "AutoMix (self-verification)"
    spent = sorted({float(run(each, tables).cost.sum()) for each in thresholds(SELF, tables)})
    assert spent == [0, 9, 25, 36]


def test_meta_verifiers_read_the_table(trees):
    """Of problems that low v marks as hopeless a threshold retries all, and the POMDP none."""
    several = decision_tables(verified(trees, np.array([8.0, 3.0, 0.0])), "test")
    found = pomdp(SELF, several)
    assert {router.name for router in found} == {"AutoMix (self-verification, POMDP)"}
    best = max((run(router, several) for router in found), key=lambda each: each.returns(0.01).mean())
    assert best.large_tokens.tolist() == [0, 16, 0] and best.correct.tolist() == [1, 1, 0]
    simple = [run(router, several) for router in thresholds(SELF, several)]
    assert not any(each.large_tokens.tolist() == [0, 16, 0] for each in simple)


def test_a_perfect_self_verifier_solves_what_either_model_does(trees):
    tables = decision_tables(verified(trees, np.array([8.0, 0.0, 0.0])), "test")  # right, wrong, wrong
    found = run(AutoMix(SELF, Knob("threshold", 0.5)), tables)
    assert found.correct.tolist() == np.maximum(*tables.alone.correct.T).tolist()


def test_unverified_solutions_are_named_and_those_without_samples_are_not_believed(trees):
    lacking = verified(trees, np.array([np.nan, 2.0, 0.0]))
    for given, count in ((lacking, 1), (trees, 3)):
        with pytest.raises(StoreError, match=f"{count} of 3 solutions .* not verified.*--scorer verification"):
            thresholds(SELF, decision_tables(given, "test"))
    none = decision_tables(verified(trees, np.zeros(3), samples=0.0), "test")
    assert run(AutoMix(SELF, Knob("threshold", 0.5)), none).large_tokens.tolist() == [11, 16, 9]
