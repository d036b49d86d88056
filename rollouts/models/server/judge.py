"""A chat model of a server that is asked for verdicts: what it is sent, and what its answers say."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollouts.models.server.chat import decoded, text_of
from rollouts.text.likelihood import TOP
from rollouts.text.prompts import chat_messages

_YES, _NO = ("yes", "right", "correct", "true"), ("no", "wrong", "incorrect", "false")
_FAULTS = r"\s+(?:\w+\s+)?(?:error|mistake|issue|problem|fault|flaw)s?\b"  # "no errors" is no "no"
_WORD = re.compile(
    rf"(?P<not>(?:\b(?:not|nothing|never)|n't)\s+)?\b(?P<word>{'|'.join((*_YES, *_NO))})\b(?<!\bno(?={_FAULTS}))",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.])(?P<value>\d+(?:\.\d+)?)(?:\s*(?P<percent>%)|\s*/\s*(?P<of>\d+(?:\.\d+)?))?(?![\w])")
_DECORATION = " \t\r\n*_#`\"'.:"
_FEW = 5  # log-probabilities that some vendors give at most
_KEPT = 80  # characters of an answer in a reason


@dataclass(frozen=True)
class Terms:
    """The fields of a request that servers differ in.

    Attributes:
        limit: Name of the field for the most tokens of an answer.
        top: Log-probabilities that are asked for at each token; 0: none.
        temperature: Whether a temperature is sent, which is 0.
    """

    limit: str = "max_tokens"
    top: int = TOP
    temperature: bool = True

    def yielding(self, refusal: str) -> Terms | None:
        """Return what to try after a refusal, or None."""
        if self.limit == "max_tokens" and "max_completion_tokens" in refusal:
            return replace(self, limit="max_completion_tokens")
        if self.temperature and "temperature" in refusal:
            return replace(self, temperature=False)
        if not self.top:
            return None
        return replace(self, top=_FEW if self.top > _FEW and "logprobs" in refusal else 0)


@dataclass(frozen=True)
class Verdict:
    """What a judge said.

    Attributes:
        score: In [0, 1]; None if its answer says nothing.
        why: Why there is none.
        spent: Tokens of prompt and answer, hidden thoughts included.
        tells: Whether the server told log-probabilities.
    """

    score: float | None
    why: str
    spent: tuple[int, int]
    tells: bool


def judge_payload(content: str, system_prompt: str | None, max_tokens: int, terms: Terms) -> dict[str, Any]:
    """Return the body of a chat that asks one question, but for the model's name."""
    return {
        "messages": chat_messages(content, system_prompt),
        terms.limit: max_tokens,
        "stream": False,
        **({"temperature": 0.0} if terms.temperature else {}),
        **({"logprobs": True, "top_logprobs": terms.top} if terms.top else {}),
    }


def read_verdict_of(body: Any) -> Verdict:
    """Return what an answer says; raises LookupError, TypeError or ValueError for what is no answer at all."""
    choice = body["choices"][0]
    text, tokens = text_of(choice["message"].get("content")), _told(choice)
    usage = body.get("usage") or {}
    spent = int(usage.get("prompt_tokens") or 0), decoded(usage) if "completion_tokens" in usage else 0
    if min(spent) < 0:
        raise ValueError(f"{spent} tokens, expected at least 0")
    cut = choice.get("finish_reason") == "length"
    score = None if tokens is None else verdict_in("".join(token for token, _ in tokens), tokens, cut=cut)
    score = verdict_in(text, cut=cut) if score is None else score
    why = f"no verdict in {' '.join(text.split())[:_KEPT]!r}" + (", cut off by the limit of tokens" if cut else "")
    return Verdict(score, "" if score is not None else why, spent, tokens is not None)


def _told(choice: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]] | None:
    """Return the tokens of an answer, each with the log-probabilities of what could have stood there."""
    content = (choice.get("logprobs") or {}).get("content")
    if not content:
        return None
    return [
        (
            str(each["token"]),
            {str(top["token"]): float(top["logprob"]) for top in (each, *(each.get("top_logprobs") or ()))},
        )
        for each in content
    ]


def verdict_in(text: str, tokens: Sequence[tuple[str, Mapping[str, float]]] = (), *, cut: bool = False) -> float | None:
    """Return the probability of yes that an answer states, or None.

    What stands before the end of a thinking block, or in one without an end, does not count. A line that is a number
    (``0.8``, ``80%``, ``8/10``) at the beginning is the answer, else the word at the beginning if it is a verdict, else
    the last verdict, else the last such number.

    Args:
        text: The answer.
        tokens: Its tokens with log-probabilities, if they are known: a verdict that is a word is then taken as P(yes |
            yes or no) of the token with which it begins.
        cut: Whether it was cut off: then only what stands at the beginning is the answer; later words may be thoughts.
    """
    if text.lstrip().startswith("<think>") and "</think>" not in text:
        return None
    begin = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    answer = text[begin:]
    first_line = next(iter(answer.strip(_DECORATION).splitlines()), "").strip(_DECORATION)
    if (number := _NUMBER.fullmatch(first_line)) and (value := _share(number)) is not None:
        return value
    if words := list(_WORD.finditer(answer)):
        leads = not any(map(str.isalnum, answer[: words[0].start()]))
        if cut and not leads:
            return None
        word = words[0] if leads else words[-1]
        said = word["word"].lower() in _YES
        if word["not"]:
            return float(not said)
        known = _probability(tokens, begin + word.start("word"))
        return float(said) if known is None else known
    if cut:
        return None
    return next(
        (value for each in reversed(list(_NUMBER.finditer(answer))) if (value := _share(each)) is not None), None
    )


def _share(number: re.Match[str]) -> float | None:
    value, of = float(number["value"]), float(number["of"] or 0)
    value = value / 100 if number["percent"] else value / of if of else value
    return value if 0.0 <= value <= 1.0 else None


def _probability(tokens: Sequence[tuple[str, Mapping[str, float]]], place: int) -> float | None:
    """Return P(yes | yes or no) at the token that holds the character at a place."""
    end = 0
    for token, tops in tokens:
        end += len(token)
        if place < end:
            sums = Counter[bool]()
            for other, logprob in tops.items():
                word = other.strip(_DECORATION).lower()
                for side, words in ((True, _YES), (False, _NO)):
                    if word and any(each.startswith(word) for each in words):
                        sums[side] += math.exp(min(logprob, 0.0))  # type: ignore[assignment]
            return sums[True] / sums.total() if sums.total() > 0 else None
    return None
