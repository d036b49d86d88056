"""The house: which room may import which, what stays light, and how few files lie about outside a room."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rollouts", "trim_env", "agents")
GROUND = {"rollouts.errors", "rollouts.files", "rollouts.plugins", "rollouts.config"}
DATA = GROUND | {"rollouts.tinymath", "rollouts.tasks", "rollouts.text"}
TREES = DATA | {"rollouts.models", "rollouts.scoring", "rollouts.store", "rollouts.trees"}
# Room -> the rooms that it may import; imports within functions count as well.
MAY_IMPORT: dict[str, set[str]] = {
    "rollouts": {"rollouts.errors"},
    "rollouts.errors": set(),
    "rollouts.files": {"rollouts.errors"},
    "rollouts.plugins": {"rollouts.errors"},
    "rollouts.tinymath": {"rollouts.errors", "rollouts.files"},
    "rollouts.tinymath.training": DATA | {"rollouts.models"},
    "rollouts.config": {"rollouts.errors", "rollouts.plugins", "rollouts.tinymath"},
    "rollouts.tasks": GROUND | {"rollouts.tinymath"},
    "rollouts.text": GROUND | {"rollouts.tasks"},
    "rollouts.models": GROUND | {"rollouts.tasks", "rollouts.text"},
    "rollouts.scoring": DATA | {"rollouts.models"},
    "rollouts.store": DATA,
    "rollouts.trees": TREES - {"rollouts.trees"},
    "rollouts.family": TREES - {"rollouts.trees"},
    "rollouts.cluster": TREES | {"rollouts.family"},
    "rollouts.cli": TREES | {"rollouts.family", "rollouts.cluster"},
    "rollouts.__main__": {"rollouts.errors", "rollouts.cli"},
    "trim_env": TREES | {"rollouts.family"},
    "agents": {"agents.deploy"},
    "agents.escape": set(),
    "agents.tracking": GROUND | {"agents.escape"},
    "agents.routers": TREES | {"trim_env"},
    "agents.evaluation": TREES | {"trim_env", "agents.escape", "agents.routers"},
    "agents.baselines": TREES | {"trim_env", "agents.routers", "agents.evaluation"},
    "agents.learners": TREES | {"trim_env", "agents.routers", "agents.evaluation"},
    "agents.runs": TREES
    | {"trim_env", "agents.routers", "agents.evaluation", "agents.baselines", "agents.learners", "agents.tracking"},
    "agents.report": TREES | {"trim_env", "agents.routers", "agents.evaluation"},
    "agents.deploy": TREES | {"trim_env", "agents.escape", "agents.routers", "agents.tracking"},
    "agents.serve": TREES
    | {"rollouts.family", "trim_env", "agents", "agents.escape", "agents.routers", "agents.deploy", "agents.report"},
    "agents.demo": TREES | {"rollouts.family", "agents.serve"},
    "agents.__main__": {"rollouts.errors", "agents.escape"},
    "train": {
        "rollouts.errors",
        "rollouts.trees",
        "trim_env",
        "agents.escape",
        "agents.evaluation",
        "agents.learners",
        "agents.runs",
    },
    "evaluate": {"rollouts.errors", "agents.escape", "agents.baselines", "agents.evaluation", "agents.report"},
}
ROOMS_IN_ROOMS = ("rollouts.tinymath.training",)
KNOW_TORCH = (
    *("agents/baselines/", "agents/learners/", "rollouts/models/hf/", "rollouts/tinymath/training/"),
    "rollouts/models/vllm_engine.py",
)
HEAVY = ("torch", "vllm", "wandb", "transformers", "pyarrow", "scipy", "matplotlib", "sklearn", "stable_baselines3")
MOST_LOOSE_FILES = {"rollouts": 6, "agents": 4, "trim_env": 10}


def sources() -> Iterator[Path]:
    yield from (ROOT / "train.py", ROOT / "evaluate.py")
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Modules, or names in modules, that a file imports anywhere, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((each.name, node.lineno) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{each.name}", node.lineno) for each in node.names)


def room_of(module: str) -> str:
    """``trim_env`` is one room; the others have rooms; a name of a package itself belongs to its ``__init__``."""
    package, *rest = module.split(".")
    inside = rest and ((ROOT / package / rest[0]).is_dir() or (ROOT / package / f"{rest[0]}.py").is_file())
    if not inside or package == "trim_env":
        return package
    return next((room for room in ROOMS_IN_ROOMS if f"{module}.".startswith(f"{room}.")), f"{package}.{rest[0]}")


def room_of_file(file: Path) -> str:
    return room_of(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def edges() -> Iterator[tuple[str, str, str]]:
    """(room, imported room, place) over all sources."""
    for file in sources():
        for module, line in imports(file):
            if module.split(".")[0] in PACKAGES and room_of(module) != room_of_file(file):
                yield room_of_file(file), room_of(module), f"{file.relative_to(ROOT)}:{line}"


def test_every_room_imports_only_rooms_below_it() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises where the table has a cycle
    found = list(edges())
    assert len(found) > 300  # the reading of sources has not gone blind
    wrong = [f"{place}: {room} imports {other}" for room, other, place in found if other not in MAY_IMPORT[room]]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_table_names_every_room() -> None:
    assert not {room_of_file(file) for file in sources()} - set(MAY_IMPORT)


def test_few_rooms_know_torch() -> None:
    places = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sources()
        for module, line in imports(file)
        if module.split(".")[0] == "torch"
    ]
    assert len(places) > 20
    wrong = [place for place in places if not place.startswith(KNOW_TORCH)]
    assert not wrong, wrong


def calculated(node: ast.AST) -> bool:
    """Whether this adds something to a seed, or multiplies it: neighbouring seeds would share streams."""
    sides = [node.left, node.right] if isinstance(node, ast.BinOp) else []
    sides = [node.target, node.value] if isinstance(node, ast.AugAssign) else sides
    names = [getattr(side, "attr", getattr(side, "id", "")) for side in sides]
    arithmetic = isinstance(getattr(node, "op", None), ast.Add | ast.Sub | ast.Mult)
    return arithmetic and any("seed" in name.lower() for name in names)


def test_seeds_are_derived_by_hashing() -> None:
    made = ("seed + 1", "self.seed + i * 2", "1000 * seed", "k - settings.seed", "run_seed += 1")
    assert all(any(map(calculated, ast.walk(ast.parse(text)))) for text in made)
    hashing = ROOT / "trim_env" / "tables.py"  # `draw`
    files = {*sources(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")} - {hashing}
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if calculated(node)
    ]
    assert not found, f"{found}: use numpy.random.SeedSequence, or a text with the seed in it"


@pytest.mark.parametrize("package", MOST_LOOSE_FILES)
def test_few_files_lie_outside_a_room(package: str) -> None:
    loose = sorted(file.name for file in (ROOT / package).glob("*.py"))
    assert len(loose) <= MOST_LOOSE_FILES[package], loose


def loaded(program: str, *names: str) -> set[str]:
    """Which of these modules a fresh interpreter has after a program."""
    code = f"import sys\n{program}\nprint('loaded:', *sorted({set(names)!r} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    assert not loaded(f"import {package}", *HEAVY)
    assert loaded(f"import {package}", package) == {package}


def test_routers_need_numpy_alone() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "agents" / "routers").rglob("*.py"))
    ]
    assert len(modules) > 10
    assert not loaded(f"import {', '.join(modules)}", *HEAVY)


SERVING = (
    "import agents.serve.command, agents.serve.app, agents.serve.listen, agents.serve.models, agents.serve.service"
)
SERVING += ", agents.serve.playground.page, agents.deploy.policy"


def test_serving_loads_no_training_stack() -> None:
    """Nor does a router whose prompts are rendered: what `pip install trim-routing` brings is enough."""
    prompts = "from rollouts.family import Family; from rollouts.config import load_family\n"
    prompts += "family = Family(load_family('tinymath')); family.formats['small'].ids('x', ['y'])\n"
    prompts += "from rollouts.models.hf.load import native_window; assert native_window(family.config.small.model)"
    others = ("pandas", "sympy", "math_verify", "rich", "sklearn", "opentelemetry", "fastapi")
    assert not loaded(f"{SERVING}\n{prompts}", *HEAVY, *others)


@pytest.mark.parametrize(
    ("command", "lacking", "extra"),
    [
        (["train.py", "--lam", "1e-3"], "gymnasium", "train"),
        (["evaluate.py", "runs/none"], "pyarrow", "train"),
        (["-m", "rollouts", "stats", "quickstart"], "pyarrow", "rollouts"),
        (["-m", "agents", "demo"], "torch", "rollouts"),
        (["-m", "agents", "serve", "--policy", "none", "--record", "none"], "pyarrow", "rollouts"),
        (["-m", "agents", "serve", "--policy", "none", "--otel"], "opentelemetry", "otel"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    command: list[str], lacking: str, extra: str, tmp_path: Path
) -> None:
    blocking = f"""
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {lacking!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
    (tmp_path / "sitecustomize.py").write_text(blocking)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *command]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().endswith(
        f"error: This needs {lacking}, which is not installed: pip install 'trim-routing[{extra}]'."
    )
