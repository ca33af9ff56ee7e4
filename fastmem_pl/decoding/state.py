"""What one decode carries from token to token, all of it in tensors that stay where they are.

A step reads and writes these tensors and nothing else: no value comes back to the host, so a CUDA graph
can record a step and repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from fastmem_pl.backbone import Backbone, Delta, FixedCache, TailInputs, room_for
from fastmem_pl.decoding.decoders import Decoder, StepLogits
from fastmem_pl.decoding.sampling import TokenChooser

if TYPE_CHECKING:
    from fastmem_pl.decoding.loop import Prefill


class Path:
    """One sequence a row that grows token by token from a prefill, which stays as it was.

    Attributes:
        cache: keys and values of the trunk's blocks.
        mask: 1 on slots that hold a token, ``(B, room)``.
        position: slot of the next token, ``(1,)``.
        place: its position in the row's text, ``(B, 1)``.
    """

    def __init__(self, backbone: Backbone, num_layers: int, early: Sequence[int]) -> None:
        self.backbone, self.num_layers, self.early = backbone, num_layers, early

    @classmethod
    def of(cls, prefill: Prefill, max_new_tokens: int) -> Path:
        """Go on from a prefill."""
        path = cls(prefill.backbone, prefill.num_layers, prefill.trunk_layers)
        length = prefill.mask.shape[1]
        room = room_for(length + max_new_tokens)
        path.position = torch.tensor([length], device=prefill.mask.device)
        path.mask = F.pad(prefill.mask, (0, room - length))
        path.place = prefill.next_position.clone()
        path.cache = FixedCache.continuing(prefill.cache, room, path.position, length)
        return path

    def read(self, tokens: Tensor) -> TailInputs:
        """Run the trunk on one token ``(B,)`` of every row."""
        self.mask.index_fill_(1, self.position, 1)
        return self.backbone.run_trunk(
            self.num_layers, tokens[:, None], self.mask, self.place, self.cache, self.early
        )

    def move(self) -> None:
        """Go on to the next slot."""
        self.position += 1
        self.place += 1
        self.cache.move()

    def tensors(self) -> list[Tensor]:
        """All that persists."""
        return [self.mask, self.position, self.place, *self.cache.tensors()]

    def rows(self, index: Tensor) -> Path:
        """A copy with some rows only."""
        path = Path(self.backbone, self.num_layers, self.early)
        path.position = self.position.clone()
        path.mask, path.place = self.mask[index], self.place[index]
        path.cache = self.cache.rows(index, path.position)
        return path


class Views:
    """The logits that one decoder looks at: with the memory, of the base model, of premature layers.

    Args:
        backbone: the frozen model.
        num_layers: trained layers.
        decoder: that looks.
        deltas: one per trained layer with a row a prompt, or ``None`` for the base model.
    """

    def __init__(
        self, backbone: Backbone, num_layers: int, decoder: Decoder, deltas: Sequence[Delta] | None
    ) -> None:
        self.backbone = backbone
        self.tail = backbone.tail(num_layers)
        self.decoder = decoder
        # Products with a memory run in the compute type: cast once, not at every token.
        self.deltas = deltas and [
            {name: tensor.to(backbone.compute_dtype) for name, tensor in layer.items()} for layer in deltas
        ]
        # bfloat16 products lose small changes, so memorized logits are the base's plus the head's product
        # with the change of the hidden state, whatever the decoder; float32 needs that only to contrast.
        exact = backbone.compute_dtype is torch.float32
        self.with_base = deltas is not None and (decoder.needs_base or not exact)
        # Keys and values of blocks above a trained FFN depend on the memory: one cache a view.
        upper = num_layers > 1
        self.caches: list[Cache | None] = [backbone.new_cache() if upper else None for _ in range(3)]

    def fix_caches(self, paths: Sequence[Path], length: Sequence[int]) -> None:
        """Give the upper blocks' caches, which hold the prompts now, the slots of their path."""
        path_of = (0, 0, len(paths) - 1)
        for i, cache in enumerate(self.caches):
            if cache is not None:
                path = paths[path_of[i]]
                room = path.mask.shape[1]
                self.caches[i] = FixedCache.continuing(cache, room, path.position, length[path_of[i]])

    def logits(self, inputs: TailInputs, without_context: TailInputs | None = None) -> StepLogits:
        """Logits ``(B, V)`` at the last position of the inputs."""
        tail = self.tail
        with self.backbone.numerics():
            base = tail.base(inputs)
            states = [s[:, -1] for s in tail.residuals(inputs, base, self.deltas, self.caches[0])]
            hidden = tail.final_norm(states[-1])
            if self.with_base:
                base_hidden = tail.hidden(inputs, base, None, self.caches[1])[:, -1]
                base_raw, change = tail.raw_logits(torch.stack([base_hidden, hidden - base_hidden]))
                model, base_logits = tail.finish_logits(base_raw + change), tail.finish_logits(base_raw)
            else:
                model = self._through_head(hidden)
                base_logits = model if self.deltas is None else None
            other = None
            if without_context is not None:
                other_base = tail.base(without_context)
                other = self._through_head(
                    tail.hidden(without_context, other_base, None, self.caches[2])[:, -1]
                )
            return StepLogits(model, base_logits, other, self._early(inputs, states))

    def tensors(self) -> list[Tensor]:
        """All that persists: caches of upper blocks, and the memory."""
        caches = [
            tensor for cache in self.caches if isinstance(cache, FixedCache) for tensor in cache.tensors()
        ]
        return caches + [tensor for layer in self.deltas or () for tensor in layer.values()]

    def rows(self, index: Tensor, paths: Sequence[Path]) -> Views:
        """A copy with some rows only."""
        deltas = self.deltas and [
            {name: tensor.index_select(0, index) for name, tensor in layer.items()} for layer in self.deltas
        ]
        views = Views(self.backbone, len(self.tail.layers), self.decoder, deltas)
        places = (paths[0].position, paths[0].position, paths[-1].position)
        views.caches = [
            cache.rows(index, place) if isinstance(cache, FixedCache) else None
            for cache, place in zip(self.caches, places, strict=True)
        ]
        return views

    def _early(self, inputs: TailInputs, states: Sequence[Tensor]) -> Tensor | None:
        if not self.decoder.early_layers:
            return None
        first = self.tail.layers[0]
        hidden = [
            inputs.early[number][:, -1] if number <= first else states[number - first - 1]
            for number in self.decoder.early_layers
        ]
        return self._through_head(torch.stack([h.float() for h in hidden]))

    def _through_head(self, hidden: Tensor) -> Tensor:
        return self.tail.finish_logits(self.tail.raw_logits(hidden))


