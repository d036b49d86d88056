"""The live environment: the same as compiled trees where those are complete, generating what misses elsewhere."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from handmade import ScriptedScorer, ScriptedWriter, Statistician, TellingWriter, process
from made_stores import PROBLEMS, HorizonWriter, finished, grown, rollout, rows_of, same, writers

from rollouts.errors import BackendError, ConfigError, StoreError
from rollouts.store.store import Store, locate
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL, Prefix, prefix_hash
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from rollouts.trees.verify import verify_store
from trim_env.features import Feature, Schema
from trim_env.live import LiveVectorEnv, open_live
from trim_env.sb3 import SB3VecEnv
from trim_env.tables import decision_tables
from trim_env.vector import TrimVectorEnv

# 0 for numbers that a float32 can hold, as compiled trees hold products of scores, and hardly ever for others
ROUNDING = Schema("rounding", 1, (Feature("rest", 0, 1, ("product_score",), lambda product: product * 2**54 % 1),) * 2)


class NoScorer:
    """Stands for the scorer of a store's table and refuses to score."""

    tolerance = 0.0

    def __init__(self, store: Store) -> None:
        self.name = store.choose("scores", None)
        self._process = store.table_manifest("scores", self.name)["process"]

    def process(self):
        return self._process

    def submit(self, question, steps):
        raise AssertionError("nothing should be scored")


class RecordingScorer(ScriptedScorer):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list = []

    def submit(self, question, steps):
        self.asked.append((question, tuple(steps)))
        return super().submit(question, steps)


def idle(store, **options) -> LiveVectorEnv:
    """Return an environment that cannot generate or score."""
    return LiveVectorEnv(store, {}, NoScorer(store if isinstance(store, Store) else Store(store)), **options)


def empty(path, max_escalations=None) -> Store:
    store = Store.create(path, process(max_escalations))
    store.add_problems(PROBLEMS)
    return store


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    path = tmp_path_factory.mktemp("copy") / "quickstart"
    shutil.copytree(locate("quickstart"), path, ignore=shutil.ignore_patterns(".compiled", ".lock"))
    return path


# ---------------------------------------------------------------- complete stores


@pytest.mark.parametrize(
    "options",
    [
        {"split": "train"},
        {"split": "test", "schema": "agg+prod", "cost": "prefill-full:0.1", "lam": 1e-3, "max_escalations": 1},
        {"split": "test", "schema": ROUNDING},
    ],
)
def test_a_complete_store_gives_what_compiled_trees_give(quickstart, options):
    compiled = rollout(TrimVectorEnv("quickstart", num_envs=16, **options), 60, seed=5)
    env = idle(quickstart, num_envs=16, **options)
    before = {file: file.stat().st_mtime_ns for file in quickstart.rglob("*.parquet")}
    assert same(rollout(env, 60, seed=5), compiled)
    assert env.generated == 0
    env.close()
    assert {file: file.stat().st_mtime_ns for file in quickstart.rglob("*.parquet")} == before


@pytest.mark.parametrize("cap", [None, 0, 2])
@pytest.mark.parametrize("memory", [1024, 1])
def test_so_does_a_small_store_with_few_trees_in_memory(tmp_path, cap, memory):
    store = finished(tmp_path / "s", cap)
    compiled = TrimVectorEnv(store.path, None, 5)
    live = idle(store.path, split=None, num_envs=5, max_escalations=cap, trees_in_memory=memory)
    assert same(rollout(live, 80, seed=1), rollout(compiled, 80, seed=1))
    assert same(rollout(live, 20), rollout(compiled, 20))  # a reset without a seed goes on
    assert live.take_finished() == compiled.take_finished()
    assert len(live._live._trees) <= max(memory, 5)
    live.close()


def test_the_sb3_face(tmp_path):
    store = finished(tmp_path / "s")
    compiled = SB3VecEnv(TrimVectorEnv(store.path, None, 4), seed=2)
    live = SB3VecEnv(idle(store.path, split=None, num_envs=4), seed=2)
    np.testing.assert_array_equal(live.reset(), compiled.reset())
    generator = np.random.default_rng(0)
    for _ in range(30):
        actions = generator.integers(0, 2, 4)
        assert same(live.step(actions), compiled.step(actions))
    live.close()


# ---------------------------------------------------------------- stores that lack something


