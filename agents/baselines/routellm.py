"""RouteLLM's routers (Ong et al., arXiv 2406.18665) for two models: who wins on a question, from its text.

Where they rest on an encoder of texts, ours have any features of the question; its head is fitted on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from agents.baselines.examples import Examples, as_float32
from agents.routers.base import Floats, Knob
from agents.routers.text import Preference, TextRouter
from rollouts.errors import DataError, require

Features = Callable[[Sequence[str]], Floats]
START = Knob("threshold", 0.5)
NEAREST = 50


def classifier(examples: Examples, features: Features) -> TextRouter:
    """Fit three classes (the large model wins, tie, the small one wins); a question is worth P(the large one wins).

    RouteLLM fine-tunes BERT for the same labels; here it is a logistic regression on the features.
    """
    require("baselines", "sklearn")
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(examples.outcome)
    if len(classes) < 2:
        raise DataError("classifier: all training problems have one outcome, there is nothing to tell apart.")
    fitted = LogisticRegression(max_iter=1000).fit(features(examples.questions), examples.outcome)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if len(classes) == 2:  # one logit, of the second class
        coefficients, intercept = (np.stack([np.zeros_like(each[0]), each[0]]) for each in (coefficients, intercept))
    weight, bias = np.zeros((3, coefficients.shape[1])), np.full(3, -1e9)
    weight[classes], bias[classes] = coefficients, intercept
    weights = as_float32(**{"0__weight": weight, "0__bias": bias})
    return TextRouter("classifier", START, Preference("classifier", features, weights))


def matrix_factorisation(examples: Examples, features: Features, seed: int = 0, epochs: int = 100) -> TextRouter:
    """Fit logit P(large wins) = w2 . ((P_large - P_small) * W1 e(q)) on won and lost questions; ties are dropped.

    With two models the product collapses to one linear form of e(q) without an intercept, which is what is kept.
    """
    import torch
    from torch.nn import functional

    won = examples.outcome != 1
    if not won.any():
        raise DataError("matrix factorisation: no training problem is won by either model.")
    embedded = torch.tensor(features(examples.questions)[won], dtype=torch.float32)
    target = torch.tensor(examples.outcome[won] == 0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    dim, size = 128, embedded.shape[1]
    models, project, out = (
        torch.nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)
        for shape in ((2, dim), (dim, size), (1, dim))
    )
    optimiser = torch.optim.Adam([models, project, out], lr=3e-4, weight_decay=1e-5)

    for _ in range(epochs):
        for batch in torch.randperm(len(target), generator=generator).split(64):
            noisy = embedded[batch] + 0.1 * torch.randn(len(batch), size, generator=generator) / size**0.5
            loss = functional.binary_cross_entropy_with_logits(noisy @ collapsed(models, project, out), target[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    weights = as_float32(**{"0__weight": collapsed(models, project, out).detach().numpy()[None]})
    return TextRouter("matrix factorisation", Knob("threshold", 0.0), Preference("linear", features, weights))


def collapsed(models: Any, project: Any, out: Any) -> Any:
    """Return the (d,) linear form of e(q) that matrix factorisation comes to with two models; their norms are nothing.

    Args:
        models: (2, k) vectors P of the small and of the large model.
        project: (k, d) W1.
        out: (1, k) w2.
    """
    from torch.nn import functional

    unit = functional.normalize(models, dim=1)
    return (out[0] * (unit[1] - unit[0])) @ project


def ranking(examples: Examples, features: Features) -> TextRouter:
    """Remember all questions with who won, half a win at a tie: similarity-weighted Bradley-Terry.

    For two models it has a closed form, the weighted share of wins. Weights differ at most tenfold, so it hardly moves.
    """
    return _remembering("SW-ranking", "ranking", examples, features)


def neighbours(examples: Examples, features: Features, count: int = NEAREST) -> TextRouter:
    """Remember the same; a question is worth the share of wins among the nearest `count`."""
    return _remembering(f"{count} neighbours", "nearest", examples, features, count=count)


def _remembering(name: str, head: str, examples: Examples, features: Features, **more: float) -> TextRouter:
    weights = as_float32(memory=features(examples.questions), told=1 - examples.outcome / 2, **more)
    return TextRouter(name, START, Preference(head, features, weights))
