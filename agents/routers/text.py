"""A query-level router that reads the question alone: features of its text, a head, a threshold. NumPy alone.

How heads are fitted is in `agents.baselines`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats, Knob
from agents.routers.mlp import Weights
from rollouts.errors import ArtefactError, did_you_mean

IDF = "idf"
LONGEST = 4
"""Most characters of an n-gram."""
_BLANK = re.compile(r"\s\s+")


def ngrams(text: str, longest: int = LONGEST) -> Iterable[str]:
    """Yield all character n-grams of a text in small letters, runs of blanks taken as one, from length 1 on."""
    text = _BLANK.sub(" ", text.lower())
    for length in range(1, longest + 1):
        for begin in range(len(text) - length + 1):
            yield text[begin : begin + length]


@dataclass(frozen=True, eq=False)
class CharTfidf:
    """Character n-grams, weighted by how few texts have them (TF-IDF), scaled to length 1.

    Attributes:
        vocabulary: The V n-grams that count.
        idf: (V,) float32 weights, 1 + ln((1 + n) / (1 + number of the n texts with it)).
    """

    vocabulary: tuple[str, ...]
    idf: NDArray[np.float32]
    _place: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that each n-gram has a weight."""
        if self.idf.shape != (len(self.vocabulary),) or len(set(self.vocabulary)) < len(self.vocabulary):
            raise ArtefactError(f"{len(self.vocabulary)} n-grams have weights of shape {self.idf.shape}.")
        object.__setattr__(self, "_place", {ngram: place for place, ngram in enumerate(self.vocabulary)})

    @classmethod
    def fit(cls, texts: Sequence[str], most: int = 1024) -> CharTfidf:
        """Take the `most` n-grams that the most texts have: of training questions, and of nothing else."""
        frequency = Counter(ngram for text in texts for ngram in set(ngrams(text)))
        chosen = sorted(frequency, key=lambda ngram: (-frequency[ngram], ngram))[:most]
        seen = np.array([frequency[ngram] for ngram in chosen], np.float64)
        return cls(tuple(chosen), (1 + np.log((1 + len(texts)) / (1 + seen))).astype(np.float32))

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Return (n, V) features; a text without any of the n-grams has zeros."""
        counts = np.zeros((len(texts), len(self.vocabulary)))
        for row, text in zip(counts, texts, strict=True):
            for ngram, count in Counter(ngrams(text)).items():
                if (place := self._place.get(ngram)) is not None:
                    row[place] = count
        counts *= self.idf
        length = np.linalg.norm(counts, axis=1, keepdims=True)
        found: Floats = counts / np.where(length > 0, length, 1)
        return found


def layers(values: Floats, weights: Weights, prefix: str = "") -> Floats:
    """Return what a perceptron with ReLUs makes of (n, d) values: ``0.weight`` (h, d), ``0.bias``, ``1.weight``, ..."""
    number = 0
    while not number or f"{prefix}{number}.weight" in weights:
        values = np.maximum(values, 0) if number else values
        bias = weights.get(f"{prefix}{number}.bias", np.zeros(1, np.float32)).astype(np.float64)
        values = values @ weights[f"{prefix}{number}.weight"].T.astype(np.float64) + bias
        number += 1
    return values


def softmax(logits: Floats) -> Floats:
    """Return the (n, k) probabilities of logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def similarity(embedded: Floats, weights: Weights) -> Floats:
    """Return the (n, m) cosines of questions to those that are remembered."""
    memory = weights["memory"].astype(np.float64)
    scale = np.linalg.norm(embedded, axis=1)[:, None] * np.linalg.norm(memory, axis=1)
    cosines: Floats = embedded @ memory.T / np.where(scale > 0, scale, 1)
    return cosines


def nearest(embedded: Floats, weights: Weights) -> Floats:
    """Return the (n, ...) means of what is remembered of the nearest ``count`` questions."""
    count = min(int(weights["count"].item()), len(weights["memory"]))
    near = np.argsort(-similarity(embedded, weights), axis=1, kind="stable")[:, :count]
    means: Floats = weights["told"].astype(np.float64)[near].mean(axis=1)
    return means


def _classified(embedded: Floats, weights: Weights) -> Floats:
    """P(the large model wins), the first of the classes."""
    return softmax(layers(embedded, weights))[:, 0]


def _linear(embedded: Floats, weights: Weights) -> Floats:
    return layers(embedded, weights)[:, 0]


def _ranked(embedded: Floats, weights: Weights) -> Floats:
    """Bradley-Terry of two models with a weight for each remembered question: the weighted share of wins."""
    cosines = similarity(embedded, weights)
    most = cosines.max(axis=1, keepdims=True)
    weight = 10.0 ** (1 + cosines / np.where(most > 0, most, 1))
    share: Floats = weight @ weights["told"].astype(np.float64) / weight.sum(axis=1)
    return share


