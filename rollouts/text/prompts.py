"""Prompts: the one function from (problem, accepted steps) to token ids, for generating and for reward models."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime, time, timedelta
from inspect import signature
from itertools import accumulate, cycle
from types import MappingProxyType
from typing import Any, ClassVar, Self

from rollouts.errors import ConfigError
from rollouts.text.splitting import BLANK_LINE, Marks, Splitting
from rollouts.text.steps import CLOSE, DELIMITER, cut_segments
from rollouts.text.tokens import Remembered, SpecialTokens, encoder_of

STEP_TAG = "<extra_0>"  # of Qwen2.5-Math-PRM
PROBE = "What is 6 times 7?"  # in the hashes of manifests
_CHECKED = "Is 6 < 7 & \"x\" = \\frac{1}{2}?\n  Say 'yes' or 'no'."  # what a template could change
STEPS = ("One.\n  So 1 = 1." + DELIMITER, "Two.")
ANOTHER_DAY = timedelta(397)  # another weekday, day of the month, month and year
_ANOTHER = "Name a `tokenizer` with another template."
_FLAG = re.compile(r"(?<!\S)/\w+(?!\S)")  # such as /no_think
_THINKING = re.compile(r"[<\[\u25c1](?P<closes>/?)[\w:|]*(?:think|thought|reason)[\w:|]*[>\]\u25b7]", re.IGNORECASE)
REMEMBERED = 16 << 20  # bytes of rendered questions
REMEMBERED_ONCE = 1 << 24  # the same of a chat, which asks one


Turns = tuple[tuple[str, str], ...]
"""Earlier turns of a chat: ``user`` or ``assistant``, and what it said."""


def chat_messages(question: str, system_prompt: str | None, turns: Turns = ()) -> list[dict[str, str]]:
    """Return the messages that ask a question, after earlier turns; None sends no system message."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    earlier = [{"role": role, "content": content} for role, content in turns]
    return [*system, *earlier, {"role": "user", "content": question}]


