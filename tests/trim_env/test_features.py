"""Feature schemas against values worked out by hand."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from handmade import ScriptedScorer
from made_stores import finished

from rollouts.errors import ConfigError
from rollouts.text.steps import SMALL
from rollouts.trees.columns import columns_of
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from trim_env.features import SCHEMAS, schema_named

NAMES = ("score", "min_score", "product_score", "tokens", "step", "terminal", "has_answer")
LOGPROBS = ("small.min_logprob", "small.mean_logprob", "least(small.min_logprob)", "large.min_logprob")


def columns(*values, max_steps):
    """Return named columns; those of score tables follow from the score, so that they vary with it."""
    named = dict(zip(NAMES, values, strict=True))
    logprob = np.log(np.minimum(np.maximum(named["score"], 1e-60), 1.0))
    signals = {**dict.fromkeys(LOGPROBS, logprob), "small.max_entropy": -logprob}
    return {**named, **signals, "max_steps": max_steps}


SEEN = columns(
    *np.array(
        [
            # those of NAMES
            (0.5, 1.0, 1.0, 20, 1, 0, 0),
            (0.9, 0.25, 0.2, 75, 4, 1, 1),
            (0.0, 0.0, 0.0, 0, 8, 1, 0),
            (1.0, 1.0, 1.0, 10**9, 8, 0, 1),
        ]
    ).T,
    max_steps=8,
)
LOGIT_BOUND = math.log(0.9999 / 0.0001) / 3  # scores are clipped to 1e-4 from 0 and 1
# -ln of the size of a log-probability, / 3, clipped to sizes from 1e-4 to 1e3
NATS = [-math.log(size) / 3 for size in (math.log(2), -math.log(0.9), 60 * math.log(10), 1e-4)]
AGG = [(0.5, 1, 20 / 300, 1 / 8), (0.9, 0.25, 0.25, 0.5), (0, 0, 0, 1), (1, 1, 10**9 / 300, 1)]
AGG_PLUS = [
    (0, LOGIT_BOUND, 0, 1 / 8, 0, 0),
    (math.log(9) / 3, -math.log(3) / 3, math.log(3.75), 0.5, 1, 1),
    (-LOGIT_BOUND, -LOGIT_BOUND, math.log(1 / 20), 1, 1, 0),
    (LOGIT_BOUND, LOGIT_BOUND, 8, 1, 0, 1),  # ln(5e7) is 17.7: clipped
]
WANTED = {
    "agg": AGG,
    "agg+prod": [(*row, product) for row, product in zip(AGG, (1, 0.2, 0, 1), strict=True)],
    "agg+": AGG_PLUS,
    "free": [(*[sure] * 4, *row[2:]) for sure, row in zip(NATS, AGG_PLUS, strict=True)],
    "prefill": [(*[sure] * 5, *row[2:]) for sure, row in zip(NATS, AGG_PLUS, strict=True)],
    "all": [(*[sure] * 5, *row[2:], *row[:2]) for sure, row in zip(NATS, AGG_PLUS, strict=True)],
    "seq": [
        (0, 0, 1 / 8, 0, 0),
        (math.log(9) / 3, math.log(3.75), 0.5, 1, 1),
        (-LOGIT_BOUND, math.log(1 / 20), 1, 1, 0),
        (LOGIT_BOUND, 8, 1, 0, 1),
    ],
}


@pytest.mark.parametrize("name", WANTED)
def test_values(name):
    schema = SCHEMAS[name]
    values = schema(SEEN)
    assert values.dtype == np.float32 and values.shape == (4, schema.size) and np.isfinite(values).all()
    np.testing.assert_allclose(values, WANTED[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMAS)
def test_one_decision_has_the_features_that_it_has_among_others(name):
    draw = np.random.default_rng(0)
    scores = draw.random((3, 3_000)).astype(np.float32).astype(np.float64)
    scores[:, draw.random(3_000) < 0.1] = draw.choice([0.0, 1e-4, 1.0], 3)[:, None]
    count, step, flags = draw.integers(1, 400, 3_000), draw.integers(1, 31, 3_000), draw.random((2, 3_000)) < 0.5
    seen = columns(*np.concatenate([scores, [count, step], flags]), max_steps=30)
    rows = [(*map(float, scores[:, i]), int(count[i]), int(step[i]), *map(bool, flags[:, i])) for i in range(3_000)]
    together = SCHEMAS[name](seen)
    alone = np.concatenate([SCHEMAS[name].single(columns(*row, max_steps=30)) for row in rows])
    assert alone.dtype == together.dtype and np.array_equal(alone, together)


def test_every_schema_is_tested():
    assert set(SCHEMAS) == set(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_nothing_leaves_the_bounds(name):
    generator = np.random.default_rng(0)
    wild = [generator.choice([0.0, 1e-9, 0.3, 1.0], 500) for _ in range(3)]
    wild += [generator.choice([0.0, 1.0, 300.0, 1e12], 500), generator.integers(1, 31, 500).astype(float)]
    wild += [generator.integers(0, 2, 500).astype(float) for _ in range(2)]
    low, high = SCHEMAS[name].bounds(1)
    values = SCHEMAS[name](columns(*wild, max_steps=30))
    assert (values >= low).all() and (values <= high).all()
    assert (values.min(axis=0) < values.max(axis=0)).all()


def test_seen_is_that_of_the_small_proposal_and_the_accepted_steps(tmp_path):
    store = finished(tmp_path / "s")
    compiled, scorer = compile_store(store, cache=False), ScriptedScorer()
    seen, row = columns_of(compiled), 0
    for tree in load_trees(store, store.problems(), None, None):
        for node in tree.nodes.values():
            step, question = node.proposals[SMALL], tree.problem.question
            accepted = [scorer.of(question, node.steps[: count + 1]) for count in range(len(node.steps))]
            wanted = (
                scorer.of(question, (*node.steps, step.text)),
                min(accepted, default=1),
                math.prod(accepted),
                step.tokens,
                len(accepted) + 1,
                step.terminal,
                "\\boxed" in step.text,
            )
            np.testing.assert_allclose([seen[name][row] for name in NAMES], wanted, rtol=1e-6)
            row += 1
    assert row == compiled.nodes > 20
    np.testing.assert_array_equal(columns_of(compiled, np.array([3, 1]))["tokens"], seen["tokens"][[3, 1]])


def test_names_versions_and_mistakes():
    schema = schema_named("agg+")
    assert schema_named(schema.id) is schema and schema.id == "agg+/1"
    with pytest.raises(ConfigError, match=r"'agg\+prd'.*Did you mean 'agg\+prod'"):
        schema_named("agg+prd")
    with pytest.raises(ConfigError, match="version 1 here; version 7"):
        schema_named("agg/7")


@pytest.mark.parametrize(
    "name", ["agg+,small.min_logprob", "tokens,least(score),prm.v2.score", "agg+,greatest(large.max_entropy)"]
)
def test_columns_are_features_by_name(name):
    schema = schema_named(name)
    assert schema_named(schema.id) == schema and schema.id.count("/1") == name.count(",") + 1
    assert schema.signals == tuple(part.split("(")[-1].rstrip(")") for part in name.split(",") if "." in part)
    assert pickle.loads(pickle.dumps(schema)) == schema


def test_what_is_no_column_is_no_feature():
    for name in (
        "agg+,least(scores)",
        "agg+,most(score)",
        "agg+,least(small.min_logprob",
        "agg+,tokns",
        "agg+,my.module:own",
    ):
        with pytest.raises(ConfigError):
            schema_named(name)
    with pytest.raises(ConfigError, match="at version 1 here; version 2"):
        schema_named("agg+,small.min_logprob/2")
