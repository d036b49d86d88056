"""Text features are those of scikit-learn; heads say what their formulas say."""

import json

import numpy as np
import pytest

from agents.routers import artefact
from agents.routers.base import Constant, Knob, Mixture, Threshold
from agents.routers.text import CharTfidf, Preference, TextRouter, ngrams
from agents.routers.whole import Cascade, OneModel, QueryRouter, decides_once
from rollouts.errors import ArtefactError
from rollouts.files.sealed import write_sealed

TEXTS = ["Let a=3+4. Find a.", "Let b=7%5,  c=b*2. Find c.", "FIND x", "aa", ""]


def test_features_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    own = CharTfidf.fit(TEXTS, most=60)
    assert len(own.vocabulary) == 60
    theirs = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), vocabulary=list(own.vocabulary)).fit(TEXTS)
    new = [*TEXTS, "Let q=9%4. Find q.", "§"]
    np.testing.assert_allclose(own(new), theirs.transform(new).toarray(), atol=1e-6)


def test_the_vocabulary_is_of_the_texts_that_most_have():
    own = CharTfidf.fit(["ab", "ab", "cd"], most=3)
    assert own.vocabulary == ("a", "ab", "b")
    assert own.idf == pytest.approx([1 + np.log(4 / 3)] * 3)
    assert list(ngrams("A  b", 2)) == ["a", " ", "b", "a ", " b"]


def test_routers_send_from_the_threshold_on():
    preference = Preference(
        "linear", lambda texts: np.array([[float(text)] for text in texts]), {"0.weight": np.eye(1)}
    )
    router = TextRouter("r", Knob("threshold", 2.0), preference)
    assert router.sends(["1", "2", "3", "2"]).tolist() == [0, 1, 1, 1]
    assert isinstance(router, QueryRouter) and not isinstance(router, Cascade)


def test_unknown_heads_are_refused():
    with pytest.raises(ArtefactError, match="head is 'lienar'.*linear"):
        Preference("lienar", CharTfidf.fit(TEXTS), {})


def routers():
    from agents.baselines import predict, routellm
    from agents.baselines.examples import Examples

    draw = np.random.default_rng(0)
    questions = tuple(f"Let a={i}{'%+*'[i % 3]}{i % 7}. Find a." for i in range(60))
    examples = Examples(questions, draw.integers(0, 2, (60, 2)).astype(float))
    features = CharTfidf.fit(questions)
    yield routellm.classifier(examples, features)
    yield routellm.matrix_factorisation(examples, features, epochs=1)
    yield routellm.ranking(examples, features)
    yield routellm.neighbours(examples, features, 7)
    costs = zip(("small", "large"), examples.correct.T, (np.zeros(60), np.ones(60)), strict=True)
    predictor = predict.fit(questions, {arm: (right, cost) for arm, right, cost in costs}, features, 0)
    yield predict.gain_over_cost(predictor)
    yield predict.doubt(predictor)
    told = np.random.default_rng(1).random((60, 3, 3)).astype(np.float32)
    weights = {"memory": features(questions).astype(np.float32), "told": told, "large": np.float32([0, 0, 1])}
    preference = Preference("smoothie", features, {**weights, "count": np.float32(5)})
    yield TextRouter("Smoothie", Knob("threshold", 0.0), preference)


def test_what_is_kept_sends_the_same(tmp_path):
    new = [f"Let b={i}%{i % 5}. Find b." for i in range(40)]
    for i, router in enumerate(routers()):
        at = TextRouter(router.name, Knob("threshold", float(np.median(router.preference(new)))), router.preference)
        again = artefact.load(artefact.save(at, tmp_path / str(i), {})).router
        assert (again.name, again.knob, again.preference.head) == (at.name, at.knob, at.preference.head)
        assert (again.preference(new) == at.preference(new)).all() and 0 < again.sends(new).mean()
        assert {file.name for file in (tmp_path / str(i)).iterdir()} == {"policy.json", "policy.safetensors"}
        assert artefact.load(tmp_path / str(i)).kind == "query"
        with pytest.raises(ArtefactError, match="holds a policy already"):
            artefact.save(at, tmp_path / str(i), {})


def linear(features, threshold=0.5, weight=1.0):
    weights = {"0.weight": np.full((1, len(features.vocabulary)), weight, np.float32)}
    return TextRouter("r", Knob("threshold", threshold), Preference("linear", features, weights))


def test_one_model_and_mixtures_with_it_are_kept(tmp_path):
    router = linear(CharTfidf.fit(TEXTS))
    for i, each in enumerate((OneModel(1), Mixture(OneModel(0), router, 0.25, Knob("budget", 0.3)))):
        again = artefact.load(artefact.save(each, tmp_path / str(i), {})).router
        assert (again.name, again.knob, decides_once(again)) == (each.name, each.knob, True)
    assert again.first == OneModel(0) and (again.second.sends(TEXTS) == router.sends(TEXTS)).all()
    assert not decides_once(Mixture(Constant(0), Threshold(0.5), 0.5, Knob("budget", 0.3)))


def sealed(folder, change):
    """Change a policy.json so that its digest still fits: what is left is for the checks of its contents."""
    file = folder / "policy.json"
    described = json.loads(file.read_text())
    change(described)
    write_sealed(file, described)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "policy.safetensors").write_bytes(b"0"),
        lambda folder: (folder / "policy.safetensors").unlink(),
        lambda folder: sealed(folder, lambda plain: plain.update(head="classify")),
        lambda folder: sealed(folder, lambda plain: plain.update(head="gain")),
        lambda folder: sealed(folder, lambda plain: plain.pop("vocabulary")),
        lambda folder: sealed(folder, lambda plain: plain["vocabulary"].pop()),
        lambda folder: sealed(folder, lambda plain: plain.update(vocabulary=[1, 2])),
        lambda folder: sealed(folder, lambda plain: plain.update(kind="alone")),
    ],
)
def test_damage_is_an_error_of_one_line(tmp_path, damage):
    folder = artefact.save(linear(CharTfidf.fit(TEXTS)), tmp_path / "r", {})
    artefact.load(folder)
    damage(folder)
    with pytest.raises(ArtefactError):
        artefact.load(folder)


def test_models_of_texts_are_not_stored(tmp_path):
    preference = Preference("linear", lambda texts: np.ones((len(texts), 1)), {"0.weight": np.eye(1)})
    with pytest.raises(ArtefactError, match="r reads questions with a model of its own, which is not there in serving"):
        artefact.save(TextRouter("r", Knob("threshold", 0.5), preference), tmp_path / "r", {})
