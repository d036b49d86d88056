"""Several policies at once, by name and by hash; read again while requests are under way."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
from serve_harness import Process, Router, Upstreams, policy

from agents.routers.base import Constant, Threshold
from agents.serve.api import ApiError
from agents.serve.config import ServeConfig
from agents.serve.policies import Policies
from rollouts.errors import ConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("several")
    made = {"first": Threshold(0.5), "large": Constant(1), "free": Threshold(0.2, schema="small.min_logprob/1")}
    return {name: policy(place, router) for name, router in made.items()}


def test_requests_are_split_by_a_hash_and_names_are_theirs(folders: dict[str, Path]) -> None:
    found = Policies.load(ServeConfig(str(folders["first"]), also=(f"b={folders['large']}",), ab=("b=0.25",)))
    arms = [found.drawn(f"problem {number}") for number in range(2000)]
    assert arms == [found.drawn(f"problem {number}") for number in range(2000)]
    assert set(arms) == {"trim-thr", "b"} and 0.2 < arms.count("b") / 2000 < 0.3
    assert found.named(None) == found.named("trim-thr") == (None, {}) and found.named("b") == ("b", {})
    assert found.named("b@lam=0.5") == ("b", {"lam": 0.5}) and found.names() == ["trim-thr", "b"]
    with pytest.raises(ApiError, match=r"does not exist\. Valid: trim-thr, b\."):
        found.named("c")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"also": ("b",)}, "expected NAME=DIR"),
        ({"also": ("trim-thr={large}",)}, "the name is taken"),
        ({"also": ("b@x={large}",)}, "has an @"),
        ({"also": ("b={large}",), "ab": ("c=0.5",)}, "no policy of --also"),
        ({"ab": ("trim-thr=0.5",)}, "no policy of --also"),
        ({"also": ("b={large}",), "ab": ("b=x",)}, "expected shares"),
        ({"also": ("b={large}",), "ab": ("b=0.7", "b=0.7")}, "expected shares"),
        ({"also": ("b={large}",), "ab": ("b=1.5",)}, "expected shares"),
        ({"also": ("b={large}",), "ab": ("b=nan",)}, "expected shares"),
        ({"also": ("b={large}",), "budget": 0.2}, "budget is 0.2"),
    ],
)
def test_what_makes_no_sense_is_refused(folders: dict[str, Path], settings: dict, words: str) -> None:
    filled = {
        name: tuple(each.format(**folders) for each in value) if isinstance(value, tuple) else value
        for name, value in settings.items()
    }
    with pytest.raises(ConfigError, match=words):
        Policies.load(ServeConfig(str(folders["first"]), **filled))


def test_the_usual_setting_is_that_of_policies_which_take_one(folders: dict[str, Path]) -> None:
    ranged = str(files("agents.demo") / "router")
    for first, also in ((str(folders["first"]), f"b={ranged}"), (ranged, f"b={folders['first']}")):
        found = Policies.load(ServeConfig(first, also=(also,), budget=0.2))
        settings = {name: found.each[name].session(*usual).knob.name for name, usual in found.usual.items()}
        assert sorted(settings.values()) == ["lam", "threshold"]
        with pytest.raises(ConfigError, match="names? neither: --lam or --budget"):
            Policies.load(ServeConfig(first, also=(also,)))


@pytest.fixture(scope="module")
def both(upstreams: Upstreams, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    place = tmp_path_factory.mktemp("served") / "second"
    shutil.copytree(folders["large"], place)
    running = Router(folders["first"], upstreams.urls(), also=(f"second={place}",), ab=("second=0.5",))
    running.second = place  # type: ignore[attr-defined]
    yield running
    running.stop()


def test_who_decided_is_told_and_counted(both: Router) -> None:
    listed = [card["id"] for card in both.client.get("/v1/models").json()["data"]]
    assert listed == ["trim-thr", "second"]
    named = both.chat(model="second").json()
    assert named["model"] == "second" and named["trim"]["policy"] == "second"
    assert named["trim"]["large_token_share"] == 1.0
    drawn = [answer.json()["trim"]["policy"] for answer in both.chats(12)]
    assert set(drawn) == {"trim-thr", "second"}
    again = [answer.json()["trim"]["policy"] for answer in both.chats(12)]
    assert again == drawn
    assert both.metric("trim_policy_requests_total", policy="second", status="200") == 1 + 2 * drawn.count("second")
    assert both.metric("trim_policy_tokens_total", policy="second", model="large", kind="completion") > 0
    assert both.chat(model="third").status_code == 404


def test_policies_are_read_again_under_load_and_bad_ones_are_not(both: Router, folders: dict[str, Path]) -> None:
    place: Path = both.second  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: [answer.status_code for answer in both.chats(60, first=100, model="second")])
        for other in ("first", "large", "first"):
            time.sleep(0.2)
            shutil.rmtree(place)
            assert not both.server.reload()  # nothing is there at the moment
            shutil.copytree(folders[other], place)
            assert both.server.reload()
        assert set(answers.result()) == {200}
    assert both.chat(model="second").json()["trim"]["knob"] == {"name": "threshold", "value": 0.5}
    assert (both.metric("trim_reloads_total", result="kept"), both.metric("trim_reloads_total", result="read")) == (
        3,
        3,
    )
    (place / "policy.json").write_text("{}")
    assert not both.server.reload() and both.chat(model="second").status_code == 200
    shutil.rmtree(place)
    shutil.copytree(folders["free"], place)  # it reads log-probabilities, which nobody was asked for
    assert not both.server.reload() and both.chat(model="second").status_code == 200


def test_sighup_reads_again(upstreams: Upstreams, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["first"], place := tmp_path / "policy")
    urls = [word for role, url in upstreams.urls().items() for word in (f"--{role}", url)]
    running = Process("--policy", place, "--port", 0, *urls)
    try:
        running.wait()
        for words in ("Policies were reloaded: trim-thr.", "Policies were not reloaded, the old ones are kept: "):
            running.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 20
            while words not in running.log.read_text() and time.monotonic() < end:
                time.sleep(0.05)
            assert words in running.log.read_text() and running.process.poll() is None
            (place / "policy.json").write_text("{}")
    finally:
        running.process.terminate()
        running.process.wait(20)
        running.log.unlink()
