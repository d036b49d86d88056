"""Live training: what episodes reach is generated once and kept, and the run is otherwise like any other."""

import json
import os
import shutil
import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
from handmade import ScriptedScorer, problem, process
from made_routers import QUICK
from scripted_store import SPLITS, AbleLarge, scripted_store

import evaluate as evaluate_command
import rollouts.__main__ as rollouts_command
import train as train_command
from agents.evaluation.suite import EvaluateConfig, evaluate
from agents.learners.loop import Training
from agents.learners.settings import PPOSettings
from agents.routers import artefact
from agents.runs.config import TrainConfig
from agents.runs.run import train
from rollouts.cli.inspect import Stats
from rollouts.errors import BackendError, BudgetSpent, ConfigError, StoreError
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL, StopReason
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from rollouts.trees.verify import verify_store
from trim_env import live

LAM = ["--lam", "0.02"]


class Scripted:
    """Stands for `rollouts.family.Family`: scripted models, which note what they were asked."""

    def __init__(self, interrupt=None) -> None:
        self.asked: list = []
        self.opened: list = []
        self.scorer = ScriptedScorer()
        self.scorer_name = self.scorer.name
        self.config = type("Config", (), {"scorer": self.scorer})
        self.interrupt = interrupt

    @contextmanager
    def open(self, role, store):
        self.opened.append(role)
        store.record_engine({"role": role})
        writer = AbleLarge(role, asked=self.asked)
        yield Interrupted(writer, self.interrupt) if self.interrupt else writer

    @contextmanager
    def open_scorer(self, store):
        self.opened.append("scorer")
        yield self.scorer


class Interrupted:
    """A writer that calls a function after every answer."""

    def __init__(self, inner, then) -> None:
        self.inner, self.then = inner, then

    def submit(self, *arguments, **options):
        future = self.inner.submit(*arguments, **options)
        self.then(self.inner)
        return future


@pytest.fixture
def models(monkeypatch):
    """Put scripted models in the place of those that a models file names."""

    def use(**options):
        family = Scripted(**options)
        monkeypatch.setattr(live, "family_of", lambda store, models: family)
        return family

    return use


def half_made(path, max_escalations=None, problems=60, begun=0) -> Store:
    """Return a store whose training problems have no trees, or but a few that are not closed."""
    items = [problem(f"p{i}", SPLITS[i % 3]) for i in range(problems)]
    store = Store.create(path, process(max_escalations))
    store.add_problems(items)
    grown = [each for each in items if each.split != "train"]
    Grower(writers := {role: AbleLarge(role) for role in ROLES}, StepBuffer(store.steps)).run(
        load_trees(store, grown, 2, max_escalations)
    )
    first = [each for each in items if each.split == "train"][:begun]
    Grower({SMALL: writers[SMALL]}, StepBuffer(store.steps)).run(load_trees(store, first, 1, max_escalations))
    score_store(store, ScriptedScorer())
    grade_store(store, make_grader("exact"))
    return store


def arguments(store, out, *more):
    return ["--live", "--rollouts", str(store.path), *LAM, "--out", str(out), "--tracking", "none", *QUICK, *more]


def steps(store):
    return sorted(map(str, (row for part in Store(store.path).steps.read() for row in part.to_pylist())))


def keys(asked):
    return [(name, replica, texts, role) for name, replica, texts, role, _ in asked]


