"""Stores whose texts try to break out of a page, routers over them, and the page of their evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scripted_store import SPLITS, AbleLarge, process

from agents.evaluation.suite import EvaluateConfig, evaluate
from agents.report.gather import gather
from agents.report.render import write
from agents.routers import artefact
from agents.routers.base import Knob
from agents.routers.mlp import MLP
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import ROLES, prefix_hash
from rollouts.trees.annotate import grade_store, score_store
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import Grower, StepBuffer, load_trees

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'><style>body { display: none }</style>",
    "<!-- --><iframe src=javascript:parent.hacked=1></iframe> $data ${data} &amp;lt;",
    r"$\frac{\sqrt[3]{x}}{2} \le ∫₀¹ f$ 因此 𝔼[x] ≥ ½ “ok” 🤖👩‍👩‍👧‍👦",
    "مرحبا \u202eabc\u202c שלום \u2028 \u2029 \x07 \u200d",
    "x" * 700,
    "https://example.com/tracker.png?" + "&".join(f"a{i}=1" for i in range(60)),
)


class HostileWriter(AbleLarge):
    """Writes what a page must show as text and must not obey."""

    def step(self, prefix, steps):
        made = super().step(prefix, steps)
        text = HOSTILE[prefix_hash((prefix.problem, *steps)) % len(HOSTILE)]
        return replace(made, text=f"{text} {made.text}")


class HalfScorer:
    """Scores that tell something: low where the step's number is odd, with noise that is a function of the path."""

    name = "half"
    tolerance = 0.0

    def process(self):
        return {"kind": "half"}

    def submit(self, question, steps):
        from concurrent.futures import Future

        future: Future = Future()
        future.set_result([self.of(question, steps[: i + 1]) for i in range(len(steps))])
        return future

    def of(self, question, steps):
        noise = (prefix_hash((question, *steps)) % 997) / 997
        digits = [c for c in steps[-1] if c.isdigit()]
        good = bool(digits) and int(digits[-1]) % 2 == (1 if "boxed" in steps[-1] else 0)
        return 0.55 * noise + (0.45 if good else 0.0)


def hostile_store(path: Path, problems: int = 90, kind=HostileWriter, **changes) -> Store:
    """Return a finished store with two replicas of each problem; questions are hostile as well."""
    items = [
        Problem(f"p{i} <b>{i}</b>", SPLITS[i % 3], f"{HOSTILE[i % len(HOSTILE)]} What is {i}?", "7", "handmade", "MIT")
        for i in range(problems)
    ]
    store = Store.create(path, process(**changes))
    store.add_problems(items)
    trees = load_trees(store, items, 2, changes.get("max_escalations"), chunk=16)
    Grower({role: kind(role) for role in ROLES}, StepBuffer(store.steps)).run(trees)
    score_store(store, HalfScorer())
    grade_store(store, make_grader("exact"))
    return store


def score_router(threshold: float, name: str = "trim-agg") -> MLP:
    """Return a network that escalates where the score is below a threshold."""
    weight = np.array([[0, 0, 0, 0], [-1, 0, 0, 0]], np.float32)
    weights = {"0.weight": weight, "0.bias": np.array([0, threshold], np.float32)}
    return MLP(name, "agg/1", Knob("lam", round(0.01 / threshold, 6)), weights)


def saved_run(folder: Path, store: Store, thresholds=(0.2, 0.45, 0.7)) -> Path:
    """Save routers as a run does and return its folder."""
    trees = compile_store(store)
    about = {
        "rollouts": {"store": "s", "hash": trees.meta["hash"]},
        "cost": "decode-only",
        "max_escalations": trees.meta["max_escalations"],
    }
    for threshold in thresholds:
        router = score_router(threshold)
        own = {**about, "held_out": [{"lam": router.knob.value}]}
        artefact.save(router, folder / f"lam-{router.knob.value:g}" / "policy", own)
    return folder


@dataclass(frozen=True)
class Made:
    """A page with its content."""

    file: Path
    content: dict
    store: Path
    run: Path


def made_page(folder: Path, problems: int = 90) -> Made:
    """Evaluate routers on a hostile store and write the page."""
    store = hostile_store(folder / "rollouts <i>", problems)
    run = saved_run(folder / "run", store)
    config = EvaluateConfig((run,), str(store.path))
    content = json.loads(json.dumps(gather(config, evaluate(config))))
    return Made(write(content, folder / "page"), content, store.path, run)
