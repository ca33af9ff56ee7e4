"""What one decode carries from token to token, all of it in tensors that stay where they are.

A step reads and writes these tensors and nothing else: no value comes back to the host, so a CUDA graph
can record a step and repeat it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastmem_pl.backbone import Delta, TailInputs, cache_rows, continued
from fastmem_pl.backbone.experts import cast
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding.decoders import Decoder, StepLogits
from fastmem_pl.decoding.prefill import Prefill, SequenceState

# Which of a decode's sequences a view is of.
_SEQUENCE = {"model": 0, "base": 0, "without_context": -1}


class Views:
    """The logits that one decoder looks at: with the memory, of the base model, of premature layers."""

    def __init__(self, prefill: Prefill, decoder: Decoder, deltas: Sequence[Delta] | None) -> None:
        self.backbone, self.decoder = prefill.backbone, decoder
        self.tail = self.backbone.tail(prefill.num_layers)
        dtype = self.backbone.compute_dtype
        # Products with a memory run in the compute type: cast once, not at every token.
        self.deltas = deltas and [cast(layer, dtype) for layer in deltas]
        # bfloat16 products lose small changes, so memorized logits are the base's plus the head's product
        # with the change of the hidden state, whatever the decoder; float32 needs that only to contrast.
        self._with_base = deltas is not None and (decoder.needs_base or dtype is not torch.float32)
        # Keys and values of blocks above a trained FFN depend on the memory: one cache a view.
        names = _SEQUENCE if prefill.num_layers > 1 else ()
        self.caches: dict[str, Cache] = {name: self.backbone.new_cache() for name in names}

    def logits(self, inputs: TailInputs, without_context: TailInputs | None = None) -> StepLogits:
        """Logits ``(B, V)`` at the last position of the inputs."""
        tail = self.tail
        with self.backbone.numerics():
            base = tail.base(inputs, self.deltas)
            states = tail.states(inputs, base, self.deltas, self.caches.get("model"))
            hidden = tail.to_head(states[-1], inputs)[:, -1]
            if self._with_base:
                base_hidden = tail.hidden(inputs, base, None, self.caches.get("base"))[:, -1]
                base_raw, change = tail.raw_logits(torch.stack([base_hidden, hidden - base_hidden]))
                model, base_logits = tail.finish_logits(base_raw + change), tail.finish_logits(base_raw)
            else:
                model = self._through_head(hidden)
                base_logits = model if self.deltas is None else None
            other = None
            if without_context is not None:
                cache = self.caches.get("without_context")
                hidden = tail.hidden(without_context, tail.base(without_context), None, cache)
                other = self._through_head(hidden[:, -1])
            return StepLogits(model, base_logits, other, self._early(inputs, states))

    def tensors(self) -> list[Tensor]:
        """All that persists: caches of upper blocks, and the memory."""
        caches = [tensor for cache in self.caches.values() for tensor in cache.tensors()]
        return caches + [tensor for layer in self.deltas or () for tensor in layer.values()]

    def rows(self, index: Tensor, sequences: Sequence[SequenceState], rows: int) -> Self:
        """A copy with some of its ``rows`` only."""
        twin = copy.copy(self)
        twin.deltas = self.deltas and [
            {n: t.index_select(0, index) for n, t in d.items()} for d in self.deltas
        ]
        positions = {name: sequences[_SEQUENCE[name]].position for name in self.caches}
        twin.caches = {n: cache_rows(cache, index, positions[n], rows) for n, cache in self.caches.items()}
        return twin

    def _early(self, inputs: TailInputs, states: Sequence[Tensor]) -> Tensor | None:
        if not self.decoder.early_layers:
            return None
        first = self.tail.layers[0]
        hidden = [
            (inputs.early[number] if number <= first else states[number - first - 1])[:, -1]
            for number in self.decoder.early_layers
        ]
        if hidden[0].ndim > 2:
            raise FastMemError(
                "model.decode: this decoder looks at hidden states between blocks, of which this model has "
                "several streams; allowed: another decoder"
            )
        return self._through_head(torch.stack([h.float() for h in hidden]))

    def _through_head(self, hidden: Tensor) -> Tensor:
        return self.tail.finish_logits(self.tail.raw_logits(hidden))


class DecodeState:
    """All tensors of a decode of ``B`` rows, with the first token chosen, and the step to the next."""

    def __init__(
        self,
        prefills: Sequence[Prefill],
        decoder: Decoder,
        deltas: Sequence[Delta] | None,
        chooser: Callable[[Tensor], Tensor],
    ) -> None:
        self.views, self.chooser = Views(prefills[0], decoder, deltas), chooser
        # What the last step chose: tokens, and what the decoder notes beside them.
        self.last = torch.zeros(2, len(prefills[0]), dtype=torch.long, device=prefills[0].mask.device)
        self._choose([prefill.inputs for prefill in prefills])
        self.sequences = [SequenceState(prefill, decoder.max_new_tokens) for prefill in prefills]
        # The upper blocks' caches hold the prompts now: they get the slots of their sequences.
        for name, cache in self.views.caches.items():
            own = self.sequences[_SEQUENCE[name]]
            room = own.mask.shape[1]
            self.views.caches[name] = continued(cache, room, own.position, own.length)

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

    def rows(self, index: Tensor) -> Self:
        """A copy with some rows only."""
        twin = copy.copy(self)
        twin.sequences = [part.rows(index) for part in self.sequences]
        twin.views = self.views.rows(index, twin.sequences, self.last.shape[1])
        twin.chooser, twin.last = self.chooser.rows(index), self.last[:, index]
        return twin


class TokenChooser:
    """Chooses the next token of every row: repetition penalty, then the highest score, or a draw.

    Draws come from uniform numbers made beforehand, by row from the seed and the row's key. So an answer
    does not depend on what else is in its batch, and no step waits for the host.
    """

    def __init__(self, decoder: Decoder, prefill: Prefill, keys: Sequence[int] | None) -> None:
        settings, ids = decoder.settings, prefill.ids
        self._penalty = decoder.repetition_penalty
        self._tensors = {"step": torch.zeros(1, dtype=torch.long, device=ids.device)}
        if self._penalty != 1:
            # Fill tokens of shorter prompts must not count as said: the last token stands in for them.
            said = torch.where(prefill.mask.bool(), ids, ids[:, -1:])
            vocabulary = prefill.backbone.anatomy.head.weight.shape[0]
            seen = torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device)
            self._tensors["seen"] = seen.scatter_(1, said, True)
        if settings.temperature > 0:
            seeds = [[settings.seed, key] for key in (prefill.keys if keys is None else keys)]
            draws = [np.random.default_rng(seed).random(decoder.max_new_tokens) for seed in seeds]
            self._tensors["uniform"] = torch.tensor(np.stack(draws), device=ids.device)
            self._warpers = [
                TemperatureLogitsWarper(float(settings.temperature)),
                *([TopKLogitsWarper(settings.top_k)] if settings.top_k else []),
                *([TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []),
            ]

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the next tokens ``(B,)`` for ``scores`` ``(B, V)``."""
        step, seen, uniform = (self._tensors.get(name) for name in ("step", "seen", "uniform"))
        if seen is not None:
            penalized = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(seen, penalized, scores)
        if uniform is None:
            token = scores.argmax(-1)
        else:
            for warp in self._warpers:
                # They look at no token ids.
                scores = warp(None, scores)
            token = draw(scores, uniform.index_select(1, step).squeeze(1))
            step += 1
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        return token

    def tensors(self) -> list[Tensor]:
        """All that persists."""
        return list(self._tensors.values())

    def rows(self, index: Tensor) -> Self:
        """A copy with some rows only."""
        twin = copy.copy(self)
        twin._tensors = {n: t.clone() if n == "step" else t[index] for n, t in self._tensors.items()}
        return twin


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token of each row from the softmax of ``scores`` ``(B, V)`` by its number in [0, 1).

    >>> draw(torch.tensor([[0.0, 0.0, -torch.inf]] * 3), torch.tensor([0.0, 0.49, 0.99])).tolist()
    [0, 0, 1]
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # Against the sum as it came out, so that rounding cannot lead past the last possible token.
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
