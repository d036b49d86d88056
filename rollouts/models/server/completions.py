"""A backend over an OpenAI-compatible HTTP server that continues token prompts, as vLLM serves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from rollouts.config import ModelConfig, Sampling
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
from rollouts.models.server.http import HttpServer, RequestFailed
from rollouts.models.server.wire import (
    completion_payload,
    likelihood_payload,
    pooling_payload,
    read_choice,
    read_completion,
    read_likelihood,
    read_scores,
    serve_prm,
)


class ServerBackend(Backend):
    """Completions, log-probabilities or step scores from one model of a server.

    The token ids of prompts are ours and those of completions the server's; nothing is tokenised here.
    """

    def __init__(self, role: str, model: ModelConfig, step_tag_id: int | None = None) -> None:
        """Connect, and find out what the server can do.

        Args:
            role: ``small``, ``large`` or ``scorer``; errors name it.
            model: Configuration with backend ``server``; `model.model` is the name that the server uses.
            step_tag_id: For a process reward model, the id of its step tag; None for a generating model.

        Raises:
            ConfigError: No such model there, no known window, no key, or the server cannot do what is needed.
            BackendError: The server is not there or refuses us.
        """
        self.role = role
        self._model = model.model
        self._http = HttpServer(role, model)
        try:
            card = self._card()
            windows = [size for size in (card.get("max_model_len"), model.max_length) if isinstance(size, int)]
            if not windows:
                raise ConfigError(f"{role}: {self._http.url} does not tell the model's window; set `max_length`.")
            self.window = min(windows)
            self._description = {
                "engine": "server",
                "version": self._http.version(),
                "url": self._http.url,
                "model": card["id"],
                "root": card.get("root"),  # what the server calls `model` may be another name for it
                "owned_by": card.get("owned_by"),
                "max_model_len": card.get("max_model_len"),
                "seed": None,  # the server's own
            }
            if step_tag_id is None:
                self.capabilities = self._probe_generator()
            else:
                self._tag = step_tag_id
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
        smallest = completion_payload(self._model, self.window, CompletionRequest((1, 2, 3), 1, Sampling()))
        url = self._http.url
        try:
            choice, _ = self._http.ask("completions", smallest, read_choice)
        except RequestFailed as error:
            raise ConfigError(
                f"{self.role}: {url} does not continue token ids ({error}). "
                "Serve a generating model with vLLM, or set chat_only = true for a vendor's chat API."
            ) from None
        if "stop_reason" not in choice:
            raise ConfigError(
                f"{self.role}: {url} does not tell a stop string from the end of the sequence (no `stop_reason`). "
                "Serve the model with vLLM, or set chat_only = true."
            )
        self._http.heartbeat = ("completions", smallest)
        asked = completion_payload(
            self._model, self.window, CompletionRequest((1, 2, 3), 1, Sampling(), likelihood=True)
        )
        try:
            own = self._http.ask("completions", asked, read_completion).likelihood is not None
        except RequestFailed:
            own = False
        try:
            known = LogprobRequest((1, 2, 3), 1)
            payload = likelihood_payload(self._model, self.window, known)
            self._http.ask("completions", payload, lambda body: read_likelihood(body, known))
            given = True
        except RequestFailed:
            given = False
        ids = isinstance(choice.get("token_ids"), list)
        return Capabilities(token_ids=ids, logprobs=own, prompt_logprobs=given)

    def _probe_pooling(self) -> Capabilities:
        ids = (1, self._tag, 2, self._tag)
        path, payload = "/pooling", pooling_payload(self._model, ids)
        try:
            self._http.ask(path, payload, lambda body: self._scores(body, ids))
        except RequestFailed as error:
            raise ConfigError(
                f"{self.role}: {self._http.address(path)} serves no step scores ({error}). {serve_prm(self._tag)}"
            ) from None
        self._http.heartbeat = (path, payload)
        return Capabilities(pooling=True)

    def submit(self, request: Request) -> Future[Any]:
        """Start one request; see `HttpServer` for what is retried and when the server counts as gone."""
        answer: Callable[[], Awaitable[Any]]
        if isinstance(request, CompletionRequest) and not self.capabilities.pooling:
            payload = completion_payload(self._model, self.window, request)
            answer = partial(self._http.post, "completions", payload, read_completion, request.max_tokens)
        elif isinstance(request, LogprobRequest) and self.capabilities.prompt_logprobs:
            payload = likelihood_payload(self._model, self.window, request)
            answer = partial(self._http.post, "completions", payload, partial(read_likelihood, request=request))
        elif isinstance(request, PoolingRequest) and self.capabilities.pooling:
            payload = pooling_payload(self._model, request.ids)
            answer = partial(self._http.post, "/pooling", payload, partial(self._scores, ids=request.ids))
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

    def _scores(self, body: Any, ids: tuple[int, ...]) -> list[float]:
        try:
            return read_scores(body, ids, self._tag)
        except BackendError as error:
            raise BackendError(f"{self.role}: {self._http.url}: {self._model} returned {error}") from None

    def describe(self) -> Mapping[str, Any]:
        """Return the server's URL and version, and what it says that the model is."""
        return self._description

    def close(self) -> None:
        """Cancel what is pending and disconnect."""
        self._http.close()
