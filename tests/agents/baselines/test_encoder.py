"""Texts are embedded by themselves, however they are batched."""

import numpy as np
import pytest

from agents.baselines.encoder import BATCH, encoder
from rollouts import tinymath
from rollouts.errors import ConfigError


def test_means_of_hidden_states():
    embed = encoder(tinymath.model_dir("small"))
    texts = ["Let a=3+4. Find a.", "Let b=9%5, c=b*2, d=c+8. Find d.", "x"]
    found = embed(texts)
    assert found.shape[0] == 3 and found.dtype == np.float64 and np.isfinite(found).all()
    for text, row in zip(texts, found, strict=True):  # padding is not among the tokens
        np.testing.assert_allclose(embed([text])[0], row, atol=1e-4)
    many = embed(texts * BATCH)
    np.testing.assert_allclose(many[:3], found, atol=1e-4)


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no encoder"):
        encoder(tmp_path / "nothing")