@pytest.mark.parametrize(("closed", "memory"), [(None, 1024), (0, 1024), (1, 1024), (None, 1)])
def test_an_almost_empty_store_is_filled_once(tmp_path, closed, memory):
    store = empty(tmp_path / "s", closed)
    asked: list = []
    who = {role: HorizonWriter(role, asked=asked) for role in ROLES}
    options = {"split": None, "num_envs": 7, "grader": "numeric", "trees_in_memory": memory, "replicas": 3}
    options["schema"] = "agg+prod"  # products show whether scores are the same to the last bit
    env = LiveVectorEnv(store.path, who, ScriptedScorer(), **options)
    first = rollout(env, 40, seed=0)
    env.close()
    assert env.generated == store.steps.keys().num_rows
    assert len({item[:4] for item in asked}) == len(asked) > 20
    assert not verify_store(store).problems
    steps = rows_of(store.steps)
    nodes = texts_of_nodes(steps)
    for (name, replica, prefix, role), row in steps.items():
        step = who[role].step(Prefix(name, "", replica, (), 0), nodes[name, prefix])
        assert (row["text"], row["tokens"]) == (step.text, step.tokens)
    second = idle(store.path, **options)
    assert same(rollout(second, 40, seed=0), first)
    assert second.generated == 0
    second.close()
    with pytest.raises(StoreError, match="no trees yet"):  # `generate` has not begun one
        compile_store(store)
    close(store, who, replicas=3)
    tables = replace(decision_tables(store.path, None, schema="agg+prod"), max_escalations=None)
    assert same(rollout(TrimVectorEnv(tables, num_envs=7), 40, seed=0), first)
    assert len({item[:4] for item in asked}) == len(asked)
    if closed is not None:
        assert max(extra["final_info"]["escalations"].max() for *_, extra in first[1:] if extra) > closed


def close(store, who, replicas, grader="numeric"):
    """Do what `generate` does on a store that has live trees."""
    with store.writing():
        trees = list(load_trees(store, PROBLEMS, replicas, store.manifest["process"]["max_escalations"]))
        assert Grower(who, StepBuffer(store.steps)).run(trees) == 0
        score_store(store, ScriptedScorer())
        grade_store(store, make_grader(grader))
        store.note_live((), closed={tree.key for tree in trees})


def texts_of_nodes(steps):
    """Return the texts of the steps before each node, by problem and hash, from rows of a step table."""
    nodes = {(name, prefix_hash(())): () for name, *_ in steps}
    below: dict = {}
    for (name, _, prefix, _), row in steps.items():
        below.setdefault((name, prefix), set()).add(row["text"])
    waiting = list(nodes)
    while waiting:
        name, node = waiting.pop()
        for text in below.get((name, node), ()):
            path = (*nodes[name, node], text)
            nodes[name, prefix_hash(path)] = path
            waiting.append((name, prefix_hash(path)))
    return nodes


def test_scores_and_grades_that_miss_are_added_without_generating(tmp_path):
    store = grown(tmp_path / "s")
    scorer = RecordingScorer()
    env = LiveVectorEnv(store.path, {}, scorer, split=None, num_envs=24)
    seen = rollout(env, 30, seed=3)
    env.close()
    assert env.generated == 0
    assert (
        len({(question, *steps) for question, steps in scorer.asked})
        == len(scorer.asked)
        < store.steps.keys().num_rows / 2
    )
    assert not verify_store(store).problems
    assert same(rollout(TrimVectorEnv(compile_store(store), None, 24), 30, seed=3), seen)


def test_identical_steps_of_both_models_are_scored_once(tmp_path):
    store = empty(tmp_path / "s")
    scorer = ScriptedScorer()
    env = LiveVectorEnv(store.path, writers(), scorer, split=None, num_envs=32)
    rollout(env, 30, seed=0)
    env.close()
    scores, steps = rows_of(store.scores("scripted")), rows_of(store.steps)
    assert scores.keys() == steps.keys()
    twins = [key for key in steps if key[3] == LARGE and steps[*key[:3], SMALL]["text"] == steps[key]["text"]]
    assert twins and all(scores[key]["score"] == scores[*key[:3], SMALL]["score"] for key in twins)
    assert scorer.paths <= len(steps) - len(twins) - sum(key[3] == SMALL for key in steps) / 2


