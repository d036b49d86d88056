"""Portable artefacts of the routers of a run, and to and from Weights & Biases.

    python -m agents export runs/quickstart --out exported            # every router of the run
    python -m agents export runs/quickstart --lam 3e-3 --out router   # one of them
    python -m agents export runs/quickstart --out router --budget 0.2 --onnx
    python -m agents export wandb:team/trim-routing/policy-1a2b:v0 --out router

What is written is read by ``agents.load(DIR)`` with NumPy alone.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from agents import tracking
from agents.deploy import policy as deployed
from agents.escape import terminal
from agents.routers import artefact
from agents.routers.artefact import Artefact
from agents.routers.base import Mixture
from agents.routers.mlp import ConditionedMLP
from agents.routers.stored import ONNX
from rollouts.config import Imports, settings
from rollouts.errors import ArtefactError, ConfigError
from rollouts.plugins import import_module
from trim_env.features import schema_named

WANDB = "wandb:"
_SAME = 1e-3  # λ in a folder's name are rounded


@settings
class ExportConfig:
    """Write portable artefacts of the routers of a run.

    Without --lam or --budget every router of the run is exported: into DIR itself if there is one, else into a folder
    of DIR for each, named as in the run (lam-0.003, budget-0.2, ...).

    Attributes:
        run: Folder of a run, of one of its routers, or wandb:ENTITY/PROJECT/ARTIFACT:VERSION.
        out: DIR, a folder that does not exist yet or is empty.
        lam: Export the router that was trained for this λ alone, into DIR; one for a range of λ that holds it is
            exported whole, and this becomes the λ of sessions that name none.
        budget: Export the router that was chosen for this budget (train.py --budget) alone, into DIR.
        onnx: Write networks as policy.onnx as well (needs the onnx extra). Other routers have no such form.
        allow_old: Read artefacts of version 1 too, whose settings may be damaged unnoticed; what is written is new.
        to_wandb: Log every artefact to Weights & Biases too: offline unless you are logged in.
        imports: A module to import first: that of a router of your own; may be repeated.
    """

    run: tyro.conf.Positional[str]
    out: Path
    lam: float | None = None
    budget: float | None = None
    onnx: bool = False
    allow_old: bool = False
    to_wandb: bool = False
    imports: Imports = ()

    def __post_init__(self) -> None:
        """Check what constraints of single values cannot say."""
        if self.lam is not None and self.budget is not None:
            raise ConfigError("Give either --lam or --budget, not both.")


@dataclass(frozen=True)
class Exported:
    """An artefact that was written."""

    folder: Path
    policy: deployed.Policy
    notes: tuple[str, ...]


def export(config: ExportConfig) -> list[Exported]:
    """Write the artefacts; nothing is overwritten, and nothing is left behind if one of them fails.

    Raises:
        ArtefactError: There is no policy, or it is damaged.
        ConfigError: A setting is wrong, DIR is not empty, or a package is missing.
    """
    for module in config.imports:
        import_module(module)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ConfigError(f"{config.out}: exists already; nothing was overwritten. Choose another --out.")
    if config.to_wandb:
        tracking.wandb_mode()  # fails now, if it must
    with tempfile.TemporaryDirectory() as temporary:
        scratch, run = Path(temporary), Path(config.run)
        if config.run.startswith(WANDB):
            run = tracking.pull(config.run.removeprefix(WANDB), scratch / "pulled")
        chosen = choose(run, config.lam, config.budget, allow_old=config.allow_old)
        alone = len(chosen) == 1
        for name, found in chosen.items():
            place = scratch / "made" if alone else scratch / "made" / name
            deployed.Policy(found.router, found.about, found.kind, str(run / name))  # fails now, if it must
            artefact.save(found.router, place, _about(found, config.lam), onnx=config.onnx)
        shutil.copytree(scratch / "made", config.out, dirs_exist_ok=True)
    exported = [
        Exported(place, deployed.load(place), _notes(found, config.onnx))
        for found, place in ((each, config.out if alone else config.out / name) for name, each in chosen.items())
    ]
    if config.to_wandb:
        for each in exported:
            tracking.push(each.folder, each.policy.name, each.policy.describe(), config.out.parent)
    return exported


def routers_of(run: Path) -> dict[str, Path]:
    """Return the folders of the routers of a run by name.

    Raises:
        ArtefactError: There are none.
    """
    if (run / "policy.json").is_file():
        return {run.name: run}
    if (run / "policy" / "policy.json").is_file():
        return {run.name: run / "policy"}
    files = [*run.glob("*/policy/policy.json"), *run.glob("*/policy.json")]
    found = {str(file.parent.relative_to(run)).removesuffix("/policy"): file.parent for file in sorted(files)}
    if not found:
        raise ArtefactError(f"{run}: no router here; expected a folder of `python train.py`, or one below it.")
    return found


def choose(
    run: Path, lam: float | None = None, budget: float | None = None, *, allow_old: bool = False
) -> dict[str, Artefact]:
    """Return the routers of a run that are asked for, by name: all, or the one for a λ or a budget.

    Raises:
        ArtefactError: There are none, or one is damaged.
        ConfigError: None, or more than one, is for that λ or budget.
    """
    found = {name: artefact.load(folder, allow_old=allow_old) for name, folder in routers_of(run).items()}
    if lam is None and budget is None:
        return found
    name, value = ("lam", lam) if budget is None else ("budget", budget)
    assert value is not None
    fitting = {key: each for key, each in found.items() if _is_for(each, name, value)}
    exact = {key: each for key, each in fitting.items() if not isinstance(each.router, ConditionedMLP)}
    fitting = exact or fitting
    if len(fitting) != 1:
        raise ConfigError(
            f"{run}: {len(fitting) or 'no'} routers are for {name} {value:g}, expected one; the run has "
            f"{', '.join(found)}. Name the folder of the one that is meant, or leave out --{name} to export all."
        )
    return fitting


def _is_for(found: Artefact, name: str, value: float) -> bool:
    router, calibration = found.router, found.about.get("calibration", {})
    if name == "budget":
        return calibration.get("target") == "budget" and math.isclose(calibration["value"], value, rel_tol=1e-6)
    if isinstance(router, ConditionedMLP):
        return router.holds(value)
    if isinstance(router, Mixture) or calibration:
        return False
    trained = [each.get("lam") for each in found.about.get("held_out", [])]
    lams = [router.knob.value] if router.knob.name == "lam" else trained
    return any(math.isclose(lam, value, rel_tol=_SAME) for lam in lams)


def _about(found: Artefact, lam: float | None) -> dict[str, object]:
    """Return what an artefact says, with what its features are and which λ is meant."""
    told = schema_named(found.router.schema).features
    features = [{"name": each.name, "low": _bound(each.low), "high": _bound(each.high)} for each in told]
    chosen = {"default_lam": lam} if lam is not None and isinstance(found.router, ConditionedMLP) else {}
    return {**found.about, "features": features, **chosen}


def _bound(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _notes(found: Artefact, onnx: bool) -> tuple[str, ...]:
    notes = [
        f"advised against at λ = {each['lam']:g}. {each['sentence']}"
        for each in found.about.get("held_out", [])
        if each.get("verdict") in ("collapsed", "beaten")
    ]
    if onnx and not artefact.has_network(found.router):
        notes.append(f"no {ONNX}: a router of kind {found.kind} is no network; policy.json is all there is.")
    return tuple(notes)


def run(config: ExportConfig) -> int:
    """Export and say what was written; return the exit code."""
    exported = export(config)
    for each in exported:
        print(terminal(f"{each.folder}: {each.policy.name}, {each.policy.setting}"))
        for note in each.notes:
            print(f"  note: {terminal(note)}", file=sys.stderr)
    told = "question=..." if exported[0].policy.decides_once else "..."
    print(f"use it: agents.load(DIR).session().decide({told}), see docs/deployment.md for what it is told")
    return 0
