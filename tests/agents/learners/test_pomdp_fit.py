"""Estimates: from labels, by EM; what they are compared with is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_pomdps import made_trees

from agents.learners.pomdp.dynamics import ends_right, wilson
from agents.learners.pomdp.fit import estimate
from agents.learners.pomdp.latent import labelled
from agents.learners.pomdp.sample import sample, score_edges
from agents.routers.pomdp.model import as_feature, to_bins
from rollouts.errors import ConfigError, DataError
from rollouts.trees.columns import columns_of
from trim_env.features import schema_named


@pytest.fixture(scope="module")
def trees():
    return made_trees()


@pytest.fixture(scope="module")
def silent(trees):
    """The same trees without labels."""
    return replace(trees, label=np.full_like(trees.label, -1))


def classes_by_walking(trees):
    """Return the class of each proposal by following every path from its root, one by one."""
    found = {}

    def follow(row, right):
        for action in (0, 1):
            good = trees.label[row, action] == 1
            found[row, action] = 1 if not right else 0 if good else 2
            if trees.child[row, action] >= 0:
                follow(trees.child[row, action], right and good)

    for root in trees.root:
        follow(int(root), True)
    return found


def test_labels_along_paths_give_classes(trees):
    rows = trees.rows_of(trees.select("train"))
    latent, truth = labelled(trees, rows), classes_by_walking(trees)
    for action in (0, 1):
        assert latent.classes(action).argmax(axis=1).tolist() == [truth[row, action] for row in rows]
    assert (latent.weight.sum(axis=(1, 2, 3)) == 1).all()


def test_unknown_labels_hide_what_follows(trees):
    label = trees.label.copy()
    apart = np.flatnonzero(trees.child[trees.root, 0] != trees.child[trees.root, 1])[:2]
    root, broken = (int(row) for row in trees.root[apart])
    child, other = (int(each) for each in trees.child[root])
    label[root] = [-1, 1]
    label[broken] = 0
    label[trees.child[broken, 0]] = -1
    rows = trees.rows_of(apart)
    weight = labelled(replace(trees, label=label), rows).weight.sum(axis=(1, 2, 3))
    place = {int(row): i for i, row in enumerate(rows)}
    assert weight[place[root]] == 0 and weight[place[child]] == 0 and weight[place[other]] == 1
    assert weight[place[broken]] == 1 and weight[place[int(trees.child[broken, 0])]] == 1  # broken for good


def test_dynamics_count_what_is_there(trees):
    found = estimate(trees, "train", labels="exact").dynamics
    truth = classes_by_walking(trees)
    rows = trees.rows_of(trees.select("train"))
    prefix_right = [row for row in rows if truth[row, 0] != 1]
    right = [row for row in prefix_right if truth[row, 0] == 0]
    wrong = [row for row in prefix_right if truth[row, 0] == 2]
    assert found.small_right.count == len(prefix_right)
    assert found.small_right.value == pytest.approx(len(right) / len(prefix_right))
    for rate, given in ((found.large_right_if_right, right), (found.large_right_if_wrong, wrong)):
        assert (rate.count, rate.value) == (len(given), pytest.approx(np.mean([truth[r, 1] == 0 for r in given])))
    broken = [row for row in rows if truth[row, 0] == 1]
    after = ends_right(trees, 0)
    assert found.salvage.count == len(broken)
    assert found.salvage.value == pytest.approx(np.mean([after[row, 0] for row in broken]))
    gain = np.mean([after[row, 1] - after[row, 0] for row in broken])
    assert found.repair.value == pytest.approx(max(gain / (1 - found.salvage.value), 0))
    assert [rate.value for rate in found.hazard] == [0, 0, 0, 1]  # the last step of four, not the one after it
    assert [rate.count for rate in found.hazard] == [(trees.depth[rows] == t).sum() for t in range(4)]
    assert (found.kind.sum(axis=1) == pytest.approx(1)) and (found.large_ends[-1] == 1).all()
    assert found.large_ends[:-1, :-2].max() < 0.01
    assert found.mean_large_tokens == pytest.approx(trees.tokens[rows, 1].mean())


def test_the_token_line_is_that_of_the_tokens(trees):
    small = trees.tokens[:, 0]
    tokens = np.stack([small, 5 + 2 * small], axis=1)
    line = estimate(replace(trees, tokens=tokens), "train", labels="exact").dynamics.token_line
    assert line[..., 1] == pytest.approx(2)
    assert line[1, :-2, 0] == pytest.approx(5, abs=0.5)  # each kind is shrunk a little towards all


def test_a_repair_is_seen(trees):
    """Where a large step mends every second broken prefix, about half is measured."""
    mended = trees.correct.copy()
    last = np.flatnonzero(trees.depth == 3)
    truth = classes_by_walking(trees)
    odd = [row for n, row in enumerate(last) if truth[row, 0] == 1]
    mended[odd, 0] = 0
    mended[odd[::2], 1] = 1
    mended[odd[1::2], 1] = 0
    mended[odd[1::6]] = 1  # these end well either way
    found = estimate(replace(trees, correct=mended), None, labels="exact").dynamics.repair
    changed = replace(trees, correct=mended)
    after = ends_right(changed, 0)[truth_rows(truth)]
    exact = (after[:, 1] - after[:, 0]).mean() / (1 - after[:, 0].mean())  # of those that need it
    assert found.value == pytest.approx(exact) and after[:, 0].mean() > 0.05
    assert 0.2 < found.low < exact < found.high < 0.5
    assert estimate(changed, None, labels="exact").model().repair == found.value


def truth_rows(truth):
    return [row for (row, action), each in truth.items() if action == 0 and each == 1]


def test_large_steps_may_end_what_small_ones_do_not(trees):
    child = trees.child.copy()
    there = np.flatnonzero((trees.depth == 1) & (trees.child[:, 0] != trees.child[:, 1]))[::2]
    child[there, 1] = -1
    found = estimate(replace(trees, child=child), None, labels="exact").dynamics.large_ends
    assert found[1, :-2].mean() == pytest.approx(len(there) / (trees.depth == 1).sum(), abs=0.05)
    assert found[1, :-2].min() > 0.2 and found[0, :-2].max() < found[1, :-2].min()


def test_ends_are_worth_what_they_were(trees):
    """Ends without an answer are a kind of their own; where both models wrote the same, it ends once."""
    ends = trees.child == -1
    answered, correct = trees.has_answer.copy(), trees.correct.copy()
    silent_ends = np.flatnonzero(ends[:, 0])[::7]
    answered[silent_ends], correct[silent_ends] = False, 0
    changed = replace(trees, has_answer=answered, correct=correct)
    estimates, truth = estimate(changed, None, labels="exact"), classes_by_walking(trees)
    counts = {(0, 0): [2.0, 2.0], (0, 1): [0.0, 2.0], (1, 0): [0.0, 2.0], (1, 1): [0.0, 2.0]}  # pseudo-ends
    same = np.array([changed.proposal(row, 0) == changed.proposal(row, 1) for row in range(trees.nodes)])
    assert 0.2 < same[ends[:, 0]].mean() < 0.4
    for row, action in np.argwhere(ends):
        if not (action == 1 and same[row]):
            cell = counts[int(truth[row, action] != 0), int(not answered[row, action])]
            cell[0] += correct[row, action] == 1
            cell[1] += 1
    for (wrong, without), (part, whole) in counts.items():
        assert estimates.dynamics.end_value[wrong, without] == pytest.approx(part / whole)
    model = estimates.model()
    assert (model.end_value[-2] > [0.9, 0, 0]).all() and (model.end_value[-1] < 0.05).all()
    features = schema_named("agg+")(columns_of(changed))
    assert (model.kinds.of(features)[silent_ends] == model.kinds.count - 1).all()
    assert model.kind[-1, -1] == pytest.approx(1 / 7, abs=0.01)  # of the proposals at the last step


def test_contexts_are_levels_of_accepted_scores(trees):
    rows = trees.rows_of(trees.select("train"))
    seen = sample(trees, rows)
    assert len(np.unique(seen.context)) == seen.level.max() + 2
    place = {int(row): i for i, row in enumerate(rows)}
    assert (
        seen.context[[place[int(root)] for root in trees.root[trees.select("train")]]] == seen.level.max() + 1
    ).all()
    for row in rows:
        for action in (0, 1):
            if trees.child[row, action] >= 0:
                bins = to_bins(seen.edges, as_feature(trees.score[row, [action]]))
                assert seen.context[place[int(trees.child[row, action])]] == seen.level[bins[0]]


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (10, 10), (50, 1000)])
def test_wilson_intervals_are_the_roots_of_the_score_test(successes, count):
    rate = wilson(successes, count)
    assert rate.low <= rate.value == successes / count <= rate.high
    for end in {rate.low, rate.high} - {0.0, 1.0}:
        assert abs(end - rate.value) / np.sqrt(end * (1 - end) / count) == pytest.approx(1.96, abs=1e-3)
    assert wilson(0, 0).low == 0 and wilson(0, 0).high == 1


def test_bins_keep_piles_of_scores_apart():
    """Scores that occur exactly often get bins of their own, however near to others; a class is told by them."""
    random = np.random.default_rng(0)
    scores = np.concatenate([np.full(500, 0.999), np.full(500, 0.9985), np.full(300, 1.0), random.random(700)])
    bins = to_bins(score_edges(scores, 24), as_feature(scores))
    for pile in (slice(0, 500), slice(500, 1000), slice(1000, 1300)):
        assert len(np.unique(bins[pile])) == 1
    assert len({bins[0], bins[500], bins[1000]}) == 3
    assert np.isin(bins[1300:], [bins[0], bins[500]]).mean() < 0.02
    others = np.delete(np.bincount(bins), [bins[0], bins[500], bins[1000]])
    assert others.max() <= len(scores) / 24 + 1


def test_spikes_tell_classes_apart(trees):
    """A tenth of the scores of right steps is exactly 1, of wrong ones none: such a score is proof enough."""
    found = estimate(trees, None, labels="exact").observed
    last = to_bins(found.edges, as_feature(np.ones(1)))[0]
    assert found.pooled[0, last] > 0.08
    assert found.pooled[0, last] > 20 * found.pooled[1, last] and found.pooled[0, last] > 8 * found.pooled[2, last]
    assert found.small.sum(axis=-1) == pytest.approx(1) and found.large.sum(axis=-1) == pytest.approx(1)
    assert found.small.min() > 0


def test_too_few_labels_are_counted_in_the_error(trees, silent):
    with pytest.raises(DataError, match="Too few steps.*0 of S0, 0 of S1, 0 of S2; expected at least 30"):
        estimate(silent, "train", labels="exact")
    few = np.full_like(trees.label, -1)
    roots = trees.root[:20]
    few[roots] = trees.label[roots]
    right = int((trees.label[roots, 0] == 1).sum())
    with pytest.raises(DataError, match=f"{right} of S0, .* of S1, {20 - right} of S2"):
        estimate(replace(trees, label=few), None)
    all_right = replace(silent, label=np.ones_like(trees.label))
    with pytest.raises(DataError, match="0 of S1, 0 of S2"):
        estimate(all_right, "train", labels="exact")


def test_unknown_words_are_refused(trees):
    with pytest.raises(ConfigError, match="Did you mean 'exact'"):
        estimate(trees, labels="exakt")
    with pytest.raises(ConfigError, match="Did you mean 'measured'"):
        estimate(trees, None).routers([1e-3], "measurd")


def test_the_report_has_counts_and_intervals(trees):
    report = json.loads(json.dumps(estimate(trees, None, labels="em").report()))
    assert report["labels"] == "em" and report["agreement"]["steps"] == trees.nodes
    for name in ("small_right", "large_right_if_wrong", "large_right_if_right", "repair", "salvage"):
        assert report[name]["low"] <= report[name]["value"] <= report[name]["high"] and report[name]["count"] > 30
    assert len(report["hazard"]) == 4
