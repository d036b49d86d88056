"""Weights & Biases, all that we do with it: trainings are logged, exported routers pushed and fetched.

Nothing here asks a question or needs an account: without a login Weights & Biases writes into a folder, from where
``wandb sync`` uploads it later.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts.errors import ConfigError

_ARTIFACT = "policy"  # the type of our artifacts


class NoTracker:
    """Tracks nothing."""

    def log(self, record: Mapping[str, float]) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any], picture: Path | None, policy: Path) -> None:
        """Do nothing."""


class WandbTracker(NoTracker):
    """One run of Weights & Biases for one training; online if the user is logged in, else offline."""

    def __init__(self, folder: Path, name: str, group: str, config: Mapping[str, Any]) -> None:
        """Start the run, or go on with the one that the folder has begun."""
        note = folder / "wandb-run.txt"
        identity = note.read_text(encoding="utf-8").strip() if note.is_file() else None
        resumed = {"id": identity, "resume": "allow"} if identity else {}
        self._run = _begin(folder, name=name, group=group, config=dict(config), **resumed)
        note.write_text(self._run.id + "\n", encoding="utf-8")

    def log(self, record: Mapping[str, float]) -> None:
        """Log what one iteration came to; a run that is gone on with does not log a step again."""
        self._run.log(dict(record), step=int(record["step"]))

    def finish(self, summary: Mapping[str, Any], picture: Path | None, policy: Path) -> None:
        """Log summary, table, training curve and the policy as an artifact, and end the run."""
        wandb = _library()
        flat = {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
        self._run.summary.update(flat)
        table = wandb.Table(columns=["what", "value"], data=[[name, str(value)] for name, value in flat.items()])
        logged: dict[str, Any] = {"result": table}
        if picture is not None:
            logged["curve"] = wandb.Image(str(picture))
        self._run.log(logged)
        self._run.log_artifact(artifact_of(policy, f"policy-{self._run.id}", flat))
        self._run.finish()


def push(folder: Path, name: str, described: Mapping[str, Any], where: Path) -> None:
    """Log an exported router: online if the user is logged in, else into ``where/wandb``, for ``wandb sync``.

    Args:
        folder: The router's.
        name: Its name.
        described: What it tells of itself; the artifact's metadata.
        where: Where an offline run is written.
    """
    run = _begin(where, job_type="export", name=f"export {folder.resolve().name}")
    run.log_artifact(artifact_of(folder, f"{name}-{folder.resolve().name}", described))
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
        wandb.Api().artifact(name, type=_ARTIFACT).download(root=str(folder))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise ConfigError(f"wandb:{name}: cannot be fetched ({error}).") from error
    return folder


def _library() -> Any:
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes this package for another one of that name
    import wandb

    return wandb


def _begin(folder: Path, **options: Any) -> Any:
    """Begin a run of Weights & Biases that keeps its files in a folder."""
    wandb = _library()
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "trim-routing"),
        dir=str(folder),
        mode=wandb_mode(),
        settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        **options,
    )


def artifact_of(folder: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    """Return the artifact of a router: the files of its folder."""
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    artifact = _library().Artifact(plain, type=_ARTIFACT, metadata=dict(metadata))
    artifact.add_dir(str(folder))
    return artifact


def wandb_mode() -> Any:
    """Return ``WANDB_MODE`` if it is set, ``online`` if the user is logged in, else ``offline``."""
    asked = os.environ.get("WANDB_MODE")
    return asked or ("online" if logged_in() else "offline")


def logged_in() -> bool:
    """Return whether a key for Weights & Biases is at hand, without asking anybody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
