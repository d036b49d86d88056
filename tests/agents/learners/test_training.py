"""Training: it learns a tiny oracle problem, repeats itself, survives kills, flags and remedies collapse."""

import json
import math
import os
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from forked import Command
from made_trees import telling
from scripted_store import scripted_store

from agents.evaluation.oracle import tree_oracle
from agents.evaluation.splits import Validation
from agents.evaluation.walk import references, run
from agents.learners.loop import Training, checked_at, remedy
from agents.learners.ppo import PPOAgg
from agents.learners.settings import PPOSettings, SeqSettings
from agents.routers import artefact
from agents.runs.config import TrainConfig
from agents.runs.listener import Listener
from agents.runs.run import automatic_lams, resume, train
from rollouts.errors import ConfigError, StoreError
from rollouts.files.sealed import write_sealed
from rollouts.trees.compile import compile_store
from trim_env.tables import decision_tables

ROOT = Path(__file__).parents[3]
TINY = {"num_envs": 64, "n_steps": 8, "batch_size": 256, "n_epochs": 2, "hidden": 16}
SMALL = PPOSettings(iterations=6, **TINY)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return scripted_store(tmp_path_factory.mktemp("training") / "s", 120).path


@pytest.fixture(scope="module")
def trees(store):
    return compile_store(store)


def test_ppo_solves_a_problem_whose_answer_is_known(trees):
    tables = decision_tables(telling(trees), "train")
    learner = PPOAgg(tables, 0.001, replace(SMALL, iterations=40, n_epochs=4), seed=0)
    before = run(learner.router(), tables).returns(0.001).mean()
    while not learner.done:
        record = learner.iterate()
    best = tree_oracle(tables, 0.001).returns(0.001).mean()
    after = run(learner.router(), tables).returns(0.001).mean()
    assert after == pytest.approx(best, abs=0.005)
    assert before < best - 0.05
    assert record["train/return"] > best - 0.1  # sampled, so a little below


def test_a_range_is_validated_within_itself():
    for low, high in ((3e-4, 1e-2), (0.0012345, 0.0012349), (0.9996e-3, 1.0004e-3)):
        found = checked_at((low, high))
        assert len(found) == 5 and all(low <= lam <= high for lam in found)
    assert checked_at((3e-4, 1e-2))[2] == 0.00173


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_entropy_and_advantages_are_as_asked_for(trees, anneal):
    settings = replace(SMALL, iterations=2, learning_rate=0.01, entropy=0.02, anneal=anneal, normalize=anneal)
    learner = PPOAgg(decision_tables(trees, "train"), 0.001, settings, seed=0)
    rates, entropies = [], []
    while not learner.done:
        rates.append(learner.iterate()["train/learning_rate"])
        entropies.append(learner.learner.ent_coef)
    assert rates == pytest.approx([0.01, 0.0055 if anneal else 0.01])
    assert entropies == pytest.approx([0.02, 0.01 if anneal else 0.02])
    assert learner.learner.normalize_advantage is anneal


def test_the_router_is_the_policy_that_was_trained(trees):
    import torch

    tables = decision_tables(trees, "train")
    learner = PPOAgg(tables, 0.01, SMALL, seed=0)
    learner.iterate()
    with torch.no_grad():
        actions, _ = learner.learner.predict(tables.features, deterministic=True)
    assert (learner.router().probability(tables.features) == actions).all()


def test_lam_rises_to_its_value():
    shares = [SMALL.lam_share(i) for i in range(6)]
    assert shares[0] == SMALL.lam_start and shares == sorted(shares) and shares[3:] == [1, 1, 1]
    assert replace(SMALL, lam_ramp=0.0).lam_share(0) == 1


@pytest.mark.parametrize("settings", [PPOSettings, SeqSettings])
def test_every_learner_checks_its_settings(settings):
    name = settings.section
    for wrong in ({"iterations": 0}, {"hidden": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan},
                  {"entropy": -1.0}, {"lam_start": 0.0}, {"lam_ramp": 1.0}):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--{name}.{next(iter(wrong)).replace('_', '-')} is "):
            settings(**wrong)
    counts = [each.name for each in fields(settings) if type(each.default) is int]  # no bool
    assert len(counts) >= 4
    for own in counts:
        with pytest.raises(ConfigError, match=f"--{name}.{own.replace('_', '-')} is 0, expected at least 1"):
            settings(**{own: 0})
    with pytest.raises(ConfigError, match=f"--{name}.hiden: no such setting. Did you mean 'hidden'"):
        settings(hiden=3)


