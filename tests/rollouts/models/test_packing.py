"""Sequences that begin alike in one pass: every token once, and the same log-probabilities as one by one."""

import numpy as np
import pytest

from rollouts import tinymath
from rollouts.config import ModelConfig
from rollouts.models.base import LogprobRequest
from rollouts.models.hf.generator import TransformersGenerator, generator
from rollouts.models.hf.packing import pack_first


@pytest.fixture(scope="module")
def branching():
    """Sequences drawn from few letters, so that many begin alike and some are prefixes of others."""
    rng = np.random.default_rng(0)
    trunk = tuple(rng.integers(5, 9, 12).tolist())
    return [trunk[: rng.integers(1, 12)] + tuple(rng.integers(5, 9, rng.integers(1, 9)).tolist()) for _ in range(60)]


@pytest.mark.parametrize("most", [1, 7, 40, 10_000])
def test_every_sequence_is_in_one_pack_and_sees_itself_alone(branching, most):
    rest = sorted(branching)
    while rest:
        pack = pack_first(rest, most)
        assert len(pack.ids) <= most or len(pack.paths) == 1
        packed, rest = rest[: len(pack.paths)], rest[len(pack.paths) :]
        assert packed
        for own, path in zip(packed, pack.paths, strict=True):
            assert tuple(pack.ids[path]) == own
            assert pack.positions[path].tolist() == list(range(len(own)))
            for place, token in enumerate(path):
                assert np.flatnonzero(pack.sees[token]).tolist() == sorted(path[: place + 1].tolist())


def test_what_is_shared_is_computed_once(branching):
    pack = pack_first(sorted(branching), 10_000)
    assert len(pack.paths) == len(branching)
    prefixes = {own[:length] for own in branching for length in range(1, len(own) + 1)}
    assert len(pack.ids) == len(prefixes)


@pytest.fixture(scope="module")
def model() -> TransformersGenerator:
    folder = tinymath.model_dir("large")
    config = ModelConfig(backend="transformers", model=str(folder), dtype="float64", max_batch=8, threads=1)
    return generator(config, seed=0)


def answers(model, requests):
    found = {}
    for key, request in enumerate(requests):
        model.add(key, request)
    while len(found) < len(requests):
        found |= dict(model.step())
    return [found[key] for key in range(len(requests))]


def test_packed_log_probabilities_are_those_of_each_sequence_alone(model, branching, monkeypatch):
    requests = [LogprobRequest(ids, 1 + number % len(ids), entropies=True) for number, ids in enumerate(branching)]
    alone = [answers(model, [request])[0] for request in requests]
    counts = [len(each.logprobs) for each in alone]
    assert counts == [len(each.ids) - each.start for each in requests] == [len(each.entropies) for each in alone]
    assert 0 in counts and max(counts) > 8
    for tokens in (30, 2048):
        monkeypatch.setattr("rollouts.models.hf.generator.PACKED_TOKENS", tokens)
        for one, other in zip(alone, answers(model, requests), strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
            assert one.entropies == pytest.approx(other.entropies, abs=1e-9)


def test_where_attention_has_a_window_that_is_passed_sequences_go_alone(model, branching, monkeypatch):
    config = model._model.config.get_text_config()
    monkeypatch.setattr(config, "layer_types", ["sliding_attention"], raising=False)
    monkeypatch.setattr(config, "sliding_window", 10, raising=False)
    assert model._packed(10) > 1
    assert model._packed(11) == 1
