"""The models of a live training (`train.py --live`): what it asks them for is added to the store."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agents.runs.config import TrainConfig
from agents.runs.listener import Listener
from rollouts.errors import ConfigError, StoreError
from rollouts.files.sealed import read_sealed, refusing_damage, write_sealed
from rollouts.store.store import Store
from rollouts.tasks.grading import make_grader
from rollouts.text.steps import SMALL
from rollouts.trees.arrays import Trees
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.live import Generated, keep_open
from trim_env import live
from trim_env.tables import DecisionTables


class Models:
    """The models that made a store, loaded only while they are used."""

    def __init__(self, config: TrainConfig, listener: Listener) -> None:
        """Check what can be checked without loading a model.

        Raises:
            StoreError: The store was made by other models, or has no problems to train on.
            ConfigError: The models file is wrong or missing, or the store is read with another scorer than theirs.
        """
        self.config, self.listener = config, listener
        self.generated = Generated()
        self._file: Path | None = None
        self.store = Store(config.rollouts)
        self.store.problems("train")
        try:
            self.family = live.family_of(self.store, config.models or "tinymath")
        except StoreError as error:
            if config.models is not None:
                raise
            raise ConfigError(
                f"{self.store.path} was not made by the embedded models. Name those that made it: --models FILE."
            ) from error
        self.scorer = self.family.scorer_name if self.family.config.scorer else SMALL
        if config.scorer not in (None, self.scorer):
            raise ConfigError(f"--scorer is {config.scorer}, but the scorer of the models file is {self.scorer}.")

    def compiled(self) -> Trees:
        """Return the store's trees but those that are open for training; a validation split must be there.

        Raises:
            StoreError: There is none, or it is not complete.
        """
        store, most = self.store, self.store.manifest["process"]["max_escalations"]
        if next(load_trees(store, store.problems("validation"), None, most), None) is None:
            raise StoreError(
                f"{store.path}: no trees of `validation`, on which a live training is measured. `python -m rollouts "
                f"generate {shlex.quote(str(store.path))} --problems ... --models "
                f"{shlex.quote(self.config.models or 'tinymath')} --replicas train=0` "
                "makes all trees but those of training."
            )
        with store.writing():
            keep_open(store, load_trees(store, store.problems("train"), None, most))
        self.grader = make_grader(self.config.grader or store.choose("grades", None))
        return compile_store(store, self.scorer, self.grader.name, on_progress=self.listener.compiling)

    def count_in(self, file: Path) -> None:
        """Keep the counts of a run in a file, too, and go on from what it says.

        Raises:
            ConfigError: It is damaged.
        """
        self._file = file
        if not file.exists():
            return
        with refusing_damage(file, ConfigError, "counts", "Delete it to count from 0, or start a new run."):
            told = read_sealed(file)
            self.generated = Generated(**{**told, "tokens": Counter(told["tokens"])})

    def _tell(self, generated: Generated) -> None:
        self.listener.generating(generated)
        if self._file is not None:
            write_sealed(self._file, {**vars(generated), "tokens": dict(generated.tokens)})

    @contextmanager
    def opened(self, tables: DecisionTables) -> Iterator[Callable[..., live.LiveVectorEnv]]:
        """Load the models; yields what makes environments of the training split, with schema and caps of `tables`."""
        with live.open_models(
            self.store,
            self.family,
            self.listener.opening,
            grader=self.grader,
            split="train",
            schema=tables.schema,
            cost=tables.cost_model,
            max_escalations=tables.max_escalations,
            max_large_tokens=tables.max_large_tokens,
            max_generated_large_tokens=self.config.max_generated_large_tokens,
            generated=self.generated,
            on_progress=self._tell,
        ) as begin:
            try:
                yield begin
            finally:
                self._tell(self.generated)
