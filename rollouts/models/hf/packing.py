"""Many sequences that begin alike in one pass, each shared token computed once: log-probabilities and reward scores.

The paths of a rollout tree share their prefixes: 543 solutions of 24 problems had 239,000 tokens, 85,000 distinct ones.
Sequences are packed as a tree into one forward pass whose attention mask lets every token see its own prefix only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.text.likelihood import TOP, Likelihood


@dataclass(frozen=True, eq=False)
class Pack:
    """A tree of T tokens.

    Attributes:
        ids: (T,) token ids, every token after those that it follows.
        positions: (T,) position of each in its sequences.
        sees: (T, T) bool: whether the row's token may see the column's.
        paths: For each sequence, the places of its tokens in `ids`.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    sees: NDArray[np.bool_]
    paths: list[NDArray[np.int64]]


def pack_first(sequences: Sequence[tuple[int, ...]], most: int) -> Pack:
    """Pack as many of the first sequences as make a tree of at most `most` tokens, but at least one.

    Args:
        sequences: In ascending order, where those that begin alike are neighbours.
        most: Tokens.
    """
    ids: list[int] = []
    paths: list[NDArray[np.int64]] = []
    known: list[int] = []
    for own in sequences:
        shared = common(sequences[len(paths) - 1], own) if paths else 0
        if paths and len(ids) + len(own) - shared > most:
            break
        fresh = np.arange(len(ids), len(ids) + len(own) - shared)
        paths.append(np.concatenate([paths[-1][:shared], fresh]) if paths else fresh)
        known.append(shared)
        ids += own[shared:]
    positions, sees = np.empty(len(ids), np.int64), np.zeros((len(ids), len(ids)), np.bool_)
    for path, shared in zip(paths, known, strict=True):
        positions[path[shared:]] = np.arange(shared, len(path))
        sees[np.ix_(path[shared:], path)] = np.tri(len(path), dtype=np.bool_)[shared:]
    return Pack(np.array(ids, np.int64), positions, sees, paths)


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    different = np.flatnonzero(np.array(one[:length]) != np.array(other[:length]))
    return int(different[0]) if len(different) else length


PACKED_TOKENS = 2048  # of one pass over sequences that begin alike: its mask has the square of them


def most_packed(config: Any, longest: int, most: int = PACKED_TOKENS) -> int:
    """Return how many tokens a pack may have: 1 where a window of attention would cut paths off, else `most`."""
    text = config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    sliding = window is not None if kinds is None else "sliding_attention" in kinds
    return 1 if sliding and longest > (window or longest) else max(1, most)


def packed_inputs(model: Any, pack: Pack) -> dict[str, Any]:
    """Return what a model of transformers is called with to read a pack."""
    import torch

    device = model.device
    ids, positions = (torch.as_tensor(each, device=device)[None] for each in (pack.ids, pack.positions))
    mask = None
    if len(pack.paths) > 1:  # a single sequence is causal by itself
        hidden = torch.as_tensor(~pack.sees, device=device)[None, None]
        least = torch.finfo(model.dtype).min
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device).masked_fill_(hidden, least)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}


_ROWS = 32  # distributions that are made at once: larger blocks of memory are page faults, which cost more than they do


def likelihoods(model: Any, pack: Pack, starts: Sequence[int], *, entropies: bool = False) -> list[Likelihood]:
    """Return, for each sequence of a pack, what the model makes of its tokens from a start on.

    Args:
        model: A causal language model of transformers.
        pack: The sequences.
        starts: For each of them, the first token to be told of, at least 1.
        entropies: Whether entropies are wanted too.
    """
    import torch

    spans = [path[start - 1 :] for path, start in zip(pack.paths, starts, strict=True)]
    before, after = (np.concatenate([span[part] for span in spans]) for part in (slice(-1), slice(1, None)))
    if not len(before):
        return [Likelihood(()) for _ in spans]
    inputs = packed_inputs(model, pack)
    ids = inputs["input_ids"][0]
    keep, place = torch.unique(torch.as_tensor(before, device=ids.device), return_inverse=True)
    logits = model(**inputs, logits_to_keep=keep).logits[0]
    norms, *told = told_of(logits, entropies=entropies)
    chosen = logits[place, ids[torch.as_tensor(after, device=ids.device)]] - norms[place]  # in the format of the norms
    ends = np.cumsum([len(span) - 1 for span in spans])
    columns = [
        np.split(values.double().cpu().numpy(), ends[:-1]) for values in (chosen, *(each[place] for each in told))
    ]
    return [Likelihood(*(tuple(each.tolist()) for each in own)) for own in zip(*columns, strict=True)]


def told_of(logits: Any, *, entropies: bool = True) -> list[Any]:
    """Return the (n,) logarithms of the normalisers of the distributions of (n, v) logits, and their (n,) entropies.

    Both are at least float32; entropies are those of `rollouts.text.likelihood.top_entropy`.
    """
    import torch

    found = []
    for part in logits.split(_ROWS):
        rows = part if part.dtype == torch.float64 else part.float()
        norms = rows.logsumexp(1, keepdim=True)
        found.append([norms[:, 0]])
        if entropies:
            top = rows.topk(min(TOP, rows.shape[1])).values - norms
            rest = (1 - top.exp().sum(1)).clamp(min=1e-12)
            found[-1].append((-(top.exp() * top.clamp(min=-1e4)).sum(1) - rest * rest.log()).clamp(min=0))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
