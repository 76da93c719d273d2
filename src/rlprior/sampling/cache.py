"""Key-value caches with room for the tokens to come, whose rows can be dropped in place.

A layer of the library's cache grows by `torch.cat`: each step copies all keys and values of all layers, and each dropped row again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# R rows, H key-value heads, T positions, D head dimension

ROOM_TOKENS = 64
"""Positions that buffers first have beyond the prompt; then they grow by half."""


class RoomyLayer(DynamicLayer):
    """Keys and values [R, H, T, D] that are views of larger buffers.

    Args:
        layer: the cache after the prompts, one row each.
        repeats: rows made of each of its rows, side by side.
    """

    def __init__(self, layer: DynamicLayer, repeats: int) -> None:
        super().__init__()
        keys, values = _filled(layer.keys), _filled(layer.values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        capacity = keys.shape[2] + ROOM_TOKENS
        self._key_buffer = _enlarge(keys, keys.shape[0] * repeats, capacity)
        self._value_buffer = _enlarge(values, values.shape[0] * repeats, capacity)
        self._show(keys.shape[0] * repeats, keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones at their end."""
        num_rows, start = key_states.shape[0], self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._key_buffer.shape[2]:
            capacity = end + end // 2
            self._key_buffer = _enlarge(_filled(self.keys), num_rows, capacity)
            self._value_buffer = _enlarge(_filled(self.values), num_rows, capacity)
        self._key_buffer[:num_rows, :, start:end] = key_states
        self._value_buffer[:num_rows, :, start:end] = value_states
        self._show(num_rows, end)
        return _filled(self.keys), _filled(self.values)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, no more than there are; only those that change their place are copied."""
        places = torch.arange(len(indices), device=indices.device)
        moved = (indices != places).nonzero().squeeze(1)
        length = self.get_seq_length()
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[moved, :, :length] = buffer[indices[moved], :, :length]
        self._show(len(indices), length)

    def _show(self, num_rows: int, length: int) -> None:
        self.keys = self._key_buffer[:num_rows, :, :length]
        self.values = self._value_buffer[:num_rows, :, :length]


def _filled(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _enlarge(old_RHTD: Tensor, num_rows: int, capacity: int) -> Tensor:
    """A buffer [num_rows, H, capacity, D] that begins with the old positions, each old row repeated side by side."""
    old_rows, num_heads, length, width = old_RHTD.shape
    buffer = old_RHTD.new_empty(num_rows, num_heads, capacity, width)
    buffer.view(old_rows, -1, num_heads, capacity, width)[..., :length, :] = old_RHTD[:, None]
    return buffer


def repeat_rows(cache: Cache, repeats: int) -> Cache:
    """The cache with each row `repeats` times side by side, in roomy layers; layers of another kind (a sliding window) stay theirs."""
    layers: list[Any] = cache.layers
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[place] = RoomyLayer(layer, repeats)
        else:
            layer.batch_repeat_interleave(repeats)
    return cache
