"""The project's exceptions: one root, leaves by cause."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class TrimError(Exception):
    """Root of every error that this project raises on purpose; the command lines print it without a traceback."""


class DataError(TrimError):
    """Raised when a problem file or another input data file cannot be used as it is."""


class ConfigError(TrimError):
    """Raised when a setting is unknown, contradicts another one or asks for what a backend cannot do."""


class BackendError(TrimError):
    """Raised when a model or scorer cannot be started or stopped answering."""


class RequestFailed(BackendError):
    """Raised when one request failed on its own, on a backend that is well; the message has the backend's words."""


class RequestsFailed(BackendError):
    """Raised when so many requests fail that going on would fill a store with failures."""


class BudgetSpent(TrimError):
    """Raised when the large model has decoded as many tokens as may be generated."""


class StoreError(TrimError):
    """Raised when a rollout store is damaged, incomplete or belongs to another process of generation."""


class ArtefactError(TrimError):
    """Raised when an exported policy is damaged, newer than this version or does not fit the data."""


def missing(error: ModuleNotFoundError, extra: str) -> ConfigError:
    """Return what to say of a package that is not installed; raises `error` again if it is a module of this project."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "rollouts", "trim_env", "agents"):
        raise error
    return ConfigError(f"This needs {name}, which is not installed: pip install 'trim-routing[{extra}]'.")


def said(error: Exception, extra: str) -> Exception:
    """Return what a command says of an error: itself, or as of `missing`."""
    return missing(error, extra) if isinstance(error, ModuleNotFoundError) else error


def require(extra: str, *modules: str) -> None:
    """Raise a `ConfigError` unless these are installed; nothing is imported."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise missing(ModuleNotFoundError(name=name), extra)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of `choices`, followed by the list of all of them, if any."""
    known = sorted(choices)
    if not known:
        return ""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."
