"""Every baseline is fitted by one call on a small store, and stands in the table of the field by its group."""

import json

import numpy as np
import pytest
from made_outcomes import outcomes, references
from made_reports import hostile_store, saved_run
from made_whole import verified
from scripted_store import scripted_store

import evaluate as command
from agents.baselines.examples import Examples
from agents.baselines.methods import (
    BASELINES,
    CASCADE,
    ENVELOPES,
    GROUPS,
    QUERY,
    SELF_VERIFIED,
    Baseline,
    Fitting,
    Setting,
    envelope,
    field_beside,
    fit,
    fit_all,
)
from agents.evaluation.curves import Method, mixture_at
from agents.evaluation.walk import alone
from agents.evaluation.walk import references as of_tables
from rollouts.errors import ConfigError, DataError, StoreError
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return hostile_store(tmp_path_factory.mktemp("field") / "s", problems=240)


@pytest.fixture(scope="module")
def fitting(store):
    trees = compile_store(store)
    for split in ("train", "validation", "test"):
        right = decision_tables(trees, split).alone.correct[:, 0]
        trees = verified(trees, np.random.default_rng(0).binomial(8, 0.3 + 0.4 * right), split=split)
    return Fitting(decision_tables(trees, "train"), decision_tables(trees, "validation"))


def test_all_are_fitted_and_measured(fitting):
    fitted, lacking = fit_all(BASELINES, fitting)
    assert not lacking
    names = [each.baseline.name for each in fitted]
    assert set(names) == {each.name for each in BASELINES} | set(ENVELOPES.values())
    order = [GROUPS.index(each.baseline.group) for each in fitted]
    assert order == sorted(order)
    test = decision_tables(fitting.train.trees, "test")
    choosing = of_tables(fitting.choosing)
    for each in fitted:
        method = each.measured(test, choosing)
        assert all(outcomes.serial_calls is not None for _, outcomes in method.points)
        if each.baseline.group == QUERY:
            told = [outcomes.scorer_calls for _, outcomes in method.points]
            assert not any(each is None or each.any() for each in told)


def test_no_question_but_those_of_training_is_in_the_vocabulary(fitting):
    from agents.routers.text import CharTfidf

    embed = fitting.embed
    assert isinstance(embed, CharTfidf)
    assert embed.vocabulary == CharTfidf.fit(Examples.of(fitting.train).questions).vocabulary


def test_validation_picks_the_members_of_an_envelope(fitting):
    """Of two methods the one that is better on validation is on the hull, whatever they come to on the split."""
    both = references()

    def made(name, there, here):
        settings = [Setting(1.0, lambda _: outcomes([here], [50.0]))]
        return Baseline(name, QUERY, lambda _: settings), settings, [outcomes([there], [50.0])]

    from agents.baselines.methods import Fitted

    good, lucky = Fitted(*made("good", 0.75, 0.7)), Fitted(*made("lucky", 0.61, 0.79))
    together = envelope("both", [good, lucky])
    method = together.measured(fitting.choosing, both)
    assert method.hull == (0,) and len(method.points) == 2
    assert "good, lucky" in together.baseline.note


def test_what_needs_more_replicas_says_so(tmp_path):
    trees = compile_store(scripted_store(tmp_path / "s", 60, replicas=1))
    single = Fitting(decision_tables(trees, "train"), decision_tables(trees, "validation"))
    needing = [each for each in BASELINES if each.name in ("Smoothie", "vote (SATER)")]
    fitted, lacking = fit_all(needing, single)
    assert not fitted and len(lacking) == 2
    assert all("not fitted" in each and "Generate more" in each for each in lacking)


def test_methods_without_a_setting_say_so(fitting):
    with pytest.raises(DataError, match="nothing.*no setting"):
        fit(Baseline("nothing", CASCADE, lambda _: []), fitting)
    fitted, lacking = fit_all([Baseline("nothing", CASCADE, lambda _: [])], fitting)
    assert not fitted and "nothing was not fitted" in lacking[0]

    def scoreless(_):
        raise StoreError("3 decisions lack the score of a proposal.")

    fitted, lacking = fit_all([Baseline("scoreless", CASCADE, scoreless)], fitting)
    assert not fitted and lacking == ["scoreless was not fitted. 3 decisions lack the score of a proposal."]


