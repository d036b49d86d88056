"""Forms of answers that math-verify would read as something else: choices, numbers in a base, lists with dots."""

from __future__ import annotations

import re

_WRAP = r"\\(?:text|math)[a-z]*\s*\{\s*"
_SPACE = r"(?:\s|~|\\[ ,;:!]|\\q?quad|\$)*"
_CHOICE = re.compile(
    rf"{_SPACE}(?P<wrap>{_WRAP})?(?:(?:option|choice|answer)\s+)?"
    rf"(?:\((?:{_WRAP})?(?P<bracketed>[A-J])\}}?\)(?!\s*(?:[+*/^_=<>|&,:(]|\\[a-zA-Z])|-|\s+-(?![0-9]))"
    r"|(?P<marked>[A-J])(?:(?P<closed>\})?(?:[.)]|:(?=\s))|(?=\s*\}?\s*$)))"
    rf"(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)
_BASE_WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_BASE = rf"(?P<base>[0-9]{{1,2}}|{'|'.join(_BASE_WORDS)}|sixteen)"
_IN_BASE = re.compile(
    rf"(?<![\w\\.}}])\(?(?P<digits>[0-9][0-9A-Za-z]*|[A-Z]+[0-9][0-9A-Z]*)\)?"
    rf"(?:_\s*(?:\{{[({{]?\s*(?:\\text[a-z]*\s*\{{)?(?:base )?{_BASE}\}}?[)}}]?\}}|(?P<digit>[0-9]))"
    rf"|(?:\s|{_WRAP})*\(?(?:in )?base[ -]{_BASE.replace('<base>', '<named>')}\)?\}}?)",
)
_DOTS = re.compile(r"\s*(,?)\s*(?:\\(?:[lch]?dots[bcmio]?)(?![A-Za-z])|\.\.\.)\s*(,?)\s*(?=(\S?))")


def choice(answer: str) -> tuple[str, str] | None:
    r"""The letter of a multiple choice, as a capital, and the text behind it (perhaps empty); None where it is none.

    Reads ``C``, ``(C)``, ``C. 12 cm``, ``C) 12``, ``\textbf{(C)}\ 12``, ``\text{C: yes}``; letters A to J.
    """
    match = _CHOICE.fullmatch(answer.replace("**", ""))
    if match is None:
        return None
    text = match["text"].lstrip()
    if match["wrap"] and not match["closed"]:
        # The brace that opened before the letter closes at once or around the text.
        text = text[1:] if text.startswith("}") else f"\\text{{{text}"
    text = re.sub(rf"^{_SPACE}", "", text).strip().rstrip("$.")
    return (match["bracketed"] or match["marked"]).upper(), text


def as_symbols(gold: str, final: str) -> tuple[str, str]:
    r"""Two answers with what math-verify passes over replaced by symbols: dots and, where both name one, bases.

    ``43_5`` is a number of base five and ``43`` may be the same one; ``1, 3, \ldots, 9`` is not ``1, 3, 9``.
    """
    answers = [_DOTS.sub(_dots, gold), _DOTS.sub(_dots, final)]
    based = [_IN_BASE.sub(_in_base, answer) for answer in answers]
    if based[0] != answers[0] and based[1] != answers[1]:
        answers = based
    return answers[0], answers[1]


def _dots(match: re.Match[str]) -> str:
    before, after, following = match.groups()
    if not before and not after and match.start() and match.string[match.start() - 1].isdigit():
        return " "  # 0.333...
    return f"{before}\\xi_{{777}}{',' if after or (before and following.isalnum()) else ''}"


def _in_base(match: re.Match[str]) -> str:
    named = match["base"] or match["digit"] or match["named"]
    base = int(named) if named.isdigit() else 16 if named == "sixteen" else _BASE_WORDS.index(named) + 2
    return f"\\xi_{{{int(match['digits'], 36)}{base:02}}}"