def validation_of(trees):
    return Validation(lambda indices: decision_tables(trees, indices=indices), trees)


def test_same_seed_same_result_another_seed_another(trees):
    tables, validation = decision_tables(trees, "train"), validation_of(trees)
    results = [Training(tables, validation, 0.01, SMALL, seed, attempts=1).run() for seed in (3, 3, 4)]
    first, again, other = (result.router.weights for result in results)
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    assert results[0].records == results[1].records


@pytest.mark.parametrize("kind", ["ppo-agg", "range", "ppo-seq"])
def test_the_last_policy_is_returned_whatever_validation_says_of_earlier_ones(trees, kind):
    settings = SeqSettings(**TINY, width=8, heads=2) if kind == "ppo-seq" else PPOSettings(**TINY)
    settings = replace(settings, iterations=6)
    lam = (0.005, 0.05) if kind == "range" else 0.01
    schema = "seq" if kind == "ppo-seq" else "agg+"
    validation = Validation(lambda indices: decision_tables(trees, schema=schema, indices=indices), trees)
    training = Training(decision_tables(trees, "train", schema=schema), validation, lam, settings, 0, attempts=1)
    training._measure = lambda router: dict.fromkeys(("return", "accuracy", "share", "escalation_rate"), -len(seen))
    seen: list = []
    result = training.run(lambda record: seen.append(training.learner.router().weights))
    assert len(seen) == 6
    assert all((values == seen[-1][name]).all() for name, values in result.router.weights.items())
    assert any((values != seen[0][name]).any() for name, values in result.router.weights.items())


def test_the_attempt_that_does_best_on_the_choice_half_is_returned(trees):
    clear = telling(trees)
    tables, validation = decision_tables(clear, "train"), validation_of(clear)
    training = Training(tables, validation, 0.001, replace(SMALL, iterations=2, learning_rate=1e-12), 1, attempts=3)
    ends = {}
    result = training.run(lambda record: ends.update({record["attempt"]: training.learner.router()}))
    reached = [run(router, validation.choice).returns(0.001).mean() for router in ends.values()]
    assert len(reached) == result.attempts > 1 and reached[0] < max(reached) - 0.01
    assert run(result.router, validation.choice).returns(0.001).mean() == pytest.approx(max(reached))


def test_neighbouring_seeds_and_attempts_share_no_stream(trees):
    """Every attempt of every training asks its environments for other problems."""
    tables, validation = decision_tables(trees, "train"), validation_of(trees)
    drawn = []
    for seed in (0, 1, 2, 999, 1000, 1001, 2000):
        training = Training(tables, validation, 0.01, SMALL, seed)
        for attempt in range(3):
            training._begin(attempt)
            drawn.append(training.learner.seed)
            env = training.learner.learner.get_env()
            env.reset()
            drawn.extend(env.env._seeds.tolist())
    assert len(set(drawn)) == len(drawn) == 21 * (SMALL.num_envs + 1)


def test_a_collapsed_router_is_trained_again_and_never_passed_off(trees):
    """Learning rate 0 leaves a random network, which cannot keep up with telling scores."""
    clear = telling(trees)
    tables, validation = decision_tables(clear, "train"), validation_of(clear)
    stuck = replace(SMALL, iterations=2, learning_rate=1e-12)
    alone = Training(tables, validation, 0.001, stuck, 1, attempts=1).run()
    assert alone.attempts == 1 and not alone.health[0.001].fine
    helped = Training(tables, validation, 0.001, stuck, 1, attempts=2).run()
    assert helped.attempts == 2
    assert helped.health[0.001].fine  # the warm start alone imitates the best simple rule
    assert len(helped.records) == 2 + remedy(stuck, 1).iterations


def test_a_warm_start_leaves_out_nodes_where_the_small_model_was_never_asked(tmp_path):
    """Beyond K escalations a bounded store has always-large's path, without proposals of the small model."""
    trees = compile_store(scripted_store(tmp_path / "s", 60, max_escalations=1), cache=False)
    assert np.isnan(trees.score[:, 0]).any()
    validation = Validation(lambda indices: decision_tables(trees, indices=indices), trees)
    stuck = replace(SMALL, iterations=1, learning_rate=1e-12)
    result = Training(decision_tables(trees, "train"), validation, 0.001, stuck, 1, attempts=3).run()
    assert result.attempts > 1
    assert all(np.isfinite(values).all() for values in result.router.weights.values())


