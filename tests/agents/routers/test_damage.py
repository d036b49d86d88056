"""Artefacts that chance or malice has changed: each gives `ArtefactError`, soon, and nothing is built from it."""

import copy
import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from made_routers import sealed

import agents
from agents.routers import artefact
from agents.routers.base import Threshold
from agents.routers.stored import read_json, read_safetensors
from rollouts.errors import ArtefactError

ROOT = Path(__file__).parents[3]
STORED = Path(__file__).parents[1] / "deploy" / "stored"
KINDS = ("mlp", "mlp-capped", "mlp-lam", "mlp-version-1", "seq", "threshold", "constant", "random", "pomdp", "mixture")
JUNK = [
    None, True, False, 0, -1, 1, 2, 3, 2.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, 10**15, 10**39, 10**400,
    "", "x", "agg+/1", "os:system", "\x00", "\ud800", "\x1b[31m", "=1+1", "9" * 400, "a" * 10**5, [], {}, [[]], [{}],
    {"": None}, [0] * 10**5, [[[[0.5]]]], {"lam": "x"}, [{"lam": "x"}], [None], {"name": []}, "../../etc/passwd",
]  # fmt: skip


def places(value, at=()):
    """Yield the path of everything in a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from places(value[key], (*at, key))


def changed(described, at, new, remove=False):
    whole = copy.deepcopy(described)
    if not at:
        return new
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return whole


def loaded(folder, **allowed):
    """Load it and use it as little as anybody does; return what went wrong, which nothing but ArtefactError may."""
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of numbers that float32 does not hold
        try:
            agents.load(folder, **allowed).describe()
        except ArtefactError as error:
            assert str(folder) in str(error) and len(str(error)) < 1500
            return error
        finally:
            assert time.monotonic() - begun < 5
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seal", [False, True])
def test_every_value_that_is_changed_is_refused_by_name_or_fits(tmp_path, kind, seal):
    folder = shutil.copytree(STORED / kind, tmp_path / "p")
    file, draw = folder / "policy.json", random.Random(kind)
    whole = json.loads(file.read_text())
    everything = [(at, new, new == "remove") for at in places(whole) for new in ("remove", *JUNK)]
    refused = 0
    tried = draw.sample(everything, min(len(everything), 200))
    for at, new, remove in tried:
        mutant = changed(whole, at, new, remove and bool(at))
        file.write_text(sealed(mutant) if seal else json.dumps(mutant), encoding="utf-8")
        error = loaded(folder, allow_old=True)
        refused += error is not None
        if not seal and kind != "mlp-version-1" and mutant != whole:
            assert error is not None, (at, new)
    assert refused > len(tried) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_that_is_changed_is_refused_or_tells_the_same(tmp_path, kind):
    folder, draw = shutil.copytree(STORED / kind, tmp_path / "p"), random.Random(kind)
    before = agents.load(folder, allow_old=True).describe()
    files = [file for file in folder.rglob("*") if file.is_file()]
    for _ in range(80):
        file = draw.choice(files)
        whole = file.read_bytes()
        place, length = draw.randrange(len(whole)), draw.choice([1, 1, 1, 7, 300])
        new = draw.choice([b"", draw.randbytes(length), whole[:length], b"[" * 10_000, b"9" * 400, b"NaN", b"1e999"])
        file.write_bytes(draw.choice([whole[:place] + new + whole[place + length :], whole[:place]]))
        error = loaded(folder, allow_old=True)
        if error is None and kind != "mlp-version-1":
            assert agents.load(folder).describe() == before
        file.write_bytes(whole)


NUMPY_ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "agents", "rollouts", "trim_env"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Nothing())
import agents
for folder in sys.argv[1:]:
    policy = agents.load(folder, allow_old=True)
    policy.session(lam=1e-3 if policy.lam_range else None, seed=0).decide(0.5, 12, text="")
"""


def test_numpy_is_enough_to_check_and_to_use_what_is_stored():
    command = [sys.executable, "-c", NUMPY_ALONE, *(str(STORED / kind) for kind in KINDS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", [1, 0, -1, True, False, 1.0, 2.0, "2", None, [2], 10**30])
def test_no_version_skips_the_digest(tmp_path, version):
    folder = shutil.copytree(STORED / "threshold", tmp_path / "p")
    whole = json.loads((folder / "policy.json").read_text())
    changed_version = {**whole, "version": version, "knob": {"name": "threshold", "value": 0.01}}
    (folder / "policy.json").write_text(json.dumps(changed_version))
    for allowed in ({}, {"allow_old": True}):
        with pytest.raises(ArtefactError, match="version|digest"):
            artefact.load(folder, **allowed)


def test_old_versions_are_read_when_asked_and_brought_up_to_date(tmp_path, capsys):
    from agents.__main__ import main

    old = STORED / "mlp-version-1"
    with pytest.raises(ArtefactError, match="version 1 of the format.*--allow-old"):
        agents.load(old)
    arguments = ["export", str(old), "--out", str(tmp_path / "new")]
    assert main(arguments) == 2 and "--allow-old" in capsys.readouterr().err
    assert main([*arguments, "--allow-old"]) == 0
    features = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    new, was = agents.load(tmp_path / "new").router, agents.load(old, allow_old=True).router
    assert (new.logits(features) == was.logits(features)).all()
    assert json.loads((tmp_path / "new" / "policy.json").read_text())["version"] == 2


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "NaN", "[-Infinity]", "1e999", "9" * 400, "{", '"\xff', ""])
def test_json_is_read_strictly(text):
    with pytest.raises(ValueError):
        read_json(text.encode("latin-1"))


