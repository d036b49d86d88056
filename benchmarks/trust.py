"""Whether what the service tells before and after it is switched on can be trusted, on the embedded models.

    OMP_NUM_THREADS=1 python -m benchmarks.trust --out results/shadow      # some ten minutes on two cores

replay   Test problems of the bundled rollouts are asked of a service that answers with one model (``--shadow large``,
         then ``small``) while a policy decides beside it; servers in front of it answer with what the bundled trees
         hold. What the service tells of the policy is compared with what `evaluate.py` computes from the same trees:
         with ``large`` nothing may differ.
live     The same with the embedded models, which draw anew: figures agree if the interval of their difference, paired
         on problems, contains 0.
traffic  Training problems are asked of a service that records (``--record``); ``rollouts expand`` grows the branches
         that nobody took, and ``train.py`` trains on them. Beside it a router is trained on trees that
         ``rollouts generate`` makes of the same problems. Both are evaluated on bundled problems.

What is done is kept in --work, and not done again; begin with an empty one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tyro
from numpy.typing import NDArray

import agents
from agents.demo.models import load, served
from agents.evaluation.bootstrap import LEVELS, resample_weights
from agents.evaluation.walk import run, run_trees
from agents.routers.base import Router, Threshold
from benchmarks.methods import LAMS, RANGE, best_constant
from benchmarks.stage import DEMO, Running, Stage, connected
from benchmarks.study import heading, write
from rollouts.config import load_family
from rollouts.family import Family
from rollouts.models.base import Completion, CompletionRequest
from rollouts.scoring.base import self_test_examples
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import DELIMITER, ROLES
from rollouts.tinymath import model_dir
from rollouts.trees.compile import compile_store
from trim_env.tables import DecisionTables, decision_tables

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Part = Literal["replay", "live", "traffic"]
_PATIENT = ("--upstream-timeout", 600, "--request-timeout", 3000)
_CAP = 2  # escalations, of trees that are grown from traffic


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        parts: What is done.
        replayed: Test problems that shadows watch, answers being those of the bundled trees.
        live: Likewise, answers being drawn.
        budget: Of the demo's router, that watches.
        recorded: Training problems that are recorded.
        fresh: Whether the embedded models draw anew for them, in place of the bundled trees.
        threshold: Of the policy that serves them.
        clients: Requests under way at once.
        work: Folder in which what was done is kept.
        out: Report, without suffix; default: print only.
    """

    parts: tuple[Part, ...] = get_args(Part)
    replayed: int = 500
    live: int = 100
    budget: float = 0.25
    recorded: int = 200
    fresh: bool = False
    threshold: float = 0.5
    clients: int = 16
    work: Path = Path("runs/trust")
    out: Path | None = None


class _Replay:
    """A backend that knows bundled trees by heart: steps and whole paths by prompt, scores by path."""

    window = 1024

    def __init__(self, indices: Ints) -> None:
        self._trees, family = compile_store("quickstart"), Family(load_family("tinymath"))
        trees, reward = self._trees, family.reward_prompts
        assert reward is not None
        self._formats, self._tag = family.formats, reward.reading.tag
        self._rows: dict[tuple[str, tuple[int, ...]], int] = {}
        self._scores: dict[tuple[int, ...], list[float]] = {}
        for index in indices:
            question = trees.questions[trees.problem[index]]
            left: list[tuple[int, tuple[str, ...], list[float]]] = [(int(trees.root[index]), (), [])]
            while left:
                row, steps, scores = left.pop()
                for action, role in enumerate(ROLES):
                    self._rows[role, self._formats[role].ids(question, steps)] = row
                    path = (*steps, trees.proposal(row, action))
                    known = [*scores, float(trees.score[row, action])]
                    self._scores[reward.ids(question, path)] = known
                    if (child := int(trees.child[row, action])) >= 0:
                        left.append((child, path, known))
        for example in self_test_examples([Problem("", "test", trees.questions[0], "", "", "")]):
            for steps, last in ((example.right, 0.9), (example.wrong, 0.1)):  # a scorer is tested on these first
                self._scores[reward.ids(example.question, steps[:-1])] = [0.9] * (len(steps) - 1)
                self._scores[reward.ids(example.question, steps)] = [*[0.9] * (len(steps) - 1), last]

    def submit(self, asked: tuple[str, Any]) -> Future[Any]:
        """Answer a request to a role."""
        role, request = asked
        done: Future[Any] = Future()
        ids = request.ids if role == "prm" else request.prompt_ids
        if len(ids) < 6:  # a probe
            done.set_result([0.5] * len(request.positions) if role == "prm" else Completion("1", 1, (5,), "length"))
        else:
            done.set_result(self._scores[ids] if role == "prm" else self._written(role, request))
        return done

    def _written(self, role: str, request: CompletionRequest) -> Completion:
        """Return the step of a model, or all that it writes until the end where nothing is to stop it."""
        row, action, text, ids = self._rows[role, request.prompt_ids], ROLES.index(role), "", list[int]()
        while True:
            step = self._trees.proposal(row, action)
            text, ids = text + step, [*ids, *self._formats[role].encode(step)]
            row = int(self._trees.child[row, action])
            if step.endswith(DELIMITER) and (row < 0 or DELIMITER in request.stop):
                return Completion(text, len(ids), tuple(ids), "stop" if DELIMITER in request.stop else "length")
            if not step.endswith(DELIMITER):
                ids.append(self._formats[role].tokenizer.eos_token_id)
                return Completion(text, len(ids), tuple(ids), "eos")

    def describe(self) -> dict[str, Any]:
        """Say where scores are read."""
        return {"tag": self._tag}


