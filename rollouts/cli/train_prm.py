"""Training a process reward model on labelled solutions, as `rollouts.cli.prm.TrainPrm` says; loads torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date as Date
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from rollouts.cli.generate import run_scoring
from rollouts.cli.prm import TrainPrm
from rollouts.cli.progress import console, progress_bar
from rollouts.config import FamilyConfig, GeneratorConfig, ModelConfig, ScorerConfig
from rollouts.errors import StoreError
from rollouts.family import Family
from rollouts.models.hf.fit import ValuedPath, make
from rollouts.scoring.base import self_test_examples
from rollouts.scoring.prm import fitting_input
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.text.prompts import STEP_TAG, RewardFormat
from rollouts.text.splitting import Splitting
from rollouts.text.steps import SMALL
from rollouts.text.tokenizer import transformers_tokenizer
from rollouts.trees.compile import compile_store
from rollouts.trees.labels import Solution
from rollouts.trees.stats import auc, small_outcomes, split_statistics

_SHARED = ("backend", "licence", "devices", "tensor_parallel", "memory_share", "cpu_cache_gib", "max_length", "threads")
"""What the scorer's section of a models file takes over from the trunk's."""


def train(settings: TrainPrm, family: Family, data: Sequence[tuple[Problem, list[Solution]]]) -> FamilyConfig:
    """Train a model, write its folder, and print what a models file needs.

    Args:
        settings: The command.
        family: The models of the store, with its date.
        data: Solutions of its problems.

    Returns:
        The models, with the new one as the scorer.

    Raises:
        StoreError: Fewer than two problems with steps that fit into the window.
    """
    trunk = family.config.generator(settings.trunk)
    made = scorer_of(trunk, settings.out)
    prompts = reward_format(trunk, family.splitting, family.date)
    told = prompts, family.windows[settings.trunk], settings.after
    paths = [[_valued(*told, problem.question, each) for each in solutions] for problem, solutions in data]
    problems = [found for some in paths if (found := [path for path in some if path.tags])]
    if len(problems) < 2:
        raise StoreError(
            f"{len(problems)} problems have steps to learn from after which the {settings.after} model goes on alone "
            "(--after), expected at least two."
        )
    recipe = settings.recipe
    total = sum(map(len, problems)) * (1 + recipe.epochs * recipe.more)
    with progress_bar("Training", total, "paths") as advance:
        fitted = make(trunk, prompts, problems, recipe, settings.out, advance)
    console().print(
        f"Cross-entropy on held-out problems: {fitted.loss:.3f} nats a step (the head alone {fitted.frozen:.3f}, a "
        f"constant {fitted.constant:.3f}). {settings.out} is ready, with {fitted.layers} of the trunk's blocks; for a "
        "models file:"
    )
    print(as_toml(made))
    return family.config.model_copy(update={"scorer": made})


def evaluate(store: Store, config: FamilyConfig, grader: str | None, split: str = "validation") -> dict[str, float]:
    """Score a store with the scorer of a configuration; return how well that tells right from wrong on a split.

    Returns:
        Areas under the ROC curve; none where the store lacks the split. ``solution``: the least score of the small
        model's solutions, for their being right. ``step``: the score of a step, for the small model's being right in
        the end if it goes on alone.
    """
    family = Family(config, examples=self_test_examples(store.problems()), store=store)
    with store.writing():
        run_scoring(store, family, None)
    with progress_bar("Compiling", None, "trees") as advance:
        trees = compile_store(store, family.scorer_name, grader, on_progress=advance)
    if split not in trees.splits[trees.problem]:
        return {}
    rows, after = trees.rows_of(trees.select(split)), small_outcomes(trees)
    known = ~np.isnan(after[rows])
    return {
        "solution": split_statistics(trees, split).min_score_auc,
        "step": auc(trees.score[rows][known], after[rows][known] == 1),
    }


def reward_format(trunk: GeneratorConfig, splitting: Splitting, date: Date) -> RewardFormat:
    """Return how a model reads paths as the trunk of a reward model; its tokenizer learns the step tag."""
    tokenizer = transformers_tokenizer(*trunk.tokenizer_source)
    tokenizer.add_tokens([STEP_TAG], special_tokens=True)
    return RewardFormat(tokenizer, trunk.system_prompt, date=date, splitting=splitting)


def scorer_of(trunk: GeneratorConfig, folder: Path) -> ScorerConfig:
    """Return the section [scorer] for a model in a folder, on the backend and devices of its trunk.

    A processor reads in single precision unless the trunk is said to be in bfloat16, for which some have instructions.
    """
    shared = {name: getattr(trunk, name) for name in _SHARED if name in trunk.model_fields_set}
    dtype = {"dtype": "bfloat16" if trunk.dtype == "bfloat16" else "float32"} if not trunk.devices else {}
    model = ModelConfig(**shared | dtype, model=str(folder.resolve()))
    return ScorerConfig(name=folder.name, model=model, system_prompt=trunk.system_prompt, informed=False)


def as_toml(scorer: ScorerConfig) -> str:
    """Return the section [scorer] as text."""
    plain: dict[str, Any] = scorer.model_dump(mode="json", exclude={"model"}, exclude_unset=True)
    plain = {"kind": scorer.kind} | plain | {"system_prompt": scorer.system_prompt or ""}
    assert scorer.model is not None
    sections = {"scorer": plain, "scorer.model": scorer.model.model_dump(mode="json", exclude_unset=True)}
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items() if value is not None)
        for name, fields in sections.items()
    )


def _valued(prompts: RewardFormat, window: int, after: str, question: str, solution: Solution) -> ValuedPath:
    """Return as many steps of a solution as fit into a window, as the reward model reads them."""
    texts = [choice.step.text for choice in solution]
    read = fitting_input(prompts, window, question, texts)
    told = (choice.step.small if after == SMALL else choice.step.large for choice in solution[: len(read.positions)])
    known = list(takewhile(lambda each: each.count, told))
    ids, tags = read.ids, read.positions[: len(known)]
    start = max(0, tags[0] - len(prompts.encode(texts[0].strip()))) if tags else 0
    values, counts = tuple(each.value or 0.0 for each in known), tuple(float(each.count) for each in known)
    return ValuedPath(ids, start, tags, values, counts)
