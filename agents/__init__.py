"""Routers: who decides, how they are trained, evaluated, stored and used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agents.deployed import Policy


def load(folder: str | Path, runtime: str = "numpy") -> Policy:
    """Read a router for use: see `agents.deployed.load`."""
    from agents.deployed import load as load_policy

    return load_policy(folder, runtime)
