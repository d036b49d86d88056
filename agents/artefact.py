"""Routers on disk: a folder with ``policy.json`` and, for networks, ``policy.safetensors`` (design section 8).

Reading needs NumPy alone and executes nothing. What is damaged, tampered with or newer than this version is refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.base import AnyRouter, Constant, Knob, Mixture, RandomRate, Threshold
from agents.policy import MLP, ConditionedMLP
from agents.pomdp.router import PomdpRouter
from rollouts.errors import ArtefactError

FORMAT = "trim-policy"
VERSION = 1
_KINDS: dict[type, str] = {
    MLP: "mlp",
    ConditionedMLP: "mlp-lam",
    Threshold: "threshold",
    Constant: "constant",
    RandomRate: "random",
    PomdpRouter: "pomdp",
    Mixture: "mixture",
}
Storable = AnyRouter | ConditionedMLP | Mixture
_PARTS = ("first", "second")


@dataclass(frozen=True)
class Artefact:
    """A router and what is known about it.

    Attributes:
        router: The router, or one for a whole range of λ.
        about: Where it comes from: models, scorer, rollouts hash, cost model, cap, metrics, package version.
    """

    router: Storable
    about: dict[str, Any] = field(default_factory=dict)


def save(router: Storable, folder: str | Path, about: dict[str, Any]) -> Path:
    """Write a router into a new folder.

    Raises:
        ArtefactError: There is something already, or routers of this kind cannot be stored.
    """
    folder = Path(folder)
    if (folder / "policy.json").exists():
        raise ArtefactError(f"{folder}: holds a policy already; nothing was overwritten.")
    if type(router) not in _KINDS:
        raise ArtefactError(f"A router of type {type(router).__name__} cannot be stored.")
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": _KINDS[type(router)],
        "name": router.name,
        "schema": router.schema,
        "knob": _knob(router),
        "about": about,
    }
    if isinstance(router, MLP | ConditionedMLP):
        from safetensors.numpy import save as to_bytes

        data = to_bytes({name: np.ascontiguousarray(values) for name, values in router.weights.items()})
        described["activation"] = "tanh"
        described["weights"] = hashlib.sha256(data).hexdigest()
        (folder / "policy.safetensors").write_bytes(data)
    if isinstance(router, PomdpRouter):
        described["pomdp"] = router.to_plain()
    if isinstance(router, Mixture):
        described["share"] = router.share
        for part in _PARTS:
            save(getattr(router, part), folder / part, {})
        described["parts"] = {part: _digest(folder / part) for part in _PARTS}
    (folder / "policy.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder


def load(folder: str | Path) -> Artefact:
    """Read a router.

    Raises:
        ArtefactError: There is none, it is damaged, or a newer version wrote it.
    """
    folder = Path(folder)
    file = folder / "policy.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise ArtefactError(f"{file}: not a policy (format {described['format']!r}, expected {FORMAT!r}).")
        if described["version"] > VERSION:
            raise ArtefactError(
                f"{file}: written in version {described['version']} of the format; this package reads up to {VERSION}. "
                "Install a newer trim-routing."
            )
        return Artefact(_build(folder, described), dict(described["about"]))
    except FileNotFoundError as error:
        raise ArtefactError(f"{folder}: no policy here ({Path(error.filename).name} is missing).") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtefactError(f"{file}: damaged policy ({type(error).__name__}: {error}).") from error


def _knob(router: Storable) -> dict[str, Any]:
    if isinstance(router, ConditionedMLP):
        return {"name": "lam", "low": router.low, "high": router.high}
    return {"name": router.knob.name, "value": router.knob.value}


def _build(folder: Path, described: dict[str, Any]) -> Storable:
    kind, name, schema = described["kind"], str(described["name"]), str(described["schema"])
    if kind == "mlp-lam":
        low, high = float(described["knob"]["low"]), float(described["knob"]["high"])
        return ConditionedMLP(name, schema, low, high, _weights(folder, described))
    knob = Knob(str(described["knob"]["name"]), float(described["knob"]["value"]))
    if kind == "threshold":
        return Threshold(knob.value, name, schema)
    if kind == "random":
        return RandomRate(knob.value, name, schema)
    if kind == "constant":
        return Constant(int(knob.value), schema)
    if kind == "mixture":
        return _mixture(folder, described, knob)
    if kind == "pomdp":
        return PomdpRouter.from_plain(described["pomdp"])
    if kind != "mlp":
        raise ArtefactError(f"{folder}: unknown kind of policy {kind!r}, known: {', '.join(_KINDS.values())}.")
    return MLP(name, schema, knob, _weights(folder, described))


def _mixture(folder: Path, described: dict[str, Any], knob: Knob) -> Mixture:
    parts = []
    for part in _PARTS:
        if _digest(folder / part) != described["parts"][part]:
            raise ArtefactError(f"{folder / part}: its policy.json is not the one that the mixture names.")
        router = load(folder / part).router
        if isinstance(router, ConditionedMLP | Mixture):
            raise ArtefactError(f"{folder / part}: a mixture is made of routers for one setting each.")
        parts.append(router)
    return Mixture(parts[0], parts[1], float(described["share"]), knob)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "policy.json").read_bytes()).hexdigest()


def _weights(folder: Path, described: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    data = (folder / "policy.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != described["weights"]:
        raise ArtefactError(f"{folder}/policy.safetensors: its contents are not those that policy.json names.")
    return read_safetensors(data)


def read_safetensors(data: bytes) -> dict[str, NDArray[np.float32]]:
    """Parse float32 tensors in the safetensors format: a length in eight bytes, a JSON header, raw values."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    body = memoryview(data)[8 + size :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"tensor {name} is {entry['dtype']}, expected F32")
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(body[begin:end], "<f4").reshape(entry["shape"])
    return tensors
