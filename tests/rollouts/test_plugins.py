"""`module:object`: what a user names is imported; what a file names is only looked up."""

import sys

import pytest

from rollouts.errors import ConfigError
from rollouts.plugins import is_plugin, load_plugin, loaded_plugin


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_thing.py").write_text("class Outer:\n    inner = 7\n")
    (tmp_path / "own_fault.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_thing", None)


def test_an_object_of_the_working_folder(own):
    assert load_plugin("own_thing:Outer.inner", "--agent") == 7


def test_files_import_nothing(own):
    with pytest.raises(ConfigError, match="--import own_thing"):
        loaded_plugin("own_thing:Outer", "policy.json")
    load_plugin("own_thing:Outer", "--agent")
    assert loaded_plugin("own_thing:Outer", "policy.json").inner == 7


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_thing:Missing", "Missing"),
        ("own_nothing:X", "own_nothing"),
        ("own_fault:X", "no licence"),
        ("own_thing", "module:object"),
        ("own thing:X", "module:object"),
    ],
)
def test_mistakes_are_named(own, name, says):
    with pytest.raises(ConfigError, match=says) as caught:
        load_plugin(name, "--agent")
    assert "--agent" in str(caught.value)


@pytest.mark.parametrize("name", ["threshold:0.5", "prices:large_out=3", "text:agg+", "agg+", "a:b:c", ":x", "x:"])
def test_names_of_ours_are_no_plugins(name):
    assert not is_plugin(name)
