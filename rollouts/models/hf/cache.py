"""A key-value cache with room to grow: one token is written in place instead of copying the whole cache.

Imports torch and transformers: import it only where models run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens


class _RoomyLayer(DynamicLayer):
    """One layer; `keys` and `values` are views of buffers that are longer than they."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._allocate(keys, values)

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        length = keys.shape[2]
        self._buffers = [
            torch.empty((*old.shape[:2], length + _ROOM, old.shape[3]), dtype=old.dtype, device=old.device)
            for old in (keys, values)
        ]
        for buffer, old in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, :length] = old
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens; called by the model."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._allocate(self.keys, self.values)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values


def roomy_cache(layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Return a cache that starts with the given keys and values, (rows, heads, tokens, width) per layer."""
    cache = DynamicCache()
    cache.layers = [_RoomyLayer(keys, values) for keys, values in layers]
    return cache
