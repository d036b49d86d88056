"""docs/scale.md: its snippets are scripts and manifests, its sizes those of the process; and its simulation."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
import yaml

from benchmarks import cluster_sim
from benchmarks.cluster_sim import Plan, Team, generate, gpu_seconds, stages, tokens
from rollouts.cli.generate import COMMANDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
SLURM = re.search(r"^```slurm\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
JOB = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1])


def generates(words):
    assert words[:3] == ["python", "-m", "rollouts"]
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=words[3:])


def test_the_slurm_script_is_one_and_starts_a_worker_for_each_gpu(tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(SLURM)
    subprocess.run(["bash", "-n", script], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM, re.MULTILINE))
    assert SLURM.startswith("#!/bin/bash\n#SBATCH") and options["ntasks-per-node"] == "1"
    stubs = 'scontrol() { echo one; echo two; }; ray() { :; }; srun() { printf "%s\\n" "$@"; }\n'
    asked = subprocess.run(
        ["bash", "-c", stubs + SLURM],
        env={"SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": options["nodes"]}
        | {"HOME": "/home/me", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert asked[:6] == ["ray", "symmetric-run", "--address", "one:6379", "--min-nodes", options["nodes"]]
    command = generates(asked[asked.index("--") + 1 :])
    assert (command.on.ray, command.on.workers) == ("auto", int(options["nodes"]) * int(options["gpus-per-node"]))
    assert "RAY_AUTH_MODE=token" in SLURM


def test_the_job_of_kuberay_has_what_a_job_needs():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob") and JOB["metadata"]["name"]
    cluster = JOB["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    command = generates(shlex.split(JOB["spec"]["entrypoint"]))
    assert command.on.ray == "auto" and command.on.workers == group["replicas"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert all(isinstance(each, str) for each in cluster["headGroupSpec"]["rayStartParams"].values())
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        assert container["image"] and all(isinstance(each, str) for each in container["resources"]["limits"].values())
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in template["spec"]["volumes"]}
    assert "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def number(text):
    scale = {"": 1, "M": 1e6, "G": 1e9, "MB": 1e6, "GB": 1e9}
    value, _, unit = text.strip().replace(",", "").partition(" ")
    return float(value) * scale[unit]


def rows():
    table = PAGE.split("| problems | K |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}, K = {row[1]}")
def test_sizes_are_what_the_process_comes_to(row):
    problems, most = int(row[0].replace(",", "")), int(row[1])
    tree = tokens(12, most)
    small, large = row[2].split("+")
    steps = (tree["small"] + tree["large"]) / cluster_sim.STEP
    hours = problems * gpu_seconds(12, most, "small", "large", "prm") / 3600
    told = (small, large, row[3], row[4], row[5], row[6])
    for text, value in zip(
        told,
        (*(problems * tree[role] for role in ("small", "large", "prm")), hours, 2.5 * hours, problems * steps * 112),
        strict=True,
    ):
        assert number(text) == pytest.approx(value, rel=0.06 if value > 1e6 or value > 2 else 0.2), (text, value)


@pytest.mark.parametrize("escalations", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_tree_has_a_step_of_either_model_at_every_prefix(steps, escalations):
    """Counted one by one, where what the small model goes on with is as long whatever came before."""

    def count(at, used):
        if at == steps:
            return 0, 0
        small, large = count(at + 1, used)
        if used < escalations:
            own = count(at + 1, used + 1)
            return 1 + small + own[0], 1 + large + own[1]
        return 1 + small, large

    small, large = count(0, 0)
    found = tokens(steps, escalations)
    assert found["small"] == pytest.approx(60 * small)
    assert found["large"] == pytest.approx(60 * (large + steps))  # and its own path, all of it
    assert all(stage for stage in stages(steps, escalations))


def test_what_counts_is_that_nobody_holds_too_much_at_the_end():
    plan = Plan(problems=6000, gpus=16, start_s=(0.0, 0.0))
    best, orders = generate(plan), generate(replace(plan, end="orders"))
    assert best.utilisation > 0.9 > orders.utilisation + 0.1 and best.tail < orders.tail / 4
    few = generate(replace(plan, hold=16))
    assert abs(few.utilisation - best.utilisation) < 0.03
    apart = generate(replace(plan, team=Team(1, 1)))
    assert apart.utilisation < best.utilisation - 0.1
    scored = cluster_sim.score(plan)
    assert scored.utilisation > 0.9


def test_the_default_of_the_table_is_busy():
    table = (ROOT / "results" / "cluster_sim.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.splitlines() if "the default |" in line and line.startswith("| 272")]
    assert float(row.split("|")[2]) >= 0.9 and f"| {row.split('|')[2].strip()} |" in PAGE
