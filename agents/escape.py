"""Names come from files and may hold anything: how they are written where control characters or markup have a meaning.

The page of the report needs none of this: there text stays data (`agents.report.render`).
"""

from __future__ import annotations

import html
import math
import re
from typing import Any


def terminal(text: object) -> str:
    r"""Return one line of printable text: other characters but blanks become escapes such as ``\x1b``."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in str(text)
    )


def csv_cell(text: object) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    plain = terminal(text)
    return f"'{plain}" if plain.startswith(("=", "+", "-", "@")) else plain


def markdown(text: object) -> str:
    """Return text that Markdown shows as it is, also inside a table: neither markup nor HTML."""
    return html.escape(re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", terminal(text)), quote=False)


def finite(value: Any) -> Any:
    """Return what JSON can hold of nested values: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(text: object) -> str:
    """Return a label that matplotlib draws as it is: neither maths nor, by a leading underscore, hidden."""
    plain = terminal(text).replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{plain}" if plain.startswith("_") else plain
