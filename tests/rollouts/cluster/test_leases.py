"""The driver's bookkeeping: leases, losses, budget, refusals. Workers are threads, their models scripted."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from handmade import ScriptedScorer, ScriptedWriter, problem
from threads_as_ray import Threads

from rollouts.__main__ import main
from rollouts.cli.machines import Machines
from rollouts.cluster import pool as pools
from rollouts.cluster import worker as workers
from rollouts.cluster.asking import Asking, RemoteGrader, RemoteScorer, RemoteWriter
from rollouts.cluster.growing import Growing
from rollouts.cluster.pool import Cluster, Pool, _anywhere, connected
from rollouts.cluster.worker import Desk, Job, package
from rollouts.config import GeneratorConfig, embedded_family
from rollouts.errors import BackendError, ConfigError, RequestsFailed, StoreError
from rollouts.family import Family
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from rollouts.trees.on_policy import expand_on_policy

pytestmark = pytest.mark.timeout(60)
PROBLEMS = [problem(f"p{number}", "test") for number in range(12)]


class Slow(ScriptedWriter):
    """Answers after a moment, so that something is always under way."""

    def submit(self, prefix, *, whole):
        future, answer = Future(), super().submit(prefix, whole=whole).result()
        threading.Timer(0.004, future.set_result, [answer]).start()
        return future


class Models:
    """What workers open instead of a family: `made` is called for each writer, `failing` for each opening."""

    made = staticmethod(lambda role, asked: Slow(role, asked=asked))
    failing = staticmethod(lambda: None)
    asked: list = []

    def __init__(self, config, *, seed, examples, store):
        self.config, self.seed, self.examples, self.date = config, seed, examples, None

    def process(self, max_escalations, *, labels):
        return Store(MADE["path"]).manifest["process"]

    @contextmanager
    def open(self, role, store):
        Models.failing()
        store.record_engine({"role": role, "seed": store.next_start()})
        yield Models.made(role, Models.asked)

    def scoring(self, name, store, writers=()):
        return nullcontext(ScriptedScorer())


MADE = {}


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setattr(workers, "Family", Models)
    monkeypatch.setattr(workers, "_HAND_IN_SECONDS", 0.05)
    monkeypatch.setattr(workers, "_PATIENCE", 0.05)
    monkeypatch.setattr(workers, "_PAUSE", 0.01)
    monkeypatch.setattr(Models, "asked", [])
    return Threads()


@pytest.fixture
def cluster(ray):
    said = []
    found = Cluster(ray, 2, said.append)
    object.__setattr__(found, "said", said)
    return found


def made(path: Path, cap=1) -> Store:
    from handmade import process

    store = Store.create(path, process(cap))
    store.add_problems(PROBLEMS)
    MADE["path"] = path
    return store


def all_rows(store):
    return [row for part in store.steps.read() for row in part.to_pylist()]


def all_steps(store):
    return {tuple(row[name] for name in store.steps.key): row for row in all_rows(store)}


def loading(store):
    return lambda: load_trees(store, PROBLEMS, 1, store.manifest["process"]["max_escalations"])


def growing(cluster, store, **options):
    job = Job(str(store.path), store.manifest, embedded_family("transformers"), writes=True, grows=4)
    return Growing(cluster, store, job, loading(store), StepBuffer(store.steps, seconds=0.05), **options)


@pytest.fixture
def whole(tmp_path):
    """The steps that one process makes."""
    store = made(tmp_path / "whole")
    Grower({role: ScriptedWriter(role) for role in ROLES}, StepBuffer(store.steps)).run(loading(store)())
    return store


def test_the_trees_are_those_of_one_process(cluster, whole, tmp_path):
    store, told = made(tmp_path / "s"), []
    with growing(cluster, store, on_progress=lambda now, note: told.append((now.steps, note))) as pool:
        assert pool.run() == 0
    assert all_steps(store) == all_steps(whole) and store.steps.counters() == whole.steps.counters()
    assert store.steps.keys().num_rows == len(all_steps(store))
    assert told[0] == (0, "0 of 2 workers: each takes a core") and told[-1][0] == len(all_steps(store))
    assert "2 of 2 workers" in told[-1][1] and "steps a second" in told[-1][1]
    again = Store(store.path).manifest
    assert again["distributed"] == {"ray": "threads", "workers": 2}
    assert again["process"] == whole.manifest["process"]
    assert sorted(start["start"] for start in again["engines"]) == [0, 1, 2, 3]
    assert all(start["seed"] == start["start"] for start in again["engines"])


def test_what_a_lost_worker_had_goes_to_another_and_nothing_is_doubled(cluster, ray, whole, tmp_path):
    store = made(tmp_path / "s")
    killed = []

    def kill(now, note):
        working = [hand.actor for hand in pool.hands if hand.state == "working" and not hand.actor.dead]
        if now.steps > 5 * (1 + len(killed)) and len(killed) < 3 and working:
            killed.append(working[0])
            killed[-1].die()

    with growing(cluster, store, on_progress=kill) as pool:
        assert pool.run() == 0
    assert len(killed) == 3 == len([line for line in cluster.said if "is lost" in line])
    assert all_steps(store) == all_steps(whole) and store.steps.keys().num_rows == len(all_steps(store))
    starts = [start["start"] for start in Store(store.path).manifest["engines"]]
    assert len(set(starts)) == len(starts) > 2 * len(killed)  # none was used twice
    assert all(each["max_restarts"] == each["max_task_retries"] == 0 for each in ray.options)


def test_a_tree_is_finished_with_the_last_of_its_rows(cluster, whole, tmp_path, monkeypatch):
    """Never before: a driver that believed it would leave trees open for good."""
    store, early = made(tmp_path / "s"), []

    def take(pool, hand, report):
        for part in report.parts:
            pool.buffer.receive(part.rows, part.counters)
            pool.buffer.flush()
            trees = {tree.key: tree for tree in loading(store)()}
            early.extend(key for key in part.finished if trees[key].missing())
        return plain(pool, hand, replace(report, parts=[replace(part, rows=[]) for part in report.parts]))

    plain = Growing.take
    monkeypatch.setattr(Growing, "take", take)
    with growing(cluster, store) as pool:
        assert pool.run() == 0
    assert early == [] and all_steps(store) == all_steps(whole)


def test_what_still_wants_something_at_the_end_is_lent_again(cluster, whole, tmp_path, monkeypatch):
    store, dropped = made(tmp_path / "s"), []

    def take(pool, hand, report):
        if report.parts and not dropped:
            dropped.extend(report.parts[0].rows)
            report.parts[0].rows = []
        return plain(pool, hand, report)

    plain = Growing.take
    monkeypatch.setattr(Growing, "take", take)
    with growing(cluster, store) as pool:
        assert pool.run() == 0
    assert dropped and all_steps(store) == all_steps(whole)


@pytest.mark.parametrize("budget", [1, 150, 400])
def test_the_budget_is_kept_to_a_step_per_worker(cluster, tmp_path, whole, budget, monkeypatch):
    monkeypatch.setattr("rollouts.cluster.growing._LEAST_SLICE", 40)
    longest = max(row["tokens"] for row in all_rows(whole) if row["role"] == LARGE)
    spent, store = Counter(), made(tmp_path / "s")
    for _ in range(30):
        with growing(cluster, store, max_large_tokens=budget) as pool:
            still = pool.run()
        spent = pool.progress.tokens
        assert spent[LARGE] <= budget + 2 * longest
        if not still:
            break
        assert pool.budget_spent and spent[LARGE] >= budget
        if budget == 1:
            return
    assert all_steps(store) == all_steps(whole)


def test_of_a_lost_worker_all_that_it_was_granted_counts_as_spent(cluster, ray, tmp_path, monkeypatch):
    monkeypatch.setattr("rollouts.cluster.growing._LEAST_SLICE", 60)
    store = made(tmp_path / "s")

    def kill(now, note):
        if now.tokens[LARGE] > 30 and not ray.actors[0].dead:
            ray.actors[0].die()

    with growing(cluster, store, max_large_tokens=200, on_progress=kill) as pool:
        assert pool.run() > 0
    counted = store.steps.counters()["decoded_large"]
    assert ray.actors[0].dead and counted < 200 + 3 * 10


def test_an_interrupt_hands_in_what_there_is(cluster, whole, tmp_path):
    store = made(tmp_path / "s")

    def interrupt(now, note):
        if now.steps > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), growing(cluster, store, on_progress=interrupt) as pool:
        pool.run()
    kept, asked = all_steps(store), len(Models.asked)
    assert len(kept) >= 60
    with growing(cluster, store) as pool:
        assert pool.run() == 0
    assert all_steps(store) == all_steps(whole) and kept.items() <= all_steps(store).items()
    requests = whole.steps.counters()
    lost = asked + len(Models.asked[asked:]) - requests["requests_small"] - requests["requests_large"]
    assert lost <= 2 * 8  # what was under way at the interrupt


def test_workers_that_are_lost_one_after_the_other_end_the_run(cluster, ray, tmp_path):
    def die(now, note):
        for actor in ray.actors:
            actor.die()

    with (
        pytest.raises(BackendError, match="6 workers were lost one after the other"),
        growing(cluster, made(tmp_path / "s"), on_progress=die) as pool,
    ):
        pool.run()


def test_a_request_that_takes_worker_after_worker_with_it_ends_the_run(cluster, ray, whole, monkeypatch):
    deadly = []

    class Deadly(ScriptedScorer):
        def submit(self, question, steps):
            future, answer, path = Future(), super().submit(question, steps).result(), (question, *steps)
            deadly.extend([] if deadly else [path])
            if path == deadly[0]:
                threading.Timer(0.02, future.set_exception, [BackendError("the engine died")]).start()
            else:
                threading.Timer(0.01, future.set_result, [answer]).start()
            return future

    monkeypatch.setattr(Models, "scoring", lambda self, name, store, writers=(): nullcontext(Deadly()))
    family = Models(embedded_family("transformers"), seed=0, examples=(), store=None)
    with (
        pytest.raises(BackendError, match="5 workers were lost with the same work, the last: the engine died"),
        Asking(cluster, whole, cluster.job(whole, family, scores="scorer"), lambda note: None) as pool,
    ):
        score_store(whole, RemoteScorer(pool), in_flight=4)
    assert len(ray.actors) <= 2 + 5


def test_a_judge_that_answers_nothing_ends_the_run_with_the_first_worker(cluster, ray, whole, monkeypatch):
    class Silent(ScriptedScorer):
        def submit(self, question, steps):
            (future := Future()).set_exception(RequestsFailed("scorer: 20 of the first 20 questions failed"))
            return future

    monkeypatch.setattr(Models, "scoring", lambda self, name, store, writers=(): nullcontext(Silent()))
    family = Models(embedded_family("transformers"), seed=0, examples=(), store=None)
    with (
        pytest.raises(RequestsFailed, match="20 of the first 20 questions failed"),
        Asking(cluster, whole, cluster.job(whole, family, scores="scorer"), lambda note: None) as pool,
    ):
        score_store(whole, RemoteScorer(pool), in_flight=4)
    assert len(ray.actors) == 2 and cluster.said == []


def test_what_no_worker_could_open_is_said_at_once(cluster, ray, tmp_path, monkeypatch):
    def broken():
        raise BackendError("small: out of memory")

    monkeypatch.setattr(Models, "failing", broken)
    with (
        pytest.raises(BackendError, match="Worker . cannot start: small: out of memory"),
        growing(cluster, made(tmp_path / "s")) as pool,
    ):
        pool.run()
    assert len(ray.actors) == 2


def test_another_package_on_a_worker_is_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "package", lambda: {**package(), "sources": "0123"})
    with (
        pytest.raises(ConfigError, match=r"has another trim-routing: .* there, .*\(0123\) here"),
        growing(cluster, made(tmp_path / "s")) as pool,
    ):
        pool.run()


def test_a_worker_whose_models_are_others_is_refused(cluster, tmp_path, monkeypatch):
    """A folder that is not there on the head has another name than where it is: stores would differ by machine."""
    store = made(tmp_path / "s")
    other = {**store.manifest["process"], "small": {"model": "/there/s"}}
    monkeypatch.setattr(Models, "process", lambda self, cap, labels: other)
    with pytest.raises(StoreError, match="Worker .*small.model is 's' there and '/there/s' here"):
        with growing(cluster, store) as pool:
            pool.run()


def test_scores_grades_and_walks_are_those_of_one_process(cluster, ray, whole, tmp_path):
    score_store(whole, ScriptedScorer())
    grade_store(whole, make_grader("exact"))
    store = made(tmp_path / "s")
    with growing(cluster, store) as pool:
        pool.run()
    family = Models(embedded_family("transformers"), seed=0, examples=(), store=None)
    notes = []
    with Asking(cluster, store, cluster.job(store, family, scores="scorer"), notes.append) as pool:
        scorer = RemoteScorer(pool)
        threading.Timer(0.02, ray.actors[-1].die).start()
        assert score_store(store, scorer, in_flight=4).rows > 0
    with RemoteGrader(cluster, store, make_grader("exact"), "exact", notes.append) as grader:
        assert grade_store(store, grader).rows > 0
        lent, grader._pool.hands = grader._pool.hands, []  # as when the only worker is lost and another one starts
        threading.Timer(0.02, lambda: setattr(grader._pool, "hands", lent)).start()
        assert grader.grade_many([("1", r"\boxed{1}")])[0].correct
    assert notes and "answers a second" in notes[-1]
    for table in ("scores", "grades"):
        name = store.names(table)[0]
        assert table_of(store, table, name) == table_of(whole, table, name)

    def router(columns):
        return columns["step"] % 2

    with Asking(cluster, store, cluster.job(store, family, writes=True, scores="scorer"), notes.append) as pool:
        writers = {role: RemoteWriter(pool, role) for role in ROLES}
        added = expand_on_policy(store, writers, RemoteScorer(pool), router, PROBLEMS)
    here = {role: ScriptedWriter(role) for role in ROLES}
    assert added == expand_on_policy(whole, here, ScriptedScorer(), router, PROBLEMS) > 0
    assert all_steps(store) == all_steps(whole)


def table_of(store, kind, name):
    table = getattr(store, kind)(name)
    return sorted(str(sorted(row.items())) for part in table.read() for row in part.to_pylist())


def test_a_worker_never_writes_to_the_store(tmp_path):
    store = made(tmp_path / "s")
    desk = Desk(Job(str(tmp_path / "elsewhere"), store.manifest), 5)
    desk.record_engine({"role": SMALL})
    desk.identify(SMALL, {"weights": "1"})
    desk.note(anything=1)
    assert desk.manifest["engines"] == [{"role": SMALL, "start": 5}] and desk.next_start() == 6
    assert not (tmp_path / "elsewhere").exists() and Store(store.path).manifest["engines"] == []


def test_gpus_of_a_worker_are_those_that_its_models_name():
    config = embedded_family("transformers")
    config = config.model_copy(
        update={"small": config.small.model_copy(update={"devices": (0,)}),
                "large": config.large.model_copy(update={"devices": (0, 1)})}
    )  # fmt: skip
    assert Job("s", {}, config, writes=True).gpus == 2
    assert Job("s", {}, config, scores="scorer").gpus == Job("s", {}, grader="exact").gpus == 0
    assert Job("s", {}, config, writes=True, scores=SMALL).opens == [SMALL, LARGE]


def needing_gpus(store, count):
    config = embedded_family("transformers")
    scorer = config.scorer.model.model_copy(update={"devices": tuple(range(count))})
    config = config.model_copy(update={"scorer": config.scorer.model_copy(update={"model": scorer})})
    return Job(str(store.path), store.manifest, config, scores="scorer")


@pytest.mark.parametrize("machines", [[{"CPU": 8.0}], [{"CPU": 8.0, "GPU": 1.0}], []])
def test_a_worker_that_needs_more_gpus_than_this_machine_has_is_refused_before_any_starts(
    cluster, ray, tmp_path, machines
):
    ray.machines, store = machines, made(tmp_path / "s")
    most = max((int(each.get("GPU", 0)) for each in machines), default=0)
    before = store.manifest.copy()
    with pytest.raises(ConfigError, match=f"takes 2 GPUs of one machine.*this one has {most}. Name fewer"):
        Asking(replace(cluster, grows=False), store, needing_gpus(store, 2), print).__enter__()
    assert not ray.actors and store.manifest == before
    with Asking(cluster, store, needing_gpus(store, 2), print):  # where machines may still come
        assert len(ray.actors) == cluster.workers


def test_what_workers_wait_for_is_said(cluster, ray, tmp_path, monkeypatch):
    ray.machines, ray.taken = [{"CPU": 4.0, "GPU": 2.0}] * 2, {"GPU": 3.0}
    store = made(tmp_path / "s")
    pool = Asking(cluster, store, needing_gpus(store, 2), print)
    monkeypatch.setattr(pool, "_start", lambda: pool.hands.append(pools.Hand(0, None)))
    Pool.__enter__(pool)
    assert pool.note() == "0 of 2 workers: each takes a core and 2 GPUs"
    monkeypatch.setattr(pools, "_SOON", -1.0)
    assert pool.note().endswith("and 2 GPUs; free are 8 cores and 1 GPU")
    pool.hands[0].state = "opening"
    assert pool.note() == "0 of 2 workers: each takes a core and 2 GPUs"


def test_folders_of_models_are_named_from_the_root_on(tmp_path, monkeypatch):
    config = embedded_family("transformers")
    monkeypatch.chdir(Path(config.small.model).parent)
    relative = config.model_copy(update={"small": config.small.model_copy(update={"model": "small"})})
    job = Cluster(None, 1).job(made(tmp_path / "s"), Family(relative))
    assert job.config.small.model == config.small.model and job.config.date is not None
    served = _anywhere(GeneratorConfig(model="small", backend="server", url=("http://a/v1",)))  # a name, and a folder
    assert (served.model, served.tokenizer) == ("small", config.small.model)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "expected `local`, `auto` or HOST:PORT"),
        ("ray://host:10001", "expected `local`, `auto` or HOST:PORT"),
        ("127.0.0.1:9", "nobody answers there"),
    ],
)
def test_addresses_without_a_cluster_are_refused_at_once(address, message):
    with pytest.raises(ConfigError, match=message), connected(address, 1, print):
        pass


class Module(Threads):
    """Ray as it is connected to: `pause` is how long that takes."""

    __spec__ = object()

    def __init__(self, pause=0.0):
        super().__init__()
        self.pause, self.settings, self.ended = pause, {}, False

    def init(self, **settings):
        self.settings, self.thread = settings, threading.current_thread()
        time.sleep(self.pause)

    def shutdown(self):
        self.ended = True


def test_connecting_has_defaults_and_is_ended(monkeypatch):
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is as it was at the end
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "ray", module := Module())
    with connected("local", 3, print) as cluster:
        assert cluster.workers == 3 and module.settings["num_cpus"] >= 3
        module.thread.join(0.2)
        assert module.thread.is_alive()  # what it has started would end with it
    module.thread.join(5)
    assert (
        not module.thread.is_alive()
        and module.ended
        and module.settings["log_to_driver"] is module.settings["include_dashboard"] is False
    )
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == os.environ["RAY_worker_niceness"] == "0"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_connecting_has_a_deadline(monkeypatch):
    monkeypatch.setattr(pools, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setitem(sys.modules, "ray", Module(pause=2.0))
    with pytest.raises(ConfigError, match="--ray auto: no connection .no answer within"), connected("auto", 1, print):
        pass


def test_ray_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs ray, .*pip install 'trim-routing\[ray\]'"):
        with connected("local", 1, print):
            pass


def test_workers_without_a_cluster_are_refused():
    with pytest.raises(ConfigError, match="--ray local"):
        Machines(workers=2)


@pytest.mark.parametrize("flag", ["--sequential", "--dry-run"])
def test_what_runs_in_one_process_is_refused_with_a_cluster(tmp_path, capsys, flag):
    assert main(["generate", str(tmp_path / "s"), flag, "--ray", "local"]) == 2
    assert flag in capsys.readouterr().err and not (tmp_path / "s").exists()
