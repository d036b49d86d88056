"""What every model backend is: something that takes requests and returns futures, and says what it can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from rollouts.config import Sampling
from rollouts.text.likelihood import Likelihood

Finish = Literal["stop", "eos", "length", "failed"]
UNPENALISED = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
"""What every request says of penalties, which do not exist here (`Sampling`), and that one answer is wanted."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; what a mode or scorer lacks is an error before a run.

    Likelihoods are those at temperature 1, whatever is sampled at.

    Attributes:
        token_ids: Completions carry the ids that were decoded (needed for whole-path generation).
        logprobs: Completions carry what the model made of their tokens, where that is asked for.
        prompt_logprobs: Log-probabilities of given tokens can be asked for.
        pooling: Scores at given tokens can be asked for, and nothing else (a process reward model).
    """

    token_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    pooling: bool = False


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Continue a prompt.

    Attributes:
        prompt_ids: The prompt as token ids of the role's tokenizer.
        max_tokens: Most tokens to decode.
        stop: Strings that end the completion; they are part of its text and tokens.
        seed: 63-bit seed of this draw; only reproducible backends use it.
        likelihood: Whether it is wanted what the model makes of the tokens that it decodes.
        about: The question; of several servers the same one is best asked about it again.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    seed: int = 0
    likelihood: bool = False
    about: str = ""


def drawing_fields(request: CompletionRequest) -> dict[str, Any]:
    """Return every field that changes a draw, as vLLM and its servers name them: unsent ones may be the model's own."""
    return {
        **asdict(request.sampling),
        **UNPENALISED,
        "min_tokens": 0,
        "ignore_eos": False,
        "stop": list(request.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": True,
    }


@dataclass(frozen=True, slots=True)
class Completion:
    """What was decoded.

    Attributes:
        text: Decoded text without special tokens; a stop string that ended it is included.
        tokens: Tokens decoded, the end-of-sequence token included.
        token_ids: The same as ids, or None where the backend cannot tell.
        finish: ``stop`` (a stop string), ``eos`` (the model ended by itself), ``length``, or ``failed``.
        detail: What went wrong, for ``failed``.
        likelihood: What the model made of the tokens, end of sequence included; None if it did not tell.
    """

    text: str
    tokens: int
    token_ids: tuple[int, ...] | None
    finish: Finish
    detail: str = ""
    likelihood: Likelihood | None = None


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """What the model makes of ``ids[start:]``, each given what precedes it; result: `Likelihood`.

    Attributes:
        start: The first that is asked about, at least 1.
        entropies: Whether entropies are wanted too.
    """

    ids: tuple[int, ...]
    start: int
    entropies: bool = False


@dataclass(frozen=True, slots=True)
class PoolingRequest:
    """Scores of a reward model, read as it was said when it was opened (`Reading`); result: ``list[float]``.

    Attributes:
        ids: The input.
        positions: Where in it to read, in ascending order.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]


Request = CompletionRequest | LogprobRequest | PoolingRequest


class Backend(AbstractContextManager["Backend"]):
    """A model that answers requests, wherever it runs.

    Attributes:
        role: What the model is used for (``small``, ``large``, ``scorer``); errors name it.
        window: Most tokens of prompt and completion together.
        identity: What tells its model from another (`rollouts.models.identity`), where that is known.
    """

    role: str
    capabilities: Capabilities
    window: int
    identity: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def submit(self, request: Request) -> Future[Any]:
        """Start one request.

        Returns:
            A future of `Completion`, `Likelihood` or ``list[float]``. A request that failed on its own (refused, timed
            out) is a `Completion` with finish ``failed``, or raises `rollouts.errors.RequestFailed`; it raises another
            `rollouts.errors.BackendError`, naming role and process or URL, when the backend itself is gone.
        """

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """Return engine, version, seed and whatever else the manifest records about this start."""

    @abstractmethod
    def close(self) -> None:
        """Stop the backend and free its memory; pending futures are cancelled. Safe to call twice."""

    def __exit__(self, *_: object) -> None:
        """Close the backend."""
        self.close()
