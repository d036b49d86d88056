"""Routers on disk: what comes back decides alike; what is damaged or newer is refused by name."""

import json

import numpy as np
import pytest
import safetensors.numpy
from made_routers import network

from agents.routers import artefact
from agents.routers.base import Constant, Knob, Mixture, RandomRate, Threshold
from agents.routers.mlp import MLP
from rollouts.errors import ArtefactError


@pytest.mark.parametrize("router", [network(), Threshold(0.25), RandomRate(0.3), Constant(1)])
def test_what_is_saved_comes_back(tmp_path, router):
    artefact.save(router, tmp_path / "p", {"lam": 0.003})
    loaded = artefact.load(tmp_path / "p")
    features = np.random.default_rng(1).normal(size=(500, 6)).astype(np.float32)
    assert (loaded.router.probability(features) == router.probability(features)).all()
    assert (loaded.router.name, loaded.router.schema, loaded.router.knob) == (router.name, router.schema, router.knob)
    assert loaded.about == {"lam": 0.003}


def test_a_network_is_what_torch_computes():
    import torch

    router = network()
    layers = []
    for layer in range(3):
        linear = torch.nn.Linear(*reversed(router.weights[f"{layer}.weight"].shape))
        linear.weight.data = torch.from_numpy(router.weights[f"{layer}.weight"])
        linear.bias.data = torch.from_numpy(router.weights[f"{layer}.bias"])
        layers += [linear, torch.nn.Tanh()]
    features = np.random.default_rng(2).normal(size=(300, 6)).astype(np.float32)
    with torch.no_grad():
        wanted = torch.nn.Sequential(*layers[:-1])(torch.from_numpy(features)).numpy()
    assert router.logits(features) == pytest.approx(wanted, abs=1e-5)
    assert (router.probability(features) == wanted.argmax(1)).all()
    assert 0 < router.probability(features).mean() < 1


def test_our_reader_is_the_librarys(tmp_path):
    router = network()
    artefact.save(router, tmp_path, {})
    data = (tmp_path / "policy.safetensors").read_bytes()
    theirs, ours = safetensors.numpy.load(data), artefact.read_safetensors(data)
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() for name in theirs)


def test_nothing_is_overwritten(tmp_path):
    artefact.save(Threshold(0.5), tmp_path, {})
    with pytest.raises(ArtefactError, match="nothing was overwritten"):
        artefact.save(Threshold(0.6), tmp_path, {})
    assert artefact.load(tmp_path).router.knob.value == 0.5


def change(folder, **values):
    file = folder / "policy.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "policy.json").unlink(), "no policy here"),
        (lambda p: (p / "policy.safetensors").unlink(), "policy.safetensors is missing"),
        (lambda p: (p / "policy.json").write_text("{"), "damaged policy"),
        (lambda p: (p / "policy.json").write_text('{"format": "other", "version": 1}'), "not a policy"),
        (lambda p: change(p, version=99), "written in version 99.*newer"),
        (lambda p: change(p, kind="forest"), "unknown kind of policy 'forest'"),
        (lambda p: change(p, knob={"name": "lam"}), "damaged policy"),
        (lambda p: (p / "policy.safetensors").write_bytes(b"\0" * 40), "not those that policy.json names"),
        (
            lambda p: (p / "policy.safetensors").write_bytes((p / "policy.safetensors").read_bytes()[:-4]),
            "not those that policy.json names",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    artefact.save(network(), tmp_path, {})
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        artefact.load(tmp_path)


def test_networks_that_do_not_fit_together_are_refused():
    weights = dict(network().weights)
    with pytest.raises(ArtefactError, match="layer 1 has shapes"):
        MLP("x", "agg+/1", Knob("lam", 1.0), {**weights, "1.weight": weights["0.weight"]})
    with pytest.raises(ArtefactError, match="not finite"):
        MLP("x", "agg+/1", Knob("lam", 1.0), {**weights, "2.bias": np.array([np.nan, 0], np.float32)})
    with pytest.raises(ArtefactError, match="3 outputs"):
        wide = {"0.weight": np.zeros((3, 6), np.float32), "0.bias": np.zeros(3, np.float32)}
        MLP("x", "agg+/1", Knob("lam", 1.0), wide)


def test_a_mixture_comes_back_with_both_parts_or_not_at_all(tmp_path):
    mixture = Mixture(Threshold(0.2), network(), 0.4, Knob("budget", 0.2))
    artefact.save(mixture, tmp_path, {})
    loaded = artefact.load(tmp_path).router
    assert (loaded.first, loaded.share, loaded.knob, loaded.name) == (mixture.first, 0.4, mixture.knob, "trim-thr")
    assert (loaded.second.weights["0.bias"] == mixture.second.weights["0.bias"]).all()
    change(tmp_path / "first", knob={"name": "threshold", "value": 0.9})
    with pytest.raises(ArtefactError, match="not the one that the mixture names"):
        artefact.load(tmp_path)
