"""Artefacts of earlier versions, `stored/`, decide as they did when they were written, at commit 30945b0.

``decisions.npz`` holds what each was given and what it then said.
"""

from pathlib import Path

import numpy as np
import pytest

import agents
from agents.routers import artefact
from agents.routers.base import StatefulRouter

STORED = Path(__file__).parent / "stored"
KINDS = ("mlp", "mlp-capped", "mlp-version-1", "threshold", "constant", "random")


@pytest.fixture(scope="module")
def kept():
    return np.load(STORED / "decisions.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_routers_of_single_steps(kept, kind):
    router, name = artefact.load(STORED / kind, allow_old=True).router, kind.removesuffix("-version-1")
    features = kept[f"{name}.features"]
    assert (router.probability(features) == kept[f"{name}.decisions"]).all()
    if f"{name}.logits" in kept:
        np.testing.assert_allclose(router.logits(features), kept[f"{name}.logits"], rtol=1e-12, atol=1e-12)


def test_a_policy_for_a_range_of_lam(kept):
    policy = agents.load(STORED / "mlp-lam")
    for lam, decisions, logits in zip(
        kept["mlp-lam.lams"], kept["mlp-lam.decisions"], kept["mlp-lam.logits"], strict=True
    ):
        router = policy.at(float(lam))
        assert (router.probability(kept["mlp-lam.features"]) == decisions).all()
        np.testing.assert_allclose(router.logits(kept["mlp-lam.features"]), logits, rtol=1e-12, atol=1e-12)
    assert policy.budget_range == (0.1, 1.0) and policy.at(budget=0.4).knob.value == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["seq", "pomdp"])
def test_routers_with_a_state(kept, kind):
    router = artefact.load(STORED / kind).router
    assert isinstance(router, StatefulRouter)
    state = router.start(128)
    for step, features in enumerate(kept[f"{kind}.features"]):
        chances, state = router.decide(features, state)
        assert (chances == kept[f"{kind}.decisions"][step]).all()
        state = router.accept(state, *(kept[f"{kind}.{name}"][step] for name in ("actions", "scores", "tokens")))
    assert 0.1 < kept[f"{kind}.decisions"].mean() < 0.9


def test_a_mixture(kept):
    mixture = artefact.load(STORED / "mixture").router
    assert (mixture.share, str(mixture.knob), mixture.first.threshold) == (0.4, "budget=0.2", 0.3)
    assert (mixture.second.probability(kept["mlp.features"]) == kept["mlp.decisions"]).all()


@pytest.mark.parametrize("kind", [*KINDS, "mlp-lam", "seq", "pomdp", "mixture"])
def test_sessions_begin_with_all_of_them(kind):
    policy = agents.load(STORED / kind, allow_old=True)
    session = policy.session(lam=1e-3 if policy.lam_range else None, seed=0)
    assert session.decide(0.5, 12, text="") in (0, 1) and policy.describe()["max_steps"] == 16


@pytest.mark.parametrize("kind", ["mlp-capped", "seq", "threshold", "constant", "random", "pomdp", "mixture"])
def test_what_is_written_today_is_what_was_written(tmp_path, kind):
    """So earlier versions read it, too."""
    found = artefact.load(STORED / kind)
    artefact.save(found.router, tmp_path / kind, found.about)
    files = [file.relative_to(STORED) for file in (STORED / kind).rglob("policy.*")]
    assert files and all((tmp_path / file).read_bytes() == (STORED / file).read_bytes() for file in files)
