"""Exported routers to and from Weights & Biases; nothing here asks a question (`agents.runs.tracking`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from agents.deploy.policy import Policy
from agents.runs.tracking import logged_in, wandb_mode
from rollouts.errors import ConfigError

TYPE = "policy"


def _library() -> Any:
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes this package for another one of that name
    import wandb

    return wandb


def as_artifact(folder: Path, policy: Policy) -> Any:
    """Return the artifact of an exported router: the files of its folder, what it tells of itself as metadata."""
    name = re.sub(r"[^\w.-]+", "-", f"{policy.name}-{folder.resolve().name}", flags=re.ASCII)
    artifact = _library().Artifact(name, type=TYPE, metadata=policy.describe())
    artifact.add_dir(str(folder))
    return artifact


def push(folder: Path, policy: Policy, where: Path) -> None:
    """Log an exported router: online if the user is logged in, else into ``where/wandb``, for ``wandb sync``."""
    run = _library().init(
        project=os.environ.get("WANDB_PROJECT", "trim-routing"),
        job_type="export",
        name=f"export {folder.resolve().name}",
        dir=str(where),
        mode=wandb_mode(),
        settings=_library().Settings(silent=True, console="off", init_timeout=60),
    )
    run.log_artifact(as_artifact(folder, policy))
    run.finish()


def pull(name: str, folder: Path) -> Path:
    """Fetch the files of an artifact into a folder; return it.

    Args:
        name: ENTITY/PROJECT/ARTIFACT:VERSION.
        folder: Where to.

    Raises:
        ConfigError: The name is none, nobody is logged in, or there is no such artifact.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+:[\w.-]+", name):
        raise ConfigError(f"wandb:{name} names no artifact, expected wandb:ENTITY/PROJECT/ARTIFACT:VERSION.")
    if not logged_in():
        raise ConfigError(
            f"wandb:{name}: fetching needs a login. Say `wandb login` or set WANDB_API_KEY; offline, export the folder."
        )
    wandb = _library()
    try:
        wandb.Api().artifact(name, type=TYPE).download(root=str(folder))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise ConfigError(f"wandb:{name}: cannot be fetched ({error}).") from error
    return folder