def test_what_cannot_be_measured_on_a_split_is_named_and_the_others_are_measured(fitting, monkeypatch):
    own = next(each for each in BASELINES if each.name.startswith("TRIM-Thr"))
    between = fit(own, fitting).settings[1]

    def budget(tables):
        if tables is not fitting.choosing:
            raise DataError("The cheapest arms cost 9 together; the budget is 1.")
        return between.run(tables)

    short = Baseline("short of money", own.group, lambda _: [Setting(1.0, budget)])
    monkeypatch.setattr("agents.baselines.methods.BASELINES", (own, short))
    monkeypatch.setattr("agents.baselines.methods.require", lambda *_: None)
    test = decision_tables(fitting.train.trees, "test")
    found, lacking = field_beside(fitting.train, fitting.choosing, test)
    assert [each.name for each in found] == [own.name]
    assert lacking == ["short of money was not measured. The cheapest arms cost 9 together; the budget is 1."]


def test_what_a_share_of_the_gap_takes_is_a_mixture_of_two_knots():
    both = references(small=0.4, large=0.8, cost=100)
    method = Method([(1.0, outcomes([0.6], [20])), (2.0, outcomes([0.7], [60]))], (0, 1))
    found = mixture_at(method, both, 62.5)  # accuracy 0.65
    assert found is not None and found.cost.mean() == pytest.approx(40) and found.correct.mean() == pytest.approx(0.65)
    dollars = [outcomes([0.4], [1]), outcomes([0.6], [2]), outcomes([0.7], [5]), outcomes([0.8], [9])]
    told = mixture_at(method, both, 62.5, dollars)
    assert told is not None and told.cost.mean() == pytest.approx(3.5)
    beyond = mixture_at(method, both, 100, dollars)
    assert beyond is not None and beyond.cost.mean() == pytest.approx(9)
    assert mixture_at(Method.whole([(1.0, outcomes([0.5], [20]))]), references(small=0.8, large=0.4), 80) is None


def test_evaluations_have_the_field_in_terminal_files_and_page(store, tmp_path, capsys):
    run = saved_run(tmp_path / "run", store)
    arguments = [str(run), "--rollouts", str(store.path), "--baselines", "--out", str(tmp_path / "e")]
    arguments += ["--report", str(tmp_path / "page")]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "The field" in said and "query-level" in said and "(RouteLLM)" in said
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    rows = {row["name"]: row for row in results["field"]}
    assert set(rows) >= {each.name for each in BASELINES} - {SELF_VERIFIED} | {"trim-agg"}
    assert f"{SELF_VERIFIED} was not fitted" in said and "--scorer verification" in " ".join(said.split())
    assert rows["trim-agg"]["group"] == "step-level"
    spent = rows["classifier (RouteLLM)"]["takes"]
    assert spent is None or (spent["scorer calls"] == 0 and spent["serial calls"] == 1 and spent["discarded"] == 0)
    drawn = {method["name"] for method in results["methods"]}
    assert set(ENVELOPES.values()) <= drawn and "classifier (RouteLLM)" not in drawn
    assert "### The field" in (tmp_path / "e" / "results.md").read_text()
    assert "classifier (RouteLLM)" in (tmp_path / "page" / "report.html").read_text()


def test_a_hard_cap_refuses_them(fitting):
    capped = decision_tables(fitting.train.trees, "test", max_large_tokens=5)
    with pytest.raises(ConfigError, match="--baselines.*cannot keep a cap of 5"):
        field_beside(fitting.train, fitting.choosing, capped)


def test_examples_are_averages_over_replicas(fitting):
    examples, both = Examples.of(fitting.choosing), of_tables(fitting.choosing)
    assert np.allclose(examples.correct, np.stack([both.small.correct, both.large.correct], axis=1))
    assert len(examples.questions) == len(both.small)


def test_arms_cost_what_the_cost_model_says(fitting, monkeypatch):
    """The small model is an arm like others: free only where its tokens are."""
    told = {}
    monkeypatch.setattr("agents.baselines.predict.fit", lambda _, arms, *others: told.update(arms))
    for cost in ("decode-only", "prices:small_in=1,small_out=2,large_in=10,large_out=20"):
        train = decision_tables(fitting.train.trees, "train", cost=cost)
        _ = Fitting(train, fitting.choosing, features=lambda questions: np.zeros((len(questions), 1))).of_models
        unit, both = of_tables(train).large.cost.mean(), alone(train)
        for arm, want in (("small", both.small), ("large", both.large)):
            assert (told[arm][0] == want.correct).all() and (told[arm][1] == want.cost / unit).all()
        assert told["small"][1].any() == (cost != "decode-only") and (told["small"][1] < told["large"][1]).all()
