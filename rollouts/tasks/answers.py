"""Where a solution states its final answer, and what number that is; nothing here knows what is right."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

# The dots, blanks and text commands of a placeholder say nothing; what `_TOKENS` passes over does neither.
_TOKENS = re.compile(
    r"(?P<box>\\+(?:boxed|fbox)\s*\{)"
    r"|(?P<nothing>\\(?:text[a-z]*|mbox|mathrm|phantom|[lc]?dots[bcmio]?|q?quad|[,;:!> ])(?![A-Za-z]))"
    r"|[{}]|\\.|[^\\{}\s.$~_\u2026]+",
    re.DOTALL,
)
# Between two boxes that are one answer: "$\boxed{3}$ and $x = \boxed{5}$".
_JOINS = re.compile(
    r"[\s$]*(?:[,;&]|(?:\\text\s*\{)?\s*,?\s*(?:and|or)\s*\}?)[\s$]*(?:(?:and|or)[\s$]+)?(?:\w+\s*=\s*)?"
)
_HASH_LINE = re.compile(r"^[ \t]*####[ \t]*(-?[0-9]+ [0-9]+/[0-9]+|[^\s#]\S*)[ \t]*$", re.MULTILINE)
_DECIMAL = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|\\[,!])[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_EXPONENT_OR_INDEX = re.compile(r"(?:\^|(?<=[A-Za-z0-9)}])_)\s*(?:\{[^{}]*\}|-?[0-9]+|\w)")
_MANTISSA = r"(?<![\w./^}])[0-9]+(?:\.[0-9]*)?"
_E_NOTATION = re.compile(rf"({_MANTISSA}|(?<![\w.])\.[0-9]+)[eE]([-+\u2212]?[0-9]{{1,9}})(?!\w|\.[0-9])")
_POWER_OF_TEN = re.compile(
    rf"(?:({_MANTISSA})\s*(?:\\times|\\cdot|[*\u00d7\u00b7])\s*)?(?<![\w.])10\s*\^\s*"
    r"(?:\{\s*([-+\u2212]?[0-9]{1,9})\s*\}|([-+\u2212]?[0-9]{1,9}))"
)
_LARGEST_EXPONENT = 500
_HUGE = "\ufdd0"  # stands for a number beyond it
_GAP = r"(?:[ ~]|\\[ ,;:!])"
_MIXED = re.compile(
    rf"(?<![\w.,/^}}])([0-9]{{1,40}}){_GAP}+([0-9]{{1,40}})[ ]?/[ ]?(0*[1-9][0-9]{{,39}})(?!\w|\.[0-9])"
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_RAISED_RUN, _LOWERED = re.compile(f"[{_RAISED}]+"), str.maketrans(_RAISED, "0123456789-")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# A minus after a digit, letter or bracket is an operator.
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-\u2212])?\\?[$\u20ac\u00a3]?
    (?:(?:(?P<whole>[0-9]+)(?:\s|{_GAP})*)?\\[dtc]?frac\s*(?:\{{\s*(?P<top>-?{_DECIMAL})\s*\}}|(?P<top_digit>[0-9]))
         \s*(?:\{{\s*(?P<bottom>{_DECIMAL})\s*\}}|(?P<bottom_digit>[0-9]))
      |(?:(?P<plain_whole>[0-9]+){_GAP}+)?(?P<left>{_DECIMAL})[ ]?/[ ]?(?P<right>{_DECIMAL})
      |(?P<decimal>{_DECIMAL})|{_HUGE})""",
    re.VERBOSE,
)


