"""Formulas in texts as MathML, which browsers draw without a script or a font: converted when the page is made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import unescape
from typing import Any
from xml.etree.ElementTree import Element

PATTERN = (
    r"\$\$[^$]+\$\$|(?<!\\)\\\[(?:[^\\]|\\[^\[\]])+?\\\]|(?<!\\)\\\((?:[^\\]|\\[^()])+?\\\)"
    r"|(?<!\\)\$(?=\S)(?:[^$\n\\]|\\.)*?[^\s$\\]\$(?!\d)|\\boxed\{(?:[^{}]|\{[^{}]*\})*\}"
)
"""What counts as a formula, delimiters included; scripts split texts by the same words. Two prices are none, and none
is looked for beyond where the next one begins: texts with many that never end are read in linear time."""
TAGS = frozenset(
    "math mrow mfrac msqrt mroot msub msup msubsup munder mover munderover mi mn mo mtext mspace mtable mtr mtd mstyle "
    "mpadded mphantom menclose".split()
)
_LONGEST = 1000  # characters of a formula
_ALIGNED = re.compile(r"\{(?:aligned|align|gathered|split|cases)\*?\}")


def formulas(texts: Iterable[str]) -> dict[str, Any]:
    """Return those formulas of some texts that can be drawn, by what they are in the text.

    Each is a list of an element's name and its content, texts and lists; nothing else of MathML is kept. What is no
    LaTeX, or is not installed to be read (``latex2mathml``), stays as it is written.
    """
    try:
        from latex2mathml.converter import convert_to_element
    except ModuleNotFoundError:
        return {}
    found: dict[str, Any] = {}
    for written in {part for text in texts for part in re.findall(PATTERN, text) if len(part) <= _LONGEST}:
        latex = written if written.startswith("\\boxed") else written.strip("$").removeprefix("\\(").removesuffix("\\)")
        latex = _ALIGNED.sub("{matrix}", latex.removeprefix("\\[").removesuffix("\\]"))
        try:
            found[written] = _plain(convert_to_element(latex))
        except Exception:  # whatever a converter says of texts that models write
            continue
    return found


def _plain(element: Element) -> list[Any]:
    """Return an element without its attributes; a box is a row of that name.

    Raises:
        ValueError: It is none that a page draws, or a command of LaTeX is left in it.
    """
    text = unescape(element.text or "")
    if element.tag not in TAGS or "\\" in text or "&" in text:
        raise ValueError(element.tag)
    return ["boxed" if element.tag == "menclose" else element.tag, *([text] if text else []), *map(_plain, element)]