def test_automatic_lams_span_the_point_where_both_models_are_even(trees):
    correct = trees.correct.copy()
    correct[:, 1] = np.where(correct[:, 1] >= 0, 0, -1)
    with pytest.raises(ConfigError, match="nothing to route for"):
        automatic_lams(replace(trees, correct=correct), TrainConfig())
    lams = automatic_lams(trees, TrainConfig())
    both = references(decision_tables(trees, "train"))
    even = (both.large.correct.mean() - both.small.correct.mean()) / both.large.cost.mean()
    assert len(lams) == 6 and list(lams) == sorted(lams)
    assert (lams[0], lams[-1]) == (pytest.approx(even / 8, rel=0.05), pytest.approx(even * 4, rel=0.05))


@pytest.fixture
def configured(store, tmp_path):
    return TrainConfig(str(store), lam=(0.02,), out=tmp_path / "run", tracking="none", ppo=SMALL, attempts=2)


def test_a_run_folder_has_everything(configured):
    trained = train(replace(configured, lam=(0.005, 0.05)))
    folder = trained.folder
    described = json.loads((folder / "config.json").read_text())
    assert described["rollouts"]["hash"] == compile_store(configured.rollouts).meta["hash"]
    assert described["versions"]["torch"] and described["config"]["ppo"]["iterations"] == SMALL.iterations
    assert (folder / "curve.png").stat().st_size > 10_000 and (folder / "curve.svg").exists()
    report = (folder / "report.txt").read_text()
    for lam, router in trained.routers.items():
        place = folder / f"lam-{lam:g}"
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert {"train/return", "validation/return", "train/approx_kl", "validation/share"} <= lines[0].keys()
        assert (place / "training.png").stat().st_size > 10_000
        stored = artefact.load(place / "policy")
        assert all((stored.router.weights[name] == router.weights[name]).all() for name in router.weights)
        assert stored.about["rollouts"]["hash"] == described["rollouts"]["hash"]
        assert trained.health[lam].sentence in report


def test_threshold_agent_stores_the_best_threshold(configured):
    trained = train(replace(configured, agent="threshold"))
    router = artefact.load(trained.folder / "lam-0.02" / "policy").router
    trees = compile_store(configured.rollouts)
    assert router == validation_of(trees).candidates.best(0.02).threshold


def test_a_finished_run_resumes_to_itself(configured):
    first = train(configured)
    again = resume(configured.out)
    assert again.health == first.health


def test_resuming_keeps_what_is_finished_and_trains_the_rest_from_its_beginning(configured):
    class Stop(Listener):
        def iteration(self, lam, training, record):
            if lam == 0.05 and record["step"] == 3:
                raise KeyboardInterrupt

    class Watch(Listener):
        begun = ()

        def begin(self, lam, training):
            self.begun += (lam, len(training.records))

    with pytest.raises(KeyboardInterrupt):
        train(replace(configured, lam=(0.005, 0.05)), Stop())
    kept, lines = configured.out / "lam-0.005" / "metrics.jsonl", configured.out / "lam-0.05" / "metrics.jsonl"
    written, part, watch = kept.stat().st_mtime_ns, lines.read_text().splitlines(), Watch()
    resumed = resume(configured.out, watch)
    assert watch.begun == (0.05, 0) and kept.stat().st_mtime_ns == written and set(resumed.health) == {0.005, 0.05}
    whole = lines.read_text().splitlines()
    assert len(part) == 3 and whole[:3] == part and json.loads(whole[-1])["step"] == len(whole) >= SMALL.iterations
    assert not list(configured.out.rglob("*.pt"))


