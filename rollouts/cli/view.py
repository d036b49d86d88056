"""What a person sees in the terminal: a store's statistics, and one problem's tree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text
from rich.tree import Tree as RichTree

from rollouts.config import ScorerConfig
from rollouts.store.rows import Rows
from rollouts.text.steps import LARGE, ROLES, SMALL, Step
from rollouts.trees.signals import Signals
from rollouts.trees.stats import SplitStatistics
from rollouts.trees.tree import Node, RolloutTree

_COLOUR = {SMALL: "cyan", LARGE: "magenta"}


def statistics_table(rows: Mapping[str, SplitStatistics]) -> RichTable:
    """Return a table with one column per split."""
    table = RichTable(title="Rollout trees", title_justify="left")
    table.add_column("")
    for split in rows:
        table.add_column(split, justify="right")

    def line(name: str, value: Any) -> None:
        table.add_row(name, *(value(item) for item in rows.values()))

    line("problems / trees", lambda item: f"{item.problems:,} / {item.trees:,}")
    line("decision nodes (merged)", lambda item: f"{item.nodes:,} ({item.merged:,})")
    line("always-small accuracy", lambda item: str(item.small_accuracy))
    line("always-large accuracy", lambda item: str(item.large_accuracy))
    line("oracle accuracy (hindsight)", lambda item: str(item.oracle_accuracy))
    line("oracle large-token share", lambda item: f"{100 * item.oracle_share:.1f} %")
    line("steps, small / large", lambda item: f"{item.small_steps:.1f} / {item.large_steps:.1f}")
    line("tokens, small / large", lambda item: f"{item.small_tokens:.0f} / {item.large_tokens:.0f}")
    line("AUC, min score: solution right", lambda item: f"{item.min_score_auc:.3f}")
    line("AUC, score: steps so far right", lambda item: "-" if item.step_auc is None else f"{item.step_auc:.3f}")
    return table


def counts_table(counts: Mapping[str, Any]) -> RichTable:
    """Return a table of what was generated, by role."""
    table = RichTable(title="Generated", title_justify="left")
    table.add_column("")
    for role in ROLES:
        table.add_column(role, justify="right")
    requests, reasons = counts["requests"], counts["stop_reasons"]
    for label, key in (
        ("requests", "requests"),
        ("tokens decoded", "decoded"),
        ("of them cut", "cut_tokens"),
        ("dropped segments", "dropped"),
    ):
        table.add_row(label, *(f"{requests.get(f'{key}_{role}', 0):,}" for role in ROLES))
    for reason in sorted({name.split(" ", 1)[1] for name in reasons}):
        table.add_row(f"steps ended by {reason}", *(f"{reasons.get(f'{role} {reason}', 0):,}" for role in ROLES))
    return table


def special_token_lines(neutralised: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what special tokens of questions are read as text (`Family.neutralised`), roles that agree in one line."""
    roles_of: dict[str, list[str]] = {}
    for role, marks in neutralised.items():
        more = " ..." if marks["questions"] > len(marks["first"]) else ""
        found = f"{marks['tokens']:,} special tokens in {marks['questions']:,} questions"
        roles_of.setdefault(f"{found} are read as text ({', '.join(marks['first'])}{more})", []).append(role)
    for line, roles in roles_of.items():
        yield f"{', '.join(roles)}: {line}."


def failure_lines(failures: Sequence[Mapping[str, Any]], most: int = 5) -> Iterator[str]:
    """Yield why steps failed, most frequent reasons first (``failures`` of `store_statistics`)."""
    for each in failures[:most]:
        yield f"{each['steps']:,} failed steps of {each['role']}: {each['reason']}"
    if rest := sum(each["steps"] for each in failures[most:]):
        yield f"{rest:,} failed steps for {len(failures) - most:,} other reasons"


def reason_lines(reasons: Counter[str], most: int = 5) -> Iterator[str]:
    """Yield why scores failed, most frequent reasons first."""
    for reason, number in reasons.most_common(most):
        yield f"{number:,} times: {reason}"
    if len(reasons) > most:
        yield f"and for {len(reasons) - most:,} other reasons"


def spending_line(spent: Mapping[str, int], scorer: ScorerConfig | None) -> str:
    """Return what a judge has spent, in tokens and at its prices."""
    read, decoded, price = spent["prompt_scorer"], spent["decoded_scorer"], 0.0
    if scorer is not None and scorer.model is not None:
        price = (read * scorer.model.price_input + decoded * scorer.model.price_output) / 1e6
    at = f", price {price:,.2f}" if price else ""
    return f"The judge answered {spent['requests_scorer']:,} questions: {read:,} tokens in, {decoded:,} out{at}."


def show_tree(
    console: Console, tree: RolloutTree, scores: Signals | None, grades: Rows, reasons: Rows, most: int = 60
) -> None:
    """Print one problem's tree: at each node both proposals with score, tokens and, at the end, correctness.

    Args:
        console: Where to print.
        tree: The tree.
        scores: Score tables, if there are any, with the tree at hand.
        grades: Grades, likewise.
        reasons: Why steps failed, likewise.
        most: Decision nodes shown; the rest is counted.
    """
    console.print(Text(tree.problem.question, style="bold"))
    console.print(
        f"[dim]{escape(tree.problem.id)}, replica {tree.replica}; answer {escape(tree.problem.answer)}; ", end=""
    )
    console.print(f"[dim]{len(tree.nodes)} nodes; a line ends in score, tokens, and how the solution ends[/]")
    root = RichTree(Text("problem"), guide_style="dim")
    left = most

    def grow(branch: RichTree, node: Node) -> None:
        nonlocal left
        if left <= 0:
            return
        left -= 1
        same = len({step.text for step in node.proposals.values()}) == 1 and len(node.proposals) == len(ROLES)
        for role in ROLES[:1] if same else ROLES:
            if role in node.proposals:
                key, step = tree.row_key(node, role), node.proposals[role]
                score, values = scores.of((tree, node, role)) if scores else (math.nan, [])
                score = math.nan if scores and math.isnan(values[scores.place]) else score
                line = _line("both" if same else role, step, score, grades.get(key), reasons.get(key))
                twig = branch.add(line)
                child = tree.child(node, role)
                if child is not None:
                    grow(twig, child)

    grow(root, tree.root)
    console.print(root)
    if left <= 0:
        console.print(f"[dim]... {len(tree.nodes) - most} more nodes; --most shows more[/]")


def _line(author: str, step: Step, score: float, correct: bool | None, why: str | None) -> Text:
    text = Text()
    text.append(f"{author:5} ", style=f"bold {_COLOUR.get(author, 'white')}")
    text.append(step.text.strip() or "(nothing)", style="default")
    if not math.isnan(score):
        colour = "green" if score >= 0.7 else "yellow" if score >= 0.3 else "red"
        text.append(f"  {score:.2f}", style=colour)
    text.append(f"  {step.tokens} tok", style="dim")
    if step.terminal:
        mark, style = {True: ("right", "bold green"), False: ("wrong", "bold red"), None: ("ungraded", "dim")}[correct]
        text.append(f"  {mark} ({step.stop_reason}{f': {why}' if why else ''})", style=style)
    return text