def boxed_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` that is closed, its braces nested; None without one.

    Of nested boxes the innermost is the last. Escaped braces (``\{``) do not count. A box without content, or with dots
    only, is none: ``put it in \boxed{}``. Boxes with no more than a comma, "and" or "or" between them are one answer,
    ``3, 5``.
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    open_groups: list[tuple[int, int]] = []  # where each open group starts and its content does; -1 if it is no box
    boxes: list[tuple[int, int, int]] = []  # start, start of the content, end of it
    said, last = -1, -1  # where something was last said; where the content of the last box starts
    for token in _TOKENS.finditer(text):
        if token["box"]:
            open_groups.append((token.start(), token.end()))
        elif token[0] == "{":
            open_groups.append((-1, -1))
        elif token[0] == "}":
            start, begin = open_groups.pop() if open_groups else (-1, -1)
            if begin > last and said >= begin:
                last = begin
                boxes.append((start, begin, token.start()))
        elif not token["nothing"]:
            said = token.start()
    if not boxes:
        return None
    first = len(boxes) - 1
    while first and _JOINS.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    return ", ".join(dict.fromkeys(text[begin:end] for _, begin, end in boxes[first:]))


def final_answer(text: str) -> str | None:
    r"""What a solution marks as its answer: its last box (see `boxed_answer`), else the last line ``#### x``.

    ``#### Step 2`` is a heading: x must be a single word with a digit in it, or a mixed number.
    """
    boxed = boxed_answer(text)
    if boxed is None and "####" in text:
        words = [word for word in _HASH_LINE.findall(text) if any(map(str.isdigit, word))]
        return words[-1] if words else None
    return boxed


def has_answer(text: str) -> bool:
    r"""Whether a text holds a closed box or a line ``#### x`` (see `final_answer`)."""
    return final_answer(text) is not None


def _written_out(mantissa: str | None, exponent: str, otherwise: str) -> str:
    power = int(exponent.replace("\u2212", "-"))
    return otherwise if abs(power) > _LARGEST_EXPONENT else format(Decimal(f"{mantissa or 1}e{power}"), "f")


def plain_numbers(text: str) -> str:
    r"""The text with ``1e-05`` as ``0.00001``, ``2 1/2`` as ``5/2``, and Unicode's signs in ASCII or LaTeX."""
    if not text.isascii():
        text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])}".replace("\u2044", "/"), text)
        text = _RAISED_RUN.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
        text = text.replace("\u00d7", "\\times ").replace("\u2212", "-").replace("\u2026", "\\ldots ")
    text = _E_NOTATION.sub(lambda match: _written_out(match[1], match[2], f"{match[1]}\\times 10^{{{match[2]}}}"), text)
    return _MIXED.sub(lambda match: f"{int(match[1]) * int(match[3]) + int(match[2])}/{match[3]}", text)


def _number(match: re.Match[str]) -> Fraction | None:
    if match[0].endswith(_HUGE):
        raise ValueError(f"its exponent is beyond {_LARGEST_EXPONENT}")

    def read(*groups: str) -> Fraction:
        return Fraction(re.sub(r"[^0-9.-]", "", next(filter(None, map(match.group, groups)), "1")))

    bottom = read("bottom", "bottom_digit", "right")
    if not bottom:
        return None
    value = read("decimal", "top", "top_digit", "left") / bottom + int(match["whole"] or match["plain_whole"] or 0)
    return -value if match["sign"] else value


def _with_powers(text: str) -> str:
    return _POWER_OF_TEN.sub(lambda match: _written_out(match[1], match[2] or match[3], _HUGE), plain_numbers(text))


def last_number(text: str) -> tuple[Fraction, str] | None:
    r"""The last number of a text and how it is written there, powers of ten written out; None without one.

    Reads ``$1,234.50``, ``18 dollars``, ``\frac{3}{4}``, ``3/4``, ``2 1/2``, ``1{,}234``, ``1e-05``,
    ``7 \times 10^3``; a percent sign is passed over (``50\%`` is 50); exponents and indices are not numbers
    (``18 cm^2`` is 18).

    Raises:
        ValueError: A number has over 4,300 digits, Python's limit, or an exponent beyond 500.
    """
    for match in reversed(list(_NUMBER.finditer(_EXPONENT_OR_INDEX.sub("", _with_powers(text))))):
        value = _number(match)
        if value is not None:
            return value, match[0]
    return None


def _normalised(answer: str) -> str:
    answer = " ".join(answer.split()).removesuffix(".")
    while len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer[1:-1].strip().removesuffix(".")
    return answer


def quick_equal(gold: str, final: str) -> bool | None:
    """Whether two answers are equal, where that needs no algebra; None where it does.

    Equal texts (up to blanks, dollar signs around and a full stop behind) are equal. Numbers are compared exactly, but
    decimals are left to math-verify where they differ by little more than rounding.
    """
    gold, final = _normalised(gold), _normalised(final)
    if gold == final and gold:
        return True
    written = [_NUMBER.fullmatch(_with_powers(text).removeprefix("+")) for text in (gold, final)]
    if written[0] is None or written[1] is None:
        return None
    try:
        values = _number(written[0]), _number(written[1])
    except ValueError:  # too long
        return None
    if values[0] is None or values[1] is None:
        return None
    difference = abs(values[0] - values[1])
    if not difference:
        return True
    if "." not in written[0][0] + written[1][0]:
        return False
    return False if difference > min(Fraction(1), abs(values[0])) / 10**4 else None
