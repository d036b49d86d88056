"""What those who run the service rely on: request ids, logs for machines, settings from a file."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
from serve_harness import QUESTION, ROOT, Process, Router, Upstreams, streamed
from starlette.datastructures import Headers

from agents.__main__ import main
from agents.serve import logs
from agents.serve.config import ServeConfig, with_file
from agents.serve.metrics import Metrics
from agents.serve.tracing import CURRENT, HEADER, Trace
from rollouts.errors import ConfigError


def test_every_answer_has_an_id_its_own_where_it_brings_one(router: Router) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    own = router.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc-1"})
    assert own.headers["X-Request-ID"] == "abc-1"
    found = [router.client.get(path).headers["X-Request-ID"] for path in ("/health", "/v1/nothing", "/metrics")]
    assert len({*found}) == 3 and all(len(each) == 32 for each in found)
    for bad in ("", "a b", "x" * 129, "\u00e9"):
        answer = router.client.get("/live", headers=[(b"x-request-id", bad.encode())])
        assert len(answer.headers["X-Request-ID"]) == 32
    assert router.chat(messages=[]).headers["X-Request-ID"]  # refused
    assert list(streamed(router))


def test_a_line_of_the_log_is_json_with_the_id() -> None:
    CURRENT.set(Trace(Headers({HEADER: "abc-2"})))
    try:
        raise ValueError("odd\nwords")
    except ValueError:
        record = logging.LogRecord("trim.serve", logging.ERROR, "", 0, "%s\nfailed", ("x",), sys.exc_info())
    line = logs.Json().format(record)
    told = json.loads(line)
    assert "\n" not in line and told["message"] == "x\nfailed" and told["request_id"] == "abc-2"
    assert told["level"] == "error" and "odd\nwords" in told["traceback"] and told["time"].endswith("Z")


def parsed(*arguments: str) -> ServeConfig:
    return tyro.cli(ServeConfig, args=with_file(arguments))


def test_settings_come_from_a_file_and_flags_have_the_last_word(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'policy = "a"\nport = 1\nlam = 0.5\nplayground = true\ncors-origin = ["https://a", "https://b"]\n'
        'request_timeout = 7.5\nalso = ["x=y"]\nwhen_scorer_fails = "large"\n'
    )
    told = parsed("--config", str(file), "--port", "2", "--cors-origin", "https://c", "--no-playground")
    assert (told.policy, told.port, told.lam, told.playground, told.request_timeout) == ("a", 2, 0.5, False, 7.5)
    assert told.cors_origins == ("https://a", "https://b", "https://c") and told.also == ("x=y",)
    assert told.when_scorer_fails == "large" and parsed(f"--config={file}").port == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("port = [", "cannot be read"),
        ("port = {a = 1}", "port is"),
        ('config = "x"', "config is"),
    ],  # fmt: skip
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, text: Any, words: str) -> None:
    file = tmp_path / "serve.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"--config .*serve.toml: {words}"):
        with_file(["--config", str(file)])


def test_a_setting_that_there_is_not_is_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "serve.toml").write_text('policy = "a"\nprot = 1\n')
    with pytest.raises(SystemExit):
        main(["serve", "--config", str(tmp_path / "serve.toml")])
    assert "--prot" in capsys.readouterr().err


def test_the_log_of_a_service_is_json_to_the_last_line(upstreams: Upstreams, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    urls = "".join(f'{role} = "{url}"\n' for role, url in upstreams.urls().items())
    file.write_text(f'policy = "{folder}"\nport = 0\naccess-log = true\nlog-format = "json"\n{urls}')
    running = Process("--config", file)
    try:
        import httpx

        assert httpx.get(f"{running.wait()}/live", headers={"X-Request-ID": "abc-3"}).status_code == 200
    finally:
        running.process.terminate()
        running.process.wait(20)
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    running.log.unlink()
    assert any("/live" in line["message"] and line.get("request_id") == "abc-3" for line in lines)


@pytest.mark.parametrize("text", ["small", "medium=1", "small=x", "small=1,2,3", "large=-1", "large=inf", "large=nan"])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--price is"):
        ServeConfig("a", prices=(text,))


def test_prices_give_what_was_paid_and_saved(upstreams: Upstreams, folder: Path) -> None:
    running = Router(folder, upstreams.urls(), prices=("small=1,2", "large=10,20", "scorer=4"))
    try:
        usage = running.chat(QUESTION).json()["usage"]
        small, large, scorer = (usage["models"][role] for role in ("small", "large", "scorer"))
        paid = {
            "small": small["prompt_tokens"] + 2 * small["completion_tokens"],
            "large": 10 * large["prompt_tokens"] + 20 * large["completion_tokens"],
            "scorer": 4 * scorer["prompt_tokens"],
        }
        for model, cost in paid.items():
            assert running.metric("trim_cost_total", model=model) == pytest.approx(cost / 1e6)
        alone = 10 * usage["prompt_tokens"] + 20 * usage["completion_tokens_details"]["accepted_tokens"]
        assert running.metric("trim_cost_saved") == pytest.approx((alone - sum(paid.values())) / 1e6)
    finally:
        running.stop()


def test_the_dashboard_shows_metrics_that_there_are_and_all_of_the_important_ones() -> None:
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    kinds = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    there = {f"{family.name}{kinds[family.type]}": family for family in Metrics().registry.collect()}
    there |= {f"{name.removesuffix('_bucket')}{end}": each for name, each in there.items() for end in ("_sum", "_count")
              if name.endswith("_bucket")}  # fmt: skip
    used = set(re.findall(r"trim_\w+", asked))
    assert used <= set(there)
    assert {"trim_requests_total", "trim_upstream_up", "trim_cost_saved", "trim_shadow_steps_total"} <= used
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
