"""What containers run is what the command line takes, and what the docs say."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tyro
import yaml

from agents.serve.config import ServeConfig

ROOT = Path(__file__).parents[3]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


def entry():
    """What the router's image runs, without the interpreter."""
    line = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    assert line[:4] == ["python", "-m", "agents", "serve"]
    return line[4:]


def test_the_router_serves_what_compose_tells_it():
    service = COMPOSE["services"]["router"]
    config = tyro.cli(ServeConfig, args=[*entry(), *service["command"]])
    assert (config.host, config.port) == ("0.0.0.0", 8080) and config.api_key_env in service["environment"]
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert {config.policy, config.models} <= mounted
    for role in ("small", "large", "prm"):
        assert getattr(config, role) == (f"http://{role}:8000/v1",) and role in COMPOSE["services"]
    assert service["build"]["target"] in re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)
    assert set(service["expose"]) == {str(config.port)} and "ports" not in service


@pytest.mark.parametrize("role", ["small", "large", "prm"])
def test_models_are_served_as_the_docs_say(role):
    command = COMPOSE["services"][role]["command"]
    settings = dict(zip(command[::2], command[1::2], strict=True))
    model = settings.pop("--model")
    joined = DOCS.replace("\\\n", " ")
    documented = shlex.split(next(line for line in joined.splitlines() if line.startswith(f"vllm serve {model}")))[3:]
    told = dict(zip(documented[::2], documented[1::2], strict=True))
    told.pop("--port")
    assert settings == told


def test_only_the_proxy_can_be_reached_and_it_knows_the_router():
    open_ = {name for name, service in COMPOSE["services"].items() if "ports" in service}
    assert open_ == {"proxy"}
    caddy = COMPOSE["configs"]["caddyfile"]["content"]
    assert "reverse_proxy router:8080" in caddy and "read_header 10s" in caddy and caddy.count("{") == caddy.count("}")


def test_the_image_holds_all_that_the_package_is_made_of():
    copied = {part for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.MULTILINE) for part in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*" and {f"!{each}" for each in copied} <= set(ignored)
    assert {"rollouts", "trim_env", "agents", "pyproject.toml"} <= copied and all(
        (ROOT / each).exists() for each in copied
    )


def test_the_unit_of_the_docs_starts_the_service():
    unit = re.search(r"```ini\n(.*?)```", DOCS, re.DOTALL)[1].replace("\\\n", " ")
    line = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    assert line[1:4] == ["-m", "agents", "serve"]
    config = tyro.cli(ServeConfig, args=line[4:])
    assert config.drain_seconds < int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert int(COMPOSE["services"]["router"]["stop_grace_period"].rstrip("s")) > config.drain_seconds
