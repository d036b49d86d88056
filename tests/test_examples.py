"""Every example runs as its first lines say, and does what it is an example of."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)]), "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, f"{arguments}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    return ended.stdout + ended.stderr


def test_examples_are_short_and_say_how_to_run_them():
    assert EXAMPLES
    for file in EXAMPLES:
        text = file.read_text()
        assert len(text.splitlines()) < 80, file.name
        assert re.search(rf"^    python .*\b{file.stem}\b", text.split('"""')[1], re.MULTILINE), file.name
        assert file.name in Path(__file__).read_text(), f"{file.name} is not run here"


def test_ppo_in_a_single_file_learns():
    said = run("examples/ppo_single_file.py", "--seed", "0")
    assert said.startswith("Better than the best constant and the best threshold.")
