"""The README and docs/*.md: every command is parsed, every program is compiled, every name and link exists.

What the README says is also run, top to bottom, long commands on a cut; of the other pages, blocks after a line
``<!-- run -->`` are. Servers of big models and their clients are the business of tests/agents/serve.
"""

import ast
import functools
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

import evaluate
import train
from agents.__main__ import main as agents_main
from agents.learners.settings import PPOSettings
from rollouts import tinymath
from rollouts.__main__ import main as rollouts_main
from rollouts.config import parse_family

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAINS = {
    ("train.py",): train.main,
    ("evaluate.py",): evaluate.main,
    ("-m", "rollouts"): rollouts_main,
    ("-m", "agents"): agents_main,
}
OTHERS = {"pip", "docker", "vllm", "ray", "aws", "curl", "wandb", "git", "cd", "export", "ruff", "pytest"}
MODELS = f"""
[small]
backend = "transformers"
model = "{tinymath.model_dir("small")}"

[large]
backend = "transformers"
model = "{tinymath.model_dir("large")}"

[scorer]
kind = "likelihood"
under = "large"
"""
CUT = ["--ppo.iterations", "2", "--ppo.num-envs", "128", "--attempts", "1", "--tracking", "none"]


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    marked: bool

    @property
    def place(self):
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self):
        """Its lines, continued ones joined, without comments."""
        if self.language not in ("sh", "bash", "console"):
            return []
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = (re.split(r"(?:^|\s)# ", line)[0].strip().removeprefix("$ ") for line in joined)
        return [line for line in lines if line]


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^(<!-- run -->\s*\n+)?```([\w-]*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start(2)) + 1
        yield Block(page, line, found[2], found[3], bool(found[1]))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [pytest.param(line, id=f"{block.place} {line[:60]}") for block in BLOCKS for line in block.commands]
PROGRAMS = [pytest.param(block.text, id=block.place) for block in BLOCKS if block.language == "python"]


def our_command(line):
    """The main function and the arguments of a command of ours; None for other programs."""
    words = shlex.split(line)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if words[0] in ("python", "python3"):
        for start, main in MAINS.items():
            if tuple(words[1 : len(start) + 1]) == start:
                return main, words[len(start) + 1 :]
    return None


class Parsed(BaseException):
    """Raised once a command line has been read, before anything is done."""


def parsed_only(monkeypatch):
    for owner, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
        real = getattr(owner, name)

        @functools.wraps(real)
        def parse(*arguments, real=real, **options):
            raise Parsed(real(*arguments, **options))

        monkeypatch.setattr(owner, name, parse)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line, monkeypatch):
    parsed_only(monkeypatch)
    if found := our_command(line):
        main, arguments = found
        with pytest.raises(Parsed):
            main(arguments)
        return
    words = [word for word in shlex.split(line) if not re.fullmatch(r"\w+=.*", word)]
    if words[0] == "make":
        assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in words[1:])
    elif words[0] in ("python", "python3") and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), line
    elif words[0] in ("python", "python3"):
        assert (ROOT / words[1]).is_file(), line
    else:
        assert words[0] in OTHERS, line


def test_the_quickstart_trains_both_routers_and_evaluates_them(monkeypatch):
    make = ["make", "--dry-run", "--directory", str(ROOT), "--old-file", "install", "quickstart", "OUT=runs/it"]
    lines = subprocess.run(make, capture_output=True, text=True, check=True).stdout.splitlines()
    commands = [line.replace(".venv/bin/", "") for line in lines if line.startswith(".venv/bin/python ")]
    parsed_only(monkeypatch)
    found = []
    for main, arguments in map(our_command, commands):
        with pytest.raises(Parsed) as caught:
            main(arguments)
        found.append(caught.value.args[0])
    *trained, evaluated = found
    assert [each.agent for each in trained] == ["exact", "ppo-agg"]
    assert [each.out for each in trained] == list(evaluated.runs) and evaluated.split == "test"


def test_an_unknown_flag_is_not_understood(monkeypatch, capsys):
    parsed_only(monkeypatch)
    for line in (
        "python train.py --lamb 3e-3",
        "python -m rollouts generate x --models.toml",
        "python -m agents serve",
    ):
        main, arguments = our_command(line)
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def resolve(name):
    """The object with a dotted name; fields of dataclasses and models that have no default count, too."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not ".".join(parts).startswith(str(error.name)):
                raise
            continue
        for part in parts[length:]:
            if part not in getattr(found, "__annotations__", {}):
                found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_compiles_and_finds_what_it_imports(program):
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            for each in node.names:
                importlib.import_module(each.name)
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                resolve(f"{node.module}.{each.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:agents|rollouts|trim_env)(?:\.\w+)+)(?:\(.*?\))?`", text):
        if not (ROOT / name).exists():
            resolve(name)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file) if file else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), target
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language == "toml"], ids=lambda each: each.place)
def test_every_models_file_is_accepted(block):
    values = tomllib.loads(block.text)
    if "small" in values and "large" in values:
        parse_family(values)


# ---------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def place(tmp_path_factory, engines_in_threads):
    """The working folder, with what the README says that the user has."""
    folder = tmp_path_factory.mktemp("readme")
    with (folder / "my-problems.jsonl").open("w") as file:
        short = sorted(tinymath.generate_problems("validation", 64), key=lambda each: len(each.question))[:16]
        for number, problem in enumerate(short):  # short solutions: trees of language models that run on a processor
            split = "train" if number < 5 else "validation" if number < 12 else "test"
            row = {"question": problem.question, "answer": f"#### {problem.answer}", "split": split}
            file.write(json.dumps(row) + "\n")
    (folder / "models.toml").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run_command(line):
    found = our_command(line)
    if found is None:
        return
    main, arguments = found
    if main is train.main and "--resume" not in arguments:
        arguments += CUT
    assert main(arguments) == 0, line


def run_program(text):
    cut = text.replace('tracking="none"', 'tracking="none", ppo=PPOSettings(iterations=2), attempts=1')
    exec(compile(cut, "program", "exec"), {"__name__": "__main__", "PPOSettings": PPOSettings})


def test_the_readme_runs_from_top_to_bottom(place):
    order = list(dict.fromkeys(line for block in BLOCKS if block.page == PAGES[0] for line in block.commands))
    assert sum(our_command(line) is not None for line in order) >= 8
    # what a section uses that a later one explains comes first: the rollouts of one's own models
    order.sort(key=lambda line: "my-trees" not in line or "train" in line or "evaluate" in line)
    for line in order:
        if "agents serve" not in line:
            run_command(line)
    assert (place / "runs" / "first" / "evaluation-test" / "curve.png").exists()
    programs = [block.text for block in BLOCKS if block.page == PAGES[0] and block.language == "python"]
    assert programs
    for program in programs:
        run_program(program)
    run_command("python train.py --resume runs/first")


def test_marked_blocks_of_other_pages_run(place):
    for block in BLOCKS:
        if block.marked and block.page != PAGES[0]:
            for line in block.commands:
                run_command(line)
            if block.language == "python":
                run_program(block.text)
