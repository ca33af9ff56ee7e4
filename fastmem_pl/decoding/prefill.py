"""The trunk's pass over prompts, which methods share, as memories leave it alone, and what grows from it."""

import copy
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fastmem_pl.backbone import Backbone, FixedCache, TailInputs, cache_rows, continued, pad, room_for
from fastmem_pl.base.phases import PhaseMeter


class Prefill:
    """The trunk's pass over a batch of prompts, from which several decodes continue.

    ``num_layers`` is that of the memories that will be used, ``early_layers`` what the decoders will look at.
    An ``earlier`` prefill of a prompt that began alike is used up: its KV cache becomes this one's.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        num_layers: int = 1,
        early_layers: Sequence[int] = (),
        earlier: Self | None = None,
    ) -> None:
        self.backbone, self.num_layers = backbone, num_layers
        # Those above the first trained block depend on the memory and come from the tail.
        self.trunk_layers = [n for n in early_layers if n <= backbone.num_blocks - num_layers]
        self.ids, self.mask = pad(prompts, backbone.pad_id, "left", backbone.device)
        self.keys = [zlib.crc32(" ".join(map(str, prompt)).encode()) for prompt in prompts]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = positions[:, -1:] + 1
        self.cache, known = self._beginning(earlier)
        # Filled by the blocks above the first trained FFN; empty for one trained layer.
        self.inputs = backbone.run_trunk(
            num_layers, self.ids[:, known:], self.mask, positions[:, known:], self.cache, self.trunk_layers
        ).last()

    def __len__(self) -> int:
        return len(self.keys)

    def expand(self, rows: int) -> Self:
        """The prefill of one prompt as that of ``rows`` equal ones, each with a memory of its own."""
        twin = copy.copy(self)
        twin.ids, twin.mask = (t.expand(rows, -1) for t in (self.ids, self.mask))
        twin.keys, twin.inputs = self.keys * rows, self.inputs.expand(rows)
        return twin

    def _beginning(self, earlier: Self | None) -> tuple[Cache, int]:
        """A KV cache, and how many tokens of the prompt it holds already."""
        # Blocks above a trained FFN need all of the prompt's hidden states, and windows slide on.
        fits = earlier is not None and earlier.cache is not None and earlier.backbone is self.backbone
        fits = fits and len(earlier) == len(self) == self.num_layers == 1
        if not (fits and all(type(layer) is DynamicLayer for layer in earlier.cache.layers)):
            return self.backbone.new_cache(), 0
        width = min(self.ids.shape[1] - 1, earlier.ids.shape[1])
        same = self.ids[0, :width] == earlier.ids[0, :width]
        known = int(same.int().cumprod(0).sum())
        cache, earlier.cache = earlier.cache, None
        if known < cache.get_seq_length():
            # A positive number has other meanings in other versions.
            cache.crop(known - cache.get_seq_length())
        return cache, known


# The last prompt's prefill by form; the next one's pass begins where the two prompts differ.
PromptCache = dict[str, Prefill]


class Prefills:
    """The prefills of a batch by form of the prompt, made when they are first needed.

    Of the forms with contexts only the last one used is kept, as their KV caches are large. The ``cache``
    holds prefills of a single earlier prompt, which are used up; ``seconds`` those of each form's pass, 0
    without a meter.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Mapping[str, Sequence[Sequence[int]]],
        num_layers: int = 1,
        early_layers: Mapping[str, Sequence[int]] | None = None,
        meter: PhaseMeter | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        self.backbone, self._prompts, self._num_layers = backbone, prompts, num_layers
        self._early_layers, self._cache = early_layers or {}, cache
        nothing = lambda *part: nullcontext({"seconds": 0.0})  # noqa: E731
        self.measure = partial(meter.measure, "decode") if meter else nothing
        self._kept: dict[str, Prefill] = {}
        self.seconds: dict[str, float] = {}

    def take(self, form: str, rows: int | None = None) -> Prefill:
        """The prefill of one form; expanded to ``rows``, if given."""
        if form not in self._kept:
            if form != "without_context":
                self._kept = {name: p for name, p in self._kept.items() if name == "without_context"}
            prompts, early = self._prompts[form], self._early_layers.get(form, ())
            earlier = None if self._cache is None else self._cache.pop(form, None)
            with self.measure("prefill", form) as timing:
                made = Prefill(self.backbone, prompts, self._num_layers, early, earlier)
                timing.update(samples=len(prompts), tokens=sum(map(len, prompts)))
            if self._cache is not None:
                self._cache[form] = made
            self._kept[form], self.seconds[form] = made, timing["seconds"]
        return self._kept[form] if rows is None else self._kept[form].expand(rows)


