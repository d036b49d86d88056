"""Engines of the embedded family that the slow tests share: each vLLM engine starts once."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """Open the embedded family on vLLM: ``family``, ``writers`` by role, ``scorer``."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from rollouts.config import load_family
    from rollouts.family import Family
    from rollouts.scoring.base import self_test_examples
    from rollouts.store.store import Store
    from rollouts.tasks.problems import load_problems

    problems = load_problems("tinymath:test", limit=200)
    family = Family(load_family("tinymath"), seed=1, examples=self_test_examples(problems))
    store = Store.create(tmp_path_factory.mktemp("engines") / "starts", family.process(None))
    with ExitStack() as stack:
        writers = {role: stack.enter_context(family.open(role, store)) for role in ("small", "large")}
        scorer = stack.enter_context(family.open_scorer(store))
        yield SimpleNamespace(family=family, writers=writers, scorer=scorer, problems=list(problems), starts=store)
