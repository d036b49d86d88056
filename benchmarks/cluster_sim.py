"""How busy 64 GPUs are while trees are grown on them: a discrete-event simulation of leases, teams and stragglers.

    python -m benchmarks.cluster_sim --out results/cluster_sim.md

Nothing here is measured but the counts of tokens, which follow from the process. A tree is a chain of stages: the path
of either model, the large model's steps at the nodes of the small one's path, the rests from there, and so on up to K
escalations. Engines batch continuously: the more sequences decode, the more tokens a second come of them, up to 256. A
worker has the engines of its team; the driver hands out leases of trees and hands out more when a worker has fewer open
than it wants. The reward model reads paths afterwards, on every GPU.

Utilisation is the time that the work would take if every GPU decoded full batches all the time, over the time that
passes; engine starts, slow machines, small batches and the end, when some have nothing left to do, all lower it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

BATCH = 256  # sequences that an engine decodes at once
HALF = 45.0  # sequences at which it decodes half as fast as it ever can
STEP, PROMPT = 60, 200  # tokens
# Tokens a second of one H100 with full batches; computed, not measured: 134 M and 35 M decoded tokens of 7,500 problems
# (K = 2, 12 steps of 60 tokens) in 2 and 1.6 hours, 545 M tokens read by the reward model in 5.
RATES = {"small": 18_600.0, "large": 6_100.0, "prm": 30_000.0}


@dataclass(frozen=True)
class Team:
    """One worker: what its GPUs are for.

    Attributes:
        small: GPUs of the small model, each with an engine's rate; 0: it shares those of the large one.
        large: GPUs of the large model.
    """

    small: int
    large: int

    @property
    def gpus(self) -> int:
        """GPUs of the worker."""
        return self.small + self.large

    def __str__(self) -> str:
        """Name it in tables."""
        return f"{self.large} GPUs shared" if not self.small else f"{self.small} for small + {self.large} for large"


@dataclass(frozen=True)
class Plan:
    """One run. How trees are handed out is by default as `rollouts.cluster.growing` does it.

    Attributes:
        team: What a worker is.
        hold: Trees that a worker has at most.
        lease: Trees that it is given at once.
        end: What happens near the end: "nothing"; "orders", none is of more than an even share of the trees that are
            left; "holds", nobody has more than such a share.
        gpus: GPUs in all.
        problems: Trees in all.
        escalations: K.
        start_s: Seconds that engines take to start, from and to.
        slow: Share of workers that are slow, and their speed.
        seed: Of lengths, starts and slow machines.
    """

    team: Team = Team(0, 1)
    hold: int = 272
    lease: int = 1
    end: str = "holds"
    gpus: int = 64
    problems: int = 75_000
    escalations: int = 2
    start_s: tuple[float, float] = (90.0, 180.0)
    slow: tuple[float, float] = (0.05, 0.7)
    seed: int = 0


Stage = tuple[tuple[str, int, float], ...]
"""What is asked for at once: role, sequences, tokens of each."""


def stages(steps: int, escalations: int) -> list[Stage]:
    """Return the stages of a tree whose solutions have so many steps (docs/design.md, section 2)."""
    found: list[Stage] = [(("small", 1, steps * STEP), ("large", 1, steps * STEP))]
    for used in range(1, escalations + 1):
        nodes = math.comb(steps, used)
        if not nodes:
            break
        # The last of `used` escalations is at step i with C(i - 1, used - 1) ways before it; `rest` is what follows.
        rest = sum(math.comb(at, used - 1) * (steps - 1 - at) for at in range(steps)) * STEP / nodes
        found += [(("large", nodes, float(STEP)),), (("small", nodes, rest),)] if rest else [(("large", nodes, STEP),)]
    return found


def lengths(plan: Plan) -> list[int]:
    """Draw the steps of each tree: 12 in the mean, and one of fifty rambles on to the limit of 30."""
    draw = np.random.default_rng(plan.seed)
    usual = np.clip(np.rint(draw.gamma(8.0, 1.5, plan.problems)), 2, 30)
    return [int(each) for each in np.where(draw.random(plan.problems) < 0.02, 30, usual)]


def speed(sequences: int) -> float:
    """Return the share of an engine's full rate at which so many sequences decode together."""
    sequences = min(sequences, BATCH)
    return sequences / (sequences + HALF) * (BATCH + HALF) / BATCH


class Engine:
    """One model of a worker; its sequences share what it decodes evenly."""

    def __init__(self, rate: float) -> None:
        """Begin idle; `rate` is that of full batches."""
        self.rate, self.running, self.each, self.at = rate, 0, 0.0, 0.0
        self.ends: list[tuple[float, int, int, int]] = []  # tokens of each at which it ends, number, tree, sequences

    @property
    def next(self) -> float:
        """Seconds until something ends."""
        return (self.ends[0][0] - self.at) / self.each if self.ends else math.inf


