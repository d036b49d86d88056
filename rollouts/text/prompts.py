"""Prompts: the one function from (problem, accepted steps) to token ids, for generating and for reward models."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from rollouts.errors import ConfigError
from rollouts.text.steps import DELIMITER
from rollouts.text.tokens import Remembered, encoder_of

_PROBE = "What is 6 times 7?"
_REMEMBERED = 16 << 20  # bytes of rendered questions


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load a fast tokenizer from a folder or the local hub cache.

    Raises:
        ConfigError: There is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"No tokenizer at {name!r} ({str(error).splitlines()[0]}). Give a model folder.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"The tokenizer of {name!r} has no fast implementation, which step cutting needs.")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def chat_messages(question: str, system_prompt: str | None) -> list[dict[str, str]]:
    """Return the messages that ask a question; None sends no system message."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": question}]


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts that a tokenizer reads as special tokens, longest first."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


def plain(text: str, special: Sequence[str]) -> str:
    """Return a text in which no special token is left: a blank after its first character makes it text."""
    for token in special:
        text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text


def _applied(tokenizer: Any, name: str, messages: list[dict[str, str]], **options: bool) -> str:
    """Return messages as a tokenizer's chat template renders them; raise `ConfigError` where it cannot."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except ValueError as error:
        raise ConfigError(f"{name}: the tokenizer has no chat template ({error}).") from error
    except Exception as error:  # templates are programs of their own and raise what they like
        raise ConfigError(
            f'{name}: the chat template failed ({error}). If it knows no system message, set system_prompt = "".'
        ) from error


class PromptFormat:
    """Renders prefixes for one generating model.

    The chat template with its generation prompt is followed by the accepted steps: the assistant's message is
    continued. Thinking is switched off where the template knows it; the empty thinking block then belongs to
    the prompt.

    Attributes:
        encode: From text to token ids.
        special: Texts that the tokenizer reads as special tokens; in questions they are made plain text.
        template_hash: Hash of how two known prompts are rendered; part of the manifest.
    """

    def __init__(
        self, tokenizer: Any, system_prompt: str | None = None, name: str = "model", *, remembered: int = _REMEMBERED
    ) -> None:
        """Render a few prompts at once, so that a template that cannot be used is found before a run.

        Args:
            tokenizer: The model's tokenizer.
            system_prompt: System message; None sends none.
            name: Named in errors.
            remembered: Most bytes of rendered questions that are kept.

        Raises:
            ConfigError: No chat template, a thinking block that stays open, or a question that the template loses.
        """
        self.tokenizer = tokenizer
        self.encode = encoder_of(tokenizer)
        self.special = special_tokens(tokenizer)
        self.system_prompt = system_prompt
        self.name = name
        self._head = Remembered(self._render, remembered)
        self._self_test()
        probe = self.text(_PROBE, ["One." + DELIMITER])
        self.template_hash = hashlib.blake2b(probe.encode(), digest_size=8).hexdigest()

    def _render(self, question: str) -> str:
        messages = chat_messages(plain(question, self.special), self.system_prompt)
        return _applied(self.tokenizer, self.name, messages, add_generation_prompt=True, enable_thinking=False)

    def _self_test(self) -> None:
        head = self._render(_PROBE)
        if _PROBE not in head:
            raise ConfigError(f"{self.name}: the chat template does not contain the question it was given.")
        if self.system_prompt is not None and self.system_prompt.strip() not in head:  # many templates trim it
            raise ConfigError(f'{self.name}: the chat template drops the system prompt. Set it to "".')
        answer = head[head.rindex(_PROBE) :]
        for opening, closing in (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]")):
            if answer.rfind(opening) > answer.rfind(closing):
                raise ConfigError(
                    f"{self.name}: its chat template opens a thinking block ({opening}) that enable_thinking=False "
                    "does not close; steps of a thinking model cannot be routed. Use a model that can switch it off."
                )

    def text(self, question: str, steps: Sequence[str] = ()) -> str:
        """Return the prompt as text."""
        return self._head(question) + "".join(steps)

    def ids(self, question: str, steps: Sequence[str] = ()) -> tuple[int, ...]:
        """Return the prompt as token ids; the only place where prompts are tokenised."""
        return self.encode(self.text(question, steps))

    def step_spans(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], list[int]]:
        """Tokenise a whole path.

        Returns:
            The ids, and len(steps) + 1 token positions: step i is ``ids[positions[i]:positions[i + 1]]``. A
            token that straddles a boundary belongs to the step in which it starts.
        """
        text = self.text(question, steps)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = accumulate(map(len, steps), initial=len(self._head(question)))
        starts = [start for start, _ in encoded["offset_mapping"]]
        positions = [bisect_left(starts, begin) for begin, _ in zip(begins, steps, strict=False)]
        return tuple(encoded["input_ids"]), [*positions, len(starts)]

    def pieces(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[str]:
        """Yield the text that each decoded token adds; special tokens add nothing."""
        from tokenizers.decoders import DecodeStream

        backend = self.tokenizer.backend_tokenizer
        stream = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=True)
        for token in ids:
            yield stream.step(backend, token) or ""


class RewardFormat:
    """Renders whole paths for a process reward model in the layout of Qwen2.5-Math-PRM.

    The steps, without their delimiters, are each followed by the step tag, within the assistant's message.
    """

    def __init__(
        self, tokenizer: Any, system_prompt: str | None, step_tag: str, *, remembered: int = _REMEMBERED
    ) -> None:
        """Check the step tag; arguments as of `PromptFormat`.

        Raises:
            ConfigError: The tag is not one token of the tokenizer, or the chat template cannot be used.
        """
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.step_tag = step_tag
        self.encode = encoder_of(tokenizer)
        self.special = (*special_tokens(tokenizer), step_tag)
        ids = self.encode(step_tag)
        if len(ids) != 1:
            raise ConfigError(f"scorer: step tag {step_tag!r} is {len(ids)} tokens of its tokenizer, expected one.")
        self.step_tag_id: int = ids[0]
        self._head = Remembered(self._render, remembered)
        probe = self.text(_PROBE, ["One." + DELIMITER])
        self.template_hash = hashlib.blake2b(probe.encode(), digest_size=8).hexdigest()

    def _render(self, question: str) -> tuple[str, str]:
        question = plain(question, self.special)
        marker = "\u241e" * (1 + question.count("\u241e"))  # longer than any run in the question
        messages = [*chat_messages(question, self.system_prompt), {"role": "assistant", "content": marker}]
        head, found, tail = _applied(self.tokenizer, "scorer", messages).rpartition(marker)
        if not found:
            raise ConfigError("scorer: the chat template drops the assistant's message, where the steps belong.")
        return head, tail.rstrip("\n")

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Return the input that scores each of `steps`; a tag inside a step's own text is taken out."""
        head, tail = self._head(question)
        cleaned = (step.replace(self.step_tag, "").strip() for step in steps)
        return head + "".join(step + self.step_tag for step in cleaned) + tail

    def ids(self, question: str, steps: Sequence[str]) -> tuple[int, ...]:
        """Return the input as token ids; it holds exactly one step tag per step."""
        return self.encode(self.text(question, steps))


def has_room(prompts: PromptFormat | RewardFormat, window: int, question: str, steps: Sequence[str]) -> bool:
    """Whether a prefix leaves room for at least one token in a window."""
    text = prompts.text(question, steps)
    return len(text.encode()) < window or len(prompts.ids(question, steps)) < window  # a token is at least one byte
