"""Routers on disk: a folder with ``policy.json`` and, for networks, ``policy.safetensors`` (docs/design.md, section 8).

``policy.json`` names the SHA-256 of every other file and its own digest. A mixture keeps its two routers in ``first``
and ``second``. Reading needs NumPy alone and executes nothing; ``policy.onnx`` is for others. What is damaged or newer
than this version is refused. That guards against accidents, not against people: whoever can write the folder can write
its digests too, so who made an artefact is not told.

Routers of other people's classes (`agents.routers.base.PlainRouter`) are of kind ``module:Class``: reading looks the
class up in modules that are imported already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from agents.routers.asking import Asking
from agents.routers.base import (
    AnyRouter,
    Constant,
    Knob,
    Mixture,
    PlainRouter,
    RandomRate,
    Threshold,
    checked,
    parts_of,
    refuse_undrafted,
    told_cap,
)
from agents.routers.mlp import MLP, ConditionedMLP
from agents.routers.pomdp.router import PomdpRouter
from agents.routers.seq import SeqPolicy
from agents.routers.stored import (
    MOST_JSON,
    MOST_WEIGHTS,
    NAME,
    ONNX,
    WEIGHTS,
    check,
    read_file,
    read_json,
    read_safetensors,
    shown,
)
from agents.routers.text import TextRouter
from agents.routers.whole import Cascade, OneModel, QueryRouter
from rollouts.errors import ArtefactError, ConfigError
from rollouts.files.sealed import digest_of
from rollouts.plugins import is_plugin, loaded_plugin
from rollouts.text.steps import USUAL_SPLIT

FORMAT = "trim-policy"
# 7 adds the kinds query and alone, 6 splittings of steps but blank-line, 5 the kind ask, 4 the activation square,
# 3 others but tanh, 2 `files` and `digest`; 1 named that of weights
VERSION = 7
_VERSIONS = {"ask": 5, "query": 7, "alone": 7}  # by kind: the least that tells it
_ACTIVATIONS = {"tanh": 2, "square": 4}
Storable = AnyRouter | ConditionedMLP | Mixture | TextRouter | OneModel
_PARTS = ("first", "second")


@dataclass(frozen=True)
class Artefact:
    """A router and what is known about it.

    Attributes:
        router: The router, or one for a whole range of λ.
        about: Where it comes from: models, scorer, rollouts hash, cost model, cap, metrics, package version.
        kind: How it is stored: ``mlp``, ``mlp-lam``, ``seq``, ``threshold``, ``constant``, ``random``, ``pomdp``,
            ``ask``, ``mixture``, ``query`` and ``alone`` (of whole problems), or others' ``module:Class``.
    """

    router: Storable
    about: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    place: str = ""


def _of_fields(router: type, told: Mapping[str, Any]) -> Any:
    """Return a router whose fields are what is told under their names."""
    return router(**{each.name: told[each.name] for each in fields(router) if each.init and each.name in told})


def _of_value(router: type, told: Mapping[str, Any]) -> Any:
    """Return a router whose first field is the value of its knob."""
    return _of_fields(router, {**told, fields(router)[0].name: told["value"]})


@dataclass(frozen=True)
class _Kind:
    """How routers of one class are stored.

    Attributes:
        plain: Its own entries of ``policy.json``.
        build: From the class, and what is stored of a router (`_told`), as checked, to the router.
        network: Whether it has ``weights``, float32 arrays, which go into ``policy.safetensors``.
        graph: Whether it has an ONNX form (`agents.routers.onnx`).
    """

    router: type
    plain: Callable[[Any], dict[str, Any]] = lambda _: {}
    build: Callable[[type, Mapping[str, Any]], Any] = _of_fields
    network: bool = False
    graph: bool = False


def _describe_network(router: Any) -> dict[str, Any]:
    return {"activation": router.activation, "max_large_tokens": told_cap(router)}


def _describe_asking(router: Any) -> dict[str, Any]:
    return _describe_network(router) | {"asks": {"source": router.source, "facts": list(router.facts)}}


def _build_mixture(mixture: type, told: Mapping[str, Any]) -> Storable:
    parts = []
    for part in _PARTS:
        place = told["folder"] / part
        if hashlib.sha256(read_file(place / "policy.json", MOST_JSON)).hexdigest() != told["parts"][part]:
            raise ArtefactError(f"{place}: its policy.json is not the one that the mixture names.")
        router = load(place, allow_old=told["version"] < 2).router
        if isinstance(router, ConditionedMLP | Mixture):
            raise ArtefactError(f"{place}: a mixture is made of routers for one setting each.")
        parts.append(router)
    return Mixture(parts[0], parts[1], float(told["share"]), told["knob"])


_KINDS: dict[str, _Kind] = {
    "mlp": _Kind(MLP, _describe_network, network=True, graph=True),
    "mlp-lam": _Kind(ConditionedMLP, _describe_network, network=True, graph=True),
    "seq": _Kind(SeqPolicy, lambda r: {"heads": r.heads, "max_large_tokens": told_cap(r)}, network=True),
    "threshold": _Kind(Threshold, build=_of_value),
    "constant": _Kind(Constant, build=_of_value),
    "random": _Kind(RandomRate, build=_of_value),
    "pomdp": _Kind(
        PomdpRouter, lambda r: {"pomdp": r.to_plain()}, lambda _, told: PomdpRouter.from_plain(told["pomdp"])
    ),
    "ask": _Kind(Asking, _describe_asking, network=True),
    "mixture": _Kind(Mixture, lambda r: {"share": r.share}, _build_mixture),
    "query": _Kind(
        TextRouter,
        TextRouter.to_plain,
        lambda _, told: TextRouter.of_stored(told["name"], told["knob"], told, told["weights"]),
        network=True,
    ),
    "alone": _Kind(OneModel, build=_of_value),
}


def kind_of(router: Storable) -> str:
    """Return the kind of a router.

    Raises:
        ArtefactError: Routers of this kind cannot be stored.
    """
    for name, kind in _KINDS.items():
        if type(router) is kind.router:
            return name
    if isinstance(router, QueryRouter | Cascade):
        raise ArtefactError(
            f"{router.name} decides once for a whole problem: of such routers those that read the question's text can "
            "be stored (agents.routers.text.TextRouter); cascades are for comparison only."
        )
    refuse_undrafted(router)
    found = type(router)
    name = f"{found.__module__}:{found.__qualname__}"
    if not isinstance(router, PlainRouter):
        raise ArtefactError(f"A router of type {name} cannot be stored: it has no to_plain() and from_plain().")
    if found.__module__ == "__main__" or not is_plugin(name):
        raise ArtefactError(f"A router of type {name} cannot be read again: define its class in a module of its own.")
    return name


def _kind_named(name: str) -> _Kind:
    """Return one of our kinds, or that of a class ``module:Class`` of somebody else's, which is not imported here.

    Raises:
        ConfigError: There is none.
    """
    if name in _KINDS:
        return _KINDS[name]
    if not is_plugin(name):
        raise ConfigError(f"unknown kind of policy {name!r}, known: {', '.join(_KINDS)}, others' module:Class.")
    found = loaded_plugin(name, "policy of kind")
    if not (isinstance(found, type) and issubclass(found, PlainRouter)):
        raise ConfigError(f"policy of kind {name!r}: that is no class with to_plain() and from_plain().")

    def build(router: Any, told: Mapping[str, Any]) -> Any:
        weights = (told["weights"],) if "weights" in told else ()
        return checked(router.from_plain(told["router"], *weights), name)

    return _Kind(found, lambda router: {"router": router.to_plain()}, build, network=hasattr(found, "weights"))


def has_network(router: Storable) -> bool:
    """Return whether a router, or a part of a mixture, is a network that has an ONNX form."""
    networks = tuple(kind.router for kind in _KINDS.values() if kind.graph)
    return any(isinstance(part, networks) for part in parts_of(router))


def save(router: Storable, folder: str | Path, about: Mapping[str, Any], *, onnx: bool = False) -> Path:
    """Write a router into a new folder.

    Args:
        router: The router.
        folder: The folder.
        about: What is known about it; JSON holds it.
        onnx: Write networks as ``policy.onnx`` as well.

    Raises:
        ArtefactError: There is something already, or routers of this kind cannot be stored.
        ConfigError: ONNX is asked for and the ``onnx`` package is not installed.
    """
    folder, name = Path(folder), kind_of(router)
    if (folder / "policy.json").exists():
        raise ArtefactError(f"{folder}: holds a policy already; nothing was overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    kind, files, own = _kind_named(name), dict[str, bytes](), dict[str, Any]()
    if kind.network or hasattr(router, "weights"):
        files = _network_files(router, onnx and kind.graph)
    if isinstance(router, Mixture):
        for part in _PARTS:
            save(getattr(router, part), folder / part, {}, onnx=onnx)
        own["parts"] = {
            part: hashlib.sha256((folder / part / "policy.json").read_bytes()).hexdigest() for part in _PARTS
        }
    described: dict[str, Any] = {
        "format": FORMAT,
        "version": _least_version(router, name, about),
        "kind": name,
        "name": router.name,
        "schema": router.schema,
        "knob": knob_of(router),
        "about": dict(about),
        **kind.plain(router),
        **own,
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
    }
    try:
        described = read_json(json.dumps(described).encode())
        described["digest"] = digest_of(described)
        check(described, kind.network)
    except (ValueError, TypeError) as error:
        raise ArtefactError(f"The router {router.name} cannot be stored: {error}.") from error
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / "policy.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder


def _least_version(router: Storable, name: str, about: Mapping[str, Any]) -> int:
    """Return the least version of the format that can tell what is in a policy."""
    usual = (about.get("splitting") or {}).get("name", USUAL_SPLIT) == USUAL_SPLIT
    own = _VERSIONS.get(name, _ACTIVATIONS.get(getattr(router, "activation", "tanh"), 3))
    return own if usual else max(own, 6)


def _network_files(router: Any, onnx: bool) -> dict[str, bytes]:
    from safetensors.numpy import save as to_bytes

    weights = {name: np.ascontiguousarray(values) for name, values in router.weights.items()}
    odd = [f"{name} ({values.dtype})" for name, values in weights.items() if values.dtype != np.float32]
    if odd:
        raise ArtefactError(f"The weights {', '.join(odd)} of {router.name} cannot be stored, expected float32.")
    files = {WEIGHTS: to_bytes(weights)}
    if onnx:
        from agents.routers.onnx import to_onnx

        files[ONNX] = to_onnx(router)
    return files


def knob_of(router: Storable) -> dict[str, Any]:
    """Return name and value, or range, of what was set to trade accuracy for cost."""
    if isinstance(router, ConditionedMLP):
        return {"name": "lam", "low": router.low, "high": router.high}
    return {"name": router.knob.name, "value": router.knob.value}


def load(folder: str | Path, *, allow_old: bool = False) -> Artefact:
    """Read a router.

    Everything in ``policy.json`` is checked, against one table and against its digest, before anything is built.

    Args:
        folder: Its folder.
        allow_old: Read version 1 of the format too, whose settings no digest guards.

    Raises:
        ArtefactError: There is none, it is damaged, another version wrote it, or its class is not imported.
    """
    folder = Path(folder)
    file = folder / "policy.json"
    data = read_file(file, MOST_JSON)
    try:
        described = read_json(data)
        kind = _checked_kind(file, described, allow_old)
        check(described, kind.network)
        if described["version"] > 1 and described["digest"] != digest_of(described):
            raise ArtefactError(
                f"{file}: damaged policy: its contents are not those that were written (its digest differs). "
                "Export the run again; settings are changed there, not in the file."
            )
        router = kind.build(kind.router, _told(folder, described))
        return Artefact(router, described["about"], described["kind"], str(folder))
    except ArtefactError as error:
        if str(folder) in str(error):
            raise
        raise ArtefactError(f"{file}: {error}") from error
    except (ConfigError, ValueError) as error:
        raise ArtefactError(f"{file}: damaged policy ({error}).") from error
    except Exception as error:  # whatever the classes of routers, also others', raise on damaged contents
        raise ArtefactError(f"{file}: damaged policy ({type(error).__name__}: {error}).") from error


def _checked_kind(file: Path, described: Any, allow_old: bool) -> _Kind:
    told = described if isinstance(described, dict) else {}
    if told.get("format") != FORMAT:
        raise ArtefactError(f"{file}: not a policy (format {shown(told.get('format'))}, expected {FORMAT!r}).")
    version, name = told.get("version"), told.get("kind", "")
    if type(version) is not int or version < 1:
        raise ArtefactError(f"{file}: damaged policy (its version is {shown(version)}).")
    if version > VERSION:
        raise ArtefactError(
            f"{file}: written in version {version} of the format; this package reads up to {VERSION}. "
            "Install a newer trim-routing."
        )
    if version < 2 and not allow_old:
        raise ArtefactError(
            f"{file}: written in version 1 of the format, which cannot tell whether its settings were damaged. If you "
            "trust it, allow old versions (--allow-old, allow_old=True); exporting it so brings it up to date."
        )
    NAME(name, "its kind")
    try:
        return _kind_named(name)
    except ConfigError as error:
        raise ArtefactError(f"{file}: {error}") from error


def _told(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of a router, by name: its entries, those of its knob and of ``asks``, and its arrays."""
    files, knob, asks = _read_files(folder, described), described["knob"], described.get("asks", {})
    told = {**knob, **asks, **described, "folder": folder, "facts": tuple(asks.get("facts", ()))}
    if "value" in knob:
        told["knob"] = Knob(knob["name"], float(knob["value"]))
    told.pop("weights", None)  # in version 1 their SHA-256
    if WEIGHTS in files:
        told["weights"] = read_safetensors(files[WEIGHTS])
    return told


def _read_files(folder: Path, described: dict[str, Any]) -> dict[str, bytes]:
    """Return the contents of all files that ``policy.json`` names, each as its SHA-256 says."""
    old = {WEIGHTS: described["weights"]} if described.get("weights") else {}
    files = {}
    for name, digest in described.get("files", old).items():
        files[name] = read_file(folder / name, MOST_WEIGHTS)
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise ArtefactError(f"{folder / name}: its contents are not those that policy.json names.")
    return files
