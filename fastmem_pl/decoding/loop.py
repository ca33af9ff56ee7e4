"""The decoding loop: one trunk pass per token, whatever is contrasted with what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastmem_pl.backbone import Backbone, Delta, TailInputs, fork
from fastmem_pl.backbone.backbone import pad
from fastmem_pl.decoding.decoders import Decoder, StepLogits

# Looking whether all rows have stopped waits for the device, so elsewhere it is done every few tokens.
_STOP_CHECK_EVERY = {"cpu": 1, "other": 8}


class Prefill:
    """The trunk's pass over a batch of prompts, from which several methods continue.

    The trunk and its KV cache are the same with and without memories, so methods share them.

    Args:
        backbone: the frozen model.
        prompts: token ids of ``B`` prompts.
        num_layers: trained layers of the memories that will be used.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[Sequence[int]], num_layers: int = 1) -> None:
        self.backbone = backbone
        self.num_layers = num_layers
        ids, self.mask = pad(prompts, backbone.pad_id, "left", backbone.device)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = positions[:, -1:] + 1
        self.cache = backbone.new_cache()
        # Filled by the blocks above the first trained FFN; empty for one trained layer.
        self.inputs = backbone.run_trunk(num_layers, ids, self.mask, positions, self.cache).last()

    def __len__(self) -> int:
        return self.mask.shape[0]

    @torch.no_grad()
    def decode(
        self, decoder: Decoder, deltas: Sequence[Delta] | None, max_new_tokens: int
    ) -> list[list[int]]:
        """Answer every prompt; leaves the prefill as it was.

        Args:
            decoder: turns logits into scores.
            deltas: one per trained layer with a row a prompt, or ``None`` for the base model.
            max_new_tokens: stop after so many.

        Returns:
            generated token ids by prompt, the end token included where one was produced.
        """
        backbone = self.backbone
        stop_ids = torch.tensor(backbone.stop_ids, device=backbone.device)
        interval = _STOP_CHECK_EVERY["cpu" if backbone.device.type == "cpu" else "other"]
        views = _Views(backbone, self.num_layers, decoder, deltas)
        inputs, mask, position = self.inputs, self.mask, self.next_position
        cache = fork(self.cache)
        stopped = torch.zeros(len(self), dtype=torch.bool, device=backbone.device)
        tokens: list[Tensor] = []
        for step in range(max_new_tokens):
            token = decoder.scores(views.logits(inputs)).argmax(-1)
            tokens.append(token)
            stopped |= torch.isin(token, stop_ids)
            if step + 1 == max_new_tokens or ((step + 1) % interval == 0 and bool(stopped.all())):
                break
            mask = torch.cat([mask, mask.new_ones(len(self), 1)], dim=1)
            inputs = backbone.run_trunk(self.num_layers, token[:, None], mask, position, cache)
            position = position + 1
        return [_until_stop(row, backbone.stop_ids) for row in torch.stack(tokens, dim=1).tolist()]


class _Views:
    """The tails that one decoder looks at: with the memory, and the base model if it contrasts."""

    def __init__(
        self, backbone: Backbone, num_layers: int, decoder: Decoder, deltas: Sequence[Delta] | None
    ) -> None:
        self.backbone = backbone
        self.tail = backbone.split(num_layers).tail
        # Products with a memory run in the compute type: cast once, not at every token.
        self.deltas = deltas and [
            {name: tensor.to(backbone.compute_dtype) for name, tensor in layer.items()} for layer in deltas
        ]
        # bfloat16 products lose small changes, so memorized logits are the base's plus the head's product
        # with the change of the hidden state, whatever the decoder; float32 needs that only to contrast.
        exact = backbone.compute_dtype is torch.float32
        self.with_base = deltas is not None and (decoder.needs_base or not exact)
        # Keys and values of blocks above a trained FFN depend on the memory: one cache a view.
        self.caches: list[Cache | None] = [None, None]
        if num_layers > 1:
            self.caches = [backbone.new_cache(), backbone.new_cache()]

    def logits(self, inputs: TailInputs) -> StepLogits:
        """Logits ``(B, V)`` at the last position of ``inputs``."""
        tail = self.tail
        with self.backbone.numerics():
            base = tail.base(inputs)
            hidden = tail.hidden(inputs, base, self.deltas, self.caches[0])[:, -1]
            if not self.with_base:
                logits = tail.finish_logits(tail.raw_logits(hidden))
                return StepLogits(logits, logits)
            base_hidden = tail.hidden(inputs, base, None, self.caches[1])[:, -1]
            base_raw, change = tail.raw_logits(torch.stack([base_hidden, hidden - base_hidden]))
            return StepLogits(tail.finish_logits(base_raw + change), tail.finish_logits(base_raw))


def _until_stop(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]
