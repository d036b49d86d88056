"""``python -m agents serve --policy DIR --small URL --large URL --prm URL``: the service from the command line."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agents.escape import terminal
from agents.serve import logs
from agents.serve.config import ServeConfig, with_file
from rollouts.config import FamilyConfig, ModelConfig, load_family, parse_family
from rollouts.errors import ConfigError, TrimError, missing, require
from rollouts.plugins import import_module
from rollouts.text.splitting import BLANK_LINE

if TYPE_CHECKING:
    from agents.serve.spans import Spans

_log = logging.getLogger("trim.serve")
_EMBEDDED = "tinymath"


def family_of(config: ServeConfig, about: dict[str, Any], *, scorer: bool = True) -> FamilyConfig:
    """Return the models with the URLs of their servers; the scorer if the policy reads scores of one.

    Raises:
        ConfigError: No models file, no URL, or other models than the policy's.
    """
    source = config.models
    if source is None and str(about.get("small", "")).startswith(f"{_EMBEDDED}-"):
        source = _EMBEDDED
    if source is None:
        raise ConfigError(
            f"The policy was trained for {about.get('small', 'models')!s} and {about.get('large', 'others')!s}; give "
            "the models file that its rollouts were generated with (--models models.toml): prompts and sampling are "
            "taken from it."
        )
    family = load_family(source)
    prm = family.scorer.model if family.scorer else None
    if scorer and prm is None:
        raise ConfigError(f"{source}: this policy needs a process reward model or a judge, a section [scorer.model].")
    if family.small.chat_only:
        raise ConfigError("small: chat_only is for the large model alone; the small one must continue token ids.")
    values = family.model_dump()
    if scorer and prm is not None:
        values["scorer"]["model"] |= _server(prm, config.prm, "prm", config)
    else:
        values["scorer"] = None
    values["small"] |= _server(family.small, config.small, "small", config)
    values["large"] |= _server(family.large, config.large, "large", config)
    return parse_family(values)


def _server(model: ModelConfig, flags: tuple[str, ...], flag: str, config: ServeConfig) -> dict[str, Any]:
    """Return what a model's configuration says behind its servers."""
    urls = [url.rstrip("/") for url in flags or model.url]
    if not urls:
        raise ConfigError(f"Where is the server of {model.display_name}? Give --{flag} http://host:port/v1.")
    return {
        "backend": "server",
        "url": [f"{url}/v1" if url.count("/") == 2 else url for url in urls],
        "tokenizer": model.tokenizer or model.model,
        "api_key_env": model.api_key_env or config.upstream_key_env,
        "dtype": "auto",
    }


def _check_origin(config: ServeConfig, family: Any, policy: Any) -> None:
    """Raise `ConfigError` unless the policy was trained for these models and limits."""
    found = {
        "small": family.config.small.display_name,
        "large": family.config.large.display_name,
        **({} if family.config.scorer is None else {"scorer": family.scorer_name}),
    }
    for role, name in found.items():
        trained = policy.about.get(role)
        if trained not in (None, name, *([f"{name}.score"] if role == "scorer" else [])) and not config.other_models:
            raise ConfigError(
                f"The policy was trained with {role} {trained!r}; the models file says {name!r}. Its thresholds mean "
                "nothing for other models: train one for them, or say --other-models if they are the same ones."
            )
    trained_on = policy.about.get("splitting") or BLANK_LINE.described()
    if trained_on != family.splitting.described():
        raise ConfigError(
            f"The policy was trained on steps that are split by {_settings(trained_on)}; the models file says "
            f"{_settings(family.splitting.described())}: set its [steps] so."
        )
    if family.limits.max_steps != policy.max_steps:
        raise ConfigError(
            f"The policy was trained for at most {policy.max_steps} steps, the models file says "
            f"{family.limits.max_steps}: set max_steps in its [limits]."
        )


def _settings(splitting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in splitting.items())


