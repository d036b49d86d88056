"""Every command and every program of the README runs, long ones on a cut.

Blocks of the language ``console`` need servers of big models; tests/agents/serve runs the same with small ones.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rollouts import tinymath

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
NOT_RUN = {"wandb sweep agents/sweep.yaml": "needs an account; test_commands.py checks the file"}
CUT = ["--ppo.iterations", "2", "--ppo.num-envs", "128", "--attempts", "1", "--tracking", "none"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the README says that the user has."""
    folder = tmp_path_factory.mktemp("readme")
    with (folder / "my-problems.jsonl").open("w") as file:
        short = sorted(tinymath.generate_problems("validation", 64), key=lambda each: len(each.question))[:16]
        for number, problem in enumerate(short):  # short solutions: trees of language models that run on a processor
            split = "train" if number < 5 else "validation" if number < 12 else "test"
            row = {"question": problem.question, "answer": f"#### {problem.answer}", "split": split}
            file.write(json.dumps(row) + "\n")
    (folder / "models.toml").write_text(MODELS)
    for name in ("train.py", "evaluate.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def execute(line, place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=500)


def test_every_command_runs_in_order(place):
    """One after another, as somebody does who reads the page from the top."""
    order = commands()
    assert len(order) >= 8
    # what a section uses that a later one explains comes first: the rollouts of one's own models
    order.sort(key=lambda line: "my-trees" not in line or "train" in line or "evaluate" in line)
    for line in order:
        if line in NOT_RUN:
            continue
        words = shlex.split(line)
        assert words[0] == "python", line
        if "train.py" in words and "--resume" not in words:
            words += CUT
        ended = execute([sys.executable, *words[1:]], place)
        assert ended.returncode == 0, f"{line}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    assert (place / "runs" / "first" / "evaluation-test" / "curve.png").exists()


def test_a_run_named_in_the_readme_can_be_resumed(place):
    assert "python train.py --resume runs/first" in README
    ended = execute([sys.executable, "train.py", "--resume", "runs/first"], place)
    assert ended.returncode == 0, ended.stderr


def test_every_program_runs(place):
    programs = blocks("python")
    assert len(programs) >= 3
    for program in programs:
        cut = program.replace('tracking="none"', 'tracking="none", ppo=PPOSettings(iterations=2), attempts=1')
        if cut != program:
            cut = "from agents.learners.settings import PPOSettings\n" + cut
        ended = execute([sys.executable, "-c", cut], place)
        assert ended.returncode == 0, f"{program}\n{ended.stderr}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w[\w-]*)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_readme_links_to_exist():
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / link).exists(), link
