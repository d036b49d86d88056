"""Files that the project keeps, damaged in any place: the same result, made anew, or one line that names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_stores import PROBLEMS, finished

import agents
from agents.runs import live as live_runs
from agents.runs import run as runs
from agents.runs.config import TrainConfig
from agents.runs.listener import Listener
from benchmarks import study
from rollouts import tinymath
from rollouts.config import ModelConfig
from rollouts.errors import TrimError
from rollouts.models.identity import identity, note_checksums
from rollouts.store.store import Store
from rollouts.trees.compile import compile_store
from rollouts.trees.live import Generated

STORED = Path(__file__).parent / "agents" / "deploy" / "stored"
Kind = tuple[list[Path], Callable[[], Any]]


def store(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    made = finished(folder / "s", replicas=1)
    with made.writing():
        made.note_live([("p0", 0)])

    def read() -> Any:
        found = Store(made.path)
        tables = [(kind, found.names(kind)) for kind in ("scores", "grades")]
        return (
            found.manifest,
            found.live,
            [found.table_manifest(kind, name) for kind, names in tables for name in names],
        )

    return sorted(made.path.rglob("*.json")), read


def compiled(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    made = finished(folder / "s", replicas=1, problems=PROBLEMS[:1])
    compile_store(made)

    def read() -> Any:
        trees = compile_store(made.path)
        columns = {each.name: getattr(trees, each.name) for each in fields(trees)} | trees.signals
        return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in columns.items()}

    return sorted(made.path.glob(".compiled/*/*")), lambda: repr(read())


def settings_of_a_run(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    made, out = finished(folder / "s", replicas=1), folder / "run"
    patch.setattr(runs._Run, "finish", lambda self: self.config)
    patch.setattr(runs._Run, "__init__", lambda self, config, *_: setattr(self, "config", config))
    runs.train(TrainConfig(rollouts=str(made.path), lam=(0.01,), out=out, tracking="none"))
    return [out / "config.json"], lambda: runs.resume(out)


def counts_of_a_run(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    file = folder / "generated.json"
    models = live_runs.Models.__new__(live_runs.Models)
    models.listener, models._file = Listener(), file
    models._tell(Generated(3, 2, {"small": 40, "large": 20}, 5))

    def read() -> Generated:
        models.count_in(file)
        return models.generated

    return [file], read


def policy(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    made = Path(shutil.copytree(STORED / "mlp", folder / "policy"))
    return sorted(made.iterdir()), lambda: agents.load(made).describe()


def model(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    made = Path(shutil.copytree(tinymath.model_dir("prm"), folder / "prm"))
    note_checksums(made)
    return sorted(made.iterdir()), lambda: identity(ModelConfig(backend="transformers", model=str(made)))


def embedded_models(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    made = Path(shutil.copytree(tinymath.model_dir("prm").parent, folder / "weights"))
    patch.setattr(tinymath.resources, "files", lambda _: folder)
    return [made / "checksums.json", *(made / "small").iterdir()], lambda: [*map(tinymath.model_dir, tinymath.ROLES)]


def fits(folder: Path, patch: pytest.MonkeyPatch) -> Kind:
    def read() -> Any:
        return study.kept(folder / "fit.pickle", lambda: {"returns": [0.5] * 20})

    read()
    return [folder / "fit.pickle"], read


MADE_ANEW = (compiled, fits)
KINDS = (*MADE_ANEW, store, settings_of_a_run, counts_of_a_run, policy, model, embedded_models)
MOST = 40  # cases of a kind


def damaged(whole: bytes, draw: random.Random) -> list[bytes | None]:
    """What becomes of a file: one byte another, cut off, nothing in it, a folder in its place."""
    places = {0, len(whole) // 2, len(whole) - 2, *(draw.randrange(len(whole)) for _ in range(6))}
    flipped = [whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :] for at in sorted(places)]
    return [*flipped, whole[: len(whole) // 3], whole[:-9], b"", None]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_changes_nothing_silently_and_is_told_in_a_line(tmp_path, monkeypatch, kind):
    files, read = kind(tmp_path, monkeypatch)
    before, draw = read(), random.Random(kind.__name__)
    contents = {file: file.read_bytes() for file in files}
    cases = [(file, new) for file in files for new in damaged(contents[file], draw)]
    told = 0
    for file, new in draw.sample(cases, min(len(cases), MOST)):
        file.unlink()
        file.mkdir() if new is None else file.write_bytes(new)
        try:
            assert read() == before, (file, new)
        except (TrimError, OSError) as error:
            assert isinstance(error, TrimError) or new is None and kind in MADE_ANEW
            assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 800
            told += 1
        if file.is_dir():
            file.rmdir()
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(contents[file])
    assert read() == before and (told > 3 or kind in MADE_ANEW)


def test_files_of_earlier_versions_are_read_as_they_are(tmp_path, monkeypatch):
    for number, kind in enumerate((store, settings_of_a_run, counts_of_a_run)):
        (tmp_path / str(number)).mkdir()
        files, read = kind(tmp_path / str(number), monkeypatch)
        before = read()
        for file in files:
            values = json.loads(file.read_text())
            del values["digest"]
            file.write_text(json.dumps(values))
        assert read() == before