def smoothie(distances: Floats) -> Floats:
    """Return the (n, k) quality of k outputs from their (n, k, k) squared distances, summing to 1.

    From E|i - j|^2 = d_i + d_j for independent errors, d_i = (|i - j|^2 + |i - l|^2 - |j - l|^2) / 2 for any two
    others, averaged over all of them; the quality is 1 / d_i, but for a factor.
    """
    count = distances.shape[-1]
    error = np.zeros(distances.shape[:-1])
    for i in range(count):
        others = [j for j in range(count) if j != i]
        pairs = [(j, k) for j in others for k in others if j < k]
        error[..., i] = np.mean(
            [(distances[..., i, j] + distances[..., i, k] - distances[..., j, k]) / 2 for j, k in pairs], axis=0
        )
    quality = 1 / np.maximum(error, _LEAST_ERROR)
    shares: Floats = quality / quality.sum(axis=-1, keepdims=True)
    return shares


_LEAST_ERROR = 1e-9


def _smooth(embedded: Floats, weights: Weights) -> Floats:
    """Quality of the large model's outputs less that of the small one's, each the mean of its voters."""
    quality, large = smoothie(nearest(embedded, weights)), weights["large"] > 0
    gain: Floats = quality[:, large].mean(axis=1) - quality[:, ~large].mean(axis=1)
    return gain


def _gain(embedded: Floats, weights: Weights) -> Floats:
    """Gain in accuracy for what the large model costs more, as predicted."""
    right = [softmax(layers(embedded, weights, f"{arm}.accuracy."))[:, 1] for arm in ("small", "large")]
    cost = [np.logaddexp(0, layers(embedded, weights, f"{arm}.cost.")[:, 0]) for arm in ("small", "large")]
    gain: Floats = (right[1] - right[0]) / np.maximum(cost[1] - cost[0], 1e-6)
    return gain


def _doubt(embedded: Floats, weights: Weights) -> Floats:
    """How unlikely the small model is to be right."""
    return 1 - softmax(layers(embedded, weights, "small.accuracy."))[:, 1]


HEADS: dict[str, Callable[[Floats, Weights], Floats]] = {
    "classifier": _classified,
    "linear": _linear,
    "ranking": _ranked,
    "nearest": lambda embedded, weights: nearest(embedded, weights),
    "smoothie": _smooth,
    "gain": _gain,
    "doubt": _doubt,
}
"""From (n, d) features and a head's weights to (n,) numbers, the greater the more the large model is wanted."""


@dataclass(frozen=True, eq=False)
class Preference:
    """How much a question is worth the large model: features of its text, and a head on them.

    Attributes:
        head: Name of the head (`HEADS`).
        features: From texts to (n, d) features. Those of `CharTfidf` are stored with a router, no others.
        weights: The head's.
    """

    head: str
    features: Callable[[Sequence[str]], Floats]
    weights: Weights

    def __post_init__(self) -> None:
        """Check that there is such a head."""
        if self.head not in HEADS:
            raise ArtefactError(f"The policy's head is {self.head!r}.{did_you_mean(self.head, HEADS)}")

    def __call__(self, questions: Sequence[str]) -> Floats:
        """Return (n,) numbers, the greater the more the large model is wanted."""
        single = dict.fromkeys(questions)  # of several replicas each problem once
        found = dict(zip(single, _found(self, tuple(single)).tolist(), strict=True))
        return np.array([found[question] for question in questions])


@lru_cache(maxsize=16)  # thresholds of one router are tried on the same questions
def _found(preference: Preference, questions: tuple[str, ...]) -> Floats:
    return HEADS[preference.head](preference.features(questions), preference.weights)


@dataclass(frozen=True, eq=False)
class TextRouter:
    """Sends a question to the large model if it is worth at least the threshold."""

    name: str
    knob: Knob
    preference: Preference
    schema: str = field(default="agg/1", init=False)

    def sends(self, questions: Sequence[str]) -> Floats:
        """Return (n,) of 0 and 1."""
        return (self.preference(questions) >= self.knob.value).astype(np.float64)

    def to_plain(self) -> dict[str, Any]:
        """Return head and vocabulary, as JSON holds them.

        Raises:
            ArtefactError: It reads questions with a model of its own.
        """
        return {"head": self.preference.head, "vocabulary": list(self._features.vocabulary)}

    @property
    def weights(self) -> Weights:
        """Arrays of features and head; errors as of `to_plain`."""
        return {IDF: self._features.idf, **self.preference.weights}

    @property
    def _features(self) -> CharTfidf:
        if not isinstance(self.preference.features, CharTfidf):
            raise ArtefactError(
                f"{self.name} reads questions with a model of its own, which is not there in serving: it cannot be "
                "stored. Fit it on character n-grams (agents.routers.text.CharTfidf)."
            )
        return self.preference.features

    @classmethod
    def of_stored(cls, name: str, knob: Knob, plain: Mapping[str, Any], weights: Weights) -> TextRouter:
        """Return a router again from its name, its knob and what `to_plain` and `weights` gave.

        Raises:
            Exception: They do not belong together, whatever NumPy makes of that.
        """
        own = dict(weights)
        router = cls(name, knob, Preference(plain["head"], CharTfidf(tuple(plain["vocabulary"]), own.pop(IDF)), own))
        router.sends(["?"])  # fails where weights lack or do not fit
        return router
