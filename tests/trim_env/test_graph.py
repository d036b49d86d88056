"""The states that caps let walks reach, against a search one state at a time; walks and passes over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scripted_store import scripted_store

from rollouts.errors import StoreError
from rollouts.trees.arrays import graph_of
from rollouts.trees.compile import compile_store
from trim_env.graph import advance, starts, walk
from trim_env.tables import decision_tables

CAPS = [{}, {"max_escalations": 1}, {"max_large_tokens": 8}, {"max_escalations": 2, "max_large_tokens": 11}]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return compile_store(scripted_store(tmp_path_factory.mktemp("graph") / "s", 40), cache=False)


@pytest.fixture(scope="module", params=CAPS, ids=str)
def tables(request, trees):
    return decision_tables(trees, "test", **request.param)


def following(tables, state):
    """Return the state after each action, or None at an end, straight from the rules."""
    (row, used, left), trees = state, tables.trees
    most, cap = tables.max_escalations, tables.max_large_tokens
    after = []
    for action in (0, 1):
        if action and (used == most or (cap is not None and left == 0)):
            action = 0
        needed = int(trees.tokens[row, 1]) * action
        accepted = int(action and (cap is None or needed <= left))
        child = int(trees.child[row, accepted])
        rest = 0 if cap is None else left - min(needed, left)
        after.append(None if child < 0 else (child, used + accepted if most is not None else 0, rest))
    return after


def test_the_graph_holds_every_reachable_state_once_and_links_them(tables):
    todo = [(int(root), 0, tables.max_large_tokens or 0) for root in tables.roots]
    links = {}
    while todo:
        state = todo.pop()
        if state not in links:
            links[state] = following(tables, state)
            todo += [each for each in links[state] if each is not None]
    graph = tables.graph
    states = [*zip(graph.rows.tolist(), *(each.tolist() for each in graph.spent), strict=True)]
    assert len(states) == len(set(states)) and set(states) == set(links)
    for place, state in enumerate(states):
        found = [None if child == len(states) else states[child] for child in graph.child[place]]
        assert found == links[state]
    assert [states[root][0] for root in graph.roots] == tables.roots.tolist()
    order = np.concatenate([np.arange(len(states))[level] for level in graph.levels])
    assert (order == np.arange(len(states))).all()
    assert (graph.child > np.arange(len(states))[:, None]).all()  # what is later comes later


def test_a_walk_visits_what_it_may_and_ends_every_tree_once(tables):
    rate, ended = 0.4, np.zeros(len(tables.indices))
    for done in walk(tables, lambda rows, _: np.full(len(rows), rate)):
        assert (tables.trees.tree[done.rows] == tables.indices[done.tree]).all()
        end = done.moved.child < 0
        ended += np.bincount(done.tree[end], done.mass[end], len(ended))
    assert ended == pytest.approx(1)
    closed = ~tables.graph.open
    share = np.where(closed, 0.0, rate)
    reach = tables.graph.reach(np.stack([1 - share, share], axis=1))
    assert reach[-1] == pytest.approx(len(ended))


def test_walks_that_are_remembered_are_never_merged(trees):
    """As many walks as paths, with what was accepted on each."""
    tables, kept = decision_tables(trees, "test"), []

    def accept(rows, going, actions):
        kept.append((rows, going, actions))

    paths = sum((done.moved.child < 0).sum() for done in walk(tables, lambda rows, _: np.full(len(rows), 0.5), accept))
    graph = tables.graph
    counted = graph.backward(lambda level, later: later.sum(axis=1), 1.0)
    assert paths == counted[graph.roots].sum() > len(tables.indices)
    assert all((rows >= 0).all() and len(rows) == len(going) == len(actions) for rows, going, actions in kept)


def test_a_step_that_is_closed_acts_as_continuing(tables):
    rows, spent = starts(tables)
    none = spent._replace(escalations=spent.escalations + (tables.max_escalations or 0), left=0 * spent.left)
    both = [advance(tables, rows, none, np.full(len(rows), action)) for action in (0, 1)]
    bound = tables.max_escalations is not None or tables.max_large_tokens is not None
    assert (both[0].child == both[1].child).all() == bound
    assert (both[1].accepted == 0).all() == bound


def test_what_is_missing_is_marked_and_an_error_where_it_is_needed(tmp_path):
    cut = compile_store(scripted_store(tmp_path / "s", 20, max_escalations=1), cache=False)
    free = replace(decision_tables(cut, "test"), max_escalations=None)
    assert free.graph.missing.any() and not decision_tables(cut, "test").graph.missing.any()
    with pytest.raises(StoreError, match="K = 1"):
        list(walk(free, lambda rows, _: np.full(len(rows), 0.5)))


def test_all_nodes_are_a_graph_by_depth(trees):
    graph = graph_of(trees)
    assert [set(trees.depth[level].tolist()) for level in graph.levels] == [{d} for d in range(len(graph.levels))]
    longest = graph.backward(lambda level, later: 1 + later.max(axis=1))
    assert longest[trees.root].max() == len(graph.levels)
    some = np.flatnonzero(np.isin(trees.tree, [3, 5]))
    part = graph_of(trees, some)
    reach = part.reach(np.full((len(some), 2), 0.5))
    assert reach[-1] == pytest.approx(2) and (some[part.roots] == trees.root[[3, 5]]).all()