@pytest.mark.parametrize(("closed", "begun"), [(None, 0), (1, 0), (2, 3)])
def test_what_episodes_reach_is_generated_once_and_kept(tmp_path, models, capsys, closed, begun):
    store, first = half_made(tmp_path / "s", closed, begun=begun), models()
    assert train_command.main(arguments(store, tmp_path / "one")) == 0
    assert first.opened == [*ROLES, "scorer"] and "added to the store: " in capsys.readouterr().out
    assert len(set(keys(first.asked))) == len(first.asked) > 50
    assert {name for name, *_ in keys(first.asked)} <= {each.id for each in store.problems("train")}
    kept = steps(store)
    assert len(kept) > 100
    second = models()
    assert train_command.main(arguments(store, tmp_path / "two")) == 0
    assert not second.asked and not second.scorer.paths and steps(store) == kept
    one, two = (artefact.load(tmp_path / name / "lam-0.02" / "policy") for name in ("one", "two"))
    assert all((one.router.weights[name] == two.router.weights[name]).all() for name in one.router.weights)
    assert one.about["rollouts"] == two.about["rollouts"] and one.about["rollouts"]["live"] is True
    written = {place.name for place in (tmp_path / "one").rglob("*")}
    assert {"config.json", "report.txt", "report.json", "metrics.jsonl", "curve.png", "policy.json"} <= written
    lines = [json.loads(line) for line in (tmp_path / "one" / "lam-0.02" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[-1]["train/return"] > 0


@pytest.mark.parametrize(
    ("closed", "more"),
    [
        (None, ["--max-escalations", "1", "--schema", "agg"]),
        (None, ["--max-large-tokens", "9", "--cost", "prefill-20"]),
        (2, ["--agent", "ppo-seq"]),
        (2, ["--lam-range", "0.005", "0.05"]),
        (None, ["--attempts", "2", "--budget", "0.5"]),
    ],
)
def test_on_a_complete_store_it_is_the_training_of_always(tmp_path, models, closed, more):
    store, family = scripted_store(tmp_path / "s", 60, closed), models()
    given = arguments(store, tmp_path / "live", *more)
    if {"--lam-range", "--budget"} & {*more}:
        given = [each for each in given if each not in LAM]
    if "ppo-seq" in more:
        given = [each.replace("--ppo", "--seq") for each in given] + ["--seq.width", "8", "--seq.heads", "2"]
    assert train_command.main(given) == 0
    given[given.index(str(tmp_path / "live"))] = str(tmp_path / "plain")
    assert train_command.main(given[1:]) == 0
    assert not family.asked and not family.scorer.paths and not store.live
    (one,), (two,) = (sorted((tmp_path / name).glob("lam-*/policy")) for name in ("live", "plain"))
    one, two = artefact.load(one), artefact.load(two)
    assert all((one.router.weights[name] == two.router.weights[name]).all() for name in one.router.weights)
    assert two.about == {**one.about, "rollouts": {**one.about["rollouts"], "live": None}} | {
        "rollouts": {name: value for name, value in one.about["rollouts"].items() if name != "live"}
    }
    same = [(tmp_path / name / one_of / "metrics.jsonl").read_text() for name in ("live", "plain")
            for one_of in [next((tmp_path / name).glob("lam-*")).name]]  # fmt: skip
    assert same[0] == same[1]


def test_every_command_works_on_a_store_of_live_trees(tmp_path, models, capsys):
    store = half_made(tmp_path / "s", 1)
    before = compile_store(store)
    models()
    assert train_command.main(arguments(store, tmp_path / "run")) == 0
    trees = compile_store(store)
    assert trees.meta["hash"] == before.meta["hash"]
    assert store.live == {(each.id, 0) for each in store.problems("train")}
    findings = verify_store(store)
    assert not findings.problems and any("trees of live episodes are not closed" in line for line in findings.facts)
    Stats(store.path).run()
    assert f"Left out {len(store.live)} trees of live episodes" in " ".join(capsys.readouterr().out.split())
    assert evaluate_command.main([str(tmp_path / "run"), "--rollouts", str(store.path)]) == 0
    with pytest.raises(StoreError, match="No trees in split 'train'"):
        train(TrainConfig(rollouts=str(store.path), lam=(0.02,), tracking="none", out=tmp_path / "plain"))
    generate(store)
    assert not store.live and not verify_store(store).problems
    closed = compile_store(store)
    assert (closed.splits[closed.problem] == "train").sum() == 20
    whole = scripted_store(tmp_path / "whole", 60, 1, replicas=2)
    of = {each.problem_ids[each.problem[tree]]: each.nodes for each in (closed,) for tree in range(len(each.root))}
    assert of and whole  # the trees are those that `generate` alone would have made
    alone = compile_store(whole)
    for name in ("p0", "p3"):
        assert texts(closed, name) == texts(alone, name)


def texts(trees, name):
    """Return the texts of the proposals of a problem's first tree."""
    tree = next(i for i in range(len(trees.root)) if trees.problem_ids[trees.problem[i]] == name)
    rows = np.flatnonzero(trees.tree == tree)
    return {(trees.depth[row], action, trees.proposal(row, action)) for row in rows for action in (0, 1)}


def generate(store):
    """Do what `generate` does."""
    with store.writing():
        problems = store.problems("train")
        trees = list(load_trees(store, problems, 1, store.manifest["process"]["max_escalations"]))
        assert Grower({role: AbleLarge(role) for role in ROLES}, StepBuffer(store.steps)).run(trees) == 0
        score_store(store, ScriptedScorer())
        grade_store(store, make_grader("exact"))
        store.note_live((), closed={tree.key for tree in trees})


def test_trees_that_are_complete_stay_in_use(tmp_path, models):
    store = scripted_store(tmp_path / "s", 60, 1)
    known = compile_store(store)
    new = [problem(f"new{i}", "train") for i in range(20)]
    store.add_problems(new)
    before = compile_store(store)  # has the new problems, and no trees of them
    models()
    assert train_command.main(arguments(store, tmp_path / "run")) == 0
    assert store.live == {(each.id, 0) for each in new}
    trees = compile_store(store)
    assert trees.meta["hash"] == before.meta["hash"] and len(trees.root) == len(known.root)
    assert evaluate(EvaluateConfig((tmp_path / "run",), str(store.path))).subject["hash"] == before.meta["hash"]


def test_an_interrupt_loses_nothing_that_was_generated(tmp_path, models, capsys):
    store, answers = half_made(tmp_path / "s"), []
    had = len(steps(store))

    def interrupt(writer):
        answers.append(writer.asked[-1])
        if len(answers) in (150, 300):  # Python drops one that comes while it calls back for a weak reference
            os.kill(os.getpid(), signal.SIGINT)

    models(interrupt=interrupt)
    assert train_command.main(arguments(store, tmp_path / "run")) == 130
    assert "Go on with --resume" in capsys.readouterr().err
    kept = steps(store)
    assert len(kept) - had >= len(answers) - 1  # the request at which it came has no answer yet
    assert not verify_duplicates(store)
    family = models()
    assert train_command.main(["--resume", str(tmp_path / "run")]) == 0
    assert len(set(keys(family.asked)) & set(keys(answers))) <= 1
    assert set(kept) <= set(steps(store)) and (tmp_path / "run" / "report.txt").is_file()
    assert not verify_store(Store(store.path)).problems


def verify_duplicates(store):
    return [line for line in verify_store(Store(store.path)).problems if "duplicate" in line]


def test_a_budget_of_large_tokens_ends_it_with_the_router_so_far(tmp_path, models, capsys):
    store, family = half_made(tmp_path / "s"), models()
    given = ["--max-generated-large-tokens", "400", "--ppo.n-steps", "1", "--ppo.iterations", "40"]
    assert train_command.main(arguments(store, tmp_path / "run", *given)) == 0
    printed = capsys.readouterr().out
    assert "The budget of large tokens ended lam-0.02 after " in printed
    assert printed.split("\n")[0] in (tmp_path / "run" / "report.txt").read_text()
    large = [texts for *_, texts, role, _ in family.asked if role == LARGE]
    done = len((tmp_path / "run" / "lam-0.02" / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < 40 and large
    spent = Store(store.path).steps.counters()["decoded_large"] - store_tokens(tmp_path)
    assert 400 <= spent <= 410  # no more than one step beyond
    assert artefact.load(tmp_path / "run" / "lam-0.02" / "policy").about["held_out"]
    assert evaluate_command.main([str(tmp_path / "run"), "--rollouts", str(store.path)]) == 0
    kept = steps(store)
    few = ["--max-generated-large-tokens", "1", "--ppo.n-steps", "64"]  # what is there is read, then one step asked for
    assert train_command.main(arguments(store, tmp_path / "few", *few)) == 2
    assert "Not one iteration of lam-0.02 was done" in capsys.readouterr().err
    assert set(kept) <= set(steps(store))


def store_tokens(tmp_path):
    return half_made(tmp_path / "other").steps.counters()["decoded_large"]


def test_a_budget_is_that_of_all_lams_together(tmp_path, models, capsys):
    store, _ = half_made(tmp_path / "s"), models()
    given = ["--max-generated-large-tokens", "300", "--ppo.n-steps", "1", "--ppo.iterations", "40"]
    given = arguments(store, tmp_path / "run", *given)
    given.insert(given.index("0.02") + 1, "0.0001")
    assert train_command.main(given) == 0
    for printed in (capsys.readouterr().out, (tmp_path / "run" / "report.txt").read_text()):
        assert "ended lam-0.02 after" in printed and "ended lam-0.0001 after" in printed
    assert Store(store.path).steps.counters()["decoded_large"] - store_tokens(tmp_path) <= 310


def test_a_budget_is_that_of_the_run_however_often_it_is_resumed(tmp_path, models, capsys):
    store, answers, more = half_made(tmp_path / "s"), [], {"max_generated_large_tokens": 500}

    def interrupt(writer):
        answers.append(writer)
        if len(answers) in (30, 60):  # as above
            os.kill(os.getpid(), signal.SIGINT)

    models(interrupt=interrupt)
    given = ["--max-generated-large-tokens", "500", "--ppo.n-steps", "1", "--ppo.iterations", "40"]
    assert train_command.main(arguments(store, tmp_path / "run", *given)) == 130
    before = json.loads((tmp_path / "run" / "generated.json").read_text())
    assert 0 < before["tokens"]["large"] < more["max_generated_large_tokens"]
    models()
    assert train_command.main(["--resume", str(tmp_path / "run")]) == 0
    assert Store(store.path).steps.counters()["decoded_large"] - store_tokens(tmp_path) <= 530
    assert json.loads((tmp_path / "run" / "generated.json").read_text())["tokens"]["large"] >= 500
    (tmp_path / "run" / "generated.json").write_text("{")
    (tmp_path / "run" / "lam-0.02" / "report.json").unlink()
    capsys.readouterr()
    assert train_command.main(["--resume", str(tmp_path / "run")]) == 2
    assert "generated.json: damaged counts" in capsys.readouterr().err


def test_a_sweep_whose_budget_is_spent_reports_what_is_done(tmp_path, models, capsys):
    """The second λ wants more at once than is left, so that it does not come to one iteration."""
    store, _ = half_made(tmp_path / "s"), models()
    given = ["--max-generated-large-tokens", "5000", "--ppo.n-steps", "1", "--ppo.iterations", "2"]
    given = arguments(store, tmp_path / "run", *given)
    given.insert(given.index("0.02") + 1, "0.0001")
    train, begun = Training.run, []

    def second_wants_more(training, *rest):
        begun.append(training.lam)
        if len(begun) > 1:
            raise BudgetSpent("The large model has decoded 61 tokens, its budget.")
        return train(training, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run", second_wants_more)
        assert train_command.main(given) == 0
    printed, report = capsys.readouterr().out, (tmp_path / "run" / "report.txt").read_text()
    assert "Not one iteration of lam-0.0001 was done" in printed and "Not one iteration of lam-0.0001" in report
    assert "lam 0.02: " in report and begun == [0.02, 0.0001]
    assert artefact.load(tmp_path / "run" / "lam-0.02" / "policy").about["held_out"]


def config_of(store, out):
    quick = PPOSettings(iterations=2, num_envs=64, n_steps=8, hidden=8)
    return TrainConfig(rollouts=str(store), live=True, lam=(0.02,), out=out, tracking="none", attempts=1, ppo=quick)


def test_a_scorer_that_is_gone_is_named_and_what_was_written_is_kept(tmp_path, models, capsys):
    store, family = half_made(tmp_path / "s"), models()
    had, submit = len(steps(store)), family.scorer.submit

    def gone(question, texts):
        if family.scorer.paths > 40:
            raise BackendError("scorer: it does not answer at http://localhost:1.")
        return submit(question, texts)

    family.scorer.submit = gone
    assert train_command.main(arguments(store, tmp_path / "run")) == 2
    assert "error: scorer: it does not answer" in capsys.readouterr().err
    assert len(steps(store)) > had
    family = models()
    assert train_command.main(["--resume", str(tmp_path / "run")]) == 0


class Failing(AbleLarge):
    def step(self, prefix, steps):
        return replace(super().step(prefix, steps), text="", stop_reason=StopReason.FAILED)


def test_requests_that_always_fail_end_it(tmp_path, models, capsys, monkeypatch):
    store, family = half_made(tmp_path / "s"), models()
    monkeypatch.setattr(
        family, "open", lambda role, store: nullcontext((Failing if role == LARGE else AbleLarge)(role))
    )
    assert train_command.main(arguments(store, tmp_path / "run")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "large: 20 of its first 20 requests failed" in said and "--drop-failed` the same command asks again." in said
    assert sum("failed" in each for each in steps(store)) >= 20


def test_what_it_cannot_do_is_refused_in_one_line(tmp_path, models, capsys):
    store, family = half_made(tmp_path / "s"), models()
    bare = Store.create(tmp_path / "bare", process())
    bare.add_problems([problem(f"p{i}", SPLITS[i % 2]) for i in range(8)])
    tests = Store.create(tmp_path / "tests", process())
    tests.add_problems([problem(f"p{i}", "test") for i in range(8)])
    half = half_made(tmp_path / "half", problems=30)
    Grower({SMALL: AbleLarge(SMALL)}, StepBuffer(half.steps)).run(
        load_trees(half, half.problems("validation"), 3, None)
    )
    score_store(half, ScriptedScorer())
    grade_store(half, make_grader("exact"))
    for place, more, message in [
        (store, ["--agent", "exact"], "--live trains ppo-agg or ppo-seq; exact learns from complete trees."),
        (store, ["--agent", "pomdp"], "--live trains ppo-agg or ppo-seq; pomdp learns from complete trees."),
        (store, ["--ppo.start", "exact"], "--ppo.start exact learns from complete trees"),
        (store, ["--scorer", "other"], "--scorer is other, but the scorer of the models file is scripted."),
        (store, ["--max-generated-large-tokens", "0"], "--max-generated-large-tokens is 0, expected at least 1"),
        (store, ["--max-escalations", "-1"], "--max-escalations is -1"),
        (bare, [], "`python -m rollouts generate"),
        (
            half,
            [],
            "trees are incomplete (not closed under at most K = None escalations). Run the same `generate` again",
        ),
        (tests, [], "no problem in split 'train'"),
    ]:
        assert train_command.main(arguments(place, tmp_path / "x", *more)) == 2
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert printed.startswith("error: ") and message in printed
    for more in (["--models", "m.toml"], ["--max-generated-large-tokens", "5"]):
        assert train_command.main([*arguments(store, tmp_path / "x", *more)[1:]]) == 2
        assert "are for --live" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not family.opened and not family.asked
    with pytest.raises(ConfigError, match="--live trains"):
        TrainConfig(live=True, agent="threshold")


def test_lams_are_chosen_on_validation_where_there_are_no_training_trees(tmp_path, models):
    store = half_made(tmp_path / "s")
    models()
    given = [each for each in arguments(store, tmp_path / "run", "--budget", "0.5") if each not in LAM]
    assert train_command.main(given) == 0
    low, high = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lam_range"]
    assert 0 < low < high and "For a budget of 50 %" in (tmp_path / "run" / "report.txt").read_text()


def test_it_tells_from_the_first_second_how_much_is_generated(tmp_path, models):
    from agents.runs.listener import Listener

    class Watching(Listener):
        def __init__(self):
            self.seen = []

        def opening(self, role):
            self.seen.append(role)

        def generating(self, generated):
            self.seen.append((generated.steps, generated.found))

        def iteration(self, lam, training, record):
            self.seen.append("iteration")

    store, watching = half_made(tmp_path / "s"), Watching()
    models()
    trained = train(config_of(store.path, tmp_path / "run"), watching)
    assert watching.seen[:3] == [*ROLES, "scorer"] and watching.seen.index("iteration") > 3
    assert trained.generated.steps > 100 and 0.5 < trained.generated.found < 1


def test_a_store_beside_the_one_that_is_trained_on_is_not_touched(tmp_path, models):
    store = half_made(tmp_path / "s")
    shutil.copytree(store.path, tmp_path / "copy")
    models()
    train(config_of(store.path, tmp_path / "run"))
    other = Store(tmp_path / "copy")
    assert not other.live and compile_store(other).meta["hash"] == compile_store(store).meta["hash"]


@pytest.mark.usefixtures("engines_in_threads")
def test_real_models(tmp_path, capsys):
    store = str(tmp_path / "s")
    made = [
        "generate",
        store,
        "--problems",
        "tinymath:train",
        "tinymath:validation",
        "--limit",
        "8",
        "--max-escalations",
        "1",
    ]
    made += ["--models", "tinymath:transformers"]
    assert rollouts_command.main([*made, "--replicas", "train=0"]) == 0
    assert not {each.id for each in Store(store).problems("train")} & set(
        Store(store).steps.keys()["problem"].to_pylist()
    )
    given = ["--live", "--rollouts", store, "--models", "tinymath:transformers", "--lam", "3e-3", "--tracking", "none"]
    given += [*QUICK, "--ppo.num-envs", "16", "--out"]
    assert train_command.main([*given, str(tmp_path / "one")]) == 0
    found = Store(store)
    assert [each["role"] for each in found.manifest["engines"]][-3:] == [*ROLES, "scorer"]
    assert len({each["seed"] for each in found.manifest["engines"]}) == len(found.manifest["engines"])
    assert len(found.live) == 8 and rollouts_command.main(["verify", store]) == 0
    assert rollouts_command.main(["stats", store]) == 0
    kept = steps(found)
    assert train_command.main([*given, str(tmp_path / "two")]) == 0
    assert steps(found) == kept
    one, two = (tmp_path / name / "lam-0.003" / "policy" / "policy.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert evaluate_command.main([str(tmp_path / "two"), "--rollouts", store, "--split", "validation"]) == 0
    said = json.loads((tmp_path / "two" / "evaluation-validation" / "results.json").read_text())["sentences"]
    assert "settings were chosen on these very problems" in said[-1]
    assert rollouts_command.main(made) == 0
    assert not Store(store).live and set(kept) <= set(steps(found)) and rollouts_command.main(["verify", store]) == 0
    plain = [each for each in given[1:] if each not in ("--models", "tinymath:transformers")]
    assert train_command.main([*plain, str(tmp_path / "three")]) == 0
    assert one.read_bytes() == (tmp_path / "three" / "lam-0.003" / "policy" / "policy.safetensors").read_bytes()
    wrong = given[:4] + [
        str(tmp_path / "models.toml") if each == "tinymath:transformers" else each for each in given[4:]
    ]
    capsys.readouterr()
    assert train_command.main([*wrong, str(tmp_path / "five")]) == 2
    assert "models.toml: the models file cannot be read" in capsys.readouterr().err
