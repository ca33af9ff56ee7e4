"""What one decode carries from token to token, all of it in tensors that stay where they are.

A step reads and writes these tensors and nothing else: no value comes back to the host, so a CUDA graph
can record a step and repeat it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastmem_pl.backbone import Backbone, Delta, FixedCache, TailInputs
from fastmem_pl.decoding.decoders import Decoder, StepLogits
from fastmem_pl.decoding.prefill import Prefill, SequenceState
from fastmem_pl.decoding.sampling import TokenChooser


class Views:
    """The logits that one decoder looks at: with the memory, of the base model, of premature layers."""

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
        names = ("model", "base", "without_context") if num_layers > 1 else ()
        self.caches: dict[str, Cache] = {name: backbone.new_cache() for name in names}

    def fix_caches(self, sequences: Sequence[SequenceState]) -> None:
        """Give the upper blocks' caches, which hold the prompts now, the slots of their sequences."""
        for name, cache in self.caches.items():
            own = _sequences_of(name, sequences)
            slots = own.mask.shape[1]
            self.caches[name] = FixedCache.continuing(cache, slots, own.position, own.length)

    def logits(self, inputs: TailInputs, without_context: TailInputs | None = None) -> StepLogits:
        """Logits ``(B, V)`` at the last position of the inputs."""
        tail = self.tail
        with self.backbone.numerics():
            base = tail.base(inputs)
            states = [s[:, -1] for s in tail.residuals(inputs, base, self.deltas, self.caches.get("model"))]
            hidden = tail.final_norm(states[-1])
            if self.with_base:
                base_hidden = tail.hidden(inputs, base, None, self.caches.get("base"))[:, -1]
                base_raw, change = tail.raw_logits(torch.stack([base_hidden, hidden - base_hidden]))
                model, base_logits = tail.finish_logits(base_raw + change), tail.finish_logits(base_raw)
            else:
                model = self._through_head(hidden)
                base_logits = model if self.deltas is None else None
            other = None
            if without_context is not None:
                other_base = tail.base(without_context)
                other = self._through_head(
                    tail.hidden(without_context, other_base, None, self.caches.get("without_context"))[:, -1]
                )
            return StepLogits(model, base_logits, other, self._early(inputs, states))

    def tensors(self) -> list[Tensor]:
        """All that persists: caches of upper blocks, and the memory."""
        caches = [tensor for cache in self.caches.values() for tensor in cache.tensors()]
        return caches + [tensor for layer in self.deltas or () for tensor in layer.values()]

    def rows(self, index: Tensor, sequences: Sequence[SequenceState]) -> Views:
        """A copy with some rows only."""
        twin = copy.copy(self)
        twin.deltas = self.deltas and [
            {name: tensor.index_select(0, index) for name, tensor in layer.items()} for layer in self.deltas
        ]
        twin.caches = {
            name: cache.rows(index, _sequences_of(name, sequences).position)
            for name, cache in self.caches.items()
        }
        return twin

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


def _sequences_of(view: str, sequences: Sequence[SequenceState]) -> SequenceState:
    return sequences[-1 if view == "without_context" else 0]


class DecodeState:
    """All tensors of a decode of ``B`` rows, and the step from one token to the next.

    Attributes:
        last: what the last step chose, ``(2, B)``: tokens, and what the decoder notes beside them.
    """

    def __init__(
        self, sequences: Sequence[SequenceState], views: Views, chooser: TokenChooser, last: Tensor
    ) -> None:
        self.sequences, self.views, self.chooser, self.last = sequences, views, chooser, last

    @classmethod
    def start(
        cls, prefills: Sequence[Prefill], views: Views, chooser: TokenChooser, max_new_tokens: int
    ) -> DecodeState:
        """Choose the first token of every row and get ready for the next."""
        last = torch.zeros(2, len(prefills[0]), dtype=torch.long, device=prefills[0].mask.device)
        state = cls([], views, chooser, last)
        state._choose([prefill.inputs for prefill in prefills])
        state.sequences = [SequenceState(prefill, max_new_tokens) for prefill in prefills]
        views.fix_caches(state.sequences)
        return state

    def step(self) -> None:
        """Read the last tokens and choose the next."""
        self._choose([sequences.read(self.last[0]) for sequences in self.sequences])
        for sequences in self.sequences:
            sequences.move()

    def _choose(self, inputs: Sequence[TailInputs]) -> None:
        decoder = self.views.decoder
        self.last[0].copy_(self.chooser(decoder.scores(self.views.logits(*inputs))))
        note = decoder.note
        if note is not None:
            # Floats travel as their bits; Decoding.notes reads them.
            self.last[1].copy_(note.double().view(torch.long) if note.is_floating_point() else note)
        # Processes that share a trunk must not read different tokens, should their sums ever round apart.
        self.views.backbone.agree(self.last)

    def tensors(self) -> list[Tensor]:
        """All that persists from step to step, in a fixed order."""
        parts = (*self.sequences, self.views, self.chooser)
        return [self.last, *(tensor for part in parts for tensor in part.tensors())]

    def adopt(self, other: DecodeState) -> None:
        """Take over the values of a state of the same shapes; the tensors stay where they are."""
        torch._foreach_copy_(self.tensors(), other.tensors())

    def rows(self, index: Tensor) -> DecodeState:
        """A copy with some rows only."""
        sequences = [part.rows(index) for part in self.sequences]
        views = self.views.rows(index, sequences)
        return DecodeState(sequences, views, self.chooser.rows(index), self.last[:, index])
