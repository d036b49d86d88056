"""Weights & Biases, all that we do with it: trainings are logged, exported routers pushed and fetched.

Nothing here asks a question, needs an account or keeps a training from starting: without a login, or where the server
cannot be reached, Weights & Biases writes into a folder, from where ``wandb sync`` uploads it later.
"""

from __future__ import annotations

import configparser
import netrc
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agents.escape import terminal
from rollouts.errors import ConfigError, did_you_mean
from rollouts.files.sealed import refusing_damage

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # WANDB_MODE
_ARTIFACT = "policy"  # the type of our artifacts
_PATIENCE, _START = 4.0, 20.0  # seconds for the server's first answer, and for a run to begin
_troubles: dict[str, str] = {}  # by server: why this process does not use it; empty if it answers


class NoTracker:
    """Tracks nothing."""

    def log(self, record: Mapping[str, float]) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any], picture: Path | None, policy: Path) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class WandbTracker(NoTracker):
    """One run of Weights & Biases for one training; online if a logged-in user's server answers, else offline."""

    def __init__(self, folder: Path, name: str, group: str, config: Mapping[str, Any]) -> None:
        """Start the run, or go on with the one that the folder has begun."""
        note = folder / "wandb-run.txt"
        with refusing_damage(note, ConfigError, "name of a Weights & Biases run", "Delete it: another run is begun."):
            identity = note.read_text(encoding="ascii").strip() if note.exists() else None
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

    def stop(self) -> None:
        """End the run of a training that came to nothing."""
        self._run.finish(exit_code=1)


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
    """Fetch the files of ENTITY/PROJECT/ARTIFACT:VERSION into a folder; return it.

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
    """Begin a run of Weights & Biases that keeps its files in a folder: offline where it cannot be begun online."""
    mode = wandb_mode()
    wandb = _library()

    def begin(mode: str) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "trim-routing"),
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=_START),
            **options,
        )

    if mode in ("online", "shared", "run"):
        server = _server()
        if server not in _troubles:
            _troubles[server] = _unreachable(server)
        if not _troubles[server]:
            try:
                return begin(mode)
            except Exception as error:  # whatever the library raises: no training depends on it
                wandb.teardown()  # the attempt would break the next one
                _troubles[server] = str(error)
        _say_offline(server, _troubles[server])
        mode = "offline"
    elif os.environ.get("WANDB_MODE") not in (None, "", mode):
        _say_offline(_server(), "nobody is logged in")
    try:
        return begin(mode)
    except Exception as error:
        raise ConfigError(
            f"Weights & Biases begins no run ({error}). Mend its settings, or train with --tracking none."
        ) from error


def _unreachable(server: str) -> str:
    """Return why a server does not answer within seconds; empty if it does, whatever it answers of itself."""
    found: list[str] = []

    def ask() -> None:
        try:
            local = urlsplit(server).hostname in ("localhost", "127.0.0.1", "::1")  # behind no proxy
            opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
            asked = urllib.request.Request(f"{server.rstrip('/')}/graphql", b'{"query": "{__typename}"}')
            asked.add_header("Content-Type", "application/json")
            opener.open(asked, timeout=_PATIENCE).close()
            found.append("")
        except urllib.error.HTTPError as error:
            found.append(f"it answers {error.code}" if error.code >= 500 else "")
        except Exception as error:
            reason = getattr(error, "reason", error)
            # certificates are the library's to judge, which may know other ones
            found.append("" if isinstance(reason, ssl.SSLError) else str(reason))

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up has no time-out of its own
    asking.start()
    asking.join(_PATIENCE)
    return found[0] if found else f"no answer within {_PATIENCE:g} s"


@cache
def _say_offline(server: str, trouble: str) -> None:
    """Say once, in one line, that runs are kept in their folders."""
    line = f"Weights & Biases at {server} cannot be used ({trouble}): tracking offline; `wandb sync` uploads it later."
    print(terminal(line), file=sys.stderr)


def artifact_of(folder: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    """Return the artifact of a router: the files of its folder."""
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    artifact = _library().Artifact(plain, type=_ARTIFACT, metadata=dict(metadata))
    artifact.add_dir(str(folder))
    return artifact


def wandb_mode() -> str:
    """Return ``WANDB_MODE``, or what ``wandb offline`` and the like have set, or ``online`` if the user is logged in.

    Without a login it is ``offline``.

    Raises:
        ConfigError: It is no mode of Weights & Biases.
    """
    asked = os.environ.get("WANDB_MODE") or _setting("mode")
    if asked and asked not in MODES:
        raise ConfigError(f"WANDB_MODE is {asked!r}, which Weights & Biases does not know.{did_you_mean(asked, MODES)}")
    if asked not in ("offline", "disabled", "dryrun") and not logged_in():
        return "offline"
    return asked or "online"


def _setting(name: str) -> str | None:
    """Return a setting that the user's commands (``wandb offline``, ``wandb login --host``) have written, if any."""
    home = os.environ.get("WANDB_CONFIG_DIR") or Path("~", ".config", "wandb")
    places = [Path(home).expanduser() / "settings", Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"]
    found = configparser.ConfigParser(interpolation=None)
    try:
        found.read(places, encoding="utf-8")  # the working folder's has the last word
    except (configparser.Error, UnicodeDecodeError, OSError):
        return None
    return found.get("default", name, fallback=None)


def _server() -> str:
    """Return the address of the server that the library would use."""
    default = str(_library().Settings().base_url)
    return os.environ.get("WANDB_BASE_URL") or _setting("base_url") or default


def logged_in() -> bool:
    """Return whether a key for Weights & Biases is at hand, without asking anybody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    address = os.environ.get("WANDB_BASE_URL") or _setting("base_url")
    hosts = [urlsplit(address).netloc] if address else ["api.wandb.ai", urlsplit(_server()).netloc]
    try:
        known = netrc.netrc(os.environ.get("NETRC") or None)
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) is not None for host in hosts)
