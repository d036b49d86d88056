"""Text features are those of scikit-learn; heads say what their formulas say."""

import numpy as np
import pytest

from agents.routers.base import Knob
from agents.routers.text import CharTfidf, Preference, TextRouter, ngrams
from agents.routers.whole import Cascade, QueryRouter
from rollouts.errors import ArtefactError

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
