"""A large model that can only be asked by chat, from rollouts to the service: a scripted vendor, real small models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import error_reply
from serve_harness import Router, Upstreams, policy
from vendor import HIDDEN, QUOTA, Vendor

import train as train_command
from agents.routers.base import Threshold
from rollouts.__main__ import main
from rollouts.errors import ConfigError
from rollouts.store.store import Store
from rollouts.tinymath import model_dir
from rollouts.tinymath.problems import solution_steps

ABOUT = {"small": "tinymath-small", "large": "vendor/thinker", "scorer": "tinymath-prm"}


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    server = Vendor()
    yield server
    server.released.set()
    server.die()


def models(folder: Path, vendor: Vendor, small: str = 'backend = "transformers"\ndtype = "float64"') -> Path:
    """Write the embedded small model and reward model beside the vendor's large one."""
    common = "max_length = 1024\nlicence = 'MIT'\nsystem_prompt = ''\n"
    file = folder / "models.toml"
    file.write_text(
        f"[small]\n{small}\n{common}model = '{model_dir('small')}'\nname = 'tinymath-small'\n"
        f"[large]\nbackend = 'server'\nchat_only = true\nmodel = 'vendor/thinker'\nurl = '{vendor.url}'\nretries = 1\n"
        "[large.sampling]\ntemperature = 1.0\n"
        "[scorer]\nname = 'tinymath-prm'\nsystem_prompt = ''\n[scorer.model]\nbackend = 'transformers'\n"
        f"dtype = 'float64'\nmax_length = 1024\nmodel = '{model_dir('prm')}'\nname = 'tinymath-prm'\n"
        "[limits]\nmax_steps = 16\nstep_tokens = 128\n"
    )
    return file


def test_from_rollouts_to_the_service(
    vendor: Vendor, upstreams: Upstreams, tmp_path: Path, engines_in_threads: Any
) -> None:
    file, store, run = models(tmp_path, vendor), tmp_path / "trees", tmp_path / "run"
    asked = ["--problems", "tinymath", "--limit", "3", "--models", str(file), "--max-escalations", "1"]
    assert main(["generate", str(store), *asked]) == 0
    rows = [row for table in Store(store).steps.read() for row in table.to_pylist()]
    by_large = [row for row in rows if row["role"] == "large"]
    assert by_large and all(row["tokens"] > HIDDEN for row in by_large)  # as they are billed
    assert main(["verify", str(store)]) == 0

    arguments = ["--agent", "threshold", "--lam", "1e-6", "--tracking", "none", "--out", str(run)]
    assert train_command.main(["--rollouts", str(store), *arguments]) == 0
    (trained,) = run.glob("lam-*/policy")

    vendor.seen.clear()
    urls = {"small": upstreams.small.url, "prm": upstreams.prm.url}
    router = Router(trained, urls, models=str(file))
    try:
        answers = router.chats(4, trace=True)
    finally:
        router.stop()
    assert {answer.status_code for answer in answers} == {200}
    spent = [answer.json()["usage"] for answer in answers]
    requests = sum(usage["models"]["large"]["requests"] for usage in spent)
    assert requests == len(vendor.asked()) > 0
    assert sum(usage["completion_tokens_details"]["reasoning_tokens"] for usage in spent) == HIDDEN * requests
    assert sum(usage["models"]["large"]["prompt_tokens"] for usage in spent) == 30 * requests


@pytest.fixture
def served(vendor: Vendor, upstreams: Upstreams, tmp_path: Path) -> Iterator[Router]:
    """Every proposal is escalated."""
    urls = {"small": upstreams.small.url, "prm": upstreams.prm.url}
    router = Router(
        policy(tmp_path, Threshold(1.5), **ABOUT), urls, models=str(models(tmp_path, vendor)), upstream_timeout=1.0
    )
    yield router
    router.stop()


def test_a_step_of_the_vendor_is_a_step_of_the_answer(served: Router, vendor: Vendor) -> None:
    question = "Let a=70+33, b=a+49. Find b."
    answer = served.chat(question, trace=True, temperature=1.0).json()
    assert answer["choices"][0]["message"]["content"] == "\n\n".join(map(str.strip, solution_steps(question)))
    trace = answer["trim"]["trace"]
    assert [step["author"] for step in trace] == ["large"] * len(trace)
    first = len(solution_steps(question)[0].strip())
    assert trace[0]["large_tokens"] == HIDDEN + first
    body = vendor.asked()[-1]
    assert body["max_completion_tokens"] == 128 and not {"max_tokens", "top_k", "min_p"} & set(body)
    assert "Solution so far:\nStep 1: a=" in body["messages"][-1]["content"]