class SequenceState:
    """One sequence a row that grows token by token from a prefill, which stays as it was."""

    def __init__(self, prefill: Prefill, max_new_tokens: int) -> None:
        self.backbone, self.num_layers = prefill.backbone, prefill.num_layers
        self.early = prefill.trunk_layers
        self.length = prefill.mask.shape[1]
        room, rows = room_for(self.length + max_new_tokens), len(prefill.next_position)
        # Slot of the next token, (1,); which slots hold one, (B, room); its position in the text, (B, 1).
        self.position = torch.tensor([self.length], device=prefill.mask.device)
        self.mask = F.pad(prefill.mask[:rows], (0, room - self.length))
        self.place = prefill.next_position.clone()
        self.cache = continued(prefill.cache, room, self.position, self.length)
        # Of a model that keeps no cache, all tokens so far.
        self._ids = prefill.ids[:rows] if prefill.cache.get_seq_length() == 0 else None
        # A cache that grows wants a mask of its length, which the host counts.
        self._tokens = self.length
        # Trunk row of each row, (R,), where many memories answer one prompt: the trunk depends on none, so
        # rows share it until their tokens differ.
        self.branch: Tensor | None = None
        if len(prefill) > rows:
            first = self.position.new_zeros(len(prefill))
            # To see which rows agree, the host of a GPU would have to wait for each token. Blocks above a
            # trained FFN keep keys and values by row.
            tail = self.backbone.tail(self.num_layers)
            if self.backbone.device.type == "cpu" and not (tail.keeps_states or tail.replays):
                self.branch = first
            else:
                self._select(first)

    def read(self, tokens: Tensor) -> TailInputs:
        """Run the trunk on one token of every row, ``(B,)`` or ``(R,)``."""
        if self.branch is not None:
            pairs, self.branch = torch.stack([self.branch, tokens]).unique(dim=1, return_inverse=True)
            parents, tokens = pairs
            if not torch.equal(parents, torch.arange(len(self.mask))):
                self._select(parents)
        self.mask.index_fill_(1, self.position, 1)
        mask = self.mask if self.fixed else self.mask[:, : self._tokens + 1]
        ids, places, cache = tokens[:, None], self.place, self.cache
        if self._ids is not None:
            ids = self._ids = torch.cat([self._ids, ids], 1)
            places, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        inputs = self.backbone.run_trunk(self.num_layers, ids, mask, places, cache, self.early).last()
        return inputs if self.branch is None else inputs.rows(self.branch)

    def move(self) -> None:
        """Go on to the next slot."""
        self.position += 1
        self.place += 1
        self._tokens += 1
        if self.fixed:
            self.cache.move()

    @property
    def fixed(self) -> bool:
        """Whether all that persists stays where it is, so that a CUDA graph can hold a step."""
        return isinstance(self.cache, FixedCache) and self._ids is None

    def tensors(self) -> list[Tensor]:
        """All that persists, where that is fixed."""
        return [self.mask, self.position, self.place, *self.cache.tensors()]

    def rows(self, index: Tensor) -> Self:
        """A copy with some rows only."""
        twin = copy.copy(self)
        twin.position = self.position.clone()
        if self.branch is not None:
            index, twin.branch = self.branch[index].unique(return_inverse=True)
        twin._select(index)
        return twin

    def _select(self, index: Tensor) -> None:
        self.cache = cache_rows(self.cache, index, self.position, len(self.mask))
        self.mask, self.place = self.mask[index], self.place[index]
        self._ids = None if self._ids is None else self._ids[index]
