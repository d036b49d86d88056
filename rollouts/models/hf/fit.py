"""Fits a process reward model to values of steps: a head on a language model's hidden states, perhaps its last blocks.

Imports torch and transformers: import it only where models run. It knows token ids and values, not where they are from.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from rollouts.config import ModelConfig
from rollouts.errors import ConfigError
from rollouts.models.hf.load import load
from rollouts.models.hf.packing import Pack, common, pack_first
from rollouts.models.hf.recipe import Recipe
from rollouts.models.hf.reward_model import ProcessRewardModel
from rollouts.models.identity import note_checksums
from rollouts.text.prompts import RewardFormat
from rollouts.text.steps import DELIMITER
from rollouts.text.tokenizer import model_settings

_PATHS, _HEAD_STEPS = 256, 256  # most of one batch
_WARM_UP = 0.05  # share of the training
_DECAY = 0.01  # of weights
_PATIENCE = 3  # epochs without a gain on held-out problems after which it ends
_HELD_OUT = 0.1  # of the problems

Progress = Callable[[int, str], None]
"""Called with the number of paths read since the last call and a line on how it stands."""


@dataclass(frozen=True, slots=True, eq=False)
class ValuedPath:
    """A path as the reward model reads it, with what is known of its steps.

    Attributes:
        values: Target at each of them, from 0 to 1.
        weights: Weight of each, such as the rollouts behind it.
    """

    ids: tuple[int, ...]
    start: int
    tags: tuple[int, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]


Problems = Sequence[Sequence[ValuedPath]]
"""The paths of each problem, neighbours alike: what they share is read, and counts, once."""


@dataclass(frozen=True)
class Fit:
    """What came out.

    Attributes:
        frozen: Cross-entropy of the head alone on held-out problems, nats a step.
        loss: The same at the end.
        constant: The same of the best constant.
    """

    layers: int
    frozen: float
    loss: float
    constant: float


def make(
    trunk: ModelConfig,
    prompts: RewardFormat,
    problems: Problems,
    recipe: Recipe,
    folder: Path,
    on_progress: Progress,
) -> Fit:
    """Make the folder of a reward model out of a language model.

    Args:
        trunk: The language model; on GPUs, the first one is used.
        prompts: How it reads paths.
        problems: What to learn from, at least two of them.
        recipe: How.
        folder: Where it goes, all of it or nothing.
        on_progress: Told how it stands.

    Raises:
        ConfigError: No such model, another kind than Qwen2, or fewer blocks than the recipe asks for.
    """
    on_progress(0, f"loading {trunk.display_name}")
    own = bool(trunk.devices) or trunk.dtype == "bfloat16"
    model = reward_model(trunk, prompts.step_tag_id, prompts.encode(DELIMITER), exact=recipe.more or not own)
    found = fit(model, problems, recipe, on_progress)
    save(model, trunk, prompts.tokenizer, folder)
    del model
    torch.cuda.empty_cache()  # what comes next on the GPU is in another process
    return found


def reward_model(model: ModelConfig, tag: int, delimiter: Sequence[int], *, exact: bool) -> ProcessRewardModel:
    """Load a language model as the trunk of a reward model with a fresh head.

    Args:
        model: The language model.
        tag: Token id of the step tag. It gets the mean embedding of a step's delimiter, as that is what the trunk has
            always met where a tag will stand.
        delimiter: Token ids of the delimiter.
        exact: In single precision: small changes are lost in half precision, and most processors are slow in it.

    Raises:
        ConfigError: There is no such model, or it is no Qwen2, the only kind that vLLM serves in this layout.
    """
    kind = model_settings(model.model, model.revision).get("model_type")
    if kind != "qwen2":
        raise ConfigError(f"{model.model}: a {kind!r} model; the layout of Qwen2ForProcessRewardModel needs a 'qwen2' "
                          "one (Qwen2, Qwen2.5).")  # fmt: skip
    where = {"devices": ()} | ({"dtype": "float32"} if exact else {})  # this process sees GPUs under their own numbers
    made: ProcessRewardModel = load(ProcessRewardModel, model.model_copy(update=where), fresh="score.")
    made.score.float()  # a head that transformers makes anew has the trunk's format
    if model.devices:
        made.to(torch.device("cuda", model.devices[0]))
    if tag >= made.config.vocab_size:
        made.resize_token_embeddings(tag + 1, mean_resizing=False)
    with torch.no_grad():
        embedding = made.get_input_embeddings().weight
        embedding[tag] = embedding[list(delimiter)].mean(0)
    return made


def fit(model: ProcessRewardModel, problems: Problems, recipe: Recipe, on_progress: Progress) -> Fit:
    """Fit a reward model in place: P(label 1) at a step tag to the value there, by cross-entropy.

    The head is fitted first, to hidden states that are computed once. Blocks then go on from there (Kumar et al., 2022,
    https://arxiv.org/abs/2202.10054), and with them the last norm; their matrices learn by Muon, at the rates of AdamW.
    What is kept is what was best on held-out problems.

    Args:
        model: From `reward_model`.
        problems: What to learn from, at least two of them.
        recipe: How.
        on_progress: Told how it stands; every path is read once for the head, and once more in every epoch of blocks.

    Raises:
        ConfigError: More blocks are asked for than there are.
    """
    depth = len(model.model.layers)
    for name, wanted in (("layers", recipe.layers or 1), ("unfreeze", recipe.unfreeze)):
        if wanted > depth:
            raise ConfigError(f"--{name} is {wanted}; {model.name_or_path} has {depth} blocks.")
    torch.manual_seed(recipe.seed)
    model.requires_grad_(False)
    shuffled = random.Random(recipe.seed).sample(problems, len(problems))
    cut = max(1, round(_HELD_OUT * len(problems)))
    held_out, learned = shuffled[:cut], shuffled[cut:]
    all_of_them = {depth} if recipe.more else {depth, -(-3 * depth // 4), -(-depth // 2)}
    choices = [recipe.layers] if recipe.layers else sorted(all_of_them, reverse=True)
    theirs, _ = _states(model, held_out, choices, recipe.batch_tokens, on_progress)
    ours, batches = _states(model, learned, choices, recipe.batch_tokens, on_progress)

    def say(layers: int) -> Callable[[str], None]:
        return lambda text: on_progress(0, f"head on {layers} blocks: {text}")

    heads = [_fit_head(model, ours[layers], theirs[layers], recipe, say(layers)) for layers in choices]
    (frozen, head), layers = min(zip(heads, choices, strict=True), key=lambda each: each[0][0])
    constant = theirs[layers].loss(torch.stack([1 - ours[layers].mean, ours[layers].mean]).log()[None])
    model.score.load_state_dict(head)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers + recipe.added
    model.config.layer_types = [*model.config.layer_types[:layers], *["full_attention"] * recipe.added]
    model.model.layers.extend(_unchanging_block(model, layers + place) for place in range(recipe.added))
    loss = _fit_blocks(model, learned, held_out, batches, recipe, on_progress) if recipe.more else frozen
    return Fit(layers, frozen, loss, float(constant))


def _unchanging_block(model: ProcessRewardModel, place: int) -> Qwen2DecoderLayer:
    """Return a block with fresh weights that adds nothing to what it reads."""
    block = Qwen2DecoderLayer(model.config, place)
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return block.to(model.device, model.dtype)


@dataclass(frozen=True, eq=False)
class _Steps:
    """n steps: hidden states (n, width), targets (n,), weights (n,)."""

    states: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return (self.values * self.weights).sum() / self.weights.sum()

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean cross-entropy of (n, 2) logits of labels 0 and 1 (or one pair for all), nats."""
        margin = (logits[:, 1] - logits[:, 0]).expand_as(self.values)
        each = binary_cross_entropy_with_logits(margin, self.values, reduction="none")
        return (each * self.weights).sum() / self.weights.sum()


def _with_shared(problems: Problems) -> Iterator[tuple[ValuedPath, int]]:
    """Yield every path, and how many of its first tokens the path before it, of the same problem, has too."""
    for paths in problems:
        before: tuple[int, ...] = ()
        for path in paths:
            shared = common(before, path.ids)
            if path.tags[-1] >= shared:  # else cut to a window it is the same as one before
                yield path, shared
                before = path.ids


def _targets(pack: Pack, paths: Iterable[tuple[ValuedPath, int]], token_weight: float) -> tuple[Any, Any, Any]:
    """Return the places of a pack that have targets, their targets and weights; a step of many paths counts once."""
    weights, sums = np.zeros(len(pack.ids)), np.zeros(len(pack.ids))
    for own, (path, shared) in zip(pack.paths, paths, strict=True):
        begins = (path.start, *(tag + 1 for tag in path.tags))
        for begin, tag, value, weight in zip(begins, path.tags, path.values, path.weights, strict=False):
            if tag >= shared:
                for places, share in ((own[begin:tag], token_weight * weight), (own[tag], weight)):
                    weights[places] += share
                    sums[places] += share * value
    places = np.flatnonzero(weights)
    return places, sums[places] / weights[places], weights[places]


def _read(
    model: ProcessRewardModel, problems: Problems, layers: Sequence[int], tokens: int, token_weight: float = 0.0
) -> Iterator[tuple[int, list[_Steps]]]:
    """Yield, batch by batch, its paths' number and its steps, with the normed hidden states after some blocks each."""
    trunk, device = model.model, model.device
    depth = len(trunk.layers)
    paths = deque(_with_shared(problems))
    while paths:
        pack = pack_first([path.ids for path, _ in islice(paths, _PATHS)], tokens)
        found = _targets(pack, [paths.popleft() for _ in pack.paths], token_weight)
        places, values, weights = (torch.as_tensor(each, device=device) for each in found)
        ids, positions = (torch.as_tensor(each, device=device)[None] for each in (pack.ids, pack.positions))
        sees = torch.as_tensor(pack.sees, device=device)[None, None]
        read = trunk(
            input_ids=ids, position_ids=positions, attention_mask=sees, use_cache=False, output_hidden_states=True
        )
        normed = (
            read.last_hidden_state[0, places] if at == depth else trunk.norm(read.hidden_states[at][0, places])
            for at in layers
        )
        yield len(pack.paths), [_Steps(each.float(), values.float(), weights.float()) for each in normed]


def _states(
    model: ProcessRewardModel, problems: Problems, layers: Sequence[int], tokens: int, on_progress: Progress
) -> tuple[dict[int, _Steps], int]:
    """Return the steps of problems with their hidden states after each of some numbers of blocks; and the batches."""
    read: list[list[_Steps]] = []
    with torch.no_grad():
        for count, steps in _read(model, problems, layers, tokens):
            read.append(steps)
            on_progress(count, "reading hidden states")
    return {
        each: _Steps(*map(torch.cat, zip(*((part.states, part.values, part.weights) for part in parts), strict=True)))
        for each, parts in zip(layers, zip(*read, strict=True), strict=True)
    }, len(read)


def _fit_head(
    model: ProcessRewardModel, ours: _Steps, theirs: _Steps, recipe: Recipe, on_progress: Callable[[str], None]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the held-out loss of a head on hidden states, and its weights."""
    head = copy.deepcopy(model.score).requires_grad_()
    for layer in head:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    mean, scale = ours.states.mean(0), ours.states.std(0, correction=0) + 1e-6
    ours, theirs = (replace(each, states=(each.states - mean) / scale) for each in (ours, theirs))

    def losses() -> Iterator[torch.Tensor]:
        for rows in torch.randperm(len(ours.values)).split(_HEAD_STEPS):
            part = _Steps(ours.states[rows], ours.values[rows], ours.weights[rows])
            yield part.loss(head(part.states))

    batches = -(-len(ours.values) // _HEAD_STEPS)
    optimiser = AdamW(head.parameters(), recipe.rate, weight_decay=_DECAY)
    best = _descend([optimiser], losses, lambda: float(theirs.loss(head(theirs.states))), batches, recipe, on_progress)
    with torch.no_grad():  # of states as the trunk has them
        head[0].weight /= scale
        head[0].bias -= head[0].weight @ mean
    return best, head.state_dict()


def _fit_blocks(
    model: ProcessRewardModel,
    learned: Problems,
    held_out: Problems,
    batches: int,
    recipe: Recipe,
    on_progress: Progress,
) -> float:
    """Fit the last blocks with the head; return the held-out loss."""
    trunk, depth = model.model, len(model.model.layers)
    order = random.Random(recipe.seed)
    note = ""

    def read(problems: Problems, token_weight: float = 0.0) -> Iterator[_Steps]:
        for count, (steps,) in _read(model, problems, [depth], recipe.batch_tokens, token_weight):
            on_progress(count, note)
            yield steps

    def losses() -> Iterator[torch.Tensor]:
        shuffled = order.sample(learned, len(learned))
        return (steps.loss(model.score(steps.states)) for steps in read(shuffled, recipe.token_weight))

    def judge() -> float:
        parts = [(steps.loss(model.score(steps.states)), steps.weights.sum()) for steps in read(held_out)]
        return float(sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts))

    def say(text: str) -> None:
        nonlocal note
        note = text

    own = depth - recipe.added
    fresh, unfrozen = trunk.layers[own:], [*trunk.layers[max(0, own - recipe.unfreeze) : own], trunk.norm]
    others: list[dict[str, Any]] = [{"params": list(model.score.parameters()), "lr": recipe.rate}]
    matrices: list[dict[str, Any]] = []
    for blocks, rate in ((fresh, recipe.rate), (unfrozen, recipe.trunk_rate)):
        parameters = [each for block in blocks for each in block.parameters()]
        others.append({"params": [each for each in parameters if each.dim() != 2], "lr": rate})
        matrices.append({"params": [each for each in parameters if each.dim() == 2], "lr": rate})
    optimisers = [
        AdamW(others, weight_decay=_DECAY),
        Muon([each for each in matrices if each["params"]], weight_decay=_DECAY, adjust_lr_fn="match_rms_adamw"),
    ]
    return _descend(optimisers, losses, judge, batches, recipe, say)


def _descend(
    optimisers: list[torch.optim.Optimizer],
    losses: Callable[[], Iterable[torch.Tensor]],
    judge: Callable[[], float],
    batches: int,
    recipe: Recipe,
    say: Callable[[str], None],
) -> float:
    """Train parameters, leave them as they were after the best epoch (or before the first), return its loss.

    Args:
        optimisers: Of all the parameters, with their peak rates.
        losses: Gives the losses of one epoch, batch after batch.
        judge: Gives the loss on held-out problems.
        batches: About how many batches an epoch has.
        recipe: Epochs.
        say: Told of every epoch.
    """
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    parameters = [each.requires_grad_() for group in groups for each in group["params"]]
    total = batches * recipe.epochs

    def share(step: int) -> float:
        done = step / total
        return min(1.0, (done + 1 / total) / _WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    schedules = [LambdaLR(optimiser, share) for optimiser in optimisers]
    best, since, kept = math.inf, -1, [each.detach().clone() for each in parameters]
    for epoch in range(recipe.epochs + 1):
        if epoch:
            for loss in losses():
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimiser, schedule in zip(optimisers, schedules, strict=True):
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
        with torch.no_grad():
            now = judge()
        since += 1
        if now < best:
            best, since, kept = now, 0, [each.detach().clone() for each in parameters]
        say(f"epoch {epoch}: held-out loss {now:.4f}, best {best:.4f}")
        if since >= _PATIENCE:
            break
    with torch.no_grad():
        for each, value in zip(parameters, kept, strict=True):
            each.requires_grad_(False).copy_(value)
    return best


def save(model: ProcessRewardModel, trunk: ModelConfig, tokenizer: Any, folder: Path) -> None:
    """Write a model folder, all of it or nothing: weights in the trunk's format, the head in float32, the tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stored = AutoConfig.from_pretrained(trunk.model, revision=trunk.revision).dtype or torch.float32
    model.model.to(stored)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        config |= {"architectures": ["Qwen2ForProcessRewardModel"], "dtype": str(stored).removeprefix("torch.")}
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        note_checksums(made)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        os.rename(made, folder)
