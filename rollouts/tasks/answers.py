"""Where a solution states its final answer, and what number that is; nothing here knows what is right."""

from __future__ import annotations

import re
from fractions import Fraction

_BRACES = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
_HASH_LINE = re.compile(r"^[ \t]*####[ \t]*([^\s#]\S*)[ \t]*$", re.MULTILINE)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|\.[0-9]{1,40})")
_DECIMAL = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|\\[,!])[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_EXPONENT_OR_INDEX = re.compile(r"(?:\^|(?<=[A-Za-z)}])_)\s*(?:\{[^{}]*\}|-?[0-9]+|\w)")
# A minus after a digit, letter or bracket is an operator.
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-\u2212])?\\?[$\u20ac\u00a3]?
    (?:(?:(?P<whole>[0-9]+)\s*)?\\[dt]?frac\s*(?:\{{\s*(?P<top>-?{_DECIMAL})\s*\}}|(?P<top_digit>[0-9]))
         \s*(?:\{{\s*(?P<bottom>{_DECIMAL})\s*\}}|(?P<bottom_digit>[0-9]))
      |(?:(?P<plain_whole>[0-9]+)[ ])?(?P<left>{_DECIMAL})[ ]?/[ ]?(?P<right>{_DECIMAL})
      |(?P<decimal>{_DECIMAL}))""",
    re.VERBOSE,
)


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` that is closed, its braces nested; None without one.

    Of nested boxes the innermost is the last. Escaped braces (``\{``) do not count.
    """
    start = text.find("\\boxed")
    if start < 0:
        return None
    open_groups: list[int] = []  # where the content of each open group starts if it is a box, else -1
    found, content = -1, None
    for token in _BRACES.finditer(text, start):
        if token[0] == "}":
            begin = open_groups.pop() if open_groups else -1
            if begin > found:
                found, content = begin, text[begin : token.start()]
        elif token[0] == "{":
            open_groups.append(-1)
        elif len(token[0]) > 2:
            open_groups.append(token.end())
    return content


def final_answer(text: str) -> str | None:
    r"""What a solution marks as its answer: the last closed ``\boxed{...}``, else the last line ``#### x``.

    ``#### Step 2`` is a heading: x must be a single word with a digit in it.
    """
    boxed = last_boxed(text)
    if boxed is None and "####" in text:
        words = [word for word in _HASH_LINE.findall(text) if any(map(str.isdigit, word))]
        return words[-1] if words else None
    return boxed


def has_answer(text: str) -> bool:
    r"""Whether a text holds a closed ``\boxed{...}`` or a line ``#### x`` (see `final_answer`)."""
    return final_answer(text) is not None


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[^0-9.-]", "", text))


def last_number(text: str) -> tuple[Fraction, str] | None:
    r"""The last number of a text and how it is written there; None without one.

    Reads ``$1,234.50``, ``18 dollars``, ``\frac{3}{4}``, ``3/4``, ``2 1/2``, ``1{,}234``; a percent sign is
    passed over (``50\%`` is 50); exponents and indices are not numbers (``18 cm^2`` is 18).

    Raises:
        ValueError: A number has over 4,300 digits, Python's limit.
    """
    for match in reversed(list(_NUMBER.finditer(_EXPONENT_OR_INDEX.sub("", text)))):
        top = _decimal(match["decimal"] or match["top"] or match["top_digit"] or match["left"])
        bottom = _decimal(match["bottom"] or match["bottom_digit"] or match["right"] or "1")
        if bottom:
            value = top / bottom + int(match["whole"] or match["plain_whole"] or 0)
            return -value if match["sign"] else value, match[0]
    return None


def _normalised(answer: str) -> str:
    answer = " ".join(answer.split()).removesuffix(".")
    while len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer[1:-1].strip().removesuffix(".")
    return answer


def quick_equal(gold: str, final: str) -> bool | None:
    """Whether two answers are equal, where that needs no algebra; None where it does.

    Equal texts (up to blanks, dollar signs around and a full stop behind) are equal; plain integers and
    decimals are compared exactly, but left to math-verify where they differ by little more than rounding.
    """
    gold, final = _normalised(gold), _normalised(final)
    if gold == final and gold:
        return True
    if not (_PLAIN_NUMBER.fullmatch(gold) and _PLAIN_NUMBER.fullmatch(final)):
        return None
    difference = abs(Fraction(gold) - Fraction(final))
    if not difference:
        return True
    return False if difference > Fraction(1, 10**5) else None
