"""Scorers and graders of one's own, by ``module:object``, from a settings file or a flag to a compiled store."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from handmade import ScriptedWriter
from made_stores import grown

from rollouts.__main__ import main
from rollouts.config import load_family
from rollouts.errors import ConfigError
from rollouts.family import Family
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.tinymath import model_dir
from rollouts.trees.compile import compile_store

MODULE = r'''
from concurrent.futures import Future

from rollouts.tasks.grading import Grade

closed = []


class ByLength:
    """The shorter the path, the surer."""

    tolerance = 0.0

    def __init__(self, name, scale=100.0, most=1.0):
        self.name, self.scale, self.most = name, scale, most

    def process(self):
        return {"kind": "by length", "scale": self.scale}

    def submit(self, question, steps):
        lengths = [sum(map(len, steps[: i + 1])) for i in range(len(steps))]
        future = Future()
        future.set_result([self.most / (1 + length / self.scale) for length in lengths])
        return future

    def close(self):
        closed.append(self.name)


class Ahead(ByLength):
    def submit(self, question, steps):
        return super().submit(question, [steps[-1]] * len(steps))


class Renamed(ByLength):
    def __init__(self, name):
        super().__init__("mine")


class Mute:
    tolerance, name = 0.0, "own_parts-Mute"

    def __init__(self, name):
        pass

    def process(self):
        return {}


class Lenient:
    """Right if the answer is anywhere in the solution."""

    name = "lenient"

    def describe(self):
        return {"rule": "contains"}

    def grade_many(self, pairs, workers=1):
        return [Grade(answer in solution, answer if answer in solution else "") for answer, solution in pairs]


class Nameless(Lenient):
    name = "../outside"


class Silent:
    name = "silent"

    def grade_many(self, pairs, workers=1):
        return []


class Picky(Lenient):
    def __init__(self, level):
        pass
'''
MODELS = """
[small]
backend = "transformers"
model = "{small}"
max_length = 1024
[large]
backend = "transformers"
model = "{small}"
max_length = 1024
[scorer]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_parts", None)


def models(folder, scorer):
    path = folder / "models.toml"
    path.write_text(MODELS.format(small=model_dir("small")) + scorer)
    return str(path)


def test_from_settings_to_compiled_trees(own):
    grown(own / "s", kind=ScriptedWriter)
    config = models(own, 'kind = "own_parts:ByLength"\n[scorer.options]\nscale = 50.0\n')
    assert main(["score", "s", "--models", config]) == 0
    assert main(["grade", "s", "--grader", "own_parts:Lenient"]) == 0
    manifest = json.loads((own / "s/scores/own_parts-ByLength/manifest.json").read_text())
    assert manifest["process"] == {"kind": "by length", "scale": 50.0}
    assert json.loads((own / "s/grades/lenient/manifest.json").read_text())["process"] == {"rule": "contains"}
    assert sys.modules["own_parts"].closed == ["own_parts-ByLength"]
    trees = compile_store(own / "s")
    assert (trees.meta["scorer"], trees.meta["grader"]) == ("own_parts-ByLength", "lenient")
    texts = bytes(trees.text).decode()
    root, end = trees.root[0], trees.text_end[trees.root[0], 0]
    begin = trees.text_end[root - 1, 1] if root else 0
    assert trees.score[root, 0] == pytest.approx(1 / (1 + len(texts[begin:end]) / 50), rel=1e-6)
    assert np.isin(trees.correct, (-1, 0, 1)).all() and {0, 1} <= set(np.unique(trees.correct))


def test_another_process_is_refused_for_the_same_table(own, capsys):
    for replicas, scale, status in ((1, 50.0, 0), (2, 60.0, 2)):
        grown(own / "s", replicas=replicas)
        config = models(own, f'kind = "own_parts:ByLength"\nname = "short"\noptions = {{scale = {scale}}}\n')
        assert main(["score", "s", "--models", config]) == status
    assert "scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ('kind = "own_nothing:X"', "own_nothing cannot be imported"),
        ('kind = "own_parts:Absent"', "no attribute 'Absent'"),
        ('kind = "own_parts:Mute"', r"has no `submit`.*rollouts\.scoring\.base\.Scorer"),
        ('kind = "own_parts:closed"', "not callable"),
        ('kind = "own_parts:Renamed"', "`name` is 'mine', expected 'own_parts-Renamed'"),
        ('kind = "own_parts:ByLength"\noptions = {scales = 2.0}', "scales"),
        ('kind = "own_parts:ByLength"\noptions = {most = 2.0}', r"expected numbers in \[0, 1\]"),
        ('kind = "own_parts:Ahead"', "must not depend on later steps"),
    ],
)
def test_scorers_that_cannot_be_used_are_errors_before_the_run(own, scorer, message, tmp_path):
    family = Family(load_family(models(own, scorer)))
    store = Store.create(tmp_path / "store", {})
    with pytest.raises(ConfigError, match=message), family.open_scorer(store):
        pass


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ('kind = "prn"', "'self-evaluation' or 'module:object' .found 'prn'."),
        ('kind = "likelihood"\noptions = {scale = 2.0}', "`options` are for a scorer of your own"),
        ('kind = "own_parts:ByLength"\nmodel = {backend = "vllm", model = "x"}', "the other kinds take none"),
    ],
)
def test_sections_that_contradict_themselves(own, scorer, message):
    with pytest.raises(ConfigError, match=message):
        load_family(models(own, scorer))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_nothing:X", "own_nothing cannot be imported"),
        ("own_parts:Silent", r"has no `describe`.*rollouts\.tasks\.grading\.Grader"),
        ("own_parts:Nameless", "`name` is '../outside'"),
        ("own_parts:Picky", "level"),
    ],
)
def test_graders_that_cannot_be_used(own, name, message):
    with pytest.raises(ConfigError, match=message):
        make_grader(name)
