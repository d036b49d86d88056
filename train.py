"""Train routers on a rollout store.

    python train.py --agent ppo-agg --lam 3e-3 --rollouts quickstart
    python train.py --rollouts quickstart                      # six values of λ that span the trade-off
    python train.py --lam-range 3e-4 1e-2                      # one policy for every λ between
    python train.py --budget 0.2                               # the best use of 20 % of always-large's tokens
    python train.py --lam 3e-3 --max-large-tokens 60           # never more than 60 large-model tokens for a problem
    python train.py --agent ppo-seq --lam 3e-3                 # a transformer over all steps so far
    python train.py --lam 3e-3 --ppo.iterations 3 --out runs/try  # a few seconds
    python train.py --live --rollouts my-trees --models models.toml --lam 3e-3  # the models write what episodes reach
    python train.py --agent my_module:MyRouter --lam 3e-3      # a router of your own: `agents.routers.base`
    python train.py --resume runs/try                          # go on where a stopped run was

Every setting is a field of `agents.runs.config.TrainConfig`.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # more only wait for each other

import tyro

from agents.escape import terminal
from agents.runs.config import Resume, TrainConfig
from agents.runs.listener import Listener
from rollouts.errors import TrimError, said

if TYPE_CHECKING:
    from agents.evaluation.health import Health
    from agents.evaluation.splits import Record
    from agents.learners.loop import Training
    from agents.runs.run import Trained
    from rollouts.trees.live import Generated
    from trim_env.episodes import Lam


class ProgressBar(Listener):
    """Shows return, accuracy, large-token share and escalation rate on validation while training."""

    def __init__(self) -> None:
        """Start the display."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._progress = Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console)
        self._task: Any = None
        self._models: Any = None
        if self.console.is_terminal:
            self._add("getting ready", total=None)

    def compiling(self, trees: int) -> None:
        """Count compiled trees."""
        if self._task is None:
            self._add("getting ready", total=None)
        self._progress.update(self._task, description="compiling trees", advance=trees)

    def _add(self, name: str, **size: Any) -> None:
        self._task = self._progress.add_task(name, figures="", **size)
        self._progress.start()

    def _finish_task(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def opening(self, role: str) -> None:
        """Say what is waited for."""
        self._finish_task()
        self._add(f"loading the {role} model" if role != "scorer" else "loading the scorer", total=None)

    def generating(self, generated: Generated) -> None:
        """Count what the models of a live training write."""
        if self._models is None:
            self._models = self._progress.add_task("generated", figures="", total=None)
        self._progress.update(self._models, completed=generated.tokens.total())
        speed = next(task.speed for task in self._progress.tasks if task.id == self._models)
        figures = (
            f"{generated.steps:,} steps, {generated.tokens['large']:,} large tokens; {speed or 0:,.0f} tokens/s; "
            f"{100 * generated.found:.1f} % found"
        )
        self._progress.update(self._models, figures=figures)

    def begin(self, lam: Lam, training: Training) -> None:
        """Add a bar."""
        self._finish_task()
        self._add(_name(lam), total=training.planned)

    def iteration(self, lam: Lam, training: Training, record: Record) -> None:
        """Move the bar."""
        figures = (
            f"return {record['validation/return']:.4f}  accuracy {100 * record['validation/accuracy']:.1f} %  "
            f"large tokens {100 * record['validation/share']:.1f} %  "
            f"escalations {100 * record['validation/escalation_rate']:.1f} %"
        )
        name = _name(lam) + (f" (attempt {training.attempt + 1})" if training.attempt else "")
        self._progress.update(
            self._task, description=name, completed=len(training.records), total=training.planned, figures=figures
        )

    def end(self, lam: float, health: Health, attempts: int) -> None:
        """Print the verdict."""
        from rich.text import Text

        self._finish_task()
        colour = {"better": "green", "level with": "yellow"}.get(health.verdict, "red")
        tried = f" ({attempts} attempts)" if attempts > 1 else ""
        self.console.print(Text.assemble((f"λ = {lam:g}", "bold"), f"{tried}: ", (terminal(health.sentence), colour)))

    def close(self) -> None:
        """End the display."""
        self._finish_task()
        if self._progress.live.is_started:
            self._progress.stop()


def _name(lam: Lam) -> str:
    return f"λ = {lam[0]:g} to {lam[1]:g}" if isinstance(lam, tuple) else f"λ = {lam:g}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    resuming = any(each == "--resume" or each.startswith("--resume=") for each in arguments)
    try:
        given = tyro.cli(Resume if resuming else TrainConfig, args=arguments, description=__doc__)
        with closing(ProgressBar()) as listener:
            from agents.runs.run import resume, train  # not for --help: it takes seconds

            if isinstance(given, Resume):
                trained = resume(given.resume, listener, given.imports)
            else:
                trained = train(given, listener)
    except (ModuleNotFoundError, TrimError, OSError) as error:
        print(f"error: {terminal(said(error, 'train'))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; what was finished is kept. Go on with --resume and the run's folder.", file=sys.stderr)
        return 130
    report(trained)
    return 0


def report(trained: Trained) -> None:
    """Print where things are and what to do next."""
    if trained.sentence:
        print(terminal(trained.sentence))
    flagged = [lam for lam, health in trained.health.items() if not health.fine]
    if trained.generated is not None:
        steps, tokens = trained.generated.steps, trained.generated.tokens
        print(f"added to the store: {steps:,} steps ({tokens['small']:,} small and {tokens['large']:,} large tokens)")
    print(f"routers:  {trained.folder}/lam-*/policy")
    print(f"picture:  {trained.folder}/curve.png")
    print(f"evaluate: {evaluation(trained)}")
    if flagged:
        print(f"Not to be used: λ = {', '.join(f'{lam:g}' for lam in flagged)}; see {trained.folder}/report.txt.")


def evaluation(trained: Trained) -> str:
    """Return the command that evaluates a run on the rollouts that it was trained on."""
    command = ["python", "evaluate.py", str(trained.folder)]
    for setting, usual in (("rollouts", TrainConfig.rollouts), ("scorer", None), ("grader", None)):
        if (value := getattr(trained.config, setting)) != usual:
            command += [f"--{setting}", value]
    return shlex.join(command)


if __name__ == "__main__":
    sys.exit(main())