@contextmanager
def _before(backend: Any, work: Path) -> Iterator[Stage]:
    """Put a backend behind the interface of servers."""
    with socket.create_server(("127.0.0.1", 0)) as listening, served(backend, listening):
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        folder = work / "services"
        folder.mkdir(parents=True, exist_ok=True)
        yield Stage({role: f"{url}/{role}/v1" for role in ("small", "large", "prm")}, folder, {})


def _problems(split: str, count: int) -> list[Problem]:
    return [problem for problem in Store("quickstart").problems() if problem.split == split][:count]


async def _ask(service: Running, problems: Sequence[Problem], clients: int, kept: Path | None = None) -> None:
    """Ask problems, with their answers; what the service tells of each is appended to a file of JSON lines."""
    slots = asyncio.Semaphore(clients)
    async with connected() as session:

        async def one(problem: Problem) -> None:
            message = {"role": "user", "content": problem.question}
            asked = {"messages": [message], "trace": True, "metadata": {"answer": problem.answer}}
            async with slots, session.post(f"{service.url}/v1/chat/completions", json=asked) as answer:
                answer.raise_for_status()
                told = (await answer.json())["trim"]
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([problem.id, told]) + "\n")

        await asyncio.gather(*map(one, problems))


# ---------------------------------------------------------------- shadows


