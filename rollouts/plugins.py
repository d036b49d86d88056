"""Others' work by name: ``module:object`` stands for an object of the user's own where a name of ours could stand."""

from __future__ import annotations

import importlib
import os
import re
import sys
from functools import reduce
from typing import Any

from rollouts.errors import ConfigError, TrimError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_plugin(name: str) -> bool:
    """Whether a name has the form ``module:object``; names of ours that do are to be looked up first."""
    return _NAME.fullmatch(name) is not None


def load_plugin(name: str, what: str) -> Any:
    """Import what a user has named on a command line or in a settings file.

    The module is looked for where Python finds modules, and in the working folder.

    Args:
        name: ``module:object``.
        what: What it is to be, for messages, such as ``--scorer``.

    Raises:
        ConfigError: There is no such module or object, or the module fails to import.
    """
    import_module(_module_of(name, what), f"{what} {name!r}")
    return loaded_plugin(name, what)


def import_module(module: str, what: str = "--import") -> None:
    """Import a module that a user has named, from where Python finds modules or from the working folder.

    Raises:
        ConfigError: There is none, or it fails to import.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(f"{what}: module {module} cannot be imported ({error!r}).") from error


def build_plugin(name: str, what: str, protocol: type, *arguments: Any, **options: Any) -> Any:
    """Import a class or function that a user has named, call it and check what it returns.

    Args:
        name: ``module:object``.
        what: What it is to be, for messages.
        protocol: The `typing.Protocol` whose attributes and methods the returned object must have.
        arguments: Handed to the object, as are `options`.
        options: The user's own.

    Raises:
        ConfigError: It cannot be imported or called so, or what it returns lacks an attribute or a method.
    """
    factory = load_plugin(name, what)
    try:
        built = factory(*arguments, **options)
    except TrimError:
        raise
    except Exception as error:  # whatever a user's class raises
        given = ", ".join([*map(repr, arguments), *(f"{key}={value!r}" for key, value in options.items())])
        raise ConfigError(f"{what} {name!r}: calling it with ({given}) failed: {error!r}.") from error
    needed = dict.fromkeys([*protocol.__annotations__, *vars(protocol)])
    for attribute in (each for each in needed if not each.startswith("_")):
        if not hasattr(built, attribute):
            of = f"{protocol.__module__}.{protocol.__name__}"
            raise ConfigError(f"{what} {name!r} has no `{attribute}`; what it must have is described in `{of}`.")
    return built


def loaded_plugin(name: str, what: str) -> Any:
    """Return an object of a module that is imported already; nothing is imported.

    So are names resolved that come out of an artefact: reading one never executes what its author has named.

    Raises:
        ConfigError: The module is not imported, or has no such object.
    """
    module = _module_of(name, what)
    if module not in sys.modules:
        raise ConfigError(
            f"{what} {name!r}: module {module} is not imported, and files import nothing. Import it first "
            f"(--import {module} on the command line)."
        )
    try:
        return reduce(getattr, name.partition(":")[2].split("."), sys.modules[module])
    except AttributeError as error:
        raise ConfigError(f"{what} {name!r}: {error}.") from error


def _module_of(name: str, what: str) -> str:
    if not is_plugin(name):
        raise ConfigError(f"{what} is {name!r}, expected module:object, such as my_package.my_module:MyClass.")
    return name.partition(":")[0]