class DecodeState:
    """All tensors of a decode of ``B`` rows, and the step from one token to the next.

    Attributes:
        last: what the last step chose, ``(2, B)``: tokens, and what the decoder notes beside them.
    """

    def __init__(self, paths: Sequence[Path], views: Views, chooser: TokenChooser, last: Tensor) -> None:
        self.paths, self.views, self.chooser, self.last = paths, views, chooser, last

    @classmethod
    def start(
        cls, prefills: Sequence[Prefill], views: Views, chooser: TokenChooser, max_new: int
    ) -> DecodeState:
        """Choose the first token of every row and get ready for the next."""
        last = torch.zeros(2, len(prefills[0]), dtype=torch.long, device=prefills[0].mask.device)
        state = cls([], views, chooser, last)
        state._choose([prefill.inputs for prefill in prefills])
        state.paths = [prefill.path(max_new) for prefill in prefills]
        views.fix_caches(state.paths, [prefill.mask.shape[1] for prefill in prefills])
        return state

    def step(self) -> None:
        """Read the last tokens and choose the next."""
        self._choose([path.read(self.last[0]) for path in self.paths])
        for path in self.paths:
            path.move()

    def _choose(self, inputs: Sequence[TailInputs]) -> None:
        decoder = self.views.decoder
        self.last[0].copy_(self.chooser(decoder.scores(self.views.logits(*inputs))))
        if decoder.note is not None:
            self.last[1].copy_(decoder.note)
        # Processes that share a trunk must not read different tokens, should their sums ever round apart.
        self.views.backbone.agree(self.last)

    def tensors(self) -> list[Tensor]:
        """All that persists from step to step, in a fixed order."""
        parts = (*self.paths, self.views, self.chooser)
        return [self.last, *(tensor for part in parts for tensor in part.tensors())]

    def adopt(self, other: DecodeState) -> None:
        """Take over the values of a state of the same shapes; the tensors stay where they are."""
        torch._foreach_copy_(self.tensors(), other.tensors())

    def rows(self, index: Tensor) -> DecodeState:
        """A copy with some rows only."""
        paths = [path.rows(index) for path in self.paths]
        return DecodeState(
            paths, self.views.rows(index, paths), self.chooser.rows(index), self.last[:, index]
        )