def _watched(settings: Settings, part: Part, model: str, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return what the shadow tells of each problem, where one model answers."""
    kept = settings.work / f"{part}-{model}.jsonl"

    def known() -> dict[str, dict[str, Any]]:
        rows = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
        return {name: told["shadow"] for name, told in map(json.loads, rows)}

    if left := [problem for problem in problems if problem.id not in known()]:
        flags = ("--budget", settings.budget, "--shadow", model, *_PATIENT)
        backend = load() if part == "live" else nullcontext(_Replay(_firsts(problems)))
        with backend as loaded, _before(loaded, settings.work) as on, on.service(*flags, policy=DEMO) as service:
            asyncio.run(_ask(service, left, settings.clients, kept))
    told = known()
    return [told[problem.id] for problem in problems]


def _firsts(problems: Sequence[Problem], split: str = "test") -> Ints:
    """Return the first tree of each problem, in their order."""
    trees = compile_store("quickstart")
    found = {trees.problem_ids[trees.problem[i]]: i for i in reversed(trees.select(split))}
    return np.array([found[problem.id] for problem in problems])


def _by_problem(shadows: Sequence[dict[str, Any]], problems: Sequence[Problem]) -> dict[str, Floats]:
    """Return (P,) counts: solutions, accepted steps and tokens, those of the large model, right answers."""
    pairs = [(problem.answer, f"#### {each['answer']}") for each, problem in zip(shadows, problems, strict=True)]
    tokens = np.array([sum(map(_tokens, each["trace"])) for each in shadows], float)
    return {
        "solutions": np.ones(len(shadows)),
        "steps": np.array([each["steps"] for each in shadows], float),
        "large_steps": np.array([each["large_steps"] for each in shadows], float),
        "tokens": tokens,
        "large_tokens": tokens * np.array([each["large_token_share"] for each in shadows]),
        "solved": np.array([grade.correct for grade in make_grader("exact").grade_many(pairs)], float),
    }


def _tokens(step: dict[str, Any]) -> int:
    """Return the tokens of a would-be step: the large model's where it was asked for one, else the small one's."""
    return int(step["large_tokens"] if step["author"] == "large" and step["large_tokens"] else step["tokens"])


def _evaluated(settings: Settings, problems: Sequence[Problem], indices: Ints) -> dict[str, Floats]:
    """Return the same of some bundled trees, means over those of each problem."""
    trees, policy = compile_store("quickstart"), agents.load(DEMO)
    router, wanted = policy.at(budget=settings.budget), {problem.id: place for place, problem in enumerate(problems)}
    assert isinstance(router, Router)
    tables = decision_tables(trees, "test", indices=indices, max_escalations=policy.max_escalations)
    totals = run_trees(tables, router)
    place = np.array([wanted[trees.problem_ids[trees.problem[i]]] for i in indices])

    def mean(values: Floats) -> Floats:
        found: Floats = np.bincount(place, values) / np.bincount(place)
        return found

    accepted = totals["small_tokens"] - totals["discarded_tokens"] + totals["large_tokens"]
    names = {"steps": "steps", "large_steps": "escalations", "large_tokens": "large_tokens", "solved": "correct"}
    own = {"solutions": np.ones(len(problems)), "tokens": mean(accepted)}
    return own | {name: mean(totals[total]) for name, total in names.items()}


def _told(values: Floats, form: str) -> str:
    """Return the first value with the interval of the others."""
    return f"{values[0]:{form}} [{', '.join(f'{each:{form}}' for each in np.quantile(values[1:], LEVELS))}]"


def shadow(settings: Settings, part: Part) -> list[str]:
    """Return the report of what shadows tell."""
    problems = _problems("test", settings.replayed if part == "replay" else settings.live)
    count, trees = len(problems), compile_store("quickstart")
    names = {problem.id for problem in problems}
    every = np.array([i for i in trees.select("test") if trees.problem_ids[trees.problem[i]] in names])
    evaluated = _evaluated(settings, problems, _firsts(problems) if part == "replay" else every)
    lines = [
        f"## Shadows against evaluation, {'the same draws' if part == 'replay' else 'new draws'}",
        "",
        f"{count} test problems of `quickstart`, asked once of a service with the router of the demo at --budget "
        f"{settings.budget:g}. "
        + (
            "Its servers answer with the first bundled tree of each. With `large` nothing may differ."
            if part == "replay"
            else "The embedded models draw anew; the bundled trees have 4 replicas of each. Figures agree if the "
            "interval of their difference contains 0."
        )
        + " Per cent, 95 % intervals over problems, differences paired on problems.",
        "",
        "| | `--shadow` | told by the service | `evaluate.py` | difference |",
        "|---|---|---:|---:|---:|",
    ]
    notes = list[str]()
    weights = np.concatenate([np.full((1, count), 1 / count), resample_weights(count)])
    for model in ("large", "small"):
        shadows = _watched(settings, part, model, problems)
        told = _by_problem(shadows, problems)
        shares = {"large steps": ("large_steps", "steps"), "large tokens": ("large_tokens", "tokens")}
        if all(each["exact"] and each["complete"] for each in shadows):
            shares["solved"] = "solved", "solutions"
        for name, (own, whole) in shares.items():
            here, there = (100 * (weights @ of[own]) / (weights @ of[whole]) for of in (told, evaluated))
            lines.append(
                f"| {name} | {model} | {_told(here, '.1f')} | {_told(there, '.1f')} | {_told(here - there, '+.1f')} |"
            )
        exact, same = sum(each["exact_steps"] for each in shadows), Counter(each["same_answer"] for each in shadows)
        notes.append(
            f"- `{model}`: {100 * exact / told['steps'].sum():.0f} % of the steps are exact; the answer would be the "
            f"served one for {same[True]} problems, another for {same[False]}, and is not known for {same[None]}."
        )
    return [*lines, "", *notes, ""]


# ---------------------------------------------------------------- traffic


def _grown(settings: Settings, problems: Sequence[Problem], models: str, on: Stage) -> tuple[Path, dict[str, Any]]:
    """Return a store of recorded requests, grown, and how many steps were recorded and grown."""
    store = settings.work / "traffic"
    policy = on.policy(Threshold(settings.threshold), max_escalations=_CAP)
    with on.service("--record", store, *_PATIENT, policy=policy) as service:
        asyncio.run(_ask(service, problems, settings.clients))
        service.process.terminate()
        service.process.wait(60)
    recorded = Store(store).steps.keys().num_rows
    _command("rollouts", "expand", store, "--models", models)
    return store, {"recorded": recorded, "grown": Store(store).steps.keys().num_rows - recorded}


def _generated(settings: Settings, problems: Sequence[Problem], models: str, name: str) -> Path:
    """Return a store of trees of some problems."""
    file, store = settings.work / f"{name}.jsonl", settings.work / name
    rows = [{"id": each.id, "question": each.question, "answer": each.answer} for each in problems]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _command("rollouts", "generate", store, "--problems", file, "--models", models, "--max-escalations", _CAP)
    return store


def _command(*arguments: object) -> None:
    """Run a module of this project."""
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, stdout=sys.stderr)


def _returns(store: Path, tables: DecisionTables, work: Path) -> Floats:
    """Return (P,) returns, means over some λ, of the router that `train.py` makes of a store."""
    out = work / f"run-{store.name}"
    if not out.exists():
        flags = ("--agent", "exact", "--lam-range", *RANGE, "--rollouts", store, "--out", out, "--tracking", "none")
        _command("train", *flags)
    policy = agents.load(next(out.glob("*/policy")))
    outcomes = []
    for lam in LAMS:
        router = policy.at(lam=lam)
        assert isinstance(router, Router)
        outcomes.append(run(router, tables).returns(lam))
    found: Floats = np.mean(outcomes, axis=0)
    return found


def traffic(settings: Settings) -> list[str]:
    """Return the report of what recorded requests are worth."""
    count = settings.recorded
    every = _problems("train", 2 * count)
    backend = load() if settings.fresh else nullcontext(_Replay(_firsts(every, "train")))
    with backend as loaded, _before(loaded, settings.work) as on:
        models = "tinymath:transformers"
        if not settings.fresh:
            models = str(settings.work / "models.toml")
            Path(models).write_text(_models(on.urls), encoding="utf-8")
        recorded, told = _grown(settings, every[:count], models, on)
        stores = {
            "traffic": recorded,
            "trees of the same problems": _generated(settings, every[:count], models, "same"),
        }
        stores["trees of other problems"] = _generated(settings, every[count:], models, "others")
    tables = decision_tables("quickstart", "validation", max_escalations=_CAP)
    values = {name: _returns(store, tables, settings.work) for name, store in stores.items()}
    splits = Counter(problem.split for problem in Store(recorded).problems())
    judged = len(values["traffic"])
    weights = np.concatenate([np.full((1, judged), 1 / judged), resample_weights(judged)])
    draws = "the embedded models draw anew" if settings.fresh else "the first bundled tree of each is what models draw"
    lines = [
        "## Recorded traffic against trees",
        "",
        f"{count} training problems of `quickstart` ({draws}), asked once of a service with a threshold of "
        f"{settings.threshold:g} and at most {_CAP} escalations (`--record`), with their answers: {told['recorded']:,} "
        f"steps. `rollouts expand` grew {told['grown']:,} more. `train.py --agent exact --lam-range {RANGE[0]:g} "
        f"{RANGE[1]:g}` was given that store ({splits['train']} to train on, {splits['validation']} that choose) and "
        f"those that `rollouts generate --max-escalations {_CAP}` made of the same and of {count} other problems.",
        "",
        f"Mean return over λ = {', '.join(f'{lam:g}' for lam in LAMS)} on {judged} bundled validation problems, "
        f"K = {_CAP}; the better constant for each λ: {best_constant(tables):.4f}. Differences are paired on problems.",
        "",
        "| trained on | steps | return | traffic less it |",
        "|---|---:|---:|---:|",
    ]
    for name, store in stores.items():
        apart = "" if name == "traffic" else _told(weights @ (values["traffic"] - values[name]), "+.4f")
        lines.append(
            f"| {name} | {Store(store).steps.keys().num_rows:,} | {_told(weights @ values[name], '.4f')} | {apart} |"
        )
    return [*lines, ""]


def _models(urls: Mapping[str, str]) -> str:
    """Return a models file of the embedded family behind servers."""
    sections = [("small", 'system_prompt = ""'), ("large", 'system_prompt = ""'), ("prm", "")]
    lines = ["[scorer]", 'kind = "prm"', 'name = "tinymath-prm"', 'system_prompt = ""', "[limits]", "max_steps = 16"]
    for role, more in sections:
        lines += [f"[{'scorer.model' if role == 'prm' else role}]", more]
        lines += [f'model = "tinymath-{role}"', f'tokenizer = "{model_dir(role)}"', "max_length = 1024"]
        lines += ['backend = "server"', f'url = "{urls[role]}"', 'licence = "MIT"']
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the study."""
    settings = tyro.cli(Settings, description=__doc__)
    lines = heading("Shadows and recorded traffic", "trust")
    for part in settings.parts:
        lines += traffic(settings) if part == "traffic" else shadow(settings, part)
    write("\n".join(lines), settings.out)


if __name__ == "__main__":
    main()
