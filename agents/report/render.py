"""Turns the content of the page into one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rollouts.errors import ConfigError

SHARED = ("tools.js", "steps.js")  # with other pages
SCRIPTS = (
    *SHARED,
    "chosen.js",
    "pictures.js",
    "curves.js",
    "bars.js",
    "tables.js",
    "deploy.js",
    "browser.js",
    "main.js",
)
FILE = "report.html"

# Inside <script> a browser looks for "</script" and "<!--"; inside JSON all of these may be written as escapes.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render(content: dict[str, Any]) -> str:
    """Return the page. Text of models stays data: it is in the JSON block alone, and scripts put it in as text."""
    return assembled("Routing evaluation", part("page.html"), part("page.css"), map(part, SCRIPTS), content)


def assembled(title: str, page: str, style: str, scripts: Iterable[str], content: Any, connect: str = "") -> str:
    """Return a page with everything in it, and hashes of style and script for its content security policy.

    Args:
        title: Its title.
        page: What is below that.
        style: CSS.
        scripts: Their texts.
        content: What they read.
        connect: What else the policy says, of whom scripts may ask something.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(scripts) + "\n})();"
    return Template(part("head.html") + page).substitute(
        title=title,
        connect=connect,
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        data=embedded(content),
    )


def embedded(content: Any) -> str:
    """Return values as JSON that is inert inside a ``<script>`` element, whatever its strings hold."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write the page into a folder and return the file.

    Raises:
        ConfigError: It cannot be written there.
    """
    file = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(render(content), encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise ConfigError(
            f"{file}: the page cannot be written here ({error.strerror}). Name another folder."
        ) from error
    return file


def part(name: str, package: str = "agents.report") -> str:
    """Return a file of a package's template."""
    return (files(package) / "template" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return a hash for the page's content security policy: what is not in the template never runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