def test_junk_of_any_size_takes_no_time(tmp_path):
    file = tmp_path / "policy.json"
    many = ",".join(f'"{number}":0' for number in range(300_000))
    start = '{"format": "trim-policy", "version": 2, "kind": '
    for junk in (
        "[" * 10**6,
        "[" + "0," * 10**6 + "0]",
        "{" + many + ',"7":1}',
        start + '"' + "m" * 10**6 + '"}',
        start + "[" * 500 + "]" * 500 + "}",
        start + '"mlp", ' + many + "}",
        "9" * 10**6,
    ):
        file.write_text(junk)
        assert loaded(tmp_path) is not None
    with file.open("wb") as opened:
        opened.truncate(1 << 33)  # a hole: it takes no room
    assert "at most 32 MiB" in str(loaded(tmp_path))
    file.unlink()
    os.mkfifo(file)  # whoever opened it would wait for ever
    assert "no plain file" in str(loaded(tmp_path))
    file.unlink()
    file.mkdir()
    assert "no plain file" in str(loaded(tmp_path))


def tensors(header, body=b"\0" * 16, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        tensors(GOOD, size=10**18),
        tensors(GOOD, size=3),
        tensors(GOOD, b"\0" * 15),
        tensors(GOOD, b"\0" * 17),
        tensors(GOOD, struct.pack("<4f", 0, math.nan, 0, 0)),
        tensors(GOOD, struct.pack("<4f", 0, 0, 0, math.inf)),
        tensors({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
        tensors({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8),
        tensors({"a": entry(-16, -8), "b": entry(8, 16)}),
        tensors({"a": entry(0, -8), "b": entry(8, 16)}),
        tensors({"a": entry(8, 0), "b": entry(8, 16)}),
        tensors({"a": entry(4, 12), "b": entry(12, 16, (1,))}),
        tensors({"a": entry(0, 8, (3,)), "b": entry(8, 16)}),
        tensors({"a": entry(0, 8, (-1,)), "b": entry(8, 16)}),
        tensors({"a": entry(0, 8, (-1, -2)), "b": entry(8, 16)}),
        tensors({"a": entry(0, 8, (2.0,)), "b": entry(8, 16)}),
        tensors({"a": entry(0, 8, (True, 2)), "b": entry(8, 16)}),
        tensors({"a": entry(0, 8, dtype="F64"), "b": entry(8, 16)}),
        tensors({"a": {**entry(0, 8), "data_offsets": [0, 8, 9]}, "b": entry(8, 16)}),
        tensors({"a": {**entry(0, 8), "x": 1}, "b": entry(8, 16)}),
        tensors({"a": {"dtype": "F32"}, "b": entry(8, 16)}),
        tensors({"a": [], "b": entry(8, 16)}),
        tensors([]),
        tensors(json.dumps(GOOD).replace('"b"', '"a"').encode()),
        tensors(json.dumps(GOOD).replace("16", "1" * 400).encode()),
        tensors({"a": entry(0, 0, (0, *[10**9] * 60)), **{"b": entry(0, 16, (4,))}}),
    ],
)
def test_weights_that_are_not_in_order_are_refused(data):
    with pytest.raises(ValueError):
        read_safetensors(data)


def test_weights_come_back_as_the_library_reads_them():
    draw = np.random.default_rng(0)
    shapes = {"b": (3, 4), "a": (2,), "one": (), "none": (0, 5), "z": (1, 2, 3)}
    made = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    data = safetensors.numpy.save(made, {"made": "by"})
    found = read_safetensors(data)
    assert found.keys() == made.keys()
    assert all(found[name].shape == made[name].shape and (found[name] == made[name]).all() for name in made)
    assert read_safetensors(tensors(GOOD)).keys() == {"a", "b"}


@pytest.mark.parametrize("damage", [{"0.bias": math.nan}, {"0.weight": math.inf}])
def test_weights_that_are_not_finite_are_refused_even_with_the_right_hash(tmp_path, damage):
    folder = shutil.copytree(STORED / "mlp", tmp_path / "p")
    weights = {name: values.copy() for name, values in artefact.load(folder).router.weights.items()}
    for name, value in damage.items():
        weights[name].flat[0] = value
    data = safetensors.numpy.save(weights)
    (folder / "policy.safetensors").write_bytes(data)
    described = json.loads((folder / "policy.json").read_text())
    described["files"]["policy.safetensors"] = hashlib.sha256(data).hexdigest()
    (folder / "policy.json").write_text(sealed(described))
    assert "not finite" in str(loaded(folder))


@pytest.mark.parametrize(
    ("router", "about", "said"),
    [
        (Threshold(math.nan), {}, "no finite number"),
        (Threshold(math.inf), {}, "no finite number"),
        (Threshold(0.5, name="x" * 20_000), {}, "'name' is 'xxx"),
        (Threshold(0.5), {"max_steps": -1}, "'max_steps' is -1, expected a whole number"),
        (Threshold(0.5), {"budgets": [{"lam": 0, "share": 1}]}, r"'budgets'\[0\]: 'lam' is 0, expected a number above"),
        (Threshold(0.5), {"seen": {1, 2}}, "not JSON serializable"),
    ],
)
def test_nothing_is_written_that_would_be_refused(tmp_path, router, about, said):
    with pytest.raises(ArtefactError, match=said):
        artefact.save(router, tmp_path / "p", about)
    assert not (tmp_path / "p" / "policy.json").exists()
