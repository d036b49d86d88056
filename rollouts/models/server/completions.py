"""A backend over an HTTP server that continues token prompts: vLLM's, SGLang's or llama.cpp's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rollouts.config import ModelConfig
from rollouts.errors import BackendError, ConfigError, did_you_mean
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
from rollouts.models.server.http import HttpServer, RequestFailed
from rollouts.models.server.wire import SMALLEST, Exchange, Send, Wire, score_exchanges, serve_prm, smallest_input
from rollouts.text.prompts import Reading

T = TypeVar("T")
_KNOWN = LogprobRequest(SMALLEST.prompt_ids, 1)


class ServerBackend(Backend):
    """Completions, log-probabilities or step scores from one model of a server.

    The token ids of prompts are ours and those of completions the server's; nothing is tokenised here.
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
        self._model = model.model
        self._http = HttpServer(role, model)
        try:
            card = self._card()
            self._wire = wire_of(card)
            told = self._wire.window(card)
            windows = [size for size in (told, model.max_length) if size is not None]
            if not windows:
                raise ConfigError(f"{role}: {self._http.url} does not tell the model's window; set `max_length`.")
            self.window = min(windows)
            self._description = {
                "engine": "server" if type(self._wire) is Wire else self._wire.name,
                "version": self._http.version(),
                "url": self._http.url,
                "model": card["id"],
                "root": self._wire.origin(card),  # what the server calls `model` may be another name for it
                "owned_by": card.get("owned_by"),
                "max_model_len": told,
                "seed": None,  # the server's own
            }
            if reading is None:
                self.capabilities = self._probe_generator()
            else:
                self._reading = reading
                self.capabilities = self._probe_pooling()
        except BaseException:
            self._http.close()
            raise

    def _card(self) -> dict[str, Any]:
        """Return the server's entry for the model."""
        url = self._http.url
        try:
            cards = self._http.ask("models", None, lambda body: {card["id"]: card for card in body["data"]})
        except RequestFailed as error:
            raise BackendError(f"{self.role}: {url}/models: {error}") from None
        if self._model not in cards:
            raise ConfigError(f"{self.role}: {url} does not serve {self._model!r}.{did_you_mean(self._model, cards)}")
        return dict(cards[self._model])

    def _probe_generator(self) -> Capabilities:
        wire, url = self._wire, self._http.url
        smallest = {"model": self._model, **wire.completion(self.window, SMALLEST)}
        try:
            lacking, body = self._http.ask(wire.path, smallest, lambda body: (wire.lacks(body), body))
        except RequestFailed as error:
            raise ConfigError(
                f"{self.role}: {url} does not continue token ids ({error}). "
                "Serve a generating model with vLLM, SGLang or llama.cpp, or set chat_only = true for a vendor's chat "
                "API."
            ) from None
        if lacking is not None:
            raise ConfigError(f"{self.role}: {url} {lacking}, or set chat_only = true.")
        self._http.heartbeat = (wire.path, smallest)
        asked = replace(SMALLEST, likelihood=True)
        own = self._tried(lambda: wire.complete(self._send(), self.window, asked))
        given = self._tried(lambda: wire.likelihood(self._send(), self.window, _KNOWN))
        return Capabilities(
            token_ids=wire.read(body).token_ids is not None,
            logprobs=own is not None and own.likelihood is not None,
            prompt_logprobs=given is not None,
        )

    def _tried(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Return what comes of it; None if the server does not do it."""
        try:
            return self._http.submit(work).result()
        except RequestFailed:
            return None

    def _send(self, tokens: int = 0) -> Send:
        """Return what sends bodies, each with as much time as so many tokens take."""
        return lambda path, body, read: self._http.post(path, {"model": self._model, **body}, read, tokens)

    def _probe_pooling(self) -> Capabilities:
        reading = self._reading
        probe = score_exchanges(reading, smallest_input(reading))[0]
        try:
            self._http.submit(lambda: self._exchanged(probe)).result()
        except RequestFailed as error:
            how = "Serve it with vLLM 0.32 or newer." if reading.verdicts else serve_prm(reading.tag or 0)
            raise ConfigError(
                f"{self.role}: {self._http.address(probe.path)} serves no step scores ({error}). {how}"
            ) from None
        self._http.heartbeat = (probe.path, {"model": self._model, **probe.payload})
        return Capabilities(pooling=True)

    def submit(self, request: Request) -> Future[Any]:
        """Start one request; see `HttpServer` for what is retried and when the server counts as gone."""
        answer: Callable[[], Awaitable[Any]]
        if isinstance(request, CompletionRequest) and not self.capabilities.pooling:
            answer = partial(self._wire.complete, self._send(request.max_tokens), self.window, request)
        elif isinstance(request, LogprobRequest) and self.capabilities.prompt_logprobs:
            answer = partial(self._wire.likelihood, self._send(), self.window, request)
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
            raise BackendError(f"{self.role}: {self._http.url} did not answer a request: {error}") from None

    async def _scores(self, request: PoolingRequest) -> list[float]:
        found = await asyncio.gather(*map(self._exchanged, score_exchanges(self._reading, request)))
        return [score for scores in found for score in scores]

    async def _exchanged(self, exchange: Exchange) -> list[float]:
        def read(body: Any) -> list[float]:
            try:
                return exchange.read(body)
            except BackendError as error:
                raise BackendError(f"{self.role}: {self._http.url}: {self._model} returned {error}") from None

        return await self._send()(exchange.path, exchange.payload, read)  # type: ignore[no-any-return]

    def describe(self) -> Mapping[str, Any]:
        """Return the server's URL and version, and what it says that the model is."""
        return self._description

    def close(self) -> None:
        """Cancel what is pending and disconnect."""
        self._http.close()