def test_settings_that_the_vendor_does_not_take_are_refused_by_name(served: Router) -> None:
    answer = served.chat(top_k=5)
    assert answer.status_code == 400 and "takes no top_k" in answer.json()["error"]["message"]
    assert served.chat(top_k=0).status_code == 200


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (error_reply(401, "bad key sk-123"), "HTTP 401"),
        (error_reply(404, "no such model"), "HTTP 404"),
        ((429, {}, QUOTA), "HTTP 429"),
    ],
)
def test_a_vendor_that_always_refuses_is_down_and_proposals_are_kept(
    served: Router, vendor: Vendor, reply: Any, why: str
) -> None:
    vendor.fault = lambda path, *_: reply if "chat" in path else None
    answer = served.chat(trace=True).json()
    assert {step["author"] for step in answer["trim"]["trace"]} == {"small"}
    assert "large (status): the proposal was kept" in answer["trim"]["fallbacks"][0]
    served.wait_down("large")
    health = served.client.get("/health").json()
    assert health["status"] == "degraded" and health["upstreams"]["large"] == {"up": False, "why": why}
    assert served.client.get("/ready").status_code == 200 and served.metric("trim_upstream_up", model="large") == 0
    before = len(vendor.asked())
    assert "large (down)" in served.chat().json()["trim"]["fallbacks"][0] and len(vendor.asked()) == before
    vendor.fault = lambda *_: None
    served.wait_up(("large",))
    assert not served.chat().json()["trim"]["fallbacks"]


def test_an_answer_that_cannot_be_written_or_counted_is_none(served: Router, vendor: Vendor) -> None:
    """Before, half a surrogate pair and counts below zero made the service fail."""

    def said(text: str, **usage: int) -> Any:
        body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}
        return lambda _, asked, *__: (200, {}, body) if "Find" in str(asked) else None  # not to those that look

    vendor.fault = said("Step 1: a\ud800=1", completion_tokens=5)
    answer = served.chat(trace=True)
    assert answer.status_code == 200 and "a\ufffd=1" in answer.json()["choices"][0]["message"]["content"]
    for usage in ({"prompt_tokens": -5, "completion_tokens": 5}, {"completion_tokens": -5}):
        vendor.fault = said("Step 1: a=1", **usage)
        answer = served.chat(trace=True)
        assert answer.status_code == 200 and "large (malformed)" in answer.json()["trim"]["fallbacks"][0]


def test_an_answer_that_may_take_many_tokens_has_more_time(
    upstreams: Upstreams, vendor: Vendor, tmp_path: Path
) -> None:
    file = models(tmp_path, vendor)
    file.write_text(file.read_text().replace("step_tokens = 128", "step_tokens = 2048"))
    urls = {"small": upstreams.small.url, "prm": upstreams.prm.url}
    router = Router(policy(tmp_path, Threshold(1.5), **ABOUT), urls, models=str(file), upstream_timeout=0.5)
    try:
        vendor.delay = 0.8
        began = time.monotonic()
        answer = router.chat("Let a=70+33. Find a.").json()
        assert not answer["trim"]["fallbacks"] and time.monotonic() - began > 0.8
    finally:
        router.stop()


def test_what_cannot_be_served_by_chat_is_refused_at_the_start(vendor: Vendor, tmp_path: Path) -> None:
    urls = {"small": "http://127.0.0.1:9/v1", "prm": "http://127.0.0.1:9/v1"}
    file = models(tmp_path, vendor, small="backend = 'server'\nurl = 'http://127.0.0.1:9/v1'\nchat_only = true")
    with pytest.raises(ConfigError, match="small: chat_only is for the large model alone"):
        Router(policy(tmp_path, Threshold(1.5), **ABOUT), urls, models=str(file))
    reader = Threshold(-0.5, schema="prefill/1")
    with pytest.raises(ConfigError, match="large: the policy reads what the large model makes of steps"):
        Router(policy(tmp_path, reader, **ABOUT), urls, models=str(models(tmp_path, vendor)))
