"""Caches that go on from a prefill: of fixed size, written to in place, or of the model's own kind.

A CUDA graph finds keys and values again in a cache of fixed size. States of linear attention have one anyway.
A cache with layers of another kind is copied and goes on growing.
"""

import copy as copying
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)


class FixedLayer(StaticLayer):
    """Keys and values ``(B, H, room, D)`` of one block, or ``None`` where the trunk does not run it.

    Layers of sliding attention keep all slots as well: the model's mask hides what has slid out, and no
    step needs the host to know how far it is. ``position`` ``(1,)`` is the slot that the next token goes to.
    """

    def __init__(
        self, keys: Tensor | None, values: Tensor | None, position: Tensor, is_sliding: bool
    ) -> None:
        super().__init__(0 if keys is None else keys.shape[2])
        self.keys, self.values, self.position = keys, values, position
        self.cumulative_length = position[0]
        self.is_sliding = is_sliding
        self.is_initialized = keys is not None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values ``(B, H, 1, D)``; returns all slots."""
        # The position moves when the whole step is done: blocks of the tail write to the same slot.
        self.keys.index_copy_(2, self.position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.position, value_states.to(self.values.dtype))
        return self.keys, self.values


class FixedCache(Cache):
    """Fixed layers of all blocks, copied by ``copy``; ``position`` is that of :class:`FixedLayer`."""

    def __init__(self, cache: Cache, copy: Callable[[Tensor], Tensor], position: Tensor) -> None:
        self._position = position
        self._elsewhere: dict[torch.device, Tensor] = {}  # copies that follow the position
        layers = []
        for layer in cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                # It is written to in place, and holds nothing that is a row for each token.
                layers.append(copying.deepcopy(layer))
                continue
            keys, values, place = None, None, position
            if layer.is_initialized:
                keys, values = copy(layer.keys), copy(layer.values)
                place = self._position_on(keys.device)
            layers.append(FixedLayer(keys, values, place, bool(getattr(layer, "is_sliding", False))))
        super().__init__(layers=layers)

    @classmethod
    def continuing(cls, cache: Cache, room: int, position: Tensor, length: int) -> Self:
        """Copy a cache that has read ``length`` tokens into ``room`` slots."""

        def slots(tensor: Tensor) -> Tensor:
            found = tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
            # A sliding layer has kept the last tokens only.
            found[:, :, length - tensor.shape[2] : length] = tensor
            return found

        return cls(cache, slots, position)

    def rows(self, index: Tensor, position: Tensor) -> Self:
        """A copy with some rows only."""
        twin = type(self)(self, lambda tensor: tensor.index_select(0, index.to(tensor.device)), position)
        for layer in twin.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(index)
        return twin

    def move(self) -> None:
        """Go on to the next slot, to which the position that the cache was made with has moved."""
        for copy in self._elsewhere.values():
            copy.copy_(self._position)

    def tensors(self) -> list[Tensor]:
        """All keys and values."""
        found: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                states = (*layer.conv_states.values(), *layer.recurrent_states.values())
                found += [state for state in states if state is not None]
            elif layer.is_initialized:
                found += [layer.keys, layer.values]
        return found

    def _position_on(self, device: torch.device) -> Tensor:
        if device == self._position.device:
            return self._position
        if device not in self._elsewhere:
            self._elsewhere[device] = self._position.to(device)
        return self._elsewhere[device]


def continued(cache: Cache, room: int, position: Tensor, length: int) -> Cache:
    """A copy of a cache that has read ``length`` tokens, to go on from; of ``room`` slots if it is fixed."""
    if type(cache) is DynamicCache and all(type(layer) in _FIXED for layer in cache.layers):
        return FixedCache.continuing(cache, room, position, length)
    return copying.deepcopy(cache)


def cache_rows(cache: Cache, index: Tensor, position: Tensor, rows: int) -> Cache:
    """A copy with some of its ``rows`` only, repeats allowed."""
    if isinstance(cache, FixedCache):
        return cache.rows(index, position)

    def pick(tensor: Tensor) -> Tensor:
        has_rows = tensor.ndim > 1 and len(tensor) == rows
        return tensor.index_select(0, index.to(tensor.device)) if has_rows else tensor

    twin = copying.deepcopy(cache)
    for part in (twin, *twin.layers):
        # (3, B, T) there, of rotary angles in three dimensions.
        places = getattr(part, "indexer_position_ids", None)
        vars(part).update(tree_map_only(Tensor, pick, vars(part)))
        if places is not None:
            part.indexer_position_ids = places.index_select(1, index.to(places.device))
    return twin


def state_bytes(cache: Cache) -> int:
    """Bytes of what does not grow with the tokens that a cache has read."""
    linear = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    states = [s for layer in linear for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return sum(state.nbytes for state in states if state is not None)


# Layers that a cache of fixed size can stand in for, or keep.
_FIXED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)


def room_for(tokens: int) -> int:
    """Slots for a sequence: multiples of 64, so that batches of like length share captured graphs."""
    return -(-tokens // 64) * 64
