"""Steps from a chat-only large model: the process of vendors' APIs that cannot continue a partial answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from rollouts.config import GeneratorConfig, Limits, Sampling
from rollouts.models.base import Completion
from rollouts.models.futures import forward
from rollouts.models.server.chat import ChatBackend, open_chat
from rollouts.models.stepwise import Fits, Generation, close_step
from rollouts.text.steps import Prefix, Segment, Step, StopReason, normalise


class ChatWriter:
    """Asks for one step at a time; the manifest records this as another process than continuing a prefix."""

    whole_paths = False

    def __init__(self, role: str, backend: ChatBackend, sampling: Sampling, limits: Limits, fits: Fits) -> None:
        """Name the server and the limits."""
        self.role = role
        self.backend = backend
        self.sampling = sampling
        self.limits = limits
        self.fits = fits

    def describe(self) -> Mapping[str, Any]:
        """Return what the server says of itself."""
        return self.backend.describe()

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """Ask for the next step; `whole` makes no difference."""
        budget = min(self.limits.step_tokens, self.limits.solution_tokens - prefix.used_tokens)
        result: Future[Generation] = Future()
        answer = self.backend.submit(prefix.question, prefix.steps, budget, self.sampling)
        forward(answer, lambda completion: result.set_result(self._read(prefix, completion)), result)
        return result

    def _read(self, prefix: Prefix, completion: Completion) -> Generation:
        if completion.finish == "failed":
            return Generation((Step("", completion.tokens, StopReason.FAILED),), completion.tokens)
        text, complete = normalise(completion.text)
        ending = StopReason.LENGTH if completion.finish == "length" else StopReason.EOS
        segment = Segment(text, 0, completion.tokens, complete)
        step = close_step(prefix, (), segment, ending, self.limits, self.fits, 0)
        return Generation((step,), completion.tokens)


@contextmanager
def open_chat_writer(role: str, model: GeneratorConfig, limits: Limits, fits: Fits) -> Iterator[ChatWriter]:
    """Connect to the chat server of a role."""
    with open_chat(role, model) as backend:
        yield ChatWriter(role, backend, model.sampling, limits, fits)
