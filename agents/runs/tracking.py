"""Where a training is logged: a JSON-lines file in the run's folder, and Weights & Biases.

Nothing here asks a question or needs an account: without a login Weights & Biases writes into the run's folder, from
where ``wandb sync`` uploads it later.
"""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.logger import KVWriter

from rollouts.errors import ConfigError, did_you_mean

TRACKING = ("wandb", "none")


class JsonLines(KVWriter):
    """Writes each record as a line of JSON; a resumed run drops the lines beyond its checkpoint first."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending."""
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def keep(self, lines: int) -> None:
        """Drop all but the first lines."""
        kept = self._path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
        self._file.truncate(len("".join(kept).encode("utf-8")))

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Append one record."""
        record = {name: float(value) for name, value in sorted(key_values.items())}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tracker(Protocol):
    """One Weights & Biases run, or nothing."""

    def output(self) -> list[KVWriter]:
        """Return outputs for a Stable-Baselines3 logger."""

    def finish(self, summary: Mapping[str, Any], picture: Path | None, policy: Path | None) -> None:
        """Log what the run ended with."""


class NoTracker:
    """Tracks nothing."""

    def output(self) -> list[KVWriter]:
        """Return no outputs."""
        return []

    def finish(self, summary: Mapping[str, Any], picture: Path | None, policy: Path | None) -> None:
        """Do nothing."""


class WandbOutput(KVWriter):
    """Sends each record of a Stable-Baselines3 logger to a Weights & Biases run."""

    def __init__(self, run: Any) -> None:
        """Name the run."""
        self._run = run

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Log one record; a resumed run does not log a step again."""
        values = {name: value for name, value in key_values.items() if np.isscalar(value)}
        self._run.log(values, step=step)

    def close(self) -> None:
        """Leave the run to whoever opened it."""


class WandbTracker:
    """One Weights & Biases run for one training; online if the user is logged in, else offline."""

    def __init__(self, folder: Path, name: str, group: str, config: Mapping[str, Any]) -> None:
        """Start the run, or go on with the one that the folder has begun."""
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes this package for another one of that name
        import wandb

        note = folder / "wandb-run.txt"
        identity = note.read_text(encoding="utf-8").strip() if note.is_file() else None
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "trim-routing"),
            id=identity,
            name=name,
            group=group,
            config=dict(config),
            dir=str(folder),
            mode=wandb_mode(),
            resume="allow" if identity else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        note.write_text(self._run.id + "\n", encoding="utf-8")

    def output(self) -> list[KVWriter]:
        """Return the output for a Stable-Baselines3 logger."""
        return [WandbOutput(self._run)]

    def finish(self, summary: Mapping[str, Any], picture: Path | None, policy: Path | None) -> None:
        """Log summary, table, training curve and the policy as an artifact, and end the run."""
        flat = {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
        self._run.summary.update(flat)
        table = self._wandb.Table(columns=["what", "value"], data=[[name, str(value)] for name, value in flat.items()])
        logged: dict[str, Any] = {"result": table}
        if picture is not None:
            logged["curve"] = self._wandb.Image(str(picture))
        self._run.log(logged)
        if policy is not None:
            artifact = self._wandb.Artifact(f"policy-{self._run.id}", type="policy", metadata=flat)
            for file in sorted(policy.iterdir()):
                artifact.add_file(str(file), name=file.name)
            self._run.log_artifact(artifact)
        self._run.finish()


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


def start(kind: str, folder: Path, name: str, group: str, config: Mapping[str, Any]) -> Tracker:
    """Start tracking one training.

    Raises:
        ConfigError: Unknown kind.
    """
    check(kind)
    return NoTracker() if kind == "none" else WandbTracker(folder, name, group, config)


def check(kind: str, known: Sequence[str] = TRACKING) -> None:
    """Raise `ConfigError` for an unknown kind of tracking."""
    if kind not in known:
        raise ConfigError(f"Unknown tracking {kind!r}.{did_you_mean(kind, known)}")