class Chat:
    """A tokenizer's chat template with a system message, on a date that does not change.

    Templates that ask for today (``strftime_now``) get that date; one that expects it from its caller gets none.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None, name: str, date: Date | None) -> None:
        """Take a tokenizer; nothing is rendered yet."""
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.name = name
        self.date = date or Date.today()
        self.turns: Turns = ()
        self.options: Mapping[str, Any] = {}

    def within(self, turns: Turns, options: Mapping[str, Any]) -> Chat:
        """Return the same after earlier turns, with what else the template takes from its caller."""
        other = copy(self)
        other.turns = turns
        other.options = {name: value for name, value in options.items() if name in self.takes}
        return other

    @property
    def takes(self) -> set[str]:
        """Names that the template takes from its caller, and nobody else does."""
        from jinja2 import Environment, meta
        from jinja2.exceptions import TemplateError

        try:
            read = meta.find_undeclared_variables(Environment().parse(str(self.tokenizer.chat_template)))
        except TemplateError:  # such as tags of its own
            return set()
        ours = {"messages", "enable_thinking", "strftime_now", "raise_exception", *self.tokenizer.special_tokens_map}
        return read - ours - set(signature(self.tokenizer.apply_chat_template).parameters)

    def refusal(self, why: str) -> ConfigError:
        """Return the error of a template that cannot be used."""
        return ConfigError(f"{self.name}: the chat template of {self.tokenizer.name_or_path} {why}")

    def render(self, question: str, *said: str, date: Date | None = None, **options: bool) -> str:
        """Return the chat that a question goes on; what is said then are the assistant's and the user's messages."""
        messages = chat_messages(question, self.system_prompt, self.turns)
        messages += [{"role": role, "content": text} for role, text in zip(cycle(("assistant", "user")), said)]
        try:
            return self._applied(messages, date or self.date, options)
        except Exception as error:  # templates are programs of their own and raise what they like
            if not self.tokenizer.chat_template:
                raise ConfigError(
                    f"{self.name}: the tokenizer of {self.tokenizer.name_or_path} has no chat template. Use a model "
                    "that was tuned for instructions, or name a `tokenizer` that has one."
                ) from error
            remedy = "Name a `tokenizer` whose template can be used."
            if self.system_prompt is not None:
                with suppress(Exception):
                    self._applied(messages[1:], self.date, options)
                    remedy = 'It knows no system message: set system_prompt = "".'
            raise self.refusal(f"failed ({' '.join(str(error).split())}). {remedy}") from error

    def _applied(self, messages: list[dict[str, str]], date: Date, options: Mapping[str, bool]) -> str:
        strftime_now = datetime.combine(date, time()).strftime
        told = {**self.options, **options, "tokenize": False, "strftime_now": strftime_now}
        return str(self.tokenizer.apply_chat_template(messages, **told))

    def around(self, question: str, count: int, date: Date | None = None, *, joined: bool = False) -> list[str]:
        """Return what a template writes before, between and after `count` messages that follow a question.

        Where they are `joined`, the first of them stands within the question's own message, after a blank.
        """
        asked = "".join(content for _, content in self.turns) + question
        mark = "\u241e" * (1 + asked.count("\u241e"))  # longer than any run in the question or before it
        marks = [mark] * (count - joined)
        parts = self.render(f"{question} {mark}" if joined else question, *marks, date=date).split(mark)
        if len(parts) != count + 1:
            what = "repeats" if len(parts) > count + 1 else "drops"
            raise self.refusal(f"{what} the assistant's message, where the steps belong. {_ANOTHER}")
        return parts

    def check(self, render: Callable[[str], str], marks: Marks | None = None) -> None:
        """Refuse a template that does not render what it is given, all of it and always alike.

        Args:
            render: From a question to a prompt.
            marks: What opens and closes the thinking block that is to be open at its end; None: none is.
        """
        before = render(_CHECKED)
        if _CHECKED not in before:
            raise self.refusal(f"does not contain the question it was given, unchanged. {_ANOTHER}")
        told = _FLAG.sub("", self.system_prompt or "").split()  # many templates trim it, and some obey flags
        if " ".join(told) not in " ".join(before.split()):
            raise self.refusal('drops the system prompt. Set system_prompt = "".')
        if render(_CHECKED) != before:
            raise self.refusal(f"renders the same messages in two ways. {_ANOTHER}")
        tags = list(_THINKING.finditer(before, before.rindex(_CHECKED)))
        opened = [tag[0] for tag in tags if marks is None or tag[0] not in marks[0]]
        if marks is not None and opened:
            raise self.refusal(
                f"writes {opened[-1]} although the model is to think; its block is opened by {marks[0]!r} (`think` in "
                "[small] and [large])."
            )
        if marks is None and tags and not tags[-1]["closes"]:
            raise self.refusal(
                f"opens a thinking block ({tags[-1][0]}) that enable_thinking=False does not close. Let both models "
                'think (split = "thinking" in [steps]), or use a model that can switch it off.'
            )


class PromptFormat:
    """Renders prefixes for one generating model.

    The chat template with its generation prompt is followed by the accepted steps: the assistant's message is
    continued. Thinking is switched off where the template knows it; the empty thinking block then belongs to
    the prompt. Where solutions think, it is switched on, the prompt ends with what opens the block, be it the template
    or this that adds it, and steps are rendered with this model's own marks, whoever wrote them.

    Attributes:
        special: The tokenizer's special tokens, those of its template, and its marks; in questions they are made plain
            text.
        marks: What opens and closes its thinking block; None where it does not think.
        template_hash: Hash of how two known prompts are rendered; part of the manifest.
        dated: Whether the template prints the date.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        name: str = "model",
        *,
        date: Date | None = None,
        remembered: int = REMEMBERED,
        marks: Marks | None = None,
    ) -> None:
        """Render a few prompts at once, so that a template that cannot be used is found before a run.

        Args:
            tokenizer: The model's tokenizer: `rollouts.text.tokenizer.ChatTokenizer`, or a fast one of transformers.
            system_prompt: System message; None sends none.
            name: Named in errors.
            date: What templates take for today; default: the day on which this is called.
            remembered: Most bytes of rendered questions that are kept.
            marks: What opens and closes the thinking block of this model; None: it is not to think.

        Raises:
            ConfigError: No chat template, a thinking block that stays open (or closed, with marks), a question that the
                template loses or changes, or a tokenizer that does not give blank lines or marks back.
        """
        self.tokenizer = tokenizer
        self.encode = encoder_of(tokenizer)
        self.marks = marks
        written = [mark.strip() for mark in marks or () if mark.strip()]
        self.special = SpecialTokens(tokenizer, *written, markers=True)
        in_steps = SpecialTokens(tokenizer)  # what else there is in a step, the model has written as a token
        self._step = Remembered(in_steps.plain, remembered)
        self._thought = Remembered(SpecialTokens(tokenizer, *written).plain, remembered)
        names = in_steps.found(written[-1]) if written else ()
        self._shown = {self.encode(token)[0]: token for token in names}
        self._chat = Chat(tokenizer, system_prompt, name, date)
        self._head = Remembered(self._render, remembered)
        self._chat.check(self._render, marks)
        self._check_cuts(name)
        self.template_hash = self.hash_on(self._chat.date)
        self.dated = self.template_hash != self.hash_on(self._chat.date + ANOTHER_DAY)

    @property
    def hidden(self) -> bool:
        """Whether what closes its thinking block are special tokens, which texts of backends leave out."""
        return bool(self._shown)

    def _check_cuts(self, name: str) -> None:
        """Refuse a tokenizer that does not give back what ends steps."""
        tokenizer = self.tokenizer
        given = [segment.text for segment in cut_segments(self.pieces((), self.encode("".join(STEPS))))]
        if [text.strip() for text in given] != [text.strip() for text in STEPS]:
            raise ConfigError(
                f"{name}: the tokenizer of {tokenizer.name_or_path} does not give blank lines back, at which steps "
                f"end: {''.join(STEPS)!r} becomes {given!r}. Name another `tokenizer`."
            )
        closed = STEPS[1] + self.marks[1] + STEPS[1] if self.marks else ""
        back = "".join(self.pieces((), self.encode(closed)))
        if back != closed:
            raise ConfigError(
                f"{name}: the tokenizer of {tokenizer.name_or_path} does not give back what closes the thinking block: "
                f"{closed!r} becomes {back!r}. Set `think` in [{name}]."
            )

    def within(self, turns: Turns, options: Mapping[str, Any] = MappingProxyType({})) -> PromptFormat:
        """Return the same for a question after earlier turns of a chat.

        Args:
            turns: As the template has them; special tokens in them are made plain text.
            options: What the template takes from its caller (``chat_template_kwargs``); what it does not take is left
                out, and special tokens in them are made plain text, too.

        Raises:
            ConfigError: The template refuses the turns, or cannot be used with the options.
        """
        other, plain = copy(self), self.special.plain
        options = {name: plain(value) if isinstance(value, str) else value for name, value in options.items()}
        other._chat = self._chat.within(plain_turns(turns, self.special), options)
        other._head = Remembered(other._render, REMEMBERED_ONCE)
        if other._chat.options:
            other._chat.check(other._render, self.marks)
        return other

    def hash_on(self, date: Date) -> str:
        """Return what `template_hash` is on a date."""
        return hash_of(self._render(PROBE, date) + "One." + DELIMITER + (self.marks[1] if self.marks else ""))

    def _render(self, question: str, date: Date | None = None) -> str:
        question = self.special.plain(question)
        thinks = self.marks is not None
        head = self._chat.render(question, date=date, add_generation_prompt=True, enable_thinking=thinks)
        opening = self.marks[0] if self.marks else ""
        return head if not opening or head.rstrip().endswith(opening.strip()) else head + opening

    def _written(self, steps: Sequence[str]) -> list[str]:
        """Return steps as this model reads them: what is special in them is plain text, but for its own marks."""
        if self.marks is None:
            return [self._step(step) for step in steps]
        written, closed = [], False
        for step in steps:
            body, mark, _ = (step, "", "") if closed else step.partition(CLOSE)
            written.append((self._step if closed else self._thought)(body) + self.marks[1] * bool(mark))
            closed = closed or bool(mark)
        return written

    def text(self, question: str, steps: Sequence[str] = ()) -> str:
        """Return the prompt as text."""
        return self._head(question) + "".join(self._written(steps))

    def ids(self, question: str, steps: Sequence[str] = ()) -> tuple[int, ...]:
        """Return the prompt as token ids; the only place where prompts are tokenised."""
        return self.encode(self.text(question, steps))

    def step_spans(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], list[int]]:
        """Tokenise a whole path.

        Returns:
            The ids, and len(steps) + 1 token positions: step i is ``ids[positions[i]:positions[i + 1]]``. A
            token that straddles a boundary belongs to the step in which it starts.
        """
        steps = self._written(steps)
        text = self._head(question) + "".join(steps)
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        begins = accumulate(map(len, steps), initial=len(self._head(question)))
        starts = [start for start, _ in encoded.offsets]
        positions = [bisect_left(starts, begin) for begin, _ in zip(begins, steps, strict=False)]
        return tuple(encoded.ids), [*positions, len(starts)]

    def pieces(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[str]:
        """Yield the text that each decoded token adds; special tokens add nothing, but for those of its marks."""
        from tokenizers.decoders import DecodeStream

        backend = self.tokenizer.backend_tokenizer
        stream = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=True)
        for token in ids:
            yield self._shown.get(token) or stream.step(backend, token) or ""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reward model is read at a token of its input: as the probability of the second of two classes.

    Attributes:
        labels: Labels of the model's head: of two P(label 1), of one its sigmoid. 0: a language model, without a head.
        verdicts: For a language model the next tokens that say wrong and right; all others are left out of account.
        tag: The step tag, where that is a token at which nothing but scores is read; servers are told it when they
            start.
    """

    labels: int = 2
    verdicts: tuple[int, int] | None = None
    tag: int | None = None


class RewardLayout(ABC):
    """How whole paths are written down for a process reward model, where scores are read in them, and how.

    Each kind of model has its own (`rollouts.text.layouts`). Special tokens and step tags that questions or steps spell
    out are made plain text.

    Attributes:
        layout: Its name in models files.
        step_tag: Text of the token at which it is read; empty where that is no token of its own.
        special: The tokenizer's special tokens, those of its template and step tags; in questions they are made plain.
        template_hash: Hash of how a known path is rendered.
        dated: Whether the layout prints the date.
    """

    layout: ClassVar[str]
    step_tag: str = ""
    reading: Reading
    template_hash: str
    dated = False

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        step_tag: str = "",
        *,
        date: Date | None = None,
        remembered: int = REMEMBERED,
        splitting: Splitting = BLANK_LINE,
    ) -> None:
        """Check that the tokenizer has what the layout needs.

        Args:
            tokenizer: The model's tokenizer.
            system_prompt: System message, in a layout that has one; None sends none.
            step_tag: Another step tag than the layout's own, if it has one.
            date: What chat templates take for today; default: the day on which this is called.
            remembered: Most bytes of questions and steps that are kept.
            splitting: How solutions are cut.

        Raises:
            ConfigError: A step tag or verdict is not one token, or the chat template cannot be used.
        """
        self.tokenizer = tokenizer
        self.encode = encoder_of(tokenizer)
        self.step_tag = step_tag or self.step_tag
        self.special = SpecialTokens(tokenizer, self.step_tag, markers=True)
        self._plain = Remembered(SpecialTokens(tokenizer, self.step_tag).plain, remembered)
        self._splitting = splitting
        self.reading = self._find_reading()
        self._open(system_prompt, date, remembered)

    @abstractmethod
    def _find_reading(self) -> Reading:
        """Return how a score is read, by the tokenizer."""

    def _open(self, system_prompt: str | None, date: Date | None, remembered: int) -> None:
        """Render what manifests hold."""
        self.template_hash = self.hash_on(date)

    def hash_on(self, date: Date | None) -> str:
        """Return what `template_hash` is on a date."""
        return hash_of(self.text(PROBE, STEPS))

    def said(self, step: str) -> str:
        """Return a step as it is written down: stripped, plain, and without what closes a thinking block."""
        return self._plain(self._splitting.said(step).strip())

    def one_token(self, text: str, what: str) -> int:
        """Return the id of a text that must be one token."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise ConfigError(f"scorer: {what} {text!r} is {len(ids)} tokens of its tokenizer, expected one.")
        return ids[0]

    def within(self, turns: Turns) -> Self:
        """Return the same for a question after earlier turns, as of `PromptFormat.within`.

        Raises:
            ConfigError: The layout has no place for them.
        """
        raise ConfigError(f"scorer: layout {self.layout!r} has no place for earlier turns of a chat.")

    @abstractmethod
    def text(self, question: str, steps: Sequence[str]) -> str:
        """Return the input that scores each of `steps`."""

    @abstractmethod
    def marked(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the input as token ids, and for each step the position at which its score is read."""

    def ids(self, question: str, steps: Sequence[str]) -> tuple[int, ...]:
        """Return the input as token ids."""
        return self.marked(question, steps)[0]


class ChatLayout(RewardLayout):
    """A layout within the messages of a chat template."""

    def _open(self, system_prompt: str | None, date: Date | None, remembered: int) -> None:
        """Check the chat template; raise `ConfigError` if it cannot be used."""
        self._chat = Chat(self.tokenizer, system_prompt, "scorer", date)
        self._head = Remembered(self._render, remembered)
        self._chat.check(lambda question: "".join(self._render(question)))
        self.template_hash = self.hash_on(self._chat.date)
        self.dated = self.template_hash != self.hash_on(self._chat.date + ANOTHER_DAY)

    @abstractmethod
    def _render(self, question: str, date: Date | None = None) -> tuple[str, ...]:
        """Return what is around the steps of a question."""

    def within(self, turns: Turns) -> Self:
        """Return the same for a question after earlier turns, as of `PromptFormat.within`."""
        other = copy(self)
        other._chat = self._chat.within(plain_turns(turns, self.special), {})
        other._head = Remembered(other._render, REMEMBERED_ONCE)
        return other


class RewardFormat(ChatLayout):
    """The layout of Qwen2.5-Math-PRM: a head with two labels, read at a step tag.

    The steps, without their delimiters, are each followed by the step tag, within the assistant's message. Steps of a
    thinking block are steps like others; what closes the block is left out.
    """

    layout = "qwen2.5-math-prm"
    step_tag = STEP_TAG

    def _find_reading(self) -> Reading:
        self.step_tag_id = self.one_token(self.step_tag, "step tag")
        return Reading(tag=self.step_tag_id)

    def hash_on(self, date: Date | None) -> str:
        """Return what `template_hash` is on a date."""
        head, tail = self._render(PROBE, date)
        return hash_of(f"{head}One.{self.step_tag}{tail}")

    def _render(self, question: str, date: Date | None = None) -> tuple[str, str]:
        head, tail = self._chat.around(self.special.plain(question), 1, date)
        return head, tail.rstrip("\n")

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Return the input that scores each of `steps`."""
        head, tail = self._head(question)
        return head + "".join(self.said(step) + self.step_tag for step in steps) + tail

    def marked(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the input as token ids, which hold exactly one step tag per step, and the tags' positions."""
        ids = self.encode(self.text(question, steps))
        return ids, tuple(place for place, token in enumerate(ids) if token == self.step_tag_id)


def plain_turns(turns: Turns, special: SpecialTokens) -> Turns:
    """Return turns in which no special token is left."""
    return tuple((role, special.plain(content)) for role, content in turns)


def hash_of(text: str) -> str:
    """Return the hash of a rendered prompt, for manifests."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def has_room(prompts: PromptFormat | RewardLayout, window: int, question: str, steps: Sequence[str]) -> bool:
    """Whether a prefix leaves room for at least one token in a window."""
    text = prompts.text(question, steps)
    return len(text.encode()) < window or len(prompts.ids(question, steps)) < window  # a token is at least one byte