class Worker:
    """A team's engines and its open trees."""

    def __init__(self, plan: Plan, ready: float, pace: float) -> None:
        """Begin idle when its engines are ready; `pace` is 1 unless it is slow."""
        team = plan.team
        gpus = {"small": team.small or team.large, "large": team.large}
        self.engines = {role: Engine(RATES[role] * number * pace) for role, number in gpus.items()}
        self.shared, self.now = not team.small, ready
        self.version, self.open = 0, 0
        self._numbers = itertools.count()

    def advance(self, now: float) -> None:
        """Let time pass."""
        for engine in self.engines.values():
            engine.at += engine.each * (now - self.now)
        self.now = now

    def ask(self, tree: int, stage: Stage) -> None:
        """Begin a stage of a tree."""
        for role, sequences, tokens in stage:
            engine = self.engines[role]
            engine.running += sequences
            heapq.heappush(engine.ends, (engine.at + tokens, next(self._numbers), tree, sequences))

    def share(self) -> float:
        """Share the GPUs among the engines, and return when something ends."""
        wanted = sum(speed(engine.running) for engine in self.engines.values()) if self.shared else 1.0
        for engine in self.engines.values():
            rate = engine.rate * speed(engine.running) / max(1.0, wanted)
            engine.each = rate / engine.running if engine.running else 0.0
        self.version += 1
        return self.now + min(engine.next for engine in self.engines.values())

    def ended(self) -> Iterator[int]:
        """Yield the trees of which something ended just now."""
        for engine in self.engines.values():
            while engine.ends and engine.ends[0][0] <= engine.at + 1e-6:
                _, _, tree, sequences = heapq.heappop(engine.ends)
                engine.running -= sequences
                yield tree


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        seconds: From the first start to the last row.
        utilisation: As the module says.
        running: The same from the moment at which each worker was ready.
        tail: Seconds from the first worker with nothing left to do to the end.
    """

    seconds: float
    utilisation: float
    running: float
    tail: float


@cache
def tokens(steps: int, escalations: int) -> dict[str, float]:
    """Return the tokens of a tree by role: decoded, and read by the reward model, every path as a whole."""
    found = {"small": 0.0, "large": 0.0}
    for role, sequences, each in itertools.chain(*stages(steps, escalations)):
        found[role] += sequences * each
    paths = sum(math.comb(steps, used) for used in range(escalations + 1))
    return {**found, "prm": paths * (PROMPT + steps * STEP)}


def gpu_seconds(steps: int, escalations: int, *roles: str) -> float:
    """Return what a tree takes with full batches."""
    return sum(tokens(steps, escalations)[role] / RATES[role] for role in roles)


def score(plan: Plan) -> Outcome:
    """Simulate the reward model, which reads paths tree by tree, one engine on every GPU."""
    draw = np.random.default_rng([plan.seed, 2])
    pace = np.where(draw.random(plan.gpus) < plan.slow[0], plan.slow[1], 1.0)
    ready = draw.uniform(*plan.start_s, plan.gpus)
    works = [gpu_seconds(steps, plan.escalations, "prm") for steps in lengths(plan)]
    free = [(float(at), worker) for worker, at in enumerate(ready)]
    heapq.heapify(free)
    done = 0
    while done < len(works):
        at, worker = heapq.heappop(free)
        size = max(1, min(plan.hold // 2, (len(works) - done) // (2 * plan.gpus)))
        heapq.heappush(free, (at + sum(works[done : done + size]) / pace[worker], worker))
        done += size
    now, work = max(free)[0], sum(works)
    running = work / sum(now - at for at in ready)
    return Outcome(now, work / (now * plan.gpus), running, now - min(free)[0])


def generate(plan: Plan) -> Outcome:
    """Simulate growing the trees."""
    draw = np.random.default_rng([plan.seed, 1])
    trees = lengths(plan)
    shapes = {steps: stages(steps, plan.escalations) for steps in set(trees)}
    count = plan.gpus // plan.team.gpus
    pace = np.where(draw.random(count) < plan.slow[0], plan.slow[1], 1.0)
    ready = draw.uniform(*plan.start_s, count)
    workers = [Worker(plan, float(ready[each]), float(pace[each])) for each in range(count)]
    left = iter(range(plan.problems))
    remaining, stage, waiting = plan.problems, [0] * plan.problems, [0] * plan.problems
    events = [(worker.now, number, 0) for number, worker in enumerate(workers)]
    heapq.heapify(events)
    first_idle, now = math.inf, 0.0

    def begin(worker: Worker, tree: int) -> None:
        shape = shapes[trees[tree]][stage[tree]]
        waiting[tree] = len(shape)
        worker.ask(tree, shape)

    def feed(worker: Worker) -> None:
        nonlocal remaining
        while remaining:
            share = max(1, remaining // count)
            room = (min(plan.hold, share) if plan.end == "holds" else plan.hold) - worker.open
            size = min(plan.lease, share) if plan.end == "orders" else plan.lease
            size = min(size, remaining, plan.hold if plan.end != "holds" else share)
            if room < size:
                break
            remaining -= size
            worker.open += size
            for tree in itertools.islice(left, size):
                begin(worker, tree)

    while events:
        now, number, version = heapq.heappop(events)
        worker = workers[number]
        if version != worker.version:
            continue
        worker.advance(now)
        for tree in list(worker.ended()):
            waiting[tree] -= 1
            if waiting[tree]:
                continue
            stage[tree] += 1
            if stage[tree] < len(shapes[trees[tree]]):
                begin(worker, tree)
                continue
            worker.open -= 1
        feed(worker)
        if not worker.open:
            first_idle = min(first_idle, now)
            continue
        heapq.heappush(events, (worker.share(), number, worker.version))
    work = sum(gpu_seconds(steps, plan.escalations, "small", "large") for steps in trees)
    available = sum(now - float(each) for each in ready) * plan.team.gpus
    return Outcome(now, work / (now * count * plan.team.gpus), work / available, now - first_idle)


def _row(words: str, outcome: Outcome) -> str:
    minutes, tail = outcome.seconds / 60, outcome.tail
    return f"| {words} | {outcome.utilisation:.2f} | {outcome.running:.2f} | {minutes:.0f} | {tail:.0f} |"


def report(plan: Plan) -> str:
    """Return the tables, in Markdown."""
    small, large, read = (count * 7500 / 1e6 for count in tokens(12, plan.escalations).values())
    columns = "utilisation | after starts | minutes | seconds from the first idle worker to the end |"
    intro = f"""# 64 GPUs, simulated

