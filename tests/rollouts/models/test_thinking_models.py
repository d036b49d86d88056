"""A tiny family that thinks, its embedded weights on every backend, and whether the cache of it is true."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_server import EngineServer
from live import fill, run_live
from reference_walk import walk
from scipy import stats
from thinking_models import MARKS, thinking_family
from thread_engine import in_threads

from rollouts.config import FamilyConfig, parse_family
from rollouts.errors import ConfigError, StoreError
from rollouts.family import Family
from rollouts.models.open import open_backend
from rollouts.scoring.base import self_test_examples
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.tasks.problems import load_problems
from rollouts.text.steps import CLOSE, LARGE, ROLES, Prefix
from rollouts.tinymath import solution_steps
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.stats import store_statistics
from rollouts.trees.verify import verify_store
from trim_env.live import family_of

PROBLEMS = load_problems("tinymath:test", limit=60)
FEW = list(PROBLEMS)[:3]
LEVEL = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[FamilyConfig]:
    """The family behind servers."""
    family = thinking_family(folder)
    values = family.model_dump()
    with ExitStack() as stack:
        for role in ROLES:
            with in_threads():
                backend = stack.enter_context(open_backend(role, family.generator(role), seed=5))
            server = EngineServer(backend, f"thinking-{role}")
            stack.callback(server.die)
            section = values[role]
            section |= {"backend": "server", "tokenizer": section["model"], "url": server.url, "dtype": "auto"}
            section["model"] = server.model
        yield parse_family(values)


def family_on(config: FamilyConfig) -> Family:
    return Family(config, seed=1, examples=self_test_examples(FEW))


def opened(stack: ExitStack, family: Family, starts: Store) -> tuple[dict[str, Any], Any]:
    with in_threads():
        writers = {role: stack.enter_context(family.open(role, starts)) for role in ROLES}
        return writers, stack.enter_context(family.open_scorer(starts))


def grown(path: Path, config: FamilyConfig, problems: Any = FEW, replicas: int = 1, cap: int | None = 1) -> Store:
    family = family_on(config)
    with ExitStack() as stack:
        starts = Store.create(path.with_name(f"{path.name}-starts"), family.process(cap))
        return fill(path, family, problems, *opened(stack, family, starts), replicas, cap)


def thinks_and_answers(store: Store) -> None:
    """The block is what the models always write, the answer what follows it; marks are those of the store."""
    assert not verify_store(store).problems
    closed = set()
    for tree in load_trees(store, FEW, None, 1):
        for _, node, role in tree.places():
            step = node.proposals[role]
            assert not any(mark.strip() in step.text for mark in MARKS[LARGE]) and "<think>" not in step.text
            if CLOSE in step.text:
                closed.add(role)
                assert step.text == "</think>\n\n" and step.tokens == 1 and not step.terminal
            if step.terminal and not node.thinking:
                assert step.text.startswith("he answer is \\boxed{")
    assert closed == set(ROLES)
    trees = compile_store(store, cache=False)
    assert set(np.unique(trees.correct)) == {-1, 0, 1}
    counters = store.steps.counters()
    assert counters.get("dropped_small", 0) == counters.get("cut_tokens_small", 0) == 0


@pytest.fixture(scope="module")
def transformers_store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return grown(tmp_path_factory.mktemp("transformers") / "store", thinking_family(folder))


def test_transformers(transformers_store: Store) -> None:
    thinks_and_answers(transformers_store)


def test_a_server_writes_the_same_process(served: FamilyConfig, transformers_store: Store, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", served)
    thinks_and_answers(store)
    assert store.manifest["process"] == transformers_store.manifest["process"]


def test_another_budget_is_refused_and_the_same_goes_on(
    folder: Path, transformers_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollouts.config.embedded_family", lambda backend: thinking_family(folder))
    family_of(transformers_store, "tinymath:transformers")
    other = thinking_family(folder, max_thinking_tokens=299)
    monkeypatch.setattr("rollouts.config.embedded_family", lambda backend: other)
    with pytest.raises(StoreError, match="max_thinking_tokens is 300 there and 299 here"):
        family_of(transformers_store, "tinymath:transformers")


def test_either_goes_on_where_the_other_thinks(transformers_store: Store, folder: Path) -> None:
    """A prefix that both have written is read by each as if it had written it itself."""
    family = family_on(thinking_family(folder))
    question = FEW[0].question
    thoughts = tuple(solution_steps(question)[:-1])
    steps = (*thoughts, "</think>\n\n")
    for role, (opening, closing) in MARKS.items():
        text = family.prompts(role).text(question, steps)
        assert text.endswith(f"assistant{opening}{''.join(thoughts)}{closing}")
    with ExitStack() as stack:
        writers, _ = opened(stack, family, transformers_store)
        for role in ROLES:
            prefix = Prefix("p", question, 0, thoughts, 150)
            assert writers[role].submit(prefix, whole=False).result(60).steps[0].text == "</think>\n\n"
            answer = writers[role].submit(Prefix("p", question, 0, steps, 151), whole=False).result(60).steps[0]
            assert answer.text == f"he answer is \\boxed{{{FEW[0].answer}}}" and not answer.thinking


def test_blocks_are_closed_by_force_and_counted(folder: Path, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", thinking_family(folder, max_thinking_tokens=40), cap=0)
    reasons = store_statistics(store)["stop_reasons"]
    assert reasons["small forced"] == 3 and reasons["large forced"] == 3 and "small length" not in reasons
    forced = [row for part in store.steps.read() for row in part.to_pylist() if row["stop_reason"] == "forced"]
    assert all(row["text"].endswith("\n</think>\n\n") and not row["terminal"] for row in forced)


def test_models_that_are_asked_by_chat_cannot_go_on_in_a_block(served: FamilyConfig) -> None:
    values = served.model_dump()
    values["large"]["chat_only"] = True
    with pytest.raises(ConfigError, match="continues a partial answer, or partial thinking"):
        parse_family(values)


# ---------------------------------------------------------------- vLLM, and the truth of the cache


@pytest.fixture(scope="module")
def on_vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("vllm")
    family = family_on(thinking_family(folder, "vllm"))
    starts = Store.create(tmp_path_factory.mktemp("engines") / "starts", family.process(None))
    with ExitStack() as stack:
        yield family, *opened(stack, family, starts)


@pytest.mark.vllm
def test_vllm(on_vllm: Any, transformers_store: Store, tmp_path: Path) -> None:
    store = fill(tmp_path / "store", on_vllm[0], FEW, *on_vllm[1:], 1, 1)
    thinks_and_answers(store)
    assert store.manifest["process"] == transformers_store.manifest["process"]


def differences(trees: Any, live: Any, replicas: int, rate: float) -> list[float]:
    """Paired by problem: p-values of the mean differences in accuracy, large tokens and steps."""
    generator, order = np.random.default_rng(7), np.lexsort((trees.replica, trees.problem))
    starts = np.repeat(trees.select()[order], 16)
    got = walk(trees, starts, lambda rows: (generator.random(len(rows)) < rate).astype(int))
    walked = np.stack([got.correct, got.large_tokens, got.steps]).astype(float).reshape(3, -1, replicas * 16)
    pairs = zip(walked.mean(axis=2), live, strict=True)
    return [float(stats.ttest_1samp(one - other, 0.0).pvalue) if (one != other).any() else 1.0 for one, other in pairs]


def truth(path: Path, family: Family, writers: Any, scorer: Any, problems: Any, replicas: int, episodes: int) -> None:
    """As `test_truth` has it for models that do not think, with a random router; another rate is told from it."""
    trees = compile_store(fill(path, family, problems, writers, scorer, replicas, None), cache=False)
    generator = np.random.default_rng(5)
    repeated = [problem for problem in problems for _ in range(episodes)]
    live = run_live(repeated, writers, lambda scores: generator.random(len(scores)) < 0.4, make_grader("exact"))
    outcomes = np.stack(live).reshape(3, -1, episodes).mean(axis=2)
    found = differences(trees, outcomes, replicas, 0.4)
    assert min(found) > LEVEL / 3, found
    assert min(differences(trees, outcomes, replicas, 0.15)) < LEVEL / 3


def test_trees_give_the_distribution_of_live_episodes(folder: Path, tmp_path: Path) -> None:
    family = family_on(thinking_family(folder))
    with ExitStack() as stack:
        writers, scorer = opened(stack, family, Store.create(tmp_path / "starts", family.process(None)))
        short = sorted(PROBLEMS, key=lambda problem: len(problem.question))[:16]
        truth(tmp_path / "store", family, writers, scorer, short, 2, 3)


@pytest.mark.vllm
def test_trees_of_vllm_give_the_distribution_of_live_episodes(on_vllm: Any, tmp_path: Path) -> None:
    truth(tmp_path / "store", *on_vllm, list(PROBLEMS), 2, 4)
