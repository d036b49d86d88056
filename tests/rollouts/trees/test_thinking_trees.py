"""Trees of solutions that think: what is an answer, who writes it, and which stores they go on in."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from handmade import process
from made_stores import PROBLEMS, ScriptedScorer, finished, grown
from scripted_thinking import ThinkingWriter, splitting

from rollouts.errors import ConfigError, StoreError
from rollouts.files.sealed import write_sealed
from rollouts.store.store import Store
from rollouts.tasks.answers import final_answer
from rollouts.text.splitting import BLANK_LINE
from rollouts.text.steps import CLOSE, LARGE, ROLES, SMALL
from rollouts.trees.annotate import score_store
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees
from rollouts.trees.stats import always, oracle, store_statistics
from rollouts.trees.verify import verify_store

AUTHORS = ["router", SMALL, LARGE]


@pytest.fixture(scope="module", params=[(by, cap) for by in AUTHORS for cap in (None, 1)], ids=str)
def store(request, tmp_path_factory):
    by, cap = request.param
    path = tmp_path_factory.mktemp("thinking") / "store"
    return finished(path, cap, kind=ThinkingWriter, splitting=splitting(answer_by=by))


def author(store):
    by = store.splitting.steps.answer_by
    return by if by in ROLES else None


def answers(store):
    """All nodes of answers, with their trees."""
    for tree in load_trees(store, PROBLEMS, None, store.manifest["process"]["max_escalations"]):
        yield from ((tree, node) for node in tree.nodes.values() if any(CLOSE in step for step in node.steps))


def test_the_store_is_sound(store):
    findings = verify_store(store)
    assert not findings.problems and not any("belong to no step" in fact for fact in findings.facts)
    trees = compile_store(store, cache=False)
    assert trees.meta["splitting"] == store.splitting.described() and len(trees.root) == 2 * len(PROBLEMS)


def test_nothing_is_an_answer_within_the_block(store):
    trees = compile_store(store, cache=False)
    for row in range(trees.nodes):
        before = CLOSE not in "".join(path_to(trees, row))
        for action in (0, 1):
            text = trees.proposal(row, action)
            if before and text:
                assert "\\boxed" in text and not trees.has_answer[row, action] and trees.correct[row, action] == -1
            elif text and trees.correct[row, action] >= 0:
                assert trees.correct[row, action] == (final_answer(text) == "7") and trees.has_answer[row, action]


def path_to(trees, row):
    texts = []
    while trees.depth[row]:
        before, action = np.argwhere(trees.child == row)[0]
        texts.insert(0, trees.proposal(before, action))
        row = before
    return texts


def test_the_answer_is_its_authors_and_the_others_at_no_tokens(store):
    alone, seen = author(store), 0
    for _, node in answers(store):
        if alone is None:
            seen += node.proposals[SMALL].text != node.proposals[LARGE].text if len(node.proposals) == 2 else 0
            continue
        other = ROLES[1 - ROLES.index(alone)]
        assert node.proposals[alone].text == node.proposals[other].text
        assert node.proposals[alone].tokens > 0 == node.proposals[other].tokens
        assert node.accepted_tokens(SMALL) == node.accepted_tokens(LARGE) == node.proposals[alone].tokens
        seen += 1
    assert seen


def test_only_the_author_is_asked_for_an_answer(tmp_path):
    for by in (SMALL, LARGE):
        asked = []
        store = Store.create(tmp_path / by, process(1, splitting=splitting(answer_by=by)))
        store.add_problems(PROBLEMS)
        writers = {role: ThinkingWriter(role, asked=asked) for role in ROLES}
        Grower(writers, StepBuffer(store.steps)).run(load_trees(store, PROBLEMS, 2, 1))
        of_answers = {role for _, _, steps, role, _ in asked if any(CLOSE in step for step in steps)}
        assert of_answers == {by} and {role for *_, role, _ in asked} == set(ROLES)
        assert len(asked) == len(set(asked))
        before = store.steps.keys().num_rows
        Grower({}, StepBuffer(store.steps)).run(load_trees(store, PROBLEMS, 2, 1))
        assert store.steps.keys().num_rows == before and not verify_store(store).problems


def test_what_the_large_model_writes_alone_is_paid_whatever_is_decided(store):
    trees = compile_store(store, cache=False)
    alone = trees.large_alone
    assert alone.any() == (author(store) == LARGE)
    found = always(trees, trees.select(), CONTINUE_SMALL)
    assert (found[1] > 0).all() == alone.any() == found[1].any()
    both = always(trees, trees.select(), ESCALATE_LARGE)
    reachable, tokens = oracle(trees)
    roots = trees.root[trees.select()]
    assert (tokens[roots] <= np.where(found[0] == 1, found[1], np.inf)).all() and (both[1] > 0).all()
    assert not alone.any() or (tokens[roots] > 0).all()


def test_stats_tell_which_blocks_were_closed_by_force(store):
    reasons = store_statistics(store)["stop_reasons"]
    assert reasons["small forced"] > 0 and reasons["large forced"] > 0


def test_another_splitting_is_refused_and_none_is_blank_lines(tmp_path):
    thinking = splitting(max_thinking_tokens=100)
    store = grown(tmp_path / "s", kind=ThinkingWriter, splitting=thinking)
    assert Store.create(store.path, process(splitting=thinking)).splitting == store.splitting
    with pytest.raises(StoreError, match="splitting.max_thinking_tokens is 100 there and 200 here"):
        Store.create(store.path, process(splitting=splitting(max_thinking_tokens=200)))
    with pytest.raises(StoreError, match="splitting.name is 'thinking' there and 'blank-line' here"):
        Store.create(store.path, process())
    plain = grown(tmp_path / "plain")
    assert plain.splitting == BLANK_LINE and "splitting" not in plain.manifest["process"]
    Store.create(plain.path, process(splitting=BLANK_LINE.described()))  # as later versions name it
    with pytest.raises(StoreError, match="splitting.name is 'blank-line' there and 'thinking' here"):
        Store.create(plain.path, process(splitting=thinking))


def test_a_splitting_of_a_later_version_is_named(tmp_path):
    store = finished(tmp_path / "s", kind=ThinkingWriter, splitting=splitting())
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["process"]["splitting"]["version"] = 7
    write_sealed(file, manifest)
    with pytest.raises(ConfigError, match="version 7"):
        compile_store(Store(store.path), cache=False)


def test_reading_a_store_runs_nothing_that_its_manifest_names(tmp_path):
    own = {"name": "no_such_module:Splitter", "version": 1, "options": {}}
    store = finished(tmp_path / "s", splitting=own)
    assert compile_store(store, cache=False).meta["splitting"] == own and store.manifest["schema_version"] == 2
    assert not verify_store(Store(store.path)).problems
    assert grown(tmp_path / "plain", splitting=BLANK_LINE.described()).manifest["schema_version"] == 1


def test_trees_are_read_back_as_they_were_written(store, tmp_path):
    """With half of the shards gone, what is missing is written again, and the rest is where it was."""
    copy = Store(shutil.copytree(store.path, tmp_path / "copy"))
    cap = copy.manifest["process"]["max_escalations"]

    def shape(of):
        return {
            tree.key: {
                node.key: (node.steps, node.used_tokens, node.thinking, node.escalations, node.proposals)
                for node in tree.nodes.values()
            }
            for tree in load_trees(of, PROBLEMS, 2, cap)
        }

    before = shape(copy)
    assert all(tree.missing() == 0 for tree in load_trees(copy, PROBLEMS, 2, cap))
    for shard in copy.steps.shards():
        shard.unlink()
    copy = Store(copy.path)
    Grower({role: ThinkingWriter(role) for role in ROLES}, StepBuffer(copy.steps)).run(
        load_trees(copy, PROBLEMS, 2, cap)
    )
    assert shape(copy) == before
    assert score_store(copy, ScriptedScorer()).rows == 0  # the same texts in the same places
