"""What a run will cost: tokens, time and money, extrapolated from a few problems that are really generated."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from rollouts.cli.generate import grow_trees
from rollouts.family import Family
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.splitting import BLANK_LINE
from rollouts.text.steps import ROLES
from rollouts.trees.grow import Progress as Counts
from rollouts.trees.grow import load_trees, replicas_of

_SAMPLE = 8


def estimate(
    screen: Console,
    family: Family,
    problems: Sequence[Problem],
    replicas: int | dict[str, int],
    max_escalations: int | None,
    in_flight: int,
    *,
    sequential: bool = False,
) -> None:
    """Generate a few trees into a temporary store and print what all of them would take.

    Time is extrapolated from a small, poorly batched sample, so it is an upper estimate. Scoring is not
    included.
    """
    generator = np.random.default_rng(family.seed)
    chosen = generator.choice(len(problems), size=min(_SAMPLE, len(problems)), replace=False)
    sample = [problems[position] for position in sorted(chosen)]
    total = sum(replicas_of(problem, replicas) for problem in problems)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store.create(Path(scratch) / "sample", family.process(max_escalations))
        store.add_problems(sample)
        start, loading = time.monotonic(), 0.0

        @contextmanager
        def opened(role: str, store: Store) -> Iterator[Any]:
            nonlocal loading
            loading -= time.monotonic()
            with family.open(role, store) as writer:
                loading += time.monotonic()
                yield writer
                loading -= time.monotonic()
            loading += time.monotonic()

        grow_trees(
            store, family, lambda: load_trees(store, sample, 1, max_escalations), Counts(total=len(sample)), None,
            in_flight=in_flight, sequential=sequential, open_writer=opened,
        )  # fmt: skip
        seconds = time.monotonic() - start - loading
        counters = store.steps.counters()
        prompts: Counter[str] = Counter()
        endings: Counter[str] = Counter()
        for table in store.steps.read(columns=["role", "prompt_tokens", "stop_reason"]):
            for row in table.to_pylist():
                prompts[row["role"]] += row["prompt_tokens"]
                endings[row["stop_reason"]] += 1
    factor = total / len(sample)
    table = RichTable(title=f"Estimate for {total:,} trees, from {len(sample)} problems", title_justify="left")
    for column in ("role", "tokens decoded", "prompt tokens (without caching)", "price"):
        table.add_column(column, justify="left" if column == "role" else "right")
    money = 0.0
    for role in ROLES:
        model = family.config.generator(role)
        decoded, prompt = counters.get(f"decoded_{role}", 0) * factor, prompts[role] * factor
        price = (decoded * model.price_output + prompt * model.price_input) / 1e6
        money += price
        table.add_row(role, f"{decoded:,.0f}", f"{prompt:,.0f}", f"{price:,.2f}")
    screen.print(table)
    shares = ", ".join(f"{100 * number / endings.total():.0f} % {reason}" for reason, number in endings.most_common())
    ends = "at a blank line (one of spaces or tabs, or with carriage returns, is one too)"
    if (splitting := family.splitting) != BLANK_LINE:
        ends = f"where {splitting.steps.split!r} cuts"
    screen.print(
        f"A step ends {ends}, with a closed \\boxed{{...}}, or where the model or a limit ends it; in the sample: "
        f"{shares}."
    )
    screen.print(f"At most about {seconds * factor / 60:,.0f} minutes on this machine; price {money:,.2f} in all.")
