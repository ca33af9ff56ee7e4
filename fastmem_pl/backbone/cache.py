"""A KV cache of fixed size, which every decoding step writes to in place.

Nothing is concatenated or allocated while tokens come, and a captured CUDA graph finds keys and values
where it left them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class FixedLayer(StaticLayer):
    """Keys and values of one block in ``room`` slots, with one position for all blocks.

    Layers of sliding attention keep all slots as well: the model's mask hides what has slid out, and no
    step needs the host to know how far it is.

    ``keys`` and ``values`` are ``(B, H, room, D)``, or ``None`` for a block that the trunk does not run;
    ``position``, ``(1,)`` on the block's device, is the slot that the next token goes to.
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
        """Write one token's keys and values ``(B, H, 1, D)``; returns all slots.

        The position moves when the whole step is done: blocks of the tail write to the same slot.
        """
        self.keys.index_copy_(2, self.position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.position, value_states.to(self.values.dtype))
        return self.keys, self.values


class FixedCache(Cache):
    """Fixed layers of all blocks, and the slot of the next token on every device that they are on."""

    def __init__(self, layers: Sequence[FixedLayer], places: Places) -> None:
        super().__init__(layers=list(layers))
        self._places = places

    @classmethod
    def continuing(cls, cache: Cache, room: int, position: Tensor, length: int) -> FixedCache:
        """Copy a cache that has read ``length`` tokens into ``room`` slots."""

        def slots(tensor: Tensor) -> Tensor:
            found = tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
            # A sliding layer has kept the last tokens only.
            found[:, :, length - tensor.shape[2] : length] = tensor
            return found

        return cls._copy(cache, slots, position)

    def rows(self, index: Tensor, position: Tensor) -> FixedCache:
        """A copy with some rows only."""
        return self._copy(self, lambda tensor: tensor.index_select(0, index.to(tensor.device)), position)

    @classmethod
    def _copy(cls, cache: Cache, copy: Callable[[Tensor], Tensor], position: Tensor) -> FixedCache:
        layers, places = [], Places(position)
        for layer in cache.layers:
            keys, values, place = None, None, position
            if layer.is_initialized:
                keys, values = copy(layer.keys), copy(layer.values)
                place = places.on(keys.device)
            layers.append(FixedLayer(keys, values, place, bool(getattr(layer, "is_sliding", False))))
        return cls(layers, places)

    def move(self) -> None:
        """Go on to the next slot, to which the position that the cache was made with has moved."""
        self._places.follow()

    def tensors(self) -> list[Tensor]:
        """All keys and values."""
        return [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]


class Places:
    """A position, and copies of it on other devices."""

    def __init__(self, position: Tensor) -> None:
        self._position = position
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The position on a device."""
        if device == self._position.device:
            return self._position
        if device not in self._copies:
            self._copies[device] = self._position.to(device)
        return self._copies[device]

    def follow(self) -> None:
        """Bring the copies to where the position is."""
        for copy in self._copies.values():
            copy.copy_(self._position)


def room_for(tokens: int) -> int:
    """Slots for a sequence: multiples of 64, so that batches of like length share captured graphs.

    >>> room_for(1), room_for(64), room_for(65)
    (64, 64, 128)
    """
    return -(-tokens // 64) * 64
