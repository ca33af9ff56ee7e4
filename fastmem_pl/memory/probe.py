"""How far an approximation of a memory is from it, on the text that was memorized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem_pl.backbone import BaseActivations, Delta, EncodedContext, TailInputs
from fastmem_pl.memory.loss import predict
from fastmem_pl.memory.memorizer import Memorizer
from fastmem_pl.memory.memory import Memory

# Of windows that are run together, and of label tokens whose logits are formed together.
_TOKENS, _LABELS = 8192, 512


class ContextProbe:
    """``KL(p_memory || p_other)`` in nats a token, averaged over the label tokens of the memorized text.

    Args:
        memorizer: of the model, with the number of trained layers of the memory.
        memory: of one row.
        encoded: the windows that it was made from.
    """

    def __init__(self, memorizer: Memorizer, memory: Memory, encoded: Sequence[EncodedContext]) -> None:
        self._backbone = memorizer.backbone
        self._tail = self._backbone.tail(memory.num_layers)
        self._groups: list[tuple[TailInputs, BaseActivations, Tensor]] = []
        count = max(1, _TOKENS // max(len(part.input_ids) for part in encoded))
        labels = []
        with self._backbone.numerics():
            for start in range(0, len(encoded), count):
                read = memorizer.read(encoded[start : start + count])
                inputs, mask = read.inputs, read.label_mask
                labels.append(read.labels[mask])
                if memory.num_layers == 1:
                    # Without attention above the trunk, all positions are those of one row.
                    inputs = TailInputs(inputs.residual[mask][None], inputs.ffn_input[mask][None])
                    mask = mask.new_ones(inputs.residual.shape[:2])
                self._groups.append((inputs, self._tail.base(inputs), mask))
            self._labels = torch.cat(labels)
            self._exact = self._hidden(memory.deltas)

    @torch.no_grad()
    def kl(self, deltas: Sequence[Delta] | None) -> float:
        """Distance of other deltas, ``(1, out, in)`` each; ``None`` for that of the base model."""
        tail, total = self._tail, 0.0
        with self._backbone.numerics():
            changes = self._hidden(deltas) - self._exact
            for start in range(0, len(changes), _LABELS):
                place = slice(start, start + _LABELS)
                hidden = self._exact[place]
                ones = hidden.new_ones(len(hidden))
                out = tail.head_weight.new_empty(len(hidden), tail.head_weight.shape[0])
                reference = predict(tail, hidden, self._labels[place])
                _, kl = reference.loss(tail, changes[place], ones, ones, out)
                total += kl.sum().item()
        # Rounding may leave a tiny negative sum where nothing differs.
        return max(total, 0.0) / len(changes)

    def _hidden(self, deltas: Sequence[Delta] | None) -> Tensor:
        """The head's input at all label tokens, ``(N, D)``."""
        parts = []
        backbone = self._backbone
        # Cast once: a copy for every row would be made of what is cast after it is expanded.
        cast = deltas and [
            {n: t.to(backbone.device, backbone.compute_dtype) for n, t in layer.items()} for layer in deltas
        ]
        for inputs, base, mask in self._groups:
            rows = len(mask)
            served = cast and [{n: t.expand(rows, -1, -1) for n, t in layer.items()} for layer in cast]
            parts.append(self._tail.hidden(inputs, base, served)[mask])
        return torch.cat(parts)
