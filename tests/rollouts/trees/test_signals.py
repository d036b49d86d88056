"""Score tables with several columns: what compiled trees hold of them, and what stands for what is not there."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import Future

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from handmade import ScriptedScorer, Statistician, TellingWriter, known
from made_stores import PROBLEMS, finished, grown

from rollouts.errors import ConfigError, StoreError
from rollouts.models.hf.packing import told_of
from rollouts.scoring.base import EXAMPLES, self_test
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.likelihood import STATISTICS, WORTHLESS, Likelihood, as_score, top_entropy
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.columns import columns_of, fold_named
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.verify import verify_store
from trim_env.features import schema_named
from trim_env.tables import decision_tables


@pytest.fixture
def store(tmp_path):
    """Scored by a scripted scorer, and by both models."""
    made = finished(tmp_path / "s")
    for role in ROLES:
        score_store(made, Statistician(role))
    return made


def proposals(store):
    """Yield (row, action, question, path, node) of all proposals, in the order of compiled trees."""
    row = 0
    for tree in load_trees(store, store.problems(), None, None):
        for node in tree.nodes.values():
            for action, role in enumerate(ROLES):
                if role in node.proposals:
                    yield row, action, tree.problem.question, (*node.steps, node.proposals[role].text), node
            row += 1


def test_trees_hold_every_column_by_name(store):
    trees = compile_store(store, cache=False)
    assert set(trees.signals) == {"scripted.score", *(f"{role}.{name}" for role in ROLES for name in STATISTICS)}
    np.testing.assert_array_equal(trees.signals["scripted.score"], trees.score)
    twins = 0
    for row, action, question, path, node in proposals(store):
        for role in ROLES:
            seen = [trees.signals[f"{role}.{name}"][row, action] for name in STATISTICS]
            merged = len(set(step.text for step in node.proposals.values())) == 1
            twins += merged
            if role == SMALL and action == 1 and not merged:  # it is not asked about what the large model wrote
                assert np.isnan(seen).all()
            else:
                np.testing.assert_array_equal(seen, np.float32(known(role, question, path)))
    assert twins > 10


def test_the_hash_that_artefacts_name_is_that_of_the_same_store_without_further_tables(store, tmp_path):
    bare = finished(tmp_path / "bare")
    assert compile_store(store).meta["hash"] == compile_store(bare).meta["hash"]
    again = compile_store(store)
    assert isinstance(again.signals["large.min_logprob"], np.memmap) and again.meta["scorer"] == "scripted"
    score_store(bare, Statistician(LARGE))  # what was compiled before has not these
    assert "large.min_logprob" in compile_store(bare).signals


def test_what_comes_with_the_steps_is_what_a_prefill_gives(store, tmp_path):
    told = grown(tmp_path / "told", kind=TellingWriter)
    score_store(told, ScriptedScorer())
    grade_store(told, make_grader("exact"))
    trees, recorded = compile_store(store, cache=False), compile_store(told, cache=False)
    assert recorded.meta["hash"] == trees.meta["hash"] and told.names("scores") == ["scripted"]
    for name in STATISTICS:
        np.testing.assert_array_equal(recorded.signals[f"small.{name}"], trees.signals[f"small.{name}"])
        own = recorded.signals[f"large.{name}"]
        np.testing.assert_array_equal(own[:, 1], trees.signals[f"large.{name}"][:, 1])
        assert np.isnan(own[:, 0]).any()
    report = score_store(told, Statistician(LARGE))
    assert 0 < report.rows < told.steps.keys().num_rows  # nothing is asked that was told
    assert score_store(told, Statistician(SMALL)).rows == 0 and not verify_store(told).problems
    np.testing.assert_array_equal(
        compile_store(told, cache=False).signals["large.mean_logprob"], trees.signals["large.mean_logprob"]
    )


def test_shards_from_before_there_were_statistics_are_read_on(store):
    (shard,) = store.steps.shards()
    pq.write_table(pq.read_table(shard).drop_columns([*STATISTICS]), shard)
    assert not store.steps.has_values(STATISTICS[0])
    assert not verify_store(store).problems and len(compile_store(store, cache=False).signals) == 11


@pytest.mark.parametrize(
    ("scorer", "column"), [("small", "small.min_logprob"), ("large.max_entropy", "large.max_entropy")]
)
def test_any_column_can_be_the_score(store, scorer, column):
    trees = compile_store(store, scorer, cache=False)
    values = trees.signals[column].astype(np.float64)
    wanted = np.exp(values if column.endswith("logprob") else -values).astype(np.float32)
    if scorer == "small":  # a step of the large model leaves the least score as it is
        wanted = np.where(np.isnan(wanted), np.float32(1), wanted)
    wanted[trees.child == -2] = np.nan
    np.testing.assert_array_equal(trees.score, wanted)
    assert trees.meta["scorer"] == scorer


def test_a_store_without_a_reward_model_is_scored_by_the_small_model(tmp_path):
    told = grown(tmp_path / "s", kind=TellingWriter)
    grade_store(told, make_grader("exact"))
    trees = compile_store(told, cache=False)
    assert trees.meta["scorer"] == "small" and (trees.score[:, 0] < 1).all()
    with pytest.raises(StoreError, match="no scores yet"):
        bare = grown(tmp_path / "bare")
        compile_store(bare, cache=False)


def test_names_that_are_no_column_are_refused(store):
    for name in ("midsize", "small.score", "smal", "small.min_logprobs", "scripted.min_logprob"):
        with pytest.raises(StoreError, match="Known|Did you mean"):
            compile_store(store, name, cache=False)
    with pytest.raises(ConfigError, match="least_score"):
        schema_named("agg+,least_score")


def test_folds_skip_the_steps_that_lack_the_fact(store):
    trees, fold = compile_store(store, cache=False), fold_named("least(small.min_logprob)")
    folded, most = columns_of(trees, folds=[fold])[fold.name], fold_named("greatest(large.max_entropy)")
    greatest = columns_of(trees, folds=[most])[most.name]
    values, high = trees.signals["small.min_logprob"], trees.signals["large.max_entropy"]
    ways = {int(row): ([], []) for row in trees.root}
    skipped = 0
    for row in range(trees.nodes):
        least, most_known = ways[row]
        assert folded[row] == np.float32(min([0.0, *least])) and greatest[row] == np.float32(max([0.0, *most_known]))
        for action in (1, 0):
            child, value = int(trees.child[row, action]), values[row, action]
            if child >= 0:
                skipped += np.isnan(value)
                ways[child] = ([*least, *([] if np.isnan(value) else [value])], [*most_known, high[row, action]])
    assert skipped > 5


def test_what_a_schema_reads_and_is_not_there_is_refused_with_the_remedy(store):
    with pytest.raises(StoreError, match=r"free reads small\..*rollouts score .*/bare --scorer small"):
        decision_tables(compile_store(finished(store.path.parent / "bare")), None, schema="free")
    with pytest.raises(StoreError, match=r"reads prm\.doubt, which these .*Known.*rollouts score [^ ]*/s`"):
        decision_tables(compile_store(store), None, schema="agg+,prm.doubt")
    with pytest.raises(StoreError, match=r"reads small\.entropy, which these .*'small.max_entropy'\? Known: [^`]*\.$"):
        decision_tables(compile_store(store), None, schema="agg+,small.entropy")
    part = finished(store.path.parent / "part")
    score_store(part, Statistician(LARGE), PROBLEMS[:2])
    with pytest.raises(
        StoreError, match=r"\d+ of \d+ proposals .* no large\.min_logprob.*rollouts score .*--scorer large"
    ):
        decision_tables(compile_store(part), None, schema="agg+,large.min_logprob")
    assert any("unscored by 'large'" in problem for problem in verify_store(part).problems)


def test_a_table_keeps_its_columns(store):
    told = json.loads((store.path / "scores" / "small" / "manifest.json").read_text())
    assert told["columns"] == [*STATISTICS] and told["roles"] == ["small"]
    assert Store(store.path).scores("small").values == STATISTICS
    other = Statistician(SMALL)
    other.columns = ("min_logprob", "doubt")
    with pytest.raises(StoreError, match=r"columns is .* there and .*doubt.* here"):
        score_store(store, other)
    shutil.rmtree(store.path / "scores" / "large")
    assert {name.partition(".")[0] for name in compile_store(store, cache=False).signals} == {"scripted", "small"}


class Doubting(ScriptedScorer):
    columns = ("score", "doubt")

    def __init__(self, value=lambda steps: (0.1 + 0.8 * (len(steps) == 1), 7.0)) -> None:
        super().__init__()
        self.value = value

    def submit(self, question, steps):
        future: Future = Future()
        future.set_result([self.value(steps[: place + 1]) for place in range(len(steps))])
        return future


def test_a_scorer_of_ones_own_may_have_several_columns(tmp_path):
    made = finished(tmp_path / "s")
    doubting = Doubting()
    doubting.name = "own"
    score_store(made, doubting)
    trees = compile_store(made, "own", cache=False)
    assert (trees.signals["own.doubt"] == 7).all() and set(np.unique(trees.score)) <= {np.float32(0.1), np.float32(0.9)}
    tables = decision_tables(trees, None, schema="own.doubt,score")
    np.testing.assert_allclose(tables.features[:, 0], np.arcsinh(7), rtol=1e-6)
    self_test(Doubting(), EXAMPLES, informed=False)
    for value, message in [
        (lambda steps: 0.5, "numbers for score, doubt"),
        (lambda steps: (1.5, 7.0), "numbers for score, doubt"),
        (lambda steps: (0.5, math.nan), "numbers for score, doubt"),
        (lambda steps: (0.5, None), "numbers for score, doubt"),
    ]:
        with pytest.raises(ConfigError, match=message):
            self_test(Doubting(value), EXAMPLES, informed=False)


def test_statistics_and_entropies_are_those_of_the_formulas():
    likelihood = Likelihood((-0.5, -2.0, -0.25), (0.3, 1.5, 0.1))
    assert likelihood.statistics() == (-2.0, -2.75 / 3, -2.75, 1.5, 0.3)
    assert likelihood.statistics(2, 3) == (-0.25, -0.25, -0.25, 0.1, 0.1)
    assert likelihood.statistics(3) == WORTHLESS and as_score("min_logprob", WORTHLESS[0]) == 0
    p = np.array([0.6, 0.3, 0.1])
    assert top_entropy(np.log(p)) == pytest.approx(-(p * np.log(p)).sum())
    grouped = top_entropy(np.log(p[:2]))
    assert grouped == pytest.approx(-(p * np.log(p)).sum()) and top_entropy([math.log(0.6)]) < grouped
    assert top_entropy([0.0]) == 0 == top_entropy([0.0, -math.inf])
    logits = np.random.default_rng(0).normal(size=(3, 40)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    told = [top_entropy(np.log(np.sort(row)[::-1][:count])) for row, count in zip(p, (20, 21, 40), strict=True)]
    assert told == pytest.approx(told_of(torch.tensor(logits))[1].tolist())  # whoever tells, and how many
    assert (np.array(told) < -(p * np.log(p)).sum(axis=1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_distributions_are_told_of_as_one_by_one(dtype):
    logits = (torch.tensor(np.random.default_rng(1).normal(size=(70, 300))) * 3).to(dtype)
    norms, entropies = told_of(logits)
    wide = logits.double()
    assert norms.tolist() == pytest.approx(wide.logsumexp(1).tolist(), rel=1e-6)
    assert entropies.tolist() == pytest.approx([top_entropy(row) for row in wide.log_softmax(1).tolist()], rel=1e-5)
    (alone,) = told_of(logits, entropies=False)
    assert torch.equal(alone, norms)


def test_folds_begin_beyond_all_values(store):
    trees = compile_store(store, "scripted")
    second = trees.depth == 1  # one step is accepted: what it is folded over is its own value
    for name in ("greatest(small.min_logprob)", "least(small.max_entropy)", "greatest(score)", "least(tokens)"):
        assert len(np.unique(decision_tables(trees, None, schema=name).features[second])) > 1, name
    for name, first in (("least(small.min_logprob)", 0.0), ("greatest(small.max_entropy)", 0.0), ("least(score)", 1.0)):
        assert fold_named(name).initial == first
    assert (fold_named("greatest(own.x)").initial, fold_named("least(own.x)").initial) == (-math.inf, math.inf)