def test_bad_settings_are_refused_before_anything_is_written(configured, tmp_path, store):
    def refused(message, kind=ConfigError, **changes):
        with pytest.raises(kind, match=message):
            train(replace(configured, **changes))
        assert not configured.out.exists()

    refused("Unknown agent 'ppo-ag'. Did you mean 'ppo-agg'", agent="ppo-ag")
    refused("Unknown feature schema 'ag'. Did you mean 'agg'", schema="ag")
    refused("Unknown cost model 'decode'. Did you mean 'decode-only'", cost="decode")
    refused("Unknown tracking 'wanb'. Did you mean 'wandb'", tracking="wanb")
    refused("lam is -1", lam=(-1.0,))
    refused("names a value twice", lam=(0.1, 0.1))
    refused("names a value twice", lam=(0.003, 0.0030000001))  # one folder
    refused("no rollout store here", kind=StoreError, rollouts=str(tmp_path / "nowhere"))
    bare = scripted_store(tmp_path / "bare", 30, splits=("train", "test")).path
    refused("No trees in split 'validation'", kind=StoreError, rollouts=str(bare))
    configured.out.mkdir()
    (configured.out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="nothing was overwritten"):
        train(configured)
    assert [file.name for file in configured.out.iterdir()] == ["mine.txt"]


def test_resuming_on_changed_rollouts_is_refused(configured, tmp_path):
    train(configured)
    file = configured.out / "config.json"
    described = json.loads(file.read_text())
    write_sealed(file, {**described, "rollouts": {**described["rollouts"], "hash": "other"}})
    with pytest.raises(StoreError, match="the run was begun on other"):
        resume(configured.out)
    with pytest.raises(ConfigError, match="no run to resume"):
        resume(tmp_path)


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "COLUMNS": "200"}
    return Command([str(ROOT / "train.py"), *map(str, arguments)], ROOT, environment)


def test_a_killed_run_resumes_to_the_same_end(store, tmp_path):
    plain = ["--rollouts", store, "--lam", "0.01", "--tracking", "none", "--ppo.num-envs", "64", "--ppo.n-steps", "8"]
    plain += ["--ppo.iterations", "40", "--ppo.hidden", "16", "--attempts", "1"]
    whole = command(*plain, "--out", tmp_path / "whole")
    assert whole.wait(200) == 0, whole.output
    killed = command(*plain, "--out", tmp_path / "killed")
    lines = tmp_path / "killed" / "lam-0.01" / "metrics.jsonl"
    for target in (5, 17):
        deadline = time.monotonic() + 100
        while not lines.exists() or lines.read_text().count("\n") < target:
            assert time.monotonic() < deadline and killed.process.is_alive()
            time.sleep(0.005)
        killed.process.kill()
        assert killed.wait(60) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "lam-0.01" / "policy").exists()
        killed = command("--resume", tmp_path / "killed")
    assert killed.wait(200) == 0, killed.output
    assert lines.read_text() == (tmp_path / "whole" / "lam-0.01" / "metrics.jsonl").read_text()
    ends = [artefact.load(tmp_path / name / "lam-0.01" / "policy") for name in ("whole", "killed")]
    assert all((ends[0].router.weights[name] == ends[1].router.weights[name]).all() for name in ends[0].router.weights)
    assert ends[0].about == ends[1].about


def test_one_policy_for_a_range_of_lam(configured):
    trained = train(replace(configured, lam=(), lam_range=(0.002, 0.2)))
    stored = artefact.load(trained.folder / "lam-0.002-to-0.2" / "policy").router
    assert (stored.low, stored.high) == (0.002, 0.2) and len(trained.routers) == 5
    trees = compile_store(configured.rollouts)
    features = decision_tables(trees, "test").features
    for lam in (0.002, 0.017, 0.2):
        told = np.concatenate([features, np.full((len(features), 1), np.log10(lam) + 3, np.float32)], axis=1)
        whole = replace(stored.at(lam), weights=stored.weights)  # the network with λ as its last input
        assert stored.at(lam).logits(features) == pytest.approx(whole.logits(told), abs=1e-5)
    for lam in (0.001, 0.3, 0.0):
        with pytest.raises(ConfigError, match="this policy was trained for 0.002 to 0.2"):
            stored.at(lam)
    assert resume(configured.out).health == trained.health


def test_a_policy_told_lam_spends_less_where_it_is_dearer(trees):
    tables = decision_tables(telling(trees), "train")
    learner = PPOAgg(tables, (0.001, 0.5), replace(SMALL, iterations=40, num_envs=256), seed=0)
    while not learner.done:
        learner.iterate()
    router = learner.router()
    cheap, dear = run(router.at(0.001), tables), run(router.at(0.5), tables)
    assert dear.large_tokens.mean() < 0.2 * cheap.large_tokens.mean()
    assert cheap.correct.mean() > dear.correct.mean() + 0.05
