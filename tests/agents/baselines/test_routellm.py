"""RouteLLM's routers find what was planted, and are what their closed forms say."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from agents.baselines.examples import Examples
from agents.baselines.routellm import classifier, collapsed, matrix_factorisation, neighbours, ranking
from agents.routers.text import CharTfidf
from rollouts.errors import DataError
from rollouts.trees.stats import auc


def planted(count, seed, shuffle=False, ties=0.3):
    """Questions of which the large model wins those with a %, the small one the others, but for some ties."""
    draw = np.random.default_rng(seed)
    texts = [
        f"Let a={draw.integers(99)}{'%' if draw.random() < 0.5 else '+'}{draw.integers(9)}. Find a."
        for _ in range(count)
    ]
    wins = np.array(["%" in text for text in texts], float)
    if shuffle:
        draw.shuffle(wins)
    correct = np.stack([1 - wins, wins], axis=1)
    correct[draw.random(count) < ties] = 1.0
    return Examples(tuple(texts), correct), np.array(["%" in text for text in texts])


@pytest.mark.parametrize("method", [classifier, matrix_factorisation, ranking, neighbours])
def test_a_sign_in_the_question_is_found(method):
    (train, _), (new, has) = planted(300, 0), planted(200, 1)
    router = method(train, CharTfidf.fit(train.questions))
    assert auc(router.preference(new.questions), has) > (0.9 if method is neighbours else 0.99)


@pytest.mark.parametrize("method", [classifier, matrix_factorisation, neighbours])
def test_nothing_is_found_in_shuffled_outcomes(method):
    (train, _), (new, has) = planted(600, 0, shuffle=True), planted(600, 1)
    router = method(train, lambda texts: np.random.default_rng(len(texts[0]) + len(texts)).normal(size=(len(texts), 5)))
    wins = np.random.default_rng(3).random(600) < 0.5
    assert auc(router.preference(new.questions), wins) == pytest.approx(0.5, abs=0.08)
    router = method(train, CharTfidf.fit(train.questions))
    assert abs(auc(router.preference(new.questions), has) - 0.5) < 0.35  # one draw of the outcomes


def test_classifiers_do_with_two_outcomes():
    train, has = planted(300, 0, ties=0.0)
    found = classifier(train, CharTfidf.fit(train.questions)).preference(train.questions)
    assert (found[has] > 0.5).all() and (found[~has] < 0.5).all()
    alike = Examples(train.questions, np.ones((300, 2)))
    for method in (classifier, matrix_factorisation):
        with pytest.raises(DataError):
            method(alike, CharTfidf.fit(train.questions))


def test_matrix_factorisation_ranks_as_a_regression_without_intercept_does():
    from sklearn.linear_model import LogisticRegression

    train, _ = planted(400, 0, shuffle=True)
    draw = np.random.default_rng(1)
    embedded = draw.normal(size=(400, 6))
    win = draw.random(400) < 1 / (1 + np.exp(-embedded @ [2, -1, 0.5, 0, 0, 1]))
    examples = Examples(tuple(map(str, range(400))), np.stack([~win, win], axis=1).astype(float))

    def features(texts):
        return embedded[[int(text) for text in texts]]

    theirs = LogisticRegression(fit_intercept=False, C=1e3).fit(embedded, win).decision_function(embedded)
    own = matrix_factorisation(examples, features).preference(examples.questions)
    assert spearmanr(own, theirs).statistic > 0.99
    assert matrix_factorisation(examples, lambda texts: 0 * features(texts)).preference(["0"]) == 0


def test_the_length_of_the_models_vectors_is_nothing():
    import torch

    models, project, out = torch.randn(2, 8), torch.randn(8, 5), torch.randn(1, 8)
    scaled = models * torch.tensor([[3.0], [0.2]])
    torch.testing.assert_close(collapsed(scaled, project, out), collapsed(models, project, out))


def test_ranking_is_a_weighted_regression():
    from sklearn.linear_model import LogisticRegression

    train, _ = planted(60, 0)
    features = CharTfidf.fit(train.questions, most=40)
    new = ["Let a=33%4. Find a.", "Find a.", "Let b=1+1."]
    found = ranking(train, features).preference(new)
    memory = features(train.questions)
    for place, question in enumerate(new):
        cosines = memory @ features([question])[0]
        weight = 10 * 10 ** (cosines / cosines.max())
        both = np.concatenate([weight * (1 - train.outcome / 2), weight * train.outcome / 2])  # won, lost
        fitted = LogisticRegression(C=1e12, tol=1e-12, max_iter=1000).fit(
            np.zeros((120, 1)), np.repeat([1, 0], 60), sample_weight=both
        )
        assert found[place] == pytest.approx(fitted.predict_proba([[0.0]])[0, 1], abs=1e-6)


def test_ranking_without_similarities_is_the_base_rate():
    train, _ = planted(50, 0)
    found = ranking(train, lambda texts: np.ones((len(texts), 1))).preference(["x", "y"])
    assert found == pytest.approx([(1 - train.outcome / 2).mean()] * 2)


def test_neighbours_are_averaged():
    examples = Examples(("0", "1", "2", "9"), np.array([[0, 1], [0, 1], [1, 1], [1, 0]], float))

    def features(texts):
        return np.array([[np.cos(float(text) / 9), np.sin(float(text) / 9)] for text in texts])

    router = neighbours(examples, features, 2)
    assert router.preference(["0.4", "1.6", "9"]).tolist() == [1.0, 0.75, 0.25]
