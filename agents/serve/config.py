"""The settings of the service."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from rollouts.config import Count, Imports, NotNegative, Positive, Urls, settings
from rollouts.errors import ConfigError
from rollouts.text.steps import ROLES

_REPLACED = {"--small", "--large", "--prm"}
Fallback = Literal["small", "large", "error"]
"""Who writes a step whose proposal cannot be scored; ``error`` ends the request."""


@settings
class ServeConfig:
    """Serve a policy with the interface of an OpenAI-compatible server, in front of three vLLM servers.

    Attributes:
        policy: Folder of the policy: an exported artefact, or ``lam-*/policy`` of a run.
        also: NAME=DIR, another policy for the same models, asked for by that name; may be repeated.
        ab: NAME=SHARE, share of the requests that name no model, or the first, that another policy gets, by a hash of
            their text; may be repeated.
        small: Base URL of the small model's server, http://host:8001/v1; default: the models file's. Of several that
            all serve it, a list with commas between them, or the flag again.
        large: Base URL of the large model's server; likewise.
        prm: Base URL of the reward model's server; likewise.
        models: The models file that the rollouts were generated with: prompts, sampling and limits are taken from
            it. Left out: the embedded family, if the policy was trained on it.
        name: Name that clients ask for; default: the policy's.
        host: Address to listen on; 0.0.0.0 for all.
        port: Port; 0 for any that is free.
        lam: λ of requests that name neither lam nor budget.
        budget: Budget of requests that name neither.
        when_scorer_fails: Who writes a step whose proposal cannot be scored: small, large, or error to end the request.
        when_small_fails: Who writes a step without a proposal: large, within what the policy's caps leave, or error to
            end the request.
        otherwise: Who answers requests that cannot be routed (tools, JSON modes, images, several answers): small or
            large, to whom they are passed on as they are, or error.
        shadow: One model that writes all answers, small or large, while the policy decides beside it what it would have
            done, which metrics and ``trim.shadow`` tell; left out, the policy decides.
        shadow_share: Share of the requests beside which it does; with large it costs what the policy's answers would.
        record: Folder of a rollout store that requests are written to, texts and all; left out, nothing is kept.
        redact: ``module:object`` that is called with every text before it is recorded; returns what is written instead,
            or None for a request that is not to be recorded.
        upstream_timeout: Longest time of one upstream request, seconds.
        request_timeout: Longest time of one request, seconds; what was accepted until then is the answer.
        drain_seconds: Longest time that requests under way have after SIGTERM; what is cut then ends with an error.
        max_tokens: Most tokens of an answer, if fewer than in the rollouts.
        max_concurrent: Most requests under way at once.
        max_body_bytes: Largest request body.
        api_key_env: Environment variable with the key that clients must send; left out, none is asked for.
        upstream_key_env: Environment variable with the key of the upstream servers, where the models file names none.
        allow_old: Read a policy of version 1 of its format too, whose settings may be damaged unnoticed.
        cors_origins: Where pages may come from that call the service in a browser, https://host, or * for anywhere; may
            be repeated.
        imports: A module to import before the policy is read: that of a router of your own; may be repeated.
        other_models: Serve other models than those that the policy was trained for.
        access_log: Log every request.
        log_format: text, or json: an object a line, with the id of the request (header ``X-Request-ID``).
        otel: Send spans of requests and steps by OpenTelemetry, over HTTP, as its OTEL_* environment variables say.
        config: TOML file with any of these settings, by the names of their flags; flags have the last word, and those
            that may be repeated add to it, but for servers.
        prices: ROLE=IN,OUT, money for a million tokens that small, large or scorer reads and decodes (OUT may be left
            out); gives ``trim_cost`` and ``trim_cost_saved``; may be repeated.
        playground: Show a page at / on which problems are solved step by step, and let it ask one model alone.
    """

    policy: str
    also: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    ab: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    small: Annotated[Urls, tyro.conf.UseAppendAction] = ()
    large: Annotated[Urls, tyro.conf.UseAppendAction] = ()
    prm: Annotated[Urls, tyro.conf.UseAppendAction] = ()
    models: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    lam: float | None = None
    budget: float | None = None
    when_scorer_fails: Fallback = "small"
    when_small_fails: Literal["large", "error"] = "large"
    otherwise: Fallback = "error"
    shadow: Literal["small", "large"] | None = None
    shadow_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    record: str | None = None
    redact: str | None = None
    upstream_timeout: Positive = 30.0
    request_timeout: Positive = 300.0
    drain_seconds: NotNegative = 10.0
    max_tokens: Count | None = None
    max_concurrent: Count = 256
    max_body_bytes: Count = 1 << 18
    api_key_env: str | None = None
    upstream_key_env: str | None = None
    allow_old: bool = False
    cors_origins: Annotated[tuple[str, ...], tyro.conf.arg(name="cors-origin"), tyro.conf.UseAppendAction] = ()
    imports: Imports = ()
    other_models: bool = False
    access_log: bool = False
    log_format: Literal["text", "json"] = "text"
    otel: bool = False
    config: str | None = None
    prices: Annotated[tuple[str, ...], tyro.conf.arg(name="price"), tyro.conf.UseAppendAction] = ()
    playground: bool = False

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        if self.redact and not self.record:
            raise ConfigError("--redact is about what is recorded: give --record DIR, too.")
        _ = self.price_of

    @property
    def price_of(self) -> dict[str, tuple[float, float]]:
        """Money for a token that each role reads, and for one that it decodes; empty if nothing is said.

        Raises:
            ConfigError: A price is none.
        """
        found = {}
        for text in self.prices:
            role, _, both = text.partition("=")
            try:
                paid = [float(each) / 1e6 for each in both.split(",")]
            except ValueError:
                paid = []
            if (
                role not in (*ROLES, "scorer")
                or len(paid) not in (1, 2)
                or not all(0 <= each < math.inf for each in paid)
            ):
                raise ConfigError(f"--price is {text!r}, expected small=IN,OUT, large=IN,OUT or scorer=IN.")
            found[role] = paid[0], (*paid, 0.0)[1]
        return found


def with_file(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with those before them that the file of ``--config`` stands for.

    Raises:
        ConfigError: It cannot be read, or a value is none that a flag can have.
    """
    given = {word.partition("=")[0] for word in arguments}
    files = [after for flag, after in zip(arguments, [*arguments[1:], ""], strict=False) if flag == "--config"]
    files += [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    found = (word for file in files for word in _flags(file))
    return [*(word for word in found if word.partition("=")[0] not in _REPLACED & given), *arguments]


def _flags(file: str) -> Iterator[str]:
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {file}: cannot be read ({error}).") from error
    for name, value in found.items():
        flag = name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool):
                yield f"--{flag}" if each else f"--no-{flag}"
            elif isinstance(each, str | int | float) and name != "config":
                yield f"--{flag}={each}"
            else:
                raise ConfigError(
                    f"--config {file}: {name} is {each!r}, expected a text, a number, true, false or a list."
                )
