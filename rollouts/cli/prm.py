"""The commands of ``python -m rollouts`` that make a process reward model out of trees: its data, and the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from rollouts.cli.inspect import StorePath
from rollouts.cli.progress import console, progress_bar
from rollouts.config import FamilyConfig, load_family, settings
from rollouts.errors import ConfigError, StoreError
from rollouts.family import Family, refuse_other_thinking, table_name
from rollouts.files.atomic import write_atomically
from rollouts.models.hf.recipe import Recipe
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.splitting import Splitting
from rollouts.trees.labels import Solution, labelled_solutions, rows

TargetPath = Annotated[Path, tyro.conf.Positional]


def read_solutions(store: Store, grader: str | None, splits: Sequence[str]) -> Iterator[tuple[Problem, list[Solution]]]:
    """Yield the problems of splits with their labelled solutions, showing a bar.

    Raises:
        StoreError: No such split, no such grades, or no trees.
    """
    name = store.choose("grades", grader)
    problems = [problem for split in splits for problem in store.problems(split)]
    found = False
    with progress_bar("Reading", None, "trees") as advance:
        for each in labelled_solutions(store, name, problems, advance):
            found = True
            yield each
    if not found:
        raise StoreError(f"{store.path}: no trees in {', '.join(splits)} yet. Run `python -m rollouts generate`.")


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Say so where an interrupt leaves nothing behind."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from interrupt


@settings
class Labels:
    """Write what every step is worth by the trees, as data to train a process reward model: one solution a line.

    Attributes:
        store: Directory of the store.
        out: File of JSON lines.
        layout: ``trl`` (its stepwise supervision) or ``prm800k``.
        split: Splits whose problems are written.
        threshold: A step is labelled right if its value is above this: 0: if any solution from it was right (hard
            estimation); values and counts stand beside the labels.
        grader: Grade table, if there are several.
    """

    store: StorePath
    out: TargetPath
    layout: Literal["trl", "prm800k"] = "trl"
    split: tuple[str, ...] = ("train",)
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    grader: str | None = None

    def run(self) -> None:
        """Run the command."""
        store = Store(self.store)
        if self.out.is_dir():
            raise ConfigError(f"{self.out} is a folder; name a file.")
        written = 0

        def write(target: Path) -> None:
            nonlocal written
            with target.open("w", encoding="utf-8") as file:
                for problem, solutions in read_solutions(store, self.grader, self.split):
                    for row in rows(problem, solutions, self.layout, self.threshold):
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        written += 1

        self.out.parent.mkdir(parents=True, exist_ok=True)
        with nothing_kept():
            write_atomically(self.out, write)
        console().print(f"{written:,} solutions in {self.out}.")


@settings
class TrainPrm:
    """Train a process reward model on the values of steps in a store's trees, and score the store with it.

    It is one of your language models, by default the small one as it is, with a small head on its hidden states, in the
    layout of Qwen2ForProcessRewardModel, which vLLM and transformers run.

    Attributes:
        store: Directory of the store.
        out: Folder of the new model; its name becomes that of the score table.
        models: TOML file of the roles, or ``tinymath`` / ``tinymath:transformers`` for the embedded family.
        trunk: Whose hidden states are read.
        after: Who goes on alone after a step in the values that are learned: ``small``, or ``large``, which errs less:
            that tells rather whether the steps so far are right (trees within a K lack most of it).
        split: Split to learn from; a tenth of its problems are held out to decide when to stop.
        recipe: How it is trained.
        grader: Grade table, if there are several.
        score: Score the store at the end.
    """

    store: StorePath
    out: TargetPath
    models: str = "tinymath"
    trunk: Literal["small", "large"] = "small"
    after: Literal["small", "large"] = "small"
    split: str = "train"
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = Recipe()
    grader: str | None = None
    score: bool = True

    def run(self) -> None:
        """Run the command."""
        scored = self.train()
        if not self.score:
            return
        from rollouts.cli.train_prm import evaluate

        if found := evaluate(Store(self.store), scored, self.grader):
            console().print(
                f"AUC on validation: {found['solution']:.3f} for the least score of a solution of the small model, "
                f"whether it is right; {found['step']:.3f} for the score of a step, whether the small model ends right."
            )

    def train(self) -> FamilyConfig:
        """Train the model and write its folder; return the models with it as the scorer."""
        store, config = Store(self.store), load_family(self.models)
        if config.generator(self.trunk).backend == "server":
            raise ConfigError(f"[{self.trunk}] is a server, and training needs weights: name a models file in which it "
                              "has backend 'transformers' or 'vllm'.")  # fmt: skip
        if self.out.exists():
            raise ConfigError(
                f"{self.out} exists; choose another folder, or score with it: `python -m rollouts score`."
            )
        if table_name(self.out.name) in store.names("scores"):
            raise StoreError(f"{store.path} has scores of another {self.out.name!r}; choose another name.")
        refuse_other_thinking(store, Splitting(config.steps))
        solutions = list(read_solutions(store, self.grader, (self.split,)))
        from rollouts.cli.train_prm import train

        with nothing_kept():
            return train(self, Family(config, store=store), solutions)
