"""Growing, storing, compiling and walking trees, against brute force over scripted models."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from handmade import ScriptedScorer, ScriptedWriter, ShuffledWriter, problem, process
from reference_walk import walk

from rollouts.cli.generate import run_grading, run_scoring
from rollouts.errors import BackendError, ConfigError, StoreError
from rollouts.store.rows import Rows
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.likelihood import STATISTICS
from rollouts.text.steps import LARGE, ROLES, SMALL, Prefix, solution_text
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.arrays import MISSING
from rollouts.trees.columns import COLUMNS, columns_of
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, grow_sequentially, load_trees
from rollouts.trees.live import LiveTrees
from rollouts.trees.on_policy import Episode, act, expand_on_policy, load_router, observe
from rollouts.trees.stats import oracle, split_statistics
from rollouts.trees.tree import RolloutTree
from rollouts.trees.verify import verify_store
from trim_env import graph
from trim_env.tables import decision_tables

PROBLEMS = [problem(f"p{i}", "train" if i % 2 else "test") for i in range(6)]


def writers(asked=None):
    return {role: ScriptedWriter(role, asked=asked) for role in ROLES}


def grow(path, max_escalations=None, replicas=2, who=None, flush_rows=20_000, **options) -> Store:
    store = Store.create(path, process(max_escalations))
    store.add_problems(PROBLEMS)
    trees = load_trees(store, PROBLEMS, replicas, max_escalations, chunk=4)
    Grower(who or writers(), StepBuffer(store.steps, rows=flush_rows), **options).run(trees)
    return store


def finish(store: Store) -> Store:
    score_store(store, ScriptedScorer())
    grade_store(store, make_grader("exact"))
    return store


def all_steps(store: Store) -> dict:
    rows = itertools.chain.from_iterable(table.to_pylist() for table in store.steps.read())
    return {(r["problem"], r["replica"], r["prefix"], r["role"]): (r["text"], r["tokens"]) for r in rows}


def paths(item, replica, limit=99):
    """Yield every path of the scripted models as (actions, texts), by brute force."""
    who = writers()

    def extend(texts, actions):
        for action, role in enumerate(ROLES):
            if sum(actions) + action > limit:
                continue
            step = who[role].step(Prefix(item.id, item.question, replica, (), 0), texts)
            if step.terminal:
                yield (*actions, action), (*texts, step.text)
            else:
                yield from extend((*texts, step.text), (*actions, action))

    yield from extend((), ())


def follow(tree: RolloutTree, actions):
    node, texts = tree.root, []
    for action in actions:
        step = node.proposals[ROLES[action]]
        texts.append(step.text)
        node = tree.child(node, ROLES[action])
    assert node is None
    return tuple(texts)


@pytest.mark.parametrize("cap", [None, 0, 1, 2])
def test_every_path_within_the_cap_exists_and_so_does_always_large(tmp_path, cap):
    store = grow(tmp_path / "s", cap)
    limit = 99 if cap is None else cap
    for tree in load_trees(store, PROBLEMS, 2, cap):
        assert tree.missing() == 0 and tree.orphans == 0
        wanted = dict(paths(tree.problem, tree.replica, limit))
        assert all(follow(tree, actions) == texts for actions, texts in wanted.items())
        node, depth = tree.root, 0
        while node is not None:
            node, depth = tree.child(node, LARGE) if LARGE in node.proposals else pytest.fail("gap"), depth + 1
        if cap is not None:  # nothing beyond the closure
            beyond = [n for n in tree.nodes.values() if n.escalations > cap and not n.all_large]
            assert not beyond


@pytest.mark.parametrize("cap", [None, 0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_answers_in_any_order_give_the_same_closed_trees(tmp_path, cap, seed):
    shuffled = grow(tmp_path / "a", cap, who={role: ShuffledWriter(role, seed) for role in ROLES})
    ordered = grow(tmp_path / "b", cap, who={role: ScriptedWriter(role, merge=2) for role in ROLES})
    assert all(tree.missing() == 0 for tree in load_trees(shuffled, PROBLEMS, 2, cap))
    assert all_steps(shuffled) == all_steps(ordered)


def test_large_is_asked_for_single_steps_and_nothing_twice(tmp_path):
    asked = []
    grow(tmp_path / "s", who=writers(asked))
    assert len({item[:4] for item in asked}) == len(asked)
    assert not any(whole for *_, role, whole in asked if role == LARGE)
    assert all(whole for *_, role, whole in asked if role == SMALL)
    written = len(all_steps(Store(tmp_path / "s")))
    small_requests = sum(role == SMALL for *_, role, _ in asked)
    assert small_requests < written / 3  # most small proposals come from longer requests


@pytest.mark.parametrize("cap", [None, 1])
def test_one_role_at_a_time_gives_the_same_store(tmp_path, cap):
    together = grow(tmp_path / "a", cap)
    store = Store.create(tmp_path / "b", process(cap))
    store.add_problems(PROBLEMS)
    buffer = StepBuffer(store.steps)

    class Opened:
        def __init__(self, role):
            self.writer = ScriptedWriter(role)

        def __enter__(self):
            return self.writer

        def __exit__(self, *_):
            pass

    left = grow_sequentially(Opened, lambda: load_trees(store, PROBLEMS, 2, cap), lambda who: Grower(who, buffer))
    assert left == 0
    assert all_steps(store) == all_steps(together)


class DyingWriter(ScriptedWriter):
    def __init__(self, role, after, asked):
        super().__init__(role, asked=asked)
        self.left = after

    def submit(self, prefix, *, whole):
        self.left -= 1
        if self.left < 0:
            raise BackendError("large: gone")
        return super().submit(prefix, whole=whole)


def test_a_dead_model_loses_nothing_and_the_rest_is_generated_once(tmp_path):
    reference = all_steps(grow(tmp_path / "whole"))
    asked: list = []
    before: dict = {}
    for attempt in range(1, 40):
        who = {SMALL: ScriptedWriter(SMALL, asked=asked), LARGE: DyingWriter(LARGE, attempt, asked)}
        try:
            grow(tmp_path / "cut", who=who, in_flight=3)
        except BackendError as error:
            assert "large" in str(error)
        now = all_steps(Store(tmp_path / "cut"))
        assert all(now[key] == value for key, value in before.items())
        before = now
        if now == reference:
            break
    assert before == reference
    assert len({item[:4] for item in asked}) == len(asked)


@pytest.mark.parametrize("written", [False, True])
def test_an_interrupt_while_a_shard_is_written_doubles_no_step(tmp_path, monkeypatch, written):
    reference = all_steps(grow(tmp_path / "whole"))
    replace, calls = os.replace, itertools.count()

    def interrupted(source, target):
        first = str(target).endswith(".parquet") and "steps" in str(target) and next(calls) == 0
        if written or not first:
            replace(source, target)
        if first:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    asked: list = []
    with pytest.raises(KeyboardInterrupt):
        grow(tmp_path / "cut", who=writers(asked), in_flight=3, flush_rows=20)
    store = Store(tmp_path / "cut")
    assert 0 < store.steps.keys().num_rows == len(all_steps(store)) < len(reference)
    grow(tmp_path / "cut", who=writers(asked))
    assert store.steps.keys().num_rows == len(reference) and all_steps(store) == reference
    assert len({item[:4] for item in asked}) == len(asked)


def test_token_budget_stops_and_resumes(tmp_path):
    store = Store.create(tmp_path / "s", process())
    store.add_problems(PROBLEMS)
    for _ in range(50):
        grower = Grower(writers(), StepBuffer(store.steps), max_large_tokens=40)
        still_open = grower.run(load_trees(store, PROBLEMS, 2, None))
        assert grower.progress.tokens[LARGE] < 40 + 10 * 20  # what was under way may finish
        if not still_open:
            break
        assert grower.budget_spent
    assert all_steps(store) == all_steps(grow(tmp_path / "whole"))


class LongWriter(ShuffledWriter):
    """Answers late and in any order, the large model in steps of 53 to 59 tokens."""

    def step(self, prefix, steps):
        made = super().step(prefix, steps)
        return replace(made, tokens=made.tokens + 50 * (self.role == LARGE))


@pytest.mark.parametrize("cap", [None, 1])
@pytest.mark.parametrize("budget", [1, 40, 500])
def test_a_token_budget_is_not_exceeded_by_what_is_under_way(tmp_path, cap, budget):
    store = Store.create(tmp_path / "s", process(cap))
    store.add_problems(PROBLEMS)
    grower = Grower(
        {role: LongWriter(role, budget) for role in ROLES}, StepBuffer(store.steps), max_large_tokens=budget
    )
    assert grower.run(load_trees(store, PROBLEMS, 2, cap)) and grower.budget_spent
    assert budget <= grower.progress.tokens[LARGE] <= budget + 59
    assert not grower.progress.under_way
    free = Grower({role: LongWriter(role, 0) for role in ROLES}, StepBuffer(store.steps))
    assert free.run(load_trees(store, PROBLEMS, 2, cap)) == 0 and free.progress.tokens[LARGE] > 1000 - budget


def test_no_tree_is_begun_once_the_budget_is_spent(tmp_path):
    """Not even its small proposals are asked for: they would be hours of a run that was to stop."""
    store = Store.create(tmp_path / "s", process())
    store.add_problems(PROBLEMS)
    asked = []
    grower = Grower(writers(asked), StepBuffer(store.steps), in_flight=2, max_large_tokens=1)
    assert grower.run(load_trees(store, PROBLEMS, 2, None)) and grower.budget_spent
    assert len({place[:2] for place in asked}) == 2


def test_trees_that_come_later_are_grown_and_a_budget_may_be_raised(tmp_path):
    """As a worker of a cluster is fed: trees, none for now, trees; requests wait for more of the budget."""
    store = Store.create(tmp_path / "s", process())
    store.add_problems(PROBLEMS)
    trees, finished = iter(load_trees(store, PROBLEMS, 2, None)), []

    def fed():
        for number in range(len(PROBLEMS) * 2):
            if number % 4 == 3:
                grower.max_large_tokens += 400
                grower.wake()
                yield None
            yield next(trees)
        while grower._waiting:
            grower.max_large_tokens += 400
            grower.wake()
            yield None

    grower = Grower(
        writers(), StepBuffer(store.steps), max_large_tokens=1, on_finished=lambda tree: finished.append(tree.key)
    )
    grower.raisable = True
    assert grower.run(fed()) == 0 and not grower.budget_spent
    assert all_steps(store) == all_steps(grow(tmp_path / "whole"))
    assert sorted(finished) == sorted((each.id, replica) for each in PROBLEMS for replica in range(2))


def test_a_run_that_is_stopped_keeps_what_came_and_asks_nothing_more(tmp_path):
    store = Store.create(tmp_path / "s", process())
    store.add_problems(PROBLEMS)
    asked = []

    class Stopping(ScriptedWriter):
        def submit(self, prefix, *, whole):
            if len(asked) == 20:
                grower.stop()
            return super().submit(prefix, whole=whole)

    grower = Grower({role: Stopping(role, asked=asked) for role in ROLES}, StepBuffer(store.steps), in_flight=2)
    grower.run(load_trees(store, PROBLEMS, 2, None))
    kept = all_steps(store)
    assert len(asked) < 30 and kept
    grow(tmp_path / "s", who=writers(asked))
    assert all_steps(store) == all_steps(grow(tmp_path / "whole"))
    assert len({item[:4] for item in asked}) == len(asked)


def test_progress_is_told_before_the_first_answer(tmp_path):
    class Slow(ScriptedWriter):
        def submit(self, prefix, *, whole):
            future, answer = Future(), super().submit(prefix, whole=whole).result()
            threading.Timer(0.2, future.set_result, [answer]).start()
            return future

    store = Store.create(tmp_path / "s", process())
    told = []
    grower = Grower(
        {role: Slow(role, depth=1) for role in ROLES},
        StepBuffer(store.steps),
        on_progress=lambda now: told.append((now.steps, now.under_way)),
    )
    grower.run(load_trees(store, PROBLEMS, 1, None))
    assert told[0] == (0, len(PROBLEMS)) and told[-1] == (2 * len(PROBLEMS), 0)


def test_of_duplicate_keys_the_first_wins(tmp_path):
    store = finish(grow(tmp_path / "s"))
    rows = store.steps.read_shard(store.steps.shards()[0]).to_pydict()
    rows["text"] = ["other\n\n"] * len(rows["text"])
    before = all_paths_of(store)
    store.steps.append(rows)
    assert all_paths_of(store) == before


def all_paths_of(store):
    return [sorted(n.steps for n in tree.nodes.values()) for tree in load_trees(store, PROBLEMS, 2, None)]


def test_compaction_keeps_every_row_once(tmp_path):
    store = grow(tmp_path / "s")
    rows, counters = all_steps(store), store.steps.counters()
    duplicate = store.steps.read_shard(store.steps.shards()[0]).to_pydict()
    store.steps.append(duplicate)
    store.steps.compact()
    assert len(store.steps.shards()) == 1 and store.steps.keys().num_rows == len(rows)
    assert all_steps(store) == rows and store.steps.counters() == counters
    store.steps.append(duplicate)  # numbering goes on after compaction
    assert len(store.steps.shards()) == 2


@pytest.mark.parametrize("cap", [None, 1])
def test_compiled_walks_equal_brute_force(tmp_path, cap):
    store = finish(grow(tmp_path / "s", cap))
    trees = compile_store(store, cache=False)
    seen = columns_of(trees)
    who, scorer = writers(), ScriptedScorer()
    generator = np.random.default_rng(0)
    for index in trees.select():
        item = next(p for p in PROBLEMS if p.id == trees.problem_ids[trees.problem[index]])
        replica = int(trees.replica[index])
        for _ in range(6):
            plan = generator.integers(0, 2, 30)
            if cap is not None:
                plan = plan * (np.cumsum(plan) <= cap)
            where = {"t": 0}

            def policy(rows, plan=plan, where=where):
                where["t"] += 1
                return np.array([plan[where["t"] - 1]])

            got = walk(trees, np.array([index]), policy)
            texts, large, steps, scores, node = (), 0, 0, [], trees.root[index]
            while True:
                role = ROLES[plan[steps]]
                prefix = Prefix(item.id, item.question, replica, (), 0)
                assert seen["min_score"][node] == pytest.approx(min(scores, default=1.0))
                assert seen["product_score"][node] == pytest.approx(np.prod(scores) if scores else 1.0)
                assert trees.score[node, 0] == pytest.approx(
                    scorer.of(item.question, (*texts, who[SMALL].step(prefix, texts).text))
                )
                step = who[role].step(prefix, texts)
                texts = (*texts, step.text)
                scores.append(scorer.of(item.question, texts))
                large += step.tokens * (role == LARGE)
                node = trees.child[node, plan[steps]]
                steps += 1
                if step.terminal:
                    break
            assert got.large_tokens[0] == large and got.steps[0] == steps
            assert got.correct[0] == ("\\boxed{7}" in solution_text(texts))
            assert got.escalations[0] == sum(plan[:steps])


def test_merged_nodes_share_a_child_and_the_small_models_token_count(tmp_path):
    trees = compile_store(finish(grow(tmp_path / "s")), cache=False)
    same = (trees.child[:, 0] == trees.child[:, 1]) & (trees.child[:, 0] >= 0)
    assert same.sum() > 5
    assert (trees.accepted_tokens[same, 0] == trees.accepted_tokens[same, 1]).all()
    assert (trees.score[same, 0] == trees.score[same, 1]).all()


def test_beyond_the_cap_is_an_error_that_names_it(tmp_path):
    trees = compile_store(finish(grow(tmp_path / "s", 1)), cache=False)
    free = replace(decision_tables(trees, None), max_escalations=None)
    with pytest.raises(StoreError, match="K = 1"):
        list(graph.walk(free, lambda rows, _: (trees.depth[rows] % 3 != 2).astype(float)))


def test_a_path_of_one_model_that_is_missing_is_an_error(tmp_path):
    trees = compile_store(finish(grow(tmp_path / "s", 1)), cache=False)
    child = trees.child.copy()
    child[trees.root[:3], 1] = MISSING
    with pytest.raises(StoreError, match="3 trees lack the path of one model"):
        split_statistics(replace(trees, child=child))


def test_oracle_equals_the_best_of_all_paths(tmp_path):
    store = finish(grow(tmp_path / "s"))
    trees = compile_store(store, cache=False)
    reachable, cost = oracle(trees)
    for index in trees.select():
        item = next(p for p in PROBLEMS if p.id == trees.problem_ids[trees.problem[index]])
        replica = int(trees.replica[index])
        right = []
        for actions, texts in paths(item, replica):
            if "\\boxed{7}" in texts[-1]:
                plan = iter(actions)
                got = walk(trees, np.array([index]), lambda rows, plan=plan: np.array([next(plan)]))
                right.append(int(got.large_tokens[0]))
        assert reachable[trees.root[index]] == bool(right)
        if right:
            assert cost[trees.root[index]] == min(right)


def test_compiling_is_cached_by_content(tmp_path):
    store = finish(grow(tmp_path / "s"))
    first = compile_store(store)
    again = compile_store(tmp_path / "s")
    assert again.meta["hash"] == first.meta["hash"] and np.array_equal(first.child, again.child)
    assert isinstance(again.child, np.memmap)
    assert split_statistics(again, "train").trees == 6


def compiled_folders(parent):
    return sorted(path.name for path in parent.iterdir())


@pytest.mark.parametrize("beside", [True, False], ids=["beside the store", "in the user's cache"])
def test_compiled_arrays_of_others_stay_and_old_ones_go(tmp_path, monkeypatch, beside):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stores = [finish(grow(tmp_path / name, replicas=1)) for name in ("one", "two")]
    for store in stores:
        shutil.copytree(store.scores("scripted").directory, store.path / "scores" / "again")
        if not beside:
            (store.path / ".compiled").write_text("not a folder")
    parents = [store.path / ".compiled" if beside else tmp_path / "cache/trim-routing/compiled" for store in stores]

    def compile_all():
        for store in stores:
            for scorer in ("scripted", "again"):
                assert isinstance(compile_store(store, scorer).child, np.memmap)

    compile_all()
    first = [compiled_folders(parent) for parent in parents]
    assert [len(found) for found in first] == ([2, 2] if beside else [4, 4])
    compile_all()
    assert [compiled_folders(parent) for parent in parents] == first
    finish(grow(stores[0].path, replicas=2))
    compile_store(stores[0], "scripted")
    now = compiled_folders(parents[0])
    assert len(now) == len(first[0]) and len(set(now) & set(first[0])) == len(now) - 1


def test_a_reader_whose_compiled_arrays_go_compiles_again(tmp_path, monkeypatch):
    store = finish(grow(tmp_path / "s", replicas=1))
    first, read = compile_store(store), np.load

    def gone(path, **options):
        monkeypatch.setattr(np, "load", read)
        shutil.rmtree(path.parent)
        return read(path, **options)

    monkeypatch.setattr(np, "load", gone)
    assert compile_store(store).meta == first.meta


@pytest.mark.parametrize(("kind", "remedy"), [("scores", "score"), ("grades", "grade")])
def test_missing_annotations_are_named_with_the_remedy(tmp_path, kind, remedy):
    store = grow(tmp_path / "s")
    if kind == "grades":
        score_store(store, ScriptedScorer(), PROBLEMS)
    with pytest.raises(StoreError, match=f"rollouts {remedy}"):
        compile_store(store)
    if kind == "scores":
        score_store(store, ScriptedScorer(), PROBLEMS[:2])
        grade_store(store, make_grader("exact"))
        with pytest.raises(StoreError, match="no score"):
            compile_store(store)


def test_scoring_shares_prefixes_and_resumes(tmp_path):
    store = grow(tmp_path / "s")
    scorer = ScriptedScorer()
    report = score_store(store, scorer, PROBLEMS[:3])
    assert scorer.paths < report.rows
    rest = score_store(store, scorer)
    assert report.rows + rest.rows == store.steps.keys().num_rows
    assert score_store(store, scorer).rows == 0
    for table in store.scores("scripted").read():
        assert len({tuple(row[name] for name in ("problem", "replica", "prefix", "role")) for row in table.to_pylist()})


class FailingScorer(ScriptedScorer):
    """Fails on one path, of those that it answers later."""

    def submit(self, question, steps):
        future = super().submit(question, steps)
        if self.paths == 3:
            future = Future()
            future.set_exception(BackendError("scorer: gone"))
        return future


def test_what_a_scorer_gave_before_and_after_a_failure_is_kept(tmp_path):
    store = grow(tmp_path / "s")
    with pytest.raises(BackendError, match="gone"):
        score_store(store, FailingScorer(), in_flight=4)
    kept = store.scores("scripted").keys().num_rows
    scorer = ScriptedScorer()
    report = score_store(store, scorer)
    assert kept > 0 and report.rows == store.steps.keys().num_rows - kept
    whole, once = grow(tmp_path / "t"), ScriptedScorer()
    score_store(whole, once)
    assert scorer.paths == once.paths - 6  # two before it, and the four that were under way
    assert sorted(scores_of(store)) == sorted(scores_of(whole))


def scores_of(store):
    return [tuple(row.values()) for part in store.scores("scripted").read() for row in part.to_pylist()]


def test_a_text_that_the_other_model_wrote_takes_its_score(tmp_path):
    store = finish(grow(tmp_path / "s"))
    shutil.rmtree(store.scores("scripted").directory)
    rows = Rows(store.attach("scores", "scripted", ScriptedScorer().process()))
    twins = 0
    for tree in load_trees(store, PROBLEMS, 2, None):
        for node in tree.nodes.values():
            for role in node.proposals:
                if role == LARGE or len(list(node.twins(role))) == 1:
                    rows.put(tree.row_key(node, role), score=0.5)
                else:
                    twins += 1
    rows.flush()
    scorer = ScriptedScorer()
    assert score_store(store, scorer).rows == twins > 0
    assert scorer.paths == 0 and {row[-1] for row in scores_of(store)} == {0.5}


class OneScorer:
    """Stands for a family: opens the scripted scorer, and counts how often."""

    scorer_name = "scripted"

    def __init__(self):
        self.opened = 0

    @contextmanager
    def open_scorer(self, store):
        self.opened += 1
        yield ScriptedScorer()


def test_score_and_grade_finish_exactly_when_nothing_is_left(tmp_path):
    store = grow(tmp_path / "s", replicas=1)
    family, grader = OneScorer(), make_grader("exact")
    run_scoring(store, family, PROBLEMS[:3])
    run_scoring(store, family, PROBLEMS[:3])
    assert family.opened == 1
    run_scoring(store, family, None)
    run_grading(store, grader, None)
    assert family.opened == 2 and not verify_store(store).problems

    orphans = {name: [] for name in store.steps.schema.names}
    for row in itertools.islice(next(store.steps.read()).to_pylist(), 10):
        for name, value in {**row, "prefix": row["prefix"] ^ 1, "terminal": True}.items():
            orphans[name].append(value)
    store.steps.append(orphans)  # more steps than scores, but no path reaches them
    run_scoring(store, family, None)
    assert family.opened == 2

    scores = store.scores("scripted")
    kept = scores.read_shard(scores.shards()[0]).slice(10).to_pydict()
    orphans["content"] = [1] * 10
    for name in kept:
        kept[name] += [0.0] * 20 if name == "score" else 2 * orphans[name]
    scores.shards()[0].unlink()
    scores.append(kept)  # as many scores as steps, but not of these
    assert scores.keys().num_rows == store.steps.keys().num_rows
    run_scoring(store, family, None)
    assert family.opened == 3
    (store.grades("exact").shards()[0]).unlink()
    run_grading(store, grader, None)
    compile_store(store, cache=False)
    assert [line for line in verify_store(store).problems if "duplicate" not in line] == []


def test_on_policy_expansion_adds_what_the_router_reaches(tmp_path):
    store = finish(grow(tmp_path / "s", 1))
    before = all_steps(store)

    def router(columns):
        signals = {"scripted.score", *(f"{role}.{name}" for role in ROLES for name in STATISTICS)}
        assert set(columns) == {*COLUMNS, *signals, "escalations", "large_tokens"}
        assert {np.shape(values) for name, values in columns.items() if name != "max_steps"} == {columns["step"].shape}
        return columns["score"] < 0.8

    added = expand_on_policy(store, writers(), ScriptedScorer(), router, PROBLEMS)
    assert added > 0
    after = all_steps(store)
    assert all(after[key] == value for key, value in before.items()) and len(after) == len(before) + added
    grade_store(store, make_grader("exact"))
    trees = compile_store(store, cache=False)
    got = walk(trees, trees.select(), lambda rows: (trees.score[rows, 0] < 0.8).astype(int))
    assert got.escalations.max() > 1
    assert (trees.child == MISSING).any()
    assert expand_on_policy(store, writers(), ScriptedScorer(), router, PROBLEMS) == 0


def test_the_command_grades_with_a_process_for_each_core(tmp_path, monkeypatch):
    asked, grader = [], make_grader("exact")

    class Recording:
        name, describe = grader.name, grader.describe

        def grade_many(self, pairs, workers=1):
            asked.append(workers)
            return grader.grade_many(pairs)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    run_grading(grow(tmp_path / "s"), Recording(), None)
    assert asked == [6]


class NarrowScorer(ScriptedScorer):
    """Has no score for what follows a path of 40 characters or more, as one with a small window."""

    def submit(self, question, steps):
        future = Future()
        scores = super().submit(question, steps).result()
        future.set_result([s if len("".join(steps[: i + 1])) < 40 else None for i, s in enumerate(scores)])
        return future


def test_a_step_without_a_score_is_never_taken_for_a_bad_one(tmp_path):
    store = grow(tmp_path / "s", 1)
    seen = []

    def router(columns):
        seen.extend(columns["score"].tolist())
        return np.ones(len(columns["score"]))

    with store.writing():
        expand_on_policy(store, writers(), NarrowScorer(), router, PROBLEMS)
    assert seen and all(0 < score <= 1 for score in seen)
    score_store(store, NarrowScorer())
    grade_store(store, make_grader("exact"))
    assert 0 < compile_store(store, cache=False).meta["left_out_trees"]
    live = LiveTrees(store, writers(), NarrowScorer())
    trees = list(load_trees(store, PROBLEMS, 2, 1))
    live.add(trees)
    episodes = [Episode(tree, tree.root) for tree in trees]
    with pytest.raises(StoreError, match=r"problem 'p\d', replica \d, has no score by 'scripted'"):
        while episodes:
            act(live, episodes, np.ones(len(observe(live, episodes)["score"])))
            episodes = [episode for episode in episodes if episode.node is not None]


def test_routers_of_ones_own_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_walker.py").write_text("def often(columns):\n    return columns['escalations'] < 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    columns = {"score": np.array([0.2, 0.7]), "escalations": np.array([1.0, 2.0])}
    for name, wanted in (("own_walker:often", [1, 0]), ("threshold:0.5", [1, 0]), ("random:1", [1, 1])):
        assert load_router(name)(columns).tolist() == wanted
    for name, message in (
        ("own_walker:seldom", "seldom"),
        ("no_such_walker:f", "module no_such_walker cannot be imported"),
        ("threshold:high", "expected a number after the colon"),
        ("treshold:0.5", "Did you mean 'threshold'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_router(name)