`python -m benchmarks.cluster_sim`: {plan.problems:,} trees, K = {plan.escalations}, {plan.gpus} GPUs. Engines start in
{plan.start_s[0]:.0f} to {plan.start_s[1]:.0f} s, {100 * plan.slow[0]:.0f} % of the workers have {plan.slow[1]} of the
speed, one tree of fifty has 30 steps (12 in the mean). Rates are computed, not measured: {RATES["small"]:,.0f} and
{RATES["large"]:,.0f} tokens a second decoded by small and large with full batches, about half of that with {HALF:.0f}
sequences, and {RATES["prm"]:,.0f} read by the reward model. 7,500 problems of 12 steps are {small:.0f} M and
{large:.0f} M decoded tokens, and {read:.0f} M read if nothing is read from a cache.

Utilisation is the time that full batches on all GPUs would take over the time that passes, starts of engines included;
*after starts* leaves these out.
"""
    lines = [intro, f"| trees at hand; what happens near the end | {columns}", "|---|---:|---:|---:|---:|"]
    for hold, end in ((272, "holds"), (272, "orders"), (272, "nothing"), (64, "holds"), (16, "holds"), (8, "holds")):
        words = {"holds": "nobody has more than an even share of what is left", "orders": "small orders alone"}.get(end)
        note = ", the default" if (hold, end) == (Plan.hold, Plan.end) else ""
        outcome = generate(replace(plan, hold=hold, end=end))
        lines.append(_row(f"{hold}; {words or 'nothing'}{note}", outcome))
    more: list[tuple[str, Plan]] = [
        ("trees in leases of 16", replace(plan, lease=16)),
        ("K = 1", replace(plan, escalations=1)),
        (f"{plan.problems // 10:,} trees", replace(plan, problems=plan.problems // 10)),
        ("nobody is slow", replace(plan, slow=(0.0, 1.0))),
        ("nobody is slow, engines are there", replace(plan, slow=(0.0, 1.0), start_s=(0.0, 0.0))),
        *(
            (f"{team}, of a team", replace(plan, team=team))
            for team in (Team(0, 2), Team(1, 1), Team(2, 2), Team(3, 1), Team(1, 3))
        ),
    ]
    lines += ["", f"| the default, and what is otherwise | {columns}", "|---|---:|---:|---:|---:|"]
    lines += [_row(words, generate(each)) for words, each in more]
    lines.append(_row("the reward model afterwards, on every GPU", score(plan)))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=Plan.problems, help="trees in all")
    parser.add_argument("--out", type=Path, help="file for the tables")
    flags = parser.parse_args()
    text = report(replace(Plan(), problems=flags.problems))
    print(text)
    if flags.out:
        flags.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