class Server:
    """The service, listening; `run` serves until `stop` or a signal."""

    def __init__(self, config: ServeConfig) -> None:
        """Load policy and tokenizers, and listen; nothing is answered yet.

        Raises:
            TrimError: Policy or models cannot be used, or the port is taken; the message says what to do.
        """
        from agents.serve.app import build
        from agents.serve.listen import Listener, address, listen
        from agents.serve.metrics import Metrics
        from agents.serve.models import Models
        from agents.serve.playground.page import add_playground
        from agents.serve.policies import Policies
        from agents.serve.service import Service
        from agents.serve.tracing import Trace

        if config.record:
            require("rollouts", "pyarrow")
        self._spans = _spans() if config.otel else None
        for module in config.imports:
            import_module(module)
        policies, metrics = Policies.load(config), Metrics()
        policy, sources = policies.first, policies.read
        family = family_of(config, policy.about, scorer=sources.scorer)
        self.models = Models(family, config.upstream_timeout, metrics, sources)
        for each in policies.each.values():
            _check_origin(config, self.models.family, each)
        recorder = None
        if config.record:
            from agents.serve.recording import recorder_of  # needs pyarrow, serving does not

            cap = policy.max_escalations
            recorder = recorder_of(config.record, self.models.family, metrics, cap, config.redact)
        self.service = Service(policies, self.models, metrics, config, recorder)
        key = _key(config.api_key_env)
        trace = Trace if self._spans is None else self._spans.trace
        self.app = build(self.service, key, trace)
        if config.playground:
            add_playground(self.app, tinymath=str(policy.about.get("small", "")).startswith(f"{_EMBEDDED}-"))
        self._listener = Listener(self.app, self.service)
        self._listening = listen(config.host, config.port)
        self.url = f"http://{address(*self._listening.getsockname()[:2])}/v1"
        if key is None and not (config.host in ("localhost", "::1") or config.host.startswith("127.")):
            _log.warning("%s: whoever can reach it may use the models; --api-key-env NAME asks for a key.", self.url)

    def run(self) -> None:
        """Ask the upstreams, then serve.

        Raises:
            ConfigError: An upstream is not the server that is needed.
        """
        try:
            with asyncio.Runner(loop_factory=self._listener.config.get_loop_factory()) as runner:
                runner.run(self._serve())
        finally:
            self._listening.close()
            if self._spans is not None:
                self._spans.close()

    async def _serve(self) -> None:
        with suppress(ValueError, RuntimeError, AttributeError):  # in another thread, or where there is no such signal
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, loop.run_in_executor, None, self.reload)
        try:
            await self.models.start()
            up = ", ".join(f"{role} {each}" for role, each in self.models.upstreams.items())
            print(f"Serving {self.service.name!r} at {self.url} ({up}).", flush=True)
            if self.service.config.playground:
                print(f"Playground: {self.url.removesuffix('v1')}", flush=True)
            if shadow := self.service.config.shadow:
                print(f"Shadow: the {shadow} model answers, the policy decides beside it.", flush=True)
            if self.service.config.record:
                print(f"Requests are recorded in {self.service.config.record}.", flush=True)
            if any(prompts.dated for prompts in self.models.family.formats.values()):
                print(f"Chat templates print the date {self.models.family.date}, until it ends.", flush=True)
            await self._listener.serve(sockets=[self._listening])
        finally:
            await self.service.close()
            await self.models.close()

    def reload(self) -> bool:
        """Read the policies again, for requests that begin from now on, and return True.

        If one cannot be used, all stay as they were; the log says why.
        """
        from agents.serve.policies import Policies

        try:
            found = Policies.load(self.service.config)
            for each in found.each.values():
                _check_origin(self.service.config, self.models.family, each)
            if list(found.each) != list(self.service.policies.each):
                raise ConfigError("the policy calls itself otherwise now: give it a --name, or start anew.")
            if not self.service.policies.covers(found):
                raise ConfigError("it reads what the servers were not asked for at the start: start anew.")
        except (TrimError, OSError) as error:
            self.service.metrics.reloads.labels("kept").inc()
            _log.error("Policies were not reloaded, the old ones are kept: %s", terminal(error))
            return False
        self.service.use(found)
        self.service.metrics.reloads.labels("read").inc()
        _log.warning("Policies were reloaded: %s.", ", ".join(found.each))
        return True

    def stop(self) -> None:
        """End serving once the requests under way are answered; from any thread."""
        self._listener.should_exit = True

    @property
    def exit_code(self) -> int:
        """What the process ends with: 128 + its signal if requests were cut, as if it had been killed; else 0."""
        return 128 + (self._listener.signal or 0) if self.service.cut else 0


def run(config: ServeConfig) -> int:
    """Serve until interrupted; return the exit code.

    Raises:
        TrimError: Policy, models or servers cannot be used; the message says what to do.
    """
    logs.set_up(config.log_format)
    try:
        server = Server(config)
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again and again would hold up every request
        server.run()
        return server.exit_code
    except KeyboardInterrupt:
        return 0


def _spans() -> Spans:
    try:
        from agents.serve.spans import Spans
    except ModuleNotFoundError as error:
        raise missing(error, "otel") from None
    try:
        return Spans()
    except ValueError as error:
        raise ConfigError(f"--otel: OpenTelemetry cannot be set up as its OTEL_* variables say: {error}") from error


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"The environment variable {variable} is not set; it must hold the API key for clients.")
    return key


__all__ = ["ServeConfig", "Server", "family_of", "run", "with_file"]
