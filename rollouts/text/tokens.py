"""From texts to token ids, without tokenising again what was tokenised before."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T", bound="str | tuple[Any, ...]")
_REMEMBERED = 16 << 20  # bytes of pieces between special tokens: messages and, where tags divide them, steps
_MARKER = re.compile(r"[^\w\s].*[^\w\s]")
_TRIED = 64  # special tokens that are tried out; there may be a thousand, all alike
_PROBES = ("{0}a b{0} c\n{0}\nd e\n\n{0}", "f {0}{0}g\n\n {0}\n\nh")


class Remembered(Generic[T]):
    """A function of a text that remembers what it was last asked, as far as that fits into some memory."""

    def __init__(self, function: Callable[[str], T], most_bytes: int) -> None:
        """Begin with nothing; texts and results of more than 1/16 of `most_bytes` are not kept."""
        self._function, self._most = function, most_bytes
        self._known: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __call__(self, text: str) -> T:
        """Return the function's result."""
        with self._lock:
            found = self._known.get(text)
            if found is not None:
                self._known.move_to_end(text)
                return found[0]
        result = self._function(text)
        size = sys.getsizeof(text) + sys.getsizeof(result)
        if not isinstance(result, str):
            size += sum(map(sys.getsizeof, result))
        if size <= self._most // 16:
            with self._lock:
                if text not in self._known:
                    self._known[text] = result, size
                    self.bytes += size
                while self.bytes > self._most:
                    self.bytes -= self._known.popitem(last=False)[1][1]
        return result


class SpecialTokens:
    """The texts that a tokenizer reads as special tokens; in what others wrote they are made plain text."""

    def __init__(self, tokenizer: Any, *others: str, markers: bool = False) -> None:
        """Take a tokenizer's special tokens.

        Args:
            tokenizer: As of `rollouts.text.prompts.PromptFormat`.
            others: Further ones.
            markers: Also those that it does not call special, but writes in its chat template (``<think>``).
        """
        template = str(tokenizer.chat_template or "") if markers else ""
        found = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (_MARKER.fullmatch(token.content) and token.content in template)
        } | {*others}
        longest_first = sorted(filter(str.strip, found), key=lambda text: (-len(text), text))
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def found(self, text: str) -> list[str]:
        """Return the special tokens that a text holds."""
        return self._any.findall(text)

    def count(self, text: str) -> int:
        """Return how many special tokens a text holds."""
        return len(self.found(text))

    def plain(self, text: str) -> str:
        """Return a text in which no special token is left: a blank after its first character makes it text."""
        while self._any.search(text):  # there may be one within another
            text = self._any.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else " ", text)
        return text


class Encoder:
    """Token ids of texts as they stand, without special tokens around them.

    Tokenizers cut a text at its special tokens first, and usually what is between two of them does not depend on what
    is elsewhere. Then a prompt is encoded piece by piece, and pieces that came before (the system message, the problem,
    each step that a reward model has read) are looked up. Otherwise, which is tried out at once, it is encoded whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Find out where the tokenizer cuts."""
        self._backend = tokenizer.backend_tokenizer
        self._piece = Remembered(self.whole, _REMEMBERED)
        added = self._backend.get_added_tokens_decoder()
        self._special = {token.content: (number,) for number, token in added.items() if not token.normalized}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self._special else None
        probes = [probe.format(token) for token in longest_first[:_TRIED] for probe in _PROBES]
        swallows = any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        if swallows or any(self(text) != self.whole(text) for text in probes):
            self._cut = None

    def whole(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text that is encoded at once.

        The tokenizer's implementation is asked itself: the method around it hands even one text to a pool of threads,
        and waking them takes longer than the work.
        """
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def __call__(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text."""
        if self._cut is None:
            return self.whole(text)
        ids: list[int] = []
        for place, piece in enumerate(self._cut.split(text)):
            if piece:
                ids.extend(self._special[piece] if place % 2 else self._piece(piece))
        return tuple(ids)


_known: WeakValueDictionary[bytes, Encoder] = WeakValueDictionary()


@lru_cache(maxsize=16)
def encoder_of(tokenizer: Any) -> Encoder:
    """Return the encoder of a tokenizer; models with the same vocabulary share what it remembers."""
    digest = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).digest()
    encoder = _known.get(digest) or Encoder(tokenizer)
    _known[digest] = encoder
    return encoder
