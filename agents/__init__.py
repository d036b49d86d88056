"""Routers: who decides, how they are trained, evaluated, stored and used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agents.deploy.policy import Policy


def load(folder: str | Path, *, allow_old: bool = False) -> Policy:
    """Read a router for use: see `agents.deploy.policy.load`."""
    from agents.deploy.policy import load as load_policy

    return load_policy(folder, allow_old=allow_old)
