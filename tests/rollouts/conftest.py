"""vLLM engines of the embedded family, opened once for all tests."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from thread_engine import in_threads


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """The embedded family on vLLM in threads: ``family``, ``writers`` by role, ``scorer``, and ``again`` to restart."""
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

    def open_writer(stack, role):
        with in_threads():
            return stack.enter_context(family.open(role, store))

    with ExitStack() as stack:
        writers = {role: open_writer(stack, role) for role in ("small", "large")}
        with in_threads():
            scorer = stack.enter_context(family.open_scorer(store))
        yield SimpleNamespace(
            family=family, writers=writers, scorer=scorer, problems=list(problems), starts=store, open=open_writer
        )
