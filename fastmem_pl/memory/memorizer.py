"""Memorizing: what the trunk makes of contexts, and the Fabric loop that fits a module to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor

from fastmem_pl.backbone import Backbone, EncodedContext, TailInputs, pad, usable_bytes
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import PhaseMeter
from fastmem_pl.memory.fabric import check_fabric
from fastmem_pl.memory.loss import MemorizationBatch, prepare
from fastmem_pl.memory.memory import Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.settings import MemorizationSettings, WindowSettings

# Bound of the step-0 predictions that are kept, alone and as a share of the memory at hand; the others are
# made anew at every step, for another product with the head.
_REFERENCE_BYTES, _REFERENCE_SHARE = 2 << 30, 0.2
# Room beside the context for bos, header and end of turn.
_AROUND_CONTEXT = 32


@dataclass(frozen=True)
class ReadContexts:
    """What the trunk makes of ``B`` contexts.

    Attributes:
        inputs: of the tail, ``(B, T, D)``.
        labels: token that each position predicts, ``(B, T)``.
        label_mask: true where it counts, ``(B, T)``.
    """

    inputs: TailInputs
    labels: Tensor
    label_mask: Tensor


def context_hash(encoded: Sequence[EncodedContext]) -> str:
    """Short hash of the token ids that are memorized."""
    ids = " ".join(str(i) for part in encoded for i in part.input_ids)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


class Memorizer:
    """Turns contexts into a :class:`Memory`, driving :class:`MemorizationModule` through Fabric.

    Args:
        backbone: the frozen model.
        settings: of memorizing; keyword arguments of :class:`MemorizationSettings` do as well.
        fabric: to drive the fit with; by default one for the backbone's device.

    Attributes:
        meter: of the trunk's passes, which a profile tells from the steps; by default it measures nothing.

    Raises:
        FastMemError: when the Fabric is for another device or precision than the backbone's, or for several
            processes.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: MemorizationSettings | None = None,
        fabric: Fabric | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        if settings is not None and kwargs:
            raise FastMemError(
                f"Memorizer: give settings or keyword arguments, not both ({', '.join(kwargs)})"
            )
        self.settings = settings or MemorizationSettings(**kwargs)
        self.meter = PhaseMeter(backbone.device)
        backbone.tail(self.settings.num_layers)
        # Single-device whatever the outer program runs on: a distributed Fabric would average the
        # gradients of different samples. 32-true concerns the deltas; the tail chooses the type of its
        # products itself. Modules need no wrapping for either, and Fabric would keep every one that it
        # wrapped, with gradients and optimizer moments, in its list of callbacks.
        device = backbone.device
        if fabric is not None:
            check_fabric(fabric, backbone)
        self._fabric = fabric or Fabric(
            accelerator=device.type, strategy=SingleDeviceStrategy(device), precision="32-true"
        )

    def __call__(self, contexts: str | Sequence[str]) -> Memory:
        """Memorize one context, or ``B`` together; equal to ``B`` separate calls up to rounding.

        Raises:
            FastMemError: when there is none, or one of them is empty.
        """
        contexts = [contexts] if isinstance(contexts, str) else contexts
        if not contexts or not all(context.strip() for context in contexts):
            raise FastMemError("Memorizer: there is nothing to memorize; give texts that are not empty")
        encoded = [self.encode(context) for context in contexts]
        memory = self.fit(encoded)
        memory.texts = list(contexts)
        memory.context_hashes = [context_hash([part]) for part in encoded]
        return memory

    def memorize_document(
        self,
        texts: str | Sequence[str],
        windows: WindowSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Memory:
        """Memorize a text of any length, or several, as one memory.

        Args:
            texts: what to memorize; each text begins a window of its own.
            windows: how they are cut (:class:`~fastmem_pl.memory.document.WindowSettings`).
            progress: called with the number of updates done and of all, after each.

        Returns:
            a memory of one row. Of a text that fits one window, the same as that of a call with it.

        Raises:
            FastMemError: when there is nothing to memorize, or the policy does not fit the settings.
        """
        from fastmem_pl.memory.document import DocumentFit

        fit = DocumentFit(self, texts, windows)
        for done in fit.run():
            if progress:
                progress(done, fit.num_updates)
        return fit.memory()

    @property
    def context_limit(self) -> int:
        """Most context tokens that the settings and the model allow."""
        return min(self.settings.max_context_tokens, self.backbone.context_length - _AROUND_CONTEXT)

    def encode(self, context: str) -> EncodedContext:
        """Token ids of the memorization sequence, cut to what the settings and the model allow."""
        return self.backbone.chat.context(context, self.context_limit)

    def prepare(self, encoded: Sequence[EncodedContext]) -> MemorizationBatch:
        """Run the trunk once and compute all that stays constant over the steps."""
        read = self.read(encoded)
        with self.backbone.numerics():
            tail = self.backbone.tail(self.settings.num_layers)
            return prepare(tail, read.inputs, read.labels, read.label_mask, self.reference_budget())

    def reference_budget(self) -> float:
        """Bytes up to which step-0 predictions are kept."""
        return min(_REFERENCE_BYTES, _REFERENCE_SHARE * usable_bytes(self.backbone.device))

    def read(self, encoded: Sequence[EncodedContext]) -> ReadContexts:
        """Run the trunk on encoded contexts."""
        backbone = self.backbone
        tokens = sum(item.context_tokens for item in encoded)
        with self.meter.detail("trunk", samples=len(encoded), tokens=tokens):
            ids, mask = pad([e.input_ids for e in encoded], backbone.pad_id, "right", backbone.device)
            inputs = backbone.run_trunk(self.settings.num_layers, ids)
        # Position t predicts token t + 1; the last one predicts nothing.
        label_mask = torch.zeros_like(mask, dtype=torch.bool)
        for row, item in enumerate(encoded):
            label_mask[row, max(item.header_length, 1) - 1 : len(item.input_ids) - 1] = True
        return ReadContexts(inputs, ids.roll(-1, dims=1), label_mask)

    def fit(self, encoded: Sequence[EncodedContext]) -> Memory:
        """Memorize encoded contexts. The base weights are not touched, whatever happens."""
        with self.backbone.numerics(grad=True):
            module = MemorizationModule(self.backbone, len(encoded), self.settings)
            if self.settings.steps:
                batch = self.prepare(encoded)
                for _ in self.run(module, [batch], self.settings.steps):
                    pass
            return module.memory()

    def run(
        self, module: MemorizationModule, parts: Sequence[MemorizationBatch], steps: int
    ) -> Iterator[int]:
        """Fit a module step by step.

        Args:
            module: to fit.
            parts: batches whose losses add up to that of one step; usually one.
            steps: to take.

        Yields:
            the number of steps taken so far.
        """
        plain = module.configure_optimizers()
        optimizer = self._fabric.setup_optimizers(plain)
        for step in range(steps):
            for part in parts:
                self._fabric.backward(module.training_step(part, step))
            module.configure_gradient_clipping(plain)
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1
