"""One problem set, three backends, one format: the stores differ by sampling noise only."""

from __future__ import annotations

import math

import pytest
from live import fill
from thread_engine import in_threads

from rollouts.config import embedded_family, parse_family
from rollouts.family import Family
from rollouts.scoring.base import self_test_examples
from rollouts.store.store import Store
from rollouts.trees.compile import compile_store
from rollouts.trees.stats import split_statistics

pytestmark = pytest.mark.vllm
PROBLEMS = 60
REPLICAS = 1


def open_and_fill(path, family, problems):
    scratch = Store.create(path.with_suffix(".starts"), family.process(1))
    with family.open("small", scratch) as small, family.open("large", scratch) as large:
        with family.open_scorer(scratch) as scorer:
            return fill(path, family, problems, {"small": small, "large": large}, scorer, REPLICAS, 1)


@pytest.fixture(scope="module")
def server_family(vllm_servers):
    """The embedded family behind three real server processes."""
    values = embedded_family("transformers", dtype="float32").model_dump()
    servers = vllm_servers._asdict()
    for section, name in ((values["small"], "small"), (values["large"], "large"), (values["scorer"]["model"], "prm")):
        section["backend"], section["tokenizer"] = "server", section["model"]
        section["model"], section["url"] = servers[name].model, servers[name].url
    return parse_family(values)


def test_three_backends_agree_within_noise(embedded, server_family, tmp_path):
    problems = embedded.problems[:PROBLEMS]
    examples = self_test_examples(problems)
    stores = {
        "vllm": fill(tmp_path / "vllm", embedded.family, problems, embedded.writers, embedded.scorer, REPLICAS, 1),
        "server": open_and_fill(tmp_path / "server", Family(server_family, seed=1, examples=examples), problems),
    }
    with in_threads():
        family = Family(embedded_family("transformers"), seed=1, examples=examples)
        stores["transformers"] = open_and_fill(tmp_path / "transformers", family, problems)
    processes = [store.manifest["process"] for store in stores.values()]
    assert processes[0] == processes[1] == processes[2]  # the backend does not change what is generated
    found = {name: split_statistics(compile_store(store), "test") for name, store in stores.items()}
    print(found)
    trees = PROBLEMS * REPLICAS
    for name, statistics in found.items():
        assert statistics.trees == trees, name
        for measure in ("small_accuracy", "large_accuracy"):
            mine, reference = getattr(statistics, measure).mean, getattr(found["vllm"], measure).mean
            pooled = (mine + reference) / 2
            error = math.sqrt(max(pooled * (1 - pooled), 1 / trees) * 2 / PROBLEMS)  # as if replicas were copies
            assert abs(mine - reference) < 3.3 * error, (name, measure)
        for measure in ("small_tokens", "large_tokens", "small_steps", "large_steps"):
            assert getattr(statistics, measure) == pytest.approx(getattr(found["vllm"], measure), rel=0.1), measure
    for store in stores.values():
        reasons = {row["stop_reason"] for table in store.steps.read() for row in table.to_pylist()}
        assert reasons <= {"delimiter", "boxed", "eos", "length", "context"}
        assert store.steps.counters()["decoded_large"] > 0
