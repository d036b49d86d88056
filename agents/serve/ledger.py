"""What one request has spent, by upstream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rollouts.text.steps import ROLES

SCORER = "scorer"


@dataclass
class Spent:
    """What one request has spent at one upstream.

    Attributes:
        requests: Requests that were answered.
        prompt_tokens: Tokens of their prompts; a prefix counts each time that it is sent.
        completion_tokens: Tokens that were decoded, kept or not.
        reasoning_tokens: Those among them that were hidden, as far as they are told.
        aborted_tokens: Most tokens that may have been decoded for requests whose answer was lost or not waited for.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    aborted_tokens: int = 0

    @property
    def most_decoded(self) -> int:
        """Tokens that were decoded, or may have been."""
        return self.completion_tokens + self.aborted_tokens

    def losing(self, tokens: int, *, again: bool) -> Callable[[], bool]:
        """Return what charges a request whose answer is lost, and says whether it may be sent once more."""

        def lost() -> bool:
            self.aborted_tokens += tokens
            return again

        return lost

    def add(self, prompt_tokens: int, completion_tokens: int = 0) -> None:
        """Charge an answered request."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


@dataclass
class Ledger:
    """What one request has spent.

    Attributes:
        waited: Seconds that the request waited for upstreams.
        prompt_tokens: Tokens of the problem's prompt, as the small model reads it.
    """

    roles: dict[str, Spent] = field(default_factory=lambda: {role: Spent() for role in (*ROLES, SCORER)})
    waited: float = 0.0
    prompt_tokens: int = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waited."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began
