"""Statistics of steps' tokens: what generating tells is what a prefill finds."""

from __future__ import annotations

import numpy as np
import pytest

from rollouts import tinymath
from rollouts.config import embedded_family
from rollouts.family import Family
from rollouts.models.base import CompletionRequest, LogprobRequest
from rollouts.models.open import open_backend
from rollouts.models.stepwise import StepModel, StepRules
from rollouts.scoring.base import score_paths
from rollouts.text.likelihood import STATISTICS
from rollouts.text.steps import SMALL, Prefix, StopReason

pytestmark = pytest.mark.usefixtures("engines_in_threads")
BACKENDS = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module", params=BACKENDS)
def small(request, engines_in_threads):
    """A family and the backend of its small model."""
    family = Family(embedded_family(request.param))
    with open_backend(SMALL, family.config.small, seed=3) as backend:
        yield family, backend


def test_generating_tells_what_a_prefill_finds(small):
    family, backend = small
    scorer = family.statistics(SMALL, backend)
    rules = StepRules(
        SMALL, family.prompts(SMALL), backend.window, family.config.small.sampling, family.limits, family.fits, 5, True
    )
    writer = StepModel(backend, rules)
    problems = tinymath.generate_problems("validation", 12)
    prefixes = [Prefix(problem.id, problem.question, 0, (), 0) for problem in problems]
    for whole in (True, False):
        futures = [writer.submit(prefix, whole=whole) for prefix in prefixes]
        made = [future.result(120).steps for future in futures]
        paths = [
            (problem.question, [step.text for step in steps]) for problem, steps in zip(problems, made, strict=True)
        ]
        found = score_paths(scorer, paths)
        told = np.array([step.statistics for steps in made for step in steps])
        np.testing.assert_allclose(told, np.concatenate([np.array(scores) for scores in found]), atol=5e-3)
        assert told.shape == (sum(map(len, made)), len(STATISTICS)) and np.isfinite(told).all()
        assert any(steps[-1].stop_reason is StopReason.BOXED for steps in made) or not whole
    quiet = StepModel(backend, StepRules(SMALL, rules.prompts, rules.window, rules.sampling, rules.limits, rules.fits))
    assert quiet.submit(prefixes[0], whole=True).result(60).steps[0].statistics is None


def test_they_are_those_at_temperature_1_whatever_is_sampled_at(small):
    family, backend = small
    sampling = family.config.small.sampling.__class__(temperature=0.3, top_p=0.8)
    prompt = family.prompts(SMALL).ids(tinymath.generate_problems("validation", 1)[0].question)
    done = backend.submit(CompletionRequest(prompt, 40, sampling, ("\n\n",), 7, likelihood=True)).result(60)
    assert len(done.likelihood.logprobs) == len(done.likelihood.entropies) == done.tokens
    again = backend.submit(LogprobRequest((*prompt, *done.token_ids), len(prompt), entropies=True)).result(60)
    assert done.likelihood.logprobs == pytest.approx(again.logprobs, abs=5e-3)
    assert done.likelihood.entropies == pytest.approx(again.entropies, abs=5e-3)
    assert max(again.entropies) > 0.01
