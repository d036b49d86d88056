"""A backend over HTTP servers that continue token prompts: vLLM's, SGLang's or llama.cpp's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, TypeVar

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError, RequestFailed, did_you_mean
from rollouts.models.base import (
    Backend,
    Capabilities,
    Completion,
    CompletionRequest,
    LogprobRequest,
    PoolingRequest,
    Request,
)
from rollouts.models.server.dialects import wire_of
from rollouts.models.server.http import Server, Servers
from rollouts.models.server.wire import SMALLEST, Exchange, Send, Wire, score_exchanges, serve_prm, smallest_input
from rollouts.text.prompts import Reading

T = TypeVar("T")
_KNOWN = LogprobRequest(SMALLEST.prompt_ids, 1)


class ServerBackend(Backend):
    """Completions, log-probabilities or step scores from one model, of one server or of several.

    The token ids of prompts are ours and those of completions the server's; nothing is tokenised here. Requests carry
    no seeds: servers draw on their own, so that each needs a ``--seed`` of its own.
    """

    def __init__(self, role: str, model: ModelConfig, reading: Reading | None = None) -> None:
        """Connect, and find out what the server can do.

        Args:
            role: ``small``, ``large`` or ``scorer``; errors name it.
            model: Configuration with backend ``server``; `model.model` is the name that the server uses.
            reading: For a process reward model, how it is read; None for a generating model.

        Raises:
            ConfigError: No such model there, no known window, no key, or the server cannot do what is needed.
            BackendError: The server is not there or refuses us.
        """
        self.role = role
        self._model, self._max_length, self._reading = model.model, model.max_length, reading
        self._http = Servers(role, model)
        known = dict(self._http.meet(self._identify))
        self.capabilities = Capabilities(**{each.name: known.pop(each.name) for each in fields(Capabilities)})
        self._wire, self.window = wire_of(known), known.pop("window")
        self._description = {**known, "servers": len(model.url), "seed": None}

    async def _identify(self, server: Server) -> dict[str, Any]:
        """Return what a server tells of its model, and what it can do."""
        card = await self._card(server)
        wire = wire_of(card)
        told = wire.window(card)
        windows = [size for size in (told, self._max_length) if size is not None]
        if not windows:
            raise ConfigError(f"{self.role}: {server.url} does not tell the model's window; set `max_length`.")
        probe = self._probe_pooling(server) if self._reading else self._probe_generator(server, wire, min(windows))
        return {
            "engine": "server" if type(wire) is Wire else wire.name,
            "model": card["id"],
            "root": wire.origin(card),  # what the server calls `model` may be another name for it
            "owned_by": card.get("owned_by"),
            "max_model_len": told,
            "window": min(windows),
            **asdict(await probe),
            "version": await server.version(),
        }

    async def _card(self, server: Server) -> dict[str, Any]:
        """Return a server's entry for the model."""
        try:
            cards = await server.ask("models", None, lambda body: {card["id"]: card for card in body["data"]})
        except RequestFailed as error:
            raise BackendError(f"{self.role}: {server.url}/models: {error}") from None
        if self._model not in cards:
            known = did_you_mean(self._model, cards)
            raise ConfigError(f"{self.role}: {server.url} does not serve {self._model!r}.{known}")
        return dict(cards[self._model])

    async def _probe_generator(self, server: Server, wire: Wire, window: int) -> Capabilities:
        smallest = {"model": self._model, **wire.completion(window, SMALLEST)}
        try:
            lacking, body = await server.ask(wire.path, smallest, lambda body: (wire.lacks(body), body))
        except RequestFailed as error:
            raise ConfigError(
                f"{self.role}: {server.url} does not continue token ids ({error}). Serve a generating model with "
                "vLLM, SGLang or llama.cpp, or set chat_only = true for a vendor's chat API."
            ) from None
        if lacking is not None:
            raise ConfigError(f"{self.role}: {server.url} {lacking}, or set chat_only = true.")
        server.heartbeat = (wire.path, smallest)

        def send(path: str, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Awaitable[Any]:
            return server.ask(path, {"model": self._model, **body}, read)

        own = await _tried(wire.complete(send, window, replace(SMALLEST, likelihood=True)))
        return Capabilities(
            token_ids=wire.read(body).token_ids is not None,
            logprobs=own is not None and own.likelihood is not None,
            prompt_logprobs=await _tried(wire.likelihood(send, window, _KNOWN)) is not None,
        )

    async def _probe_pooling(self, server: Server) -> Capabilities:
        reading = self._reading
        assert reading is not None
        probe = score_exchanges(reading, smallest_input(reading))[0]
        payload = {"model": self._model, **probe.payload}
        try:
            await server.ask(probe.path, payload, partial(self._read, probe))
        except RequestFailed as error:
            how = "Serve it with vLLM 0.32 or newer." if reading.verdicts else serve_prm(reading.tag or 0)
            where = server.address(probe.path)
            raise ConfigError(f"{self.role}: {where} serves no step scores ({error}). {how}") from None
        server.heartbeat = (probe.path, payload)
        return Capabilities(pooling=True)

    def _send(self, tokens: int, about: str) -> Send:
        """Return what sends bodies, each with as much time as so many tokens take."""
        return lambda path, body, read: self._http.post(path, {"model": self._model, **body}, read, tokens, about)

    def submit(self, request: Request) -> Future[Any]:
        """Start one request; see `Servers` for what is retried and when the servers count as gone."""
        answer: Callable[[], Awaitable[Any]]
        if isinstance(request, CompletionRequest) and not self.capabilities.pooling:
            answer = partial(self._wire.complete, self._send(request.max_tokens, request.about), self.window, request)
        elif isinstance(request, LogprobRequest) and self.capabilities.prompt_logprobs:
            answer = partial(self._wire.likelihood, self._send(0, str(hash(request.ids))), self.window, request)
        elif isinstance(request, PoolingRequest) and self.capabilities.pooling:
            answer = partial(self._scores, request)
        else:
            raise ConfigError(f"{self.role}: {self._http.url} cannot answer a {type(request).__name__}.")
        return self._http.submit(lambda: self._answer(request, answer))

    async def _answer(self, request: Request, answer: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await answer()
        except RequestFailed as error:
            if isinstance(request, CompletionRequest):
                return Completion("", 0, None, "failed", str(error))
            raise RequestFailed(f"{self.role}: {self._http.url} did not answer a request: {error}") from None

    async def _scores(self, request: PoolingRequest) -> list[float]:
        assert self._reading is not None
        send, exchanges = self._send(0, ""), score_exchanges(self._reading, request)
        asked = (send(each.path, each.payload, partial(self._read, each)) for each in exchanges)
        return [score for scores in await asyncio.gather(*asked) for score in scores]

    def _read(self, exchange: Exchange, body: Any) -> list[float]:
        try:
            return exchange.read(body)
        except BackendError as error:
            raise BackendError(f"{self.role}: {self._http.url}: {self._model} returned {error}") from None

    def describe(self) -> Mapping[str, Any]:
        """Return what the servers say that the model is, their version, and how many they are."""
        return self._description

    def close(self) -> None:
        """Cancel what is pending and disconnect."""
        self._http.close()


async def _tried(work: Awaitable[T]) -> T | None:
    """Return what comes of it; None if the server does not do it."""
    try:
        return await work
    except RequestFailed:
        return None