def test_problems_without_trees_get_as_many_replicas_as_asked_for(tmp_path):
    store = empty(tmp_path / "s")
    env = LiveVectorEnv(store.path, writers(), ScriptedScorer(), num_envs=200, replicas=3)
    env.reset(seed=0)
    env.close()
    assert {key[:2] for key in rows_of(store.steps)} == {(f"p{i}", replica) for i in range(5) for replica in range(3)}
    assert all(row["role"] == SMALL for row in rows_of(store.steps).values())  # K is None: only what is reached
    assert (
        rows_of(store.scores("scripted")).keys() == rows_of(store.steps).keys()
    )  # beyond what has been looked at, too
    ends = {key for key, row in rows_of(store.steps).items() if row["terminal"]}
    assert rows_of(store.grades("exact")).keys() == ends


# ---------------------------------------------------------------- batches


class Pending(Future):
    """Answered, with all others of its engine, when somebody waits for it."""

    def __init__(self, engine) -> None:
        super().__init__()
        self.engine = engine

    def result(self, timeout=None):
        self.engine.answer()
        return super().result(timeout)


class Batching:
    """A writer or scorer that answers only what was sent before somebody waited, and counts how often that was."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.waiting: list = []
        self.batches: list[int] = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def submit(self, *arguments, **options):
        future = Pending(self)
        self.waiting.append((future, self.inner.submit(*arguments, **options)))
        return future

    def answer(self):
        if self.waiting:
            self.batches.append(len(self.waiting))
        for future, answer in self.waiting:
            future.set_result(answer.result())
        self.waiting = []


def test_all_that_a_step_lacks_is_one_batch_for_each_model(tmp_path):
    store = empty(tmp_path / "s")
    models = {role: Batching(ScriptedWriter(role, depth=6, merge=50)) for role in ROLES}
    scorer = Batching(ScriptedScorer())
    env = LiveVectorEnv(store.path, models, scorer, split=None, num_envs=64, replicas=8)
    env.reset(seed=0)
    engines = [*models.values(), scorer]
    assert [len(engine.batches) for engine in engines] == [1, 0, 1]
    generator = np.random.default_rng(0)
    sizes = [[], [], []]
    for _ in range(12):
        for engine in engines:
            engine.batches.clear()
        env.step(generator.integers(0, 2, 64))
        for engine, size in zip(engines, sizes, strict=True):
            assert len(engine.batches) <= 1 and not engine.waiting
            size += engine.batches
    assert all(max(size) > 5 for size in sizes)
    env.close()


# ---------------------------------------------------------------- failures


class Dying:
    """A writer or scorer that answers some requests and then no more; `late` fails answers instead of requests."""

    def __init__(self, inner, after, late) -> None:
        self.inner, self.left, self.late = inner, after, late

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def submit(self, *arguments, **options):
        self.left -= 1
        if self.left >= 0:
            return self.inner.submit(*arguments, **options)
        if not self.late:
            raise BackendError("the model is gone")
        future: Future = Future()
        future.set_exception(BackendError("the model is gone"))
        return future


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("who", [SMALL, LARGE, "scorer"])
@pytest.mark.parametrize("closed", [None, 0])
def test_what_was_made_before_a_model_failed_is_kept(tmp_path, who, late, closed):
    store = empty(tmp_path / "s", closed)
    asked: list = []
    before: dict = {}
    for attempt in range(40):
        models = {role: ScriptedWriter(role, asked=asked) for role in ROLES} | {"scorer": ScriptedScorer()}
        models[who] = Dying(models[who], attempt, late)
        env = LiveVectorEnv(store.path, models, models["scorer"], split=None, num_envs=6, replicas=2)
        try:
            rollout(env, 30, seed=0)
            break
        except BackendError as error:
            assert "gone" in str(error)
            with pytest.raises(ConfigError, match="reset"):
                env.step(np.zeros(6))
            now = rows_of(store.steps)  # before it is closed
            assert len(now) == len(before) + env.generated
            assert all(now[key] == value for key, value in before.items())
            before = now
        finally:
            env.close()
    assert attempt > 3
    assert len({item[:4] for item in asked}) == len(asked)
    assert not verify_store(store).problems


def test_it_can_be_reset_after_a_failure(tmp_path):
    store = empty(tmp_path / "s")
    small = Dying(ScriptedWriter(SMALL), 2, False)
    env = LiveVectorEnv(store.path, {**writers(), SMALL: small}, ScriptedScorer(), split=None, num_envs=6)
    with pytest.raises(BackendError):
        env.reset(seed=0)
    small.left = 10**9
    seen = rollout(env, 20, seed=0)
    env.close()
    other = LiveVectorEnv(empty(tmp_path / "t").path, writers(), ScriptedScorer(), split=None, num_envs=6)
    assert same(rollout(other, 20, seed=0), seen)
    other.close()


def test_the_write_lock_is_held_until_closed(tmp_path):
    store = finished(tmp_path / "s")
    env = idle(store.path)
    with pytest.raises(StoreError, match="another process is writing"):
        idle(store.path)
    env.close()
    env.close()
    for mistake, error in (
        ({"lam": -1}, ConfigError),
        ({"schema": "agc"}, ConfigError),
        ({"split": "tset"}, StoreError),
        ({"replicas": 0}, ConfigError),
        ({"max_escalations": -1}, ConfigError),
        ({"grader": "exactly"}, ConfigError),
    ):
        with pytest.raises(error):
            idle(store.path, **mistake)
    with store.writing():  # no mistake has left it locked; a store that is locked can be passed on
        env = idle(store)
        env.reset(seed=0)
        env.close()


# ---------------------------------------------------------------- what score tables tell

SIGNALS = "all,least(large.min_logprob),greatest(small.first_entropy),scripted.score"


@pytest.mark.parametrize("scorer", ["scripted", "small", "large"])
def test_columns_of_score_tables_are_those_of_compiled_trees(tmp_path, scorer):
    store = finished(tmp_path / "s")
    for role in ROLES:
        score_store(store, Statistician(role))
    scorers = {"scripted": ScriptedScorer(), **{role: Statistician(role) for role in ROLES}}
    others = [each for name, each in scorers.items() if name != scorer]
    plain = TrimVectorEnv(compile_store(store, scorer), None, 24, schema=SIGNALS)
    env = LiveVectorEnv(store, {}, scorers[scorer], split=None, num_envs=24, schema=SIGNALS, others=others)
    assert same(rollout(plain, 40, seed=5), rollout(env, 40, seed=5))
    env.close()


def test_what_writers_tell_needs_no_scorer_of_its_own(tmp_path):
    store = grown(tmp_path / "s", replicas=0)
    who, large = writers(TellingWriter), Statistician(LARGE)
    options = {"split": None, "num_envs": 12, "schema": "prefill,least(large.min_logprob)", "replicas": 2}
    env = LiveVectorEnv(store, who, ScriptedScorer(), others=[large], **options)
    seen = rollout(env, 40, seed=5)
    env.close()
    assert env.generated > 50 and large.paths and "small" not in store.names("scores")
    again = LiveVectorEnv(store, who, ScriptedScorer(), others=[Statistician(LARGE)], **options)
    assert same(rollout(again, 40, seed=5), seen) and again.generated == 0
    again.close()
    with pytest.raises(StoreError, match="prefill reads large.min_logprob, which some proposals lack"):
        bare = grown(tmp_path / "bare", replicas=0)
        LiveVectorEnv(bare, who, ScriptedScorer(), split=None, num_envs=12, schema="prefill").reset(seed=77)


# ---------------------------------------------------------------- real models


@pytest.mark.usefixtures("engines_in_threads")
def test_real_models(tmp_path):
    from rollouts.config import load_family
    from rollouts.family import Family
    from rollouts.tasks.problems import load_problems

    problems = list(load_problems("tinymath:train", limit=8))
    store = Store.create(tmp_path / "s", Family(load_family("tinymath:transformers")).process(0, labels=True))
    store.add_problems(problems)
    with open_live(store.path, "tinymath:transformers", num_envs=8, schema="agg") as env:
        first = rollout(env, 12, seed=0)
        assert env.generated > 20
    assert not verify_store(store).problems
    steps = rows_of(store.steps)
    assert all(row["label"] is not None for row in steps.values())
    assert (np.stack([seen[0] for seen in first])[:, :, 0] != 0).all()
    second = idle(store.path, num_envs=8, schema="agg")
    assert same(rollout(second, 12, seed=0), first)
    second.close()
    with pytest.raises(StoreError, match="another process"):
        Store.create(tmp_path / "other", process(0)).add_problems(problems)
        with open_live(tmp_path / "other", "tinymath:transformers"):
            pass
