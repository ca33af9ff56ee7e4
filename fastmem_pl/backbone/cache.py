"""A KV cache of fixed size, written to in place, so that a CUDA graph finds keys and values again."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


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
        return type(self)(self, lambda tensor: tensor.index_select(0, index.to(tensor.device)), position)

    def move(self) -> None:
        """Go on to the next slot, to which the position that the cache was made with has moved."""
        for copy in self._elsewhere.values():
            copy.copy_(self._position)

    def tensors(self) -> list[Tensor]:
        """All keys and values."""
        return [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]

    def _position_on(self, device: torch.device) -> Tensor:
        if device == self._position.device:
            return self._position
        if device not in self._elsewhere:
            self._elsewhere[device] = self._position.to(device)
        return self._elsewhere[device]


def room_for(tokens: int) -> int:
    """Slots for a sequence: multiples of 64, so that batches of like length share captured graphs."""
    return -(-tokens // 64) * 64
